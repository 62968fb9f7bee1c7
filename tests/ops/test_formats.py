"""CSR: the mask decides what is stored, nothing is lost, and broken arrays are told from good ones."""

import dataclasses

import numpy as np
import pytest
import torch

from ops.formats import CSR, FormatError


def _random(rows: int, cols: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + cols)
    return torch.randn(rows, cols, generator=generator), torch.rand(rows, cols, generator=generator) < density


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 8), (16, 27)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_to_dense_gives_back_the_masked_weight(shape: tuple[int, int], density: float) -> None:
    weight, mask = _random(*shape, density)
    packed = CSR.from_dense(weight, mask)
    packed.check()
    assert torch.equal(packed.to_dense(), weight * mask)
    assert torch.equal(packed.mask(), mask)
    assert packed.nnz == int(mask.sum())
    assert packed.nbytes == 8 * packed.nnz + 4 * (shape[0] + 1)


def test_a_kept_zero_is_stored() -> None:
    packed = CSR.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([[True, False], [False, True]]))
    assert packed.nnz == 2
    assert packed.values.tolist() == [0.0, 0.0]
    assert packed.indices.tolist() == [0, 1]


def test_without_a_mask_everything_but_zero_is_stored() -> None:
    packed = CSR.from_dense(torch.tensor([[0.0, 2.0], [float("nan"), 0.0]]))
    assert packed.indptr.tolist() == [0, 1, 2]
    assert packed.indices.tolist() == [1, 0]


def test_strided_weights_of_other_types_are_packed_as_contiguous_float32() -> None:
    weight = torch.arange(12, dtype=torch.float64).reshape(3, 4).t()
    packed = CSR.from_dense(weight)
    packed.check()
    assert torch.equal(packed.to_dense(), weight.float())


@pytest.mark.parametrize(
    ("weight", "mask", "part"),
    [
        (torch.ones(2, 2, 1, 1), None, r"flatten\(1\)"),
        (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool), r"\[2, 3\]"),
        (torch.ones(2, 2), torch.ones(2, 2), "float32"),
    ],
)
def test_from_dense_refuses_what_is_no_matrix_or_no_mask(weight: torch.Tensor, mask: torch.Tensor, part: str) -> None:
    with pytest.raises(FormatError, match=part):
        CSR.from_dense(weight, mask)


@pytest.mark.parametrize(
    "change",
    [
        {"indptr": np.array([0, 2], np.int32)},
        {"indptr": np.array([0, 2, 1, 3], np.int32)},
        {"indptr": np.array([0, 1, 2, 3], np.int64)},
        {"indices": np.array([1, 0, 2], np.int32)},
        {"indices": np.array([0, 0, 2], np.int32)},
        {"indices": np.array([0, 1, 3], np.int32)},
        {"indices": np.array([-1, 1, 2], np.int32)},
        {"values": np.ones(2, np.float32)},
        {"values": np.ones(6, np.float32)[::2]},
    ],
)
def test_check_refuses_arrays_that_are_not_canonical(change: dict[str, np.ndarray]) -> None:
    good = CSR((3, 3), np.array([0, 2, 2, 3], np.int32), np.array([0, 1, 2], np.int32), np.ones(3, np.float32))
    good.check()
    with pytest.raises(FormatError):
        dataclasses.replace(good, **change).check()  # type: ignore[arg-type]
