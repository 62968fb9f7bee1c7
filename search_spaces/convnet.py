"""`convnet`: a chain of convolution blocks in stages; width, depth, block, kernel, density and pattern chosen per stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ops.blocks import BLOCKS, conv_norm
from search_spaces.architecture import SpaceError
from search_spaces.chooser import Chooser, Placeholder, fitting_patterns, sparsity_offers, weights_of
from search_spaces.space import Space

WIDTHS = (16, 32, 64)
DEPTHS = (1, 2, 3)
KERNELS = (3, 5)
DENSITIES = (1.0, 0.5, 0.25, 0.1)
PATTERNS = ("unstructured", "4x1", "2:4")


def convnet(
    c: Chooser,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    stages: int = 3,
    stem: int = 16,
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    kernels: Sequence[int] = KERNELS,
    blocks: Sequence[str] = tuple(BLOCKS),
    densities: Sequence[float] = DENSITIES,
    patterns: Sequence[str] = PATTERNS,
    depthwise: bool = False,
) -> nn.Module:
    """A stem, `stages` stages that halve the image (but the first), global average pooling and a classifier.

    Stem and classifier stay dense; so do depthwise convolutions unless `depthwise`.

    Args:
        c: takes the decisions.
        input_shape: (channels, height, width) of one image.
        classes: outputs.
        stages: number of stages; stage i > 0 starts with stride 2.
        stem: channels after the first convolution.
        widths, depths, kernels, blocks: offered per stage; `blocks` are names in `ops.blocks.BLOCKS`.
        densities, patterns: offered per stage, where legal on all its layers.
        depthwise: make depthwise convolutions sparse too.
    """
    candidates = {name: BLOCKS[name] for name in blocks}
    network: list[nn.Module] = [c.build(lambda: conv_norm(input_shape[0], stem, 3))]
    channels = stem
    for i in range(stages):
        width = c.choice(f"stage{i}.width", tuple(widths))
        kernel = c.choice(f"stage{i}.kernel", tuple(kernels))
        stage = nn.Sequential()
        for j in range(c.choice(f"stage{i}.depth", tuple(depths))):
            stride = 2 if i > 0 and j == 0 else 1
            stage.append(
                c.op(
                    f"stage{i}.block",
                    candidates,
                    in_channels=channels,
                    out_channels=width,
                    kernel=kernel,
                    stride=stride,
                )
            )
            channels = width
        network.append(c.sparse(f"stage{i}", stage, densities, patterns, depthwise=depthwise))
    network += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), c.build(lambda: nn.Linear(channels, classes))]
    return nn.Sequential(*network)


def convnet_space(**options: Any) -> Space:
    """The `convnet` space with its options checked (see `convnet`)."""
    shape = tuple(options.get("input_shape", (3, 32, 32)))
    if len(shape) != 3:
        raise SpaceError(
            f"convnet: expected images of shape (channels, height, width), got {shape}; for flat data use the mlp space"
        )
    for name in options.get("blocks", ()):
        if name not in BLOCKS:
            raise SpaceError(f'convnet: unknown block "{name}"; known: {", ".join(sorted(BLOCKS))}')
    for name in ("widths", "depths", "kernels", "blocks"):
        if not options.get(name, (1,)):
            raise SpaceError(f"convnet: expected at least one of {name}, got none")
    for kernel in options.get("kernels", ()):
        if kernel % 2 == 0:
            raise SpaceError(f"convnet: expected odd kernels, got {kernel}")
    if not options.get("stages", 3) >= 1:
        raise SpaceError(f"convnet: expected stages >= 1, got {options['stages']}")
    return Space(convnet, "convnet", fitting_patterns(options, PATTERNS), size=_size)


def _size(options: Mapping[str, Any]) -> int:
    """Paths counted stage by stage: `paths[w]` is the number of ways to have reached a stage end of w channels."""
    get = options.get
    depthwise = get("depthwise", False)
    paths = {get("stem", 16): 1}
    for i in range(get("stages", 3)):
        reached = dict.fromkeys(get("widths", WIDTHS), 0)
        for channels, ways in paths.items():
            for width in reached:
                for name in get("blocks", tuple(BLOCKS)):
                    for kernel in get("kernels", KERNELS):
                        for depth in get("depths", DEPTHS):
                            stage = [(channels, 2 if i > 0 else 1)] + [(width, 1)] * (depth - 1)
                            reached[width] += ways * _offered(name, stage, width, kernel, depthwise, options)
        paths = reached
    return sum(paths.values())


def _offered(
    name: str, stage: list[tuple[int, int]], width: int, kernel: int, depthwise: bool, options: Mapping[str, Any]
) -> int:
    layers = [
        w
        for channels, stride in stage
        for w in weights_of(
            Placeholder(
                BLOCKS[name], {"in_channels": channels, "out_channels": width, "kernel": kernel, "stride": stride}
            )
        )
        if depthwise or not w.depthwise
    ]
    offers = sparsity_offers("", layers, options.get("densities", DENSITIES), options.get("patterns", PATTERNS))
    return sum(max(1, len(fits)) for fits in offers.values())
