"""Sparse arithmetic: patterns, masks, allocation of density, masked layers and counting. Knows nothing of search.

The names below are re-exported for convenience. Kernels, plans and the runtime are imported by their own module names, so that
`import ops` stays light (numba is imported only by the kernels).
"""

from ops.allocation import AllocationError, allocate
from ops.counting import Counts, LayerCount, count
from ops.layers import SparseConv2d, SparseLayer, SparseLinear, draw_masks_, is_depthwise, sparse_layers, sparsify
from ops.masks import kept_count, random_mask, satisfies, topk_mask
from ops.patterns import NM, Block, Channel, Pattern, PatternError, Unstructured, check_pattern, parse_pattern

__all__ = [
    "NM",
    "AllocationError",
    "Block",
    "Channel",
    "Counts",
    "LayerCount",
    "Pattern",
    "PatternError",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "Unstructured",
    "allocate",
    "check_pattern",
    "count",
    "draw_masks_",
    "is_depthwise",
    "kept_count",
    "parse_pattern",
    "random_mask",
    "satisfies",
    "sparse_layers",
    "sparsify",
    "topk_mask",
]
