"""What is known of a network without training it: `evaluate`, and the share of its weights that it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nas.data import Split
from ops.layers import SparseConv2d, SparseLinear


@dataclass(frozen=True)
class Evaluation:
    """Of a network on one part of a data set: accuracy in 0..1, mean cross-entropy in nats."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, *, device: str | torch.device = "cpu", batch_size: int = 1024
) -> Evaluation:
    """Accuracy and loss of a network in float32. Its training mode is left as it was; it is moved to `device`."""
    was_training = model.training
    device = torch.device(device)
    model.to(device).eval()
    hits, losses = [], []
    for x, y in zip(split.x.split(batch_size), split.y.split(batch_size)):
        x, y = x.to(device), y.to(device)
        logits = model(x)
        hits.append((logits.argmax(1) == y).sum())
        losses.append(F.cross_entropy(logits, y, reduction="sum"))
    model.train(was_training)
    rows = len(split)
    return Evaluation(int(torch.stack(hits).sum()) / rows, float(torch.stack(losses).double().sum()) / rows)


def kept_share(model: nn.Module) -> float:
    """Kept / all weights of the conv and linear layers, by the masks; 1.0 if there are none."""
    kept = total = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel()
            kept += module.nnz if isinstance(module, SparseConv2d | SparseLinear) else module.weight.numel()
    return kept / total if total else 1.0
