"""Candidate operations: shapes, exact weight counts, the two tricky ones against plain loops; drop-path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ops.candidates import (
    DARTS_PRIMITIVES,
    NASBENCH201_PRIMITIVES,
    NASNET_OPERATIONS,
    NASNET_PRIMITIVES,
    OPERATIONS,
    FactorizedReduce,
    Zero,
    candidates,
)
from ops.droppath import DropPath, set_progress


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sep_conv_3x3", 3384),
        ("sep_conv_5x5", 4536),
        ("sep_conv_7x7", 6264),
        ("dil_conv_3x3", 1692),
        ("dil_conv_5x5", 2268),
        ("conv_7x1_1x7", 2 * 7 * 36 * 36 + 72),
        ("conv_3x1_1x3", 2 * 3 * 36 * 36 + 72),
        ("conv_1x1", 36 * 36 + 72),
        ("nor_conv_3x3", 9 * 36 * 36 + 72),
        ("avg_pool_3x3", 0),
        ("max_pool_7x7", 0),
        ("skip_connect", 0),
        ("none", 0),
    ],
)
def test_operations_on_36_channels_have_the_published_weights(name: str, expected: int) -> None:
    assert params(OPERATIONS[name](36, 36)) == expected
    assert params(OPERATIONS[name](36, 36, affine=False)) == expected - 2 * 36 * sum(
        isinstance(m, nn.BatchNorm2d) for m in OPERATIONS[name](36, 36).modules()
    )


def test_a_strided_identity_is_two_half_convolutions_in_darts_and_one_in_nasnet() -> None:
    assert params(OPERATIONS["skip_connect"](36, 36, 2)) == 1368
    assert params(NASNET_OPERATIONS["skip_connect"](36, 36, 2)) == 36 * 36 + 72
    assert isinstance(OPERATIONS["skip_connect"](36, 36, 2), FactorizedReduce)


@pytest.mark.parametrize("operations", [OPERATIONS, NASNET_OPERATIONS], ids=["darts", "nasnet"])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (7, 4), (1, 1)])
def test_operations_keep_or_halve_the_image_and_leave_their_input_alone(
    operations: dict, name: str, size: tuple[int, int]
) -> None:
    x = torch.randn(2, 6, *size)
    for stride in (1, 2):
        for out in (6, 4):
            if name == "none" and out != 6:
                with pytest.raises(ValueError, match="keeps the number of channels, got 6 in and 4 out"):
                    operations[name](6, out, stride)
                continue
            op = operations[name](6, out, stride, odd=bool(size[0] % 2 or size[1] % 2)).eval()
            given = x.clone()
            y = op(given)
            assert y.shape == (2, out, -(-size[0] // stride), -(-size[1] // stride))
            assert torch.equal(given, x)
            assert torch.equal(torch.fx.symbolic_trace(op)(x), y)


def test_separable_convolutions_with_other_channels_change_them_first() -> None:
    assert params(OPERATIONS["sep_conv_3x3"](96, 32)) == 96 * 9 + 96 * 32 + 64 + 32 * 9 + 32 * 32 + 64


@pytest.mark.parametrize("size", [(6, 6), (5, 5), (5, 4), (1, 1)])
@pytest.mark.parametrize("relu", [True, False])
def test_factorized_reduce_equals_plain_loops(size: tuple[int, int], relu: bool) -> None:
    height, width = size
    reduce = FactorizedReduce(3, 5, relu=relu, odd=bool(height % 2 or width % 2)).eval()
    x = torch.randn(2, 3, height, width)
    seen = x.clamp(min=0) if relu else x
    halves = [conv.weight[:, :, 0, 0] for conv in (reduce.conv0, reduce.conv1)]
    assert [h.shape[0] for h in halves] == [2, 3]
    expected = torch.zeros(2, 5, (height + 1) // 2, (width + 1) // 2)
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            expected[:, :2, i, j] = seen[:, :, 2 * i, 2 * j] @ halves[0].T
            if 2 * i + 1 < height and 2 * j + 1 < width:  # beyond the border there are zeros
                expected[:, 2:, i, j] = seen[:, :, 2 * i + 1, 2 * j + 1] @ halves[1].T
    torch.testing.assert_close(reduce(x), reduce.norm(expected))


def test_average_pooling_leaves_padding_out() -> None:
    assert torch.equal(OPERATIONS["avg_pool_3x3"](2, 2)(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4, 4))


def test_none_is_zero_even_for_nan() -> None:
    x = torch.full((1, 2, 3, 3), float("nan"))
    assert torch.equal(Zero(2, 2, 2)(x), torch.zeros(1, 2, 2, 2))


def test_dilated_convolutions_read_every_second_pixel() -> None:
    op = OPERATIONS["dil_conv_3x3"](1, 1).eval()
    x = torch.zeros(1, 1, 9, 9, requires_grad=True)
    op.depthwise(x)[0, 0, 4, 4].backward()
    assert x.grad is not None
    assert {tuple(i) for i in x.grad[0, 0].nonzero().tolist()} == {(r, c) for r in (2, 4, 6) for c in (2, 4, 6)}


def test_vocabularies_have_the_sizes_of_their_papers() -> None:
    assert [len(v) for v in (DARTS_PRIMITIVES, NASNET_PRIMITIVES, NASBENCH201_PRIMITIVES)] == [7, 13, 5]
    assert list(candidates(DARTS_PRIMITIVES)) == list(DARTS_PRIMITIVES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sep_conv_3x4"], 'unknown operation "sep_conv_3x4"; did you mean "sep_conv_3x3"'),
        (["conv_1x1", "conv_1x1"], "named twice"),
        ([], "at least one operation"),
    ],
)
def test_wrong_operation_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(names)


def test_drop_path_drops_whole_samples_and_scales_the_others() -> None:
    drop = DropPath(0.4)
    x = torch.randn(4000, 2, 3, 3) + 5
    assert drop(x) is x  # no progress yet
    set_progress(nn.Sequential(drop), 0.5)
    y = drop(x)
    dropped = (y == 0).flatten(1).all(1)
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.8)
    assert abs(dropped.double().mean().item() - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    drop.eval()
    assert drop(x) is x


def test_progress_is_clipped_at_one_and_refused_below_zero() -> None:
    drop = DropPath(0.4)
    set_progress(drop, 3.0)
    assert drop.progress == 1.0
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="fraction of training"):
            set_progress(drop, wrong)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            DropPath(wrong)
