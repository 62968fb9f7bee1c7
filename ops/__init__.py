"""Sparse arithmetic: patterns, masks, allocation of density, masked layers and counting. Knows nothing of search.

The names below are re-exported for convenience. Kernels, plans and the runtime are imported by their own module names, so that
`import ops` stays light (numba is imported only by the kernels).
"""

from ops.masks import kept_count, random_mask, satisfies, topk_mask
from ops.patterns import NM, Block, Channel, Pattern, PatternError, Unstructured, check_pattern, parse_pattern

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Pattern",
    "PatternError",
    "Unstructured",
    "check_pattern",
    "kept_count",
    "parse_pattern",
    "random_mask",
    "satisfies",
    "topk_mask",
]
