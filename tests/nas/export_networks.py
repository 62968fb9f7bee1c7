"""Networks the export tests share, and the quick way there and back: generate the source, run it here, compare."""

from __future__ import annotations

import ast
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.export.plain import plain_copy
from nas.export.source import Source, generate
from nas.export.verify import difference, random_inputs, run_model


class InvertedBottleneck(nn.Module):
    """Depthwise, grouped and non-square convolutions, an in-place activation, a side path and an in-place sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.Hardswish(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 1, groups=2)
        self.drop = nn.Dropout2d(0.1)
        self.body = nn.Sequential(nn.Conv2d(channels, channels, (1, 3), padding=(0, 1)), nn.ReLU6(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.drop(self.conv2(y)) + self.body(x)
        y += x
        return y


class Everything(nn.Module):
    """A small CNN with most of what users write: awkward names, shared layers, own parameters, sizes, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.layers = nn.ModuleList([InvertedBottleneck(8), InvertedBottleneck(8)])
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)
        self.scale = nn.Parameter(torch.full((64,), 1.5))
        self.register_buffer("shift", torch.randn(64))
        self.add_module("class", nn.Linear(10, 10))
        self.type_ = nn.Linear(10, 10)
        self.unused = nn.Linear(5, 7)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        x = self.stem(x)
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        x = torch.cat(found, 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).sum(1)
        if x.shape[1] == 8 and mask is None:
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        x = self.pool(x).reshape(x.size(0), -1)
        x = F.pad(x, (0, 32))
        x = self.norm(x) * self.scale / math.sqrt(c) + self.shift
        logits = getattr(self, "class")(self.head(x))
        twice = self.type_(F.gelu(self.type_(logits)))
        twice[:, 0] = 0.5
        return {"logits": logits, "others": (twice, -x[:, None, ..., 1:3])}


def randomised(model: nn.Module) -> nn.Module:
    """Give batch norm layers statistics of their own, and return the model in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def run_here(model: nn.Module, *examples: Tensor) -> tuple[Source, nn.Module]:
    """Generate a model's source, run it in this process and assert that it computes the same; returns source and network."""
    model.eval()
    plain, sparse = plain_copy(model)
    source = generate(plain, sparse, examples, "a network")
    space: dict[str, Any] = {"__name__": "network", "__file__": "network.py"}
    exec(compile(source.text, "network.py", "exec"), space)
    network = space["Network"]().eval()
    missing, unexpected = network.load_state_dict({k: v.clone() for k, v in source.state.items()}, strict=False)
    assert not unexpected
    tied = {line.split("#")[0] for line in source.text.splitlines() if "# one tensor, two names" in line}
    assert len(missing) <= len(tied), missing
    batches = random_inputs(examples)
    gap = difference(run_model(model, batches), run_model(network, batches))
    assert gap.largest_relative <= 1e-6, source.text
    assert imports_of(source.text) <= {"torch", "safetensors", "math", "pathlib"}
    return source, network


def imports_of(text: str) -> set[str]:
    """Top-level names of everything a source text imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def forward_of(text: str) -> str:
    """The body of the forward method, dedented, blank lines and comments removed."""
    body = text.split("    def forward(")[1].split("\n\n\ndef ")[0].splitlines()[1:]
    return "\n".join(
        line.removeprefix("        ") for line in body if line.strip() and not line.strip().startswith("#")
    )
