"""From architecture parameters to the probabilities of candidates, and from latency to a loss.

Start with `choice_probabilities`; `hw_models.expected.expected_latency` gives the latency that `fbnet_loss` and `proxyless_loss`
add to a task's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choice_probabilities", "fbnet_loss", "proxyless_loss"]

RELAXATIONS = ("softmax", "gumbel", "one-hot")


def choice_probabilities(
    alphas: Tensor,
    how: str = "softmax",
    *,
    temperature: float = 1.0,
    dim: int | tuple[int, ...] = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Probabilities of candidates from architecture parameters.

    Args:
        alphas: float[..., C], unnormalised log probabilities.
        how: "softmax"; "gumbel", a random relaxed choice; "one-hot", that choice made hard, with the gradient of the relaxed one
            (straight through).
        temperature: of the softmax or the relaxed choice, positive.
        dim: the axis of the candidates, or several that make one choice together, (-2, -1) for candidates and densities.
        generator: of the Gumbel noise.

    Returns:
        float of the shape of alphas, summing to 1 over `dim`.

    Raises:
        ValueError: an unknown way or a temperature that is not positive.

    Source: Gumbel-softmax, Jang et al. 2017 (arXiv:1611.01144), equation 2 and section 2.2.
    """
    if how not in RELAXATIONS:
        raise ValueError(f'how: expected one of {", ".join(RELAXATIONS)}, got "{how}"')
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature:g}")
    axes = tuple(sorted(axis % alphas.ndim for axis in ((dim,) if isinstance(dim, int) else dim)))
    last = tuple(range(alphas.ndim - len(axes), alphas.ndim))
    moved = alphas.movedim(axes, last)
    logits = moved.flatten(last[0])
    if how != "softmax":
        noise = torch.empty_like(logits).exponential_(generator=generator).log()
        logits = logits - noise
    soft = (logits / temperature).softmax(-1)
    if how == "one-hot":
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        soft = hard + soft - soft.detach()
    return soft.view(moved.shape).movedim(last, axes)


def fbnet_loss(task_loss: Tensor, latency_ms: Tensor, alpha: float = 0.2, beta: float = 0.6) -> Tensor:
    """task_loss * alpha * log(latency in microseconds) ** beta.

    Args:
        task_loss: scalar.
        latency_ms: scalar, expected latency; above a microsecond, because the logarithm must be positive.
        alpha, beta: size and bend of the factor; defaults as in the paper.

    Raises:
        ValueError: a latency of a microsecond or less, NaN included.

    Source: FBNet, Wu et al. 2019 (arXiv:1812.03443), equation 2.
    """
    found = latency_ms.detach().min().item()
    if not found > 1e-3:
        raise ValueError(
            f"FBNet's loss takes the logarithm of microseconds, which must be above 1; got {found:g} ms: check the unit, or use "
            "proxyless_loss"
        )
    return task_loss * alpha * (latency_ms * 1e3).log() ** beta


def proxyless_loss(task_loss: Tensor, latency_ms: Tensor, lambda2: float) -> Tensor:
    """task_loss + lambda2 * E[latency], with lambda2 in units of loss per millisecond.

    The weight decay of the paper's formula (lambda1) is left to the optimiser.

    Source: ProxylessNAS, Cai et al. 2019 (arXiv:1812.00332), section 3.3.1.
    """
    return task_loss + lambda2 * latency_ms
