"""The expected latency of a supernet, differentiable in the probabilities of its candidates and in their densities.

Latency is additive over the mixed operations of a network (`hw_models.latency_grid`), so that its expectation over all
architectures is the sum of the expectations, which one pass over the grids gives:

    E[ms] = constant_ms + sum over mixed operations l, candidates c:  p_l(c) * ms_l(c, density)

Start with `expected_latency`; `ExpectedLatency` is the same with the tables put on the device once, for use in every step of
training. `hw_models.relaxation` makes probabilities of architecture parameters, and adds latency to a training loss.

Source: ProxylessNAS, Cai et al. 2019 (arXiv:1812.00332), section 3.3.1; FBNet, Wu et al. 2019 (arXiv:1812.03443), section 3.
Densities are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hw_models.latency_grid import LatencyGrid
from hw_models.relaxation import choice_probabilities, fbnet_loss, proxyless_loss

__all__ = ["ExpectedLatency", "choice_probabilities", "expected_latency", "fbnet_loss", "proxyless_loss"]


def expected_latency(
    grids: LatencyGrid | Sequence[LatencyGrid] | Mapping[str, LatencyGrid],
    probabilities: Any = None,
    densities: Any = None,
    *,
    alphas: Any = None,
    constant_ms: float = 0.0,
) -> Tensor:
    """The mean latency of the architectures a supernet stands for; see `ExpectedLatency.forward`.

    Args:
        grids: of the mixed operations: one, several in order, or by name.
        probabilities: of the candidates.
        densities: of the candidates; default dense.
        alphas: instead of probabilities: architecture parameters of the same shape; their softmax over the entries of each mixed
            operation is used.
        constant_ms: the latency of everything that is not searched.

    Returns:
        Scalar tensor, ms, on the device of the probabilities.

    Raises:
        ValueError: neither or both of probabilities and alphas; shapes that do not fit.

    Example:
        >>> grid = LatencyGrid.from_arrays(["skip", "conv"], [0.1, 0.5], [[math.nan] * 2, [1.0, 3.0]], [0.0, 4.0])
        >>> expected_latency(grid, [0.5, 0.5], 0.3).item()
        1.0
    """
    if (probabilities is None) == (alphas is None):
        raise ValueError("expected_latency needs either probabilities or alphas, got both or neither")
    tensors = [v for v in _flat([probabilities, alphas, densities]) if isinstance(v, Tensor)]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    model = ExpectedLatency(grids, constant_ms, torch.float64 if double else None)
    model = model.to(tensors[0].device if tensors else None)
    if alphas is not None:
        parameters = [_tensor(entry, model.values) for entry in model.entries(alphas, "alphas")]
        soft = [choice_probabilities(entry, dim=tuple(range(entry.ndim))) for entry in parameters]
        probabilities = soft[0] if model.single else dict(zip(model.names, soft)) if model.names else soft
    result: Tensor = model(probabilities, densities)
    return result


class ExpectedLatency(nn.Module):
    """The tables of a supernet's mixed operations as buffers; calling it gives the expected latency.

    Args:
        grids: of the mixed operations: one, several in order, or by name.
        constant_ms: the latency of everything that is not searched.
        dtype: of the tables. Default: torch's default.

    Raises:
        ValueError: no grids.
    """

    knots: Tensor  # [G, K]: densities where lines meet, from 0 to 1, padded with 1
    values: Tensor  # [G, C, K]: ms there, padded with 0
    slopes: Tensor  # [G, C, K - 1]: ms per unit of density from each knot on
    segments: Tensor  # int64[G, 1]: index of the last segment that is not padding
    floor: Tensor  # [G, C]
    cap: Tensor  # [G, C]: dense time where a masked layer may run dense, else inf
    dense: Tensor  # [G, C]: dense time, inf where it is not known

    def __init__(
        self,
        grids: LatencyGrid | Sequence[LatencyGrid] | Mapping[str, LatencyGrid],
        constant_ms: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.single = isinstance(grids, LatencyGrid)
        self.names = tuple(grids) if isinstance(grids, Mapping) else None
        if isinstance(grids, LatencyGrid):
            self.grids: tuple[LatencyGrid, ...] = (grids,)
        else:
            self.grids = tuple(grids.values() if isinstance(grids, Mapping) else grids)
        if not self.grids:
            raise ValueError("ExpectedLatency needs at least one grid, got none")
        self.constant_ms = float(constant_ms)
        for name, table in _tables(self.grids).items():
            kind = torch.int64 if name == "segments" else dtype or torch.get_default_dtype()
            self.register_buffer(name, torch.as_tensor(table, dtype=kind), persistent=False)

    def forward(self, probabilities: Any, densities: Any = None) -> Tensor:
        """The expected latency.

        Args:
            probabilities: of the candidates of each mixed operation: float[C]; or float[C, K], of candidates and K densities
                together. For one grid that tensor; for grids in order a sequence of such, or one tensor [G, C] or [G, C, K]; for
                grids by name a mapping. They are used as they are: gates that do not sum to 1 give the sum of what they let
                through.
            densities: kept fractions in (0, 1], tensors if they are to be learned; 1 is dense. For each mixed operation something
                that broadcasts against its probabilities: a scalar, [C], or, beside [C, K], [K] or [C, K]; for several grids one
                such entry for each, or one scalar for all. Default: everything dense.

        Returns:
            Scalar tensor, ms. Its gradient with respect to a density is the slope of the line that the density is on, at a knot
            of the one to its right. It is zero at density 1 and above the crossover (`LatencyGrid.crossover`), where the dense
            kernel is faster: start learned densities below it.

        Raises:
            ValueError: shapes or names that do not fit; no densities given where a candidate was never priced dense.
        """
        return self.constant_ms + self.per_operation(probabilities, densities).sum()

    def per_operation(self, probabilities: Any, densities: Any = None) -> Tensor:
        """The same for each mixed operation, without the constant part: float[G] ms."""
        p, shapes = self._probabilities(probabilities)
        ms = self._dense(p.ndim) if densities is None else self._at(self._densities(densities, shapes, p))
        return (p * ms).flatten(1).sum(1)

    def entries(self, given: Any, what: str) -> list[Any]:
        """What was given for each mixed operation, in the order of the grids.

        Raises:
            ValueError: not one entry for each, or other names.
        """
        if self.single:
            return [given]
        if self.names is not None:
            if not isinstance(given, Mapping) or set(given) != set(self.names):
                found = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
                raise ValueError(
                    f"{what}: the grids have names, so expected a mapping of {', '.join(self.names)}, got {found}"
                )
            return [given[name] for name in self.names]
        if isinstance(given, Mapping) or not hasattr(given, "__len__") or len(given) != len(self.grids):
            found = f"{len(given)}" if hasattr(given, "__len__") else type(given).__name__
            raise ValueError(f"{what}: expected one entry for each of {len(self.grids)} mixed operations, got {found}")
        return list(given)

    def _where(self, index: int) -> str:
        if self.single:
            return "the mixed operation"
        return f'mixed operation "{self.names[index]}"' if self.names else f"mixed operation {index}"

    def _whole(self, given: Tensor) -> bool:
        """Whether it is one tensor for all mixed operations that needs no padding: taken as it is, without a loop over them."""
        even = all(len(grid.candidates) == self.values.shape[1] for grid in self.grids)
        return not self.single and even and given.ndim in (2, 3) and given.shape[:2] == self.values.shape[:2]

    def _probabilities(self, given: Any) -> tuple[Tensor, list[torch.Size]]:
        """float[G, C] or [G, C, K], padded with zeros, and the shape of each before padding."""
        if isinstance(given, Tensor) and self._whole(given):
            return given, [given.shape[1:]] * len(self.grids)
        tensors = [_tensor(entry, self.values) for entry in self.entries(given, "probabilities")]
        for i, (tensor, grid) in enumerate(zip(tensors, self.grids)):
            if tensor.ndim not in (1, 2) or tensor.shape[0] != len(grid.candidates):
                count = len(grid.candidates)
                raise ValueError(
                    f"probabilities of {self._where(i)}: expected shape [{count}] or [{count}, K] for its candidates "
                    f"{', '.join(grid.candidates)}, got {list(tensor.shape)}"
                )
        if len({tensor.ndim for tensor in tensors}) > 1:
            raise ValueError("probabilities must be [C] for all mixed operations or [C, K] for all, got both")
        shapes = [tensor.shape for tensor in tensors]
        return _stacked(tensors, self.values.shape[1], 0.0), shapes

    def _densities(self, given: Any, shapes: list[torch.Size], p: Tensor) -> Tensor:
        """float of the shape of p, padded with ones."""
        if isinstance(given, Tensor) and given.shape == p.shape and self._whole(given):
            return given
        for value in _flat(given):
            if not isinstance(value, Tensor) and not 0 < value <= 1:
                raise ValueError(f"densities are kept fractions in (0, 1], got {value:g}")
        scalar = given.ndim == 0 if isinstance(given, Tensor) else isinstance(given, int | float)
        entries = [given] * len(shapes) if scalar else self.entries(given, "densities")
        tensors = []
        for i, (entry, shape) in enumerate(zip(entries, shapes)):
            tensor = _tensor(entry, self.values)
            try:
                tensors.append(tensor.expand(shape))
            except RuntimeError:
                raise ValueError(
                    f"densities of {self._where(i)}: expected a shape that broadcasts against its probabilities "
                    f"{list(shape)}, got {list(tensor.shape)}"
                ) from None
        return _stacked(tensors, p.shape[1], 1.0)

    def _dense(self, ndim: int) -> Tensor:
        for i, grid in enumerate(self.grids):
            if np.isnan(grid.dense_ms).any():
                missing = [c for c, ms in zip(grid.candidates, grid.dense_ms) if math.isnan(ms)]
                raise ValueError(
                    f"{self._where(i)}: {', '.join(missing)} was priced at densities "
                    f"{', '.join(f'{d:g}' for d in grid.densities)} but never dense; pass densities"
                )
        return self.dense if ndim == 2 else self.dense.unsqueeze(-1)

    def _at(self, density: Tensor) -> Tensor:
        """ms of each candidate at its density; float[G, C] or [G, C, K] in and out."""
        d = density if density.ndim == 3 else density.unsqueeze(-1)
        flat = d.detach().flatten(1).to(self.knots.dtype).contiguous()
        segment = torch.searchsorted(self.knots, flat, right=True) - 1
        segment = torch.minimum(segment.clamp(min=0), self.segments)
        left = self.knots.gather(1, segment).view(d.shape)
        segment = segment.view(d.shape)
        line = self.values.gather(2, segment) + (d - left) * self.slopes.gather(2, segment)
        floor, cap, dense = (table.unsqueeze(-1) for table in (self.floor, self.cap, self.dense))
        # torch.where instead of minimum, which would share the gradient of equal values between the two
        ms = torch.where(line > floor, line, floor)
        ms = torch.where(ms < cap, ms, cap)
        ms = torch.where((d >= 1) & dense.isfinite(), dense, ms)
        # not a number stays one, also where it was compared
        ms = torch.where(d.isnan(), d, ms)
        return ms.reshape(density.shape)


def _tables(grids: Sequence[LatencyGrid]) -> dict[str, np.ndarray]:
    """The buffers of `ExpectedLatency`, stacked and padded."""
    lines = [grid.lines() for grid in grids]
    g, c = len(grids), max(len(grid.candidates) for grid in grids)
    k = max(knots.size for knots, _ in lines)
    knots, values, slopes = np.ones((g, k)), np.zeros((g, c, k)), np.zeros((g, c, k - 1))
    floor, cap, dense = np.zeros((g, c)), np.full((g, c), np.inf), np.zeros((g, c))
    segments = np.empty((g, 1))
    for i, (grid, (x, y)) in enumerate(zip(grids, lines)):
        n, m = y.shape
        knots[i, :m] = x
        values[i, :n, :m] = y
        slopes[i, :n, : m - 1] = np.diff(y) / np.diff(x)
        segments[i] = m - 2
        known = ~np.isnan(grid.dense_ms)
        sparse = ~np.isnan(grid.ms).all(axis=1)
        floor[i, :n] = np.where(sparse, grid.floor_ms, 0.0)
        dense[i, :n] = np.where(known, grid.dense_ms, np.inf)
        cap[i, :n] = np.where(known & grid.dense_allowed, grid.dense_ms, np.inf)
    return {
        "knots": knots,
        "values": values,
        "slopes": slopes,
        "segments": segments,
        "floor": floor,
        "cap": cap,
        "dense": dense,
    }


def _tensor(value: Any, like: Tensor | None = None) -> Tensor:
    """A tensor of that value; nested sequences may hold scalar tensors, whose gradient is kept."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Sequence) and any(isinstance(v, Tensor) for v in _flat(value)):
        return torch.stack([_tensor(v, like) for v in value])
    dtype = like.dtype if like is not None else torch.get_default_dtype()
    return torch.as_tensor(
        np.asarray(value, dtype=float), dtype=dtype, device=like.device if like is not None else None
    )


def _flat(value: Any) -> Iterable[Any]:
    """The tensors and numbers in nested sequences and mappings."""
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from _flat(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _flat(entry)
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    else:
        yield value


def _stacked(tensors: list[Tensor], candidates: int, padding: float) -> Tensor:
    """float[G, candidates] or [G, candidates, K] of [C_g] or [C_g, K_g] each."""
    widths = [tensor.shape[1] if tensor.ndim == 2 else 0 for tensor in tensors]
    padded = []
    for tensor, width in zip(tensors, widths):
        below = candidates - tensor.shape[0]
        pad = [0, below] if tensor.ndim == 1 else [0, max(widths) - width, 0, below]
        padded.append(nn.functional.pad(tensor, pad, value=padding) if any(pad) else tensor)
    return torch.stack(padded)
