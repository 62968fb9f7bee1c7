"""The architecture parameters of a supernet: one vector per choice. They are not parameters of any module.

Start with `Alphas`.

Source: DARTS, Liu et al. 2019 (arXiv:1806.09055), section 2.2; initial values as in its published code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nas.oneshot.choices import Choice


class Alphas:
    """Decision -> float32[options], leaves that take gradients.

    Args:
        choices: what to have parameters for.
        generator: on the CPU, of the initial values.
        scale: they are scale * N(0, 1).
        device: where they are.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        *,
        generator: torch.Generator,
        scale: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        self.choices = dict(choices)
        self._values: dict[str, Tensor] = {}
        for name, choice in self.choices.items():
            initial = scale * torch.randn(len(choice.options), generator=generator)
            self._values[name] = initial.to(device).requires_grad_()

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return list(self._values.values())

    def probabilities(self, name: str) -> Tensor:
        """softmax of one: float[options]."""
        return self._values[name].softmax(0)

    def snapshot(self) -> dict[str, list[float]]:
        """Probabilities as plain numbers, for logs."""
        if not self._values:
            return {}
        flat = torch.cat([v.detach().softmax(0) for v in self._values.values()]).cpu()
        parts = flat.split([len(v) for v in self._values.values()])
        return {name: [float(p) for p in part] for name, part in zip(self._values, parts)}

    def state(self) -> dict[str, Tensor]:
        """Their values."""
        return {name: value.detach().clone() for name, value in self._values.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over values, in place, so that optimizers go on.

        Raises:
            ValueError: other decisions or numbers of options.
        """
        if set(values) != set(self._values):
            differing = sorted(set(values) ^ set(self._values))
            raise ValueError(
                f"architecture parameters of other decisions: {', '.join(differing[:5])} are in one of the two only"
            )
        for name, value in values.items():
            if value.shape != self._values[name].shape:
                raise ValueError(
                    f"decision {name!r}: expected {len(self._values[name])} architecture parameters, got {list(value.shape)}"
                )
            self._values[name].copy_(value)
