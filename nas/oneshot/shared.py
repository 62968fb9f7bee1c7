"""Weights shared by networks of different structure: one tensor per key, smaller layers take a slice of it.

Where a space decides widths or depths, a supernet is many networks. Their parameters are looked up by key
(`chooser.parameter_keys`): the first, largest network allocates a tensor, later ones take its leading channels and the middle of
its kernel. What does not fit gets a tensor of its own. Start with `SharedWeights`.

Source: slimmable networks, Yu et al. 2019 (arXiv:1812.08928); once-for-all, Cai et al. 2020 (arXiv:1908.09791), elastic kernel and
width (without its kernel transformation).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Slices = tuple[slice, ...] | None

Source = tuple[str, Slices]
"""Key of a shared tensor, and the slice of it (None: all)."""


class SharedWeights:
    """key -> parameter. Grows when a structure is added that has keys nobody had.

    Args:
        device: where the parameters are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.tensors: dict[str, nn.Parameter] = {}

    def adopt(self, network: nn.Module, keys: Mapping[str, str]) -> dict[str, Source]:
        """Take the parameters out of a freshly built network: where a key is new, its values become the shared ones.

        Returns:
            path of a parameter -> where its values are now. The network's own parameters are left on the meta device.
        """
        sources: dict[str, Source] = {}
        for path, parameter in list(network.named_parameters()):
            sources[path] = self._place(keys[path], parameter)
            owner, _, name = path.rpartition(".")
            empty = torch.empty_like(parameter, device="meta")
            network.get_submodule(owner)._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return sources

    def views(self, sources: Mapping[str, Source]) -> dict[str, Tensor]:
        """path -> the shared values, as views."""
        return {
            path: self.tensors[key] if part is None else self.tensors[key][part]
            for path, (key, part) in sources.items()
        }

    def _place(self, key: str, parameter: nn.Parameter) -> Source:
        known = self.tensors.get(key)
        if known is not None and not fits(tuple(parameter.shape), tuple(known.shape)):
            key = f"{key} {'x'.join(map(str, parameter.shape))}"
            known = self.tensors.get(key)
        if known is None:
            values = parameter.detach().to(self.device, copy=True)
            self.tensors[key] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            return key, None
        return key, slices(tuple(parameter.shape), tuple(known.shape))


def fits(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether a weight of shape `small` can be a slice of one of shape `large`."""
    return len(small) == len(large) and all(s <= n for s, n in zip(small, large))


def slices(small: tuple[int, ...], large: tuple[int, ...]) -> Slices:
    """Leading channels (axes 0 and 1), the middle of the kernel (axes 2 and on); None if the shapes are equal."""
    if small == large:
        return None
    return tuple(
        slice(0, s) if axis < 2 else slice((n - s) // 2, (n - s) // 2 + s)
        for axis, (s, n) in enumerate(zip(small, large))
    )
