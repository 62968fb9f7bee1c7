"""CSR kernels for one CPU thread, in plain Numba: convolution straight from the non-zeros, and linear.

Convolution: every kept weight adds `w · (a shifted plane of the input)` to its output plane. The input is first spread into
zero-padded planes, one per channel and stride phase, so that every tap of every geometry is a constant offset into them and
the inner loop runs over contiguous memory; where nothing is padded or strided (1x1) the input itself serves as the planes.
Linear: a dot product per row up to `DOT_BATCH` inputs, beyond it the same plane kernel with the batch as the plane.

Entries that are not stored are not computed: a NaN or Inf in the input reaches only the outputs of kept weights, whereas a
masked dense layer (0 · NaN = NaN) spreads it everywhere. Only float32, one thread. The arrays are normalised when the operator is
made, so each kernel is compiled for exactly one signature. `fastmath` allows fused multiply-add only; NaN and Inf keep their
meaning.

Start with `CSRConv2d` and `CSRLinear`; their twins are in `ops.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ops.formats import CSR

__all__ = ["ACTIVATIONS", "DOT_BATCH", "CSRConv2d", "CSRLinear", "compile_kernels"]

Floats = npt.NDArray[np.float32]

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
# 1000 x 1024 at density 0.1, microseconds by dot products / by planes (one thread of a shared AVX-512 host): batch 1 64 / 145,
# 2 127 / 161, 3 185 / 174, 8 492 / 250. test_csr_linear_equals_reference_and_torch covers both sides.
DOT_BATCH = 2
PLANE_FLOATS = 2048  # output floats worked on at a time, so that they stay in the first-level cache


def _jit(function: Callable[..., Any]) -> Any:
    """numba.njit with the on-disk cache where there is a writable place for it, without it otherwise."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "cannot cache function: no locator available"
        return numba.njit(**options)(function)


@_jit
def _activated(value, activation):
    """float32 through activation code 0 (none), 1 (relu) or 2 (relu6); the comparisons let NaN through."""
    if activation > 0 and value < np.float32(0):
        return np.float32(0)
    if activation == 2 and value > np.float32(6):
        return np.float32(6)
    return value


@_jit
def _spread(x, planes, geometry):
    """Copy one image [C, H, W] into its padded phase planes [C, slots, plane_height, plane_width].

    Pixel (y, x) of the padded image goes to phase (y % sh, x % sw), place (y // sh, x // sw). The border stays as it was: 0.
    """
    channels, height, width = geometry[0], geometry[1], geometry[2]
    sh, sw, top, left = geometry[3], geometry[4], geometry[5], geometry[6]
    slots, plane_height, plane_width = geometry[7], geometry[8], geometry[9]
    if slots == 0:  # nothing is kept, so there are no planes
        return
    if sh == 1 and sw == 1:
        for c in range(channels):
            for y in range(height):
                source = x[(c * height + y) * width : (c * height + y + 1) * width]
                start = (c * plane_height + y + top) * plane_width + left
                line = planes[start : start + width]
                for i in range(width):
                    line[i] = source[i]
        return
    for y in range(height):  # outermost, so that the divisions are done once per row, not per row and channel
        row, phase_y = (y + top) // sh, (y + top) % sh
        for phase_x in range(sw):
            slot = geometry[16 + phase_y * sw + phase_x]
            if slot < 0:  # no kept weight looks at this phase
                continue
            first = (phase_x - left) % sw  # first pixel of the row that belongs to this phase
            place = (first + left) // sw
            count = (width - first + sw - 1) // sw
            for c in range(channels):
                source = x[(c * height + y) * width + first : (c * height + y + 1) * width]
                start = ((c * slots + slot) * plane_height + row) * plane_width + place
                line = planes[start : start + count]
                if sw == 2:  # a constant step becomes vector code
                    for i in range(count):
                        line[i] = source[2 * i]
                else:
                    for i in range(count):
                        line[i] = source[i * sw]


@_jit
def _plane_rows(source, start, indptr, offsets, values, bias, accumulator, out, out_start, geometry):
    """All output rows of one image from its planes: out[o, q] = act(bias[o] + Σ_k values[k] · source[start + offsets[k] + q]).

    Eight weights at a time, so that the running sums are loaded and stored once per eight multiply-adds.
    """
    pitch, out_height, out_width = geometry[9], geometry[10], geometry[11]
    chunk, activation = geometry[12], geometry[13]
    for y0 in range(0, out_height, chunk):
        lines = min(chunk, out_height - y0)
        span = (lines - 1) * pitch + out_width
        base = start + y0 * pitch
        total = accumulator[:span]
        for o in range(indptr.shape[0] - 1):
            b = bias[o]
            for q in range(span):
                total[q] = b
            k = np.int64(indptr[o])
            end = np.int64(indptr[o + 1])
            while k + 8 <= end:
                w0, w1, w2, w3 = values[k], values[k + 1], values[k + 2], values[k + 3]
                w4, w5, w6, w7 = values[k + 4], values[k + 5], values[k + 6], values[k + 7]
                x0 = source[base + offsets[k] : base + offsets[k] + span]
                x1 = source[base + offsets[k + 1] : base + offsets[k + 1] + span]
                x2 = source[base + offsets[k + 2] : base + offsets[k + 2] + span]
                x3 = source[base + offsets[k + 3] : base + offsets[k + 3] + span]
                x4 = source[base + offsets[k + 4] : base + offsets[k + 4] + span]
                x5 = source[base + offsets[k + 5] : base + offsets[k + 5] + span]
                x6 = source[base + offsets[k + 6] : base + offsets[k + 6] + span]
                x7 = source[base + offsets[k + 7] : base + offsets[k + 7] + span]
                for q in range(span):
                    t = total[q] + w0 * x0[q] + w1 * x1[q] + w2 * x2[q] + w3 * x3[q]
                    total[q] = t + w4 * x4[q] + w5 * x5[q] + w6 * x6[q] + w7 * x7[q]
                k += 8
            while k + 2 <= end:
                w0, w1 = values[k], values[k + 1]
                x0 = source[base + offsets[k] : base + offsets[k] + span]
                x1 = source[base + offsets[k + 1] : base + offsets[k + 1] + span]
                for q in range(span):
                    total[q] = total[q] + w0 * x0[q] + w1 * x1[q]
                k += 2
            if k < end:
                w0 = values[k]
                x0 = source[base + offsets[k] : base + offsets[k] + span]
                for q in range(span):
                    total[q] = total[q] + w0 * x0[q]
            if activation > 0:
                for q in range(span):
                    total[q] = _activated(total[q], activation)
            first = out_start + (o * out_height + y0) * out_width
            if pitch == out_width:
                line = out[first : first + span]
                for j in range(span):
                    line[j] = total[j]
            else:
                for i in range(lines):
                    line = out[first + i * out_width : first + (i + 1) * out_width]
                    sums = total[i * pitch : i * pitch + out_width]
                    for j in range(out_width):
                        line[j] = sums[j]


@_jit
def csr_conv2d(x, planes, indptr, offsets, values, bias, accumulator, out, geometry):
    """A batch of images; all arrays flat. geometry: see `CSRConv2d`; twin: `ops.reference.csr_conv2d`."""
    image = geometry[0] * geometry[1] * geometry[2]
    result = (indptr.shape[0] - 1) * geometry[10] * geometry[11]
    for n in range(geometry[14]):
        if geometry[15]:
            _plane_rows(x, n * image, indptr, offsets, values, bias, accumulator, out, n * result, geometry)
        else:
            _spread(x[n * image : (n + 1) * image], planes, geometry)
            _plane_rows(planes, 0, indptr, offsets, values, bias, accumulator, out, n * result, geometry)


@_jit
def csr_linear_dot(x, indptr, indices, values, bias, out, batch, activation):
    """out[n, i] = act(bias[i] + row i · x[n]), four partial sums per row; flat arrays; twin: `ops.reference.csr_linear`."""
    rows = indptr.shape[0] - 1
    cols = x.shape[0] // batch
    for n in range(batch):
        vector = x[n * cols : (n + 1) * cols]
        for i in range(rows):
            s0 = s1 = s2 = s3 = np.float32(0)
            k = np.int64(indptr[i])
            end = np.int64(indptr[i + 1])
            while k + 4 <= end:  # unsigned indices: no wrap-around test in the inner loop
                s0 += values[k] * vector[np.uintp(indices[k])]
                s1 += values[k + 1] * vector[np.uintp(indices[k + 1])]
                s2 += values[k + 2] * vector[np.uintp(indices[k + 2])]
                s3 += values[k + 3] * vector[np.uintp(indices[k + 3])]
                k += 4
            while k < end:
                s0 += values[k] * vector[np.uintp(indices[k])]
                k += 1
            out[n * rows + i] = _activated((s0 + s1) + (s2 + s3) + bias[i], activation)


@_jit
def _transpose(source, rows, cols, out):
    """out[j, i] = source[i, j], both flat, in tiles of 16 x 16."""
    for i0 in range(0, rows, 16):
        for j0 in range(0, cols, 16):
            for j in range(j0, min(j0 + 16, cols)):
                for i in range(i0, min(i0 + 16, rows)):
                    out[j * rows + i] = source[i * cols + j]


@_jit
def csr_linear_plane(x, columns, indptr, offsets, values, bias, accumulator, product, out, geometry):
    """Batched linear as the plane kernel with the batch as the plane; twin: `ops.reference.csr_linear`."""
    batch = geometry[11]
    rows = indptr.shape[0] - 1
    _transpose(x, batch, geometry[0], columns)
    _plane_rows(columns, 0, indptr, offsets, values, bias, accumulator, product, 0, geometry)
    _transpose(product, rows, batch, out)


class CSRConv2d:
    """A convolution packed for one input shape; calling it fills and returns `out`, the same array every time.

    Args:
        weight: CSR of shape (out, in/groups * kernel_height * kernel_width), columns in the order (in, ky, kx).
        kernel_size: (kernel_height, kernel_width).
        input_shape: (batch, in, height, width).
        bias: float[out] or None.
        stride: (vertical, horizontal).
        padding: zeros around the input, (top, bottom, left, right).
        dilation: (vertical, horizontal).
        groups: as in torch.
        activation: "none", "relu" or "relu6", applied after the bias.

    Attributes:
        out: float32[batch, out, out_height, out_width].

    Raises:
        ValueError: the shapes do not fit together.
    """

    def __init__(
        self,
        weight: CSR,
        kernel_size: tuple[int, int],
        input_shape: tuple[int, int, int, int],
        *,
        bias: npt.NDArray[Any] | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        activation: str = "none",
    ) -> None:
        batch, channels, height, width = input_shape
        (rows, cols), (kh, kw), (sh, sw), (dh, dw) = weight.shape, kernel_size, stride, dilation
        if cols * groups != channels * kh * kw or rows % groups:
            raise ValueError(
                f"a convolution of {channels} channels in {groups} groups with a {kh}x{kw} kernel needs a weight of "
                f"{channels // groups * kh * kw} columns and a multiple of {groups} rows, got {rows} x {cols}"
            )
        top, bottom, left, right = padding
        out_height = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
        out_width = (width + left + right - dw * (kw - 1) - 1) // sw + 1
        if out_height < 1 or out_width < 1:
            raise ValueError(
                f"a {kh}x{kw} kernel with dilation {dilation} does not fit into an input of {height}x{width} padded by "
                f"{padding} (top, bottom, left, right)"
            )
        direct = stride == (1, 1) and padding == (0, 0, 0, 0)
        plane_height, plane_width = -(-(height + top + bottom) // sh), -(-(width + left + right) // sw)

        channel, tap = np.divmod(weight.indices.astype(np.int64), kh * kw)
        channel += np.repeat(np.arange(rows) // (rows // groups) * (cols // (kh * kw)), np.diff(weight.indptr))
        tap_row, tap_phase_y = np.divmod(tap // kw * dh, sh)
        tap_col, tap_phase_x = np.divmod(tap % kw * dw, sw)
        phase = tap_phase_y * sw + tap_phase_x
        used = np.unique(phase)
        slot_of_phase = np.full(sh * sw, -1, np.int64)
        slot_of_phase[used] = np.arange(used.size)
        plane = channel * used.size + slot_of_phase[phase]

        chunk = max(1, min(out_height, PLANE_FLOATS // plane_width))
        # Places 0-15 are read by number in the kernels above; the slot of each stride phase follows.
        self._geometry = np.array(
            [
                *(channels, height, width, sh, sw, top, left, used.size, plane_height, plane_width),
                *(out_height, out_width, chunk, ACTIVATIONS[activation], batch, int(direct)),
                *slot_of_phase,
            ],
            np.int64,
        )
        self._indptr = weight.indptr
        self._offsets = (plane * plane_height + tap_row) * plane_width + tap_col
        self._values = weight.values
        self._bias = _vector(bias, rows)
        self._planes = np.zeros(0 if direct else channels * used.size * plane_height * plane_width, np.float32)
        self._accumulator = np.zeros(chunk * plane_width, np.float32)
        self.input_shape = input_shape
        self.out = np.zeros((batch, rows, out_height, out_width), np.float32)
        self._flat_out = self.out.reshape(-1)

    def __call__(self, x: Floats) -> Floats:
        """Convolve x, float32[batch, in, height, width], C-contiguous (the caller sees to that)."""
        csr_conv2d(
            x.reshape(-1),
            self._planes,
            self._indptr,
            self._offsets,
            self._values,
            self._bias,
            self._accumulator,
            self._flat_out,
            self._geometry,
        )
        return self.out


class CSRLinear:
    """A linear layer packed for one batch size; calling it fills and returns `out`, the same array every time.

    Args:
        weight: CSR of shape (out_features, in_features).
        batch: number of input vectors.
        bias: float[out_features] or None.
        activation: "none", "relu" or "relu6", applied after the bias.

    Attributes:
        out: float32[batch, out_features].
    """

    def __init__(
        self, weight: CSR, batch: int = 1, *, bias: npt.NDArray[Any] | None = None, activation: str = "none"
    ) -> None:
        rows, cols = weight.shape
        self._weight = weight
        self._bias = _vector(bias, rows)
        self._batch = batch
        self._activation = ACTIVATIONS[activation]
        self.input_shape = (batch, cols)
        self.out = np.zeros((batch, rows), np.float32)
        self._flat_out = self.out.reshape(-1)
        if batch > DOT_BATCH:
            self._offsets = weight.indices.astype(np.int64) * batch
            self._columns = np.zeros(cols * batch, np.float32)
            self._product = np.zeros(rows * batch, np.float32)
            self._accumulator = np.zeros(batch, np.float32)
            plane = [cols, 1, batch, 1, 1, 0, 0, 1, 1, batch, 1, batch, 1, self._activation, 1, 1, 0]
            self._geometry = np.array(plane, np.int64)

    def __call__(self, x: Floats) -> Floats:
        """Multiply x, float32[batch, in_features], C-contiguous (the caller sees to that)."""
        w = self._weight
        if self._batch <= DOT_BATCH:
            csr_linear_dot(
                x.reshape(-1), w.indptr, w.indices, w.values, self._bias, self._flat_out, self._batch, self._activation
            )
        else:
            csr_linear_plane(
                x.reshape(-1),
                self._columns,
                w.indptr,
                self._offsets,
                w.values,
                self._bias,
                self._accumulator,
                self._product,
                self._flat_out,
                self._geometry,
            )
        return self.out


def _vector(bias: npt.NDArray[Any] | None, rows: int) -> Floats:
    """The bias as a contiguous float32[rows], zeros for None."""
    if bias is None:
        return np.zeros(rows, np.float32)
    if bias.shape != (rows,):
        raise ValueError(f"the bias must have one entry per weight row, float[{rows}], got {bias.dtype}{bias.shape}")
    return np.array(bias, np.float32)


def compile_kernels() -> None:
    """Compile every kernel, or load it from Numba's cache: some seconds the first time on a machine, then well under one.

    Calling it is never needed; it moves the cost of the first call to where the caller can show it.
    """
    tiny = CSR((1, 1), np.array([0, 1], np.int32), np.zeros(1, np.int32), np.ones(1, np.float32))
    CSRConv2d(tiny, (1, 1), (1, 1, 1, 1))(np.zeros((1, 1, 1, 1), np.float32))
    for batch in (1, DOT_BATCH + 1):
        CSRLinear(tiny, batch)(np.zeros((batch, 1), np.float32))
