"""The same architecture at another density, so that it keeps a given number of weights, or takes a given time.

Networks are compared at equal numbers of kept weights, not at equal densities: cells differ in size by an order of
magnitude. Start with `match`; `match_latency` does the same for a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from nas.errors import NasError
from ops.counting import total_kept_weights
from ops.layers import draw_masks_
from ops.patterns import parse_pattern
from search_spaces import Architecture, Space, SpaceError
from search_spaces.architecture import Value

Price = Callable[[nn.Module], float]
"""A network with its masks drawn -> milliseconds of one forward pass."""

TOLERANCE = 0.02
UNSTRUCTURED = "unstructured"
LOWEST = 1e-9


class MatchError(NasError, ValueError):
    """No density gives the architecture the cost that was asked for; says the nearest it can have."""


def match(
    space: Space,
    architecture: Architecture,
    *,
    kept_weights: int,
    tolerance: float = TOLERANCE,
    like: Architecture | None = None,
) -> Architecture:
    """The architecture at the density at which it keeps a number of convolution and linear weights.

    An overall density (`Chooser.allocate`) is set; densities of parts (`Chooser.sparse`) are scaled by one factor and
    capped at 1. All other decisions stay, but patterns of a density of their own (2:4) give way to "unstructured", or the
    first free one offered. Found by bisection on exact counts of networks on the meta device, so the result is the closest
    there is: layers of equal shape gain weights together.

    Args:
        space: of the architecture.
        architecture: any density will do, 1 among them.
        kept_weights: wanted; biases and norms do not count (`ops.counting.total_kept_weights`).
        tolerance: largest difference allowed, as a fraction of `kept_weights`.
        like: whose patterns and allocation rules to take where decisions of these names are asked; a part that `like` does not
            have takes the pattern most frequent in it.

    Returns:
        An architecture of the space; its densities need not be among those the space offers.

    Raises:
        MatchError: it has too few weights even when dense, too many at the lowest density, or the closest is not close enough.
        ValueError: `kept_weights` or `tolerance` makes no sense.
    """
    if kept_weights < 1:
        raise ValueError(f"expected kept_weights >= 1, got {kept_weights}")
    _check_tolerance(tolerance)
    return _search(
        Scaled(space, architecture, like),
        lambda found: total_kept_weights(space.meta(found)),
        int(kept_weights),
        tolerance=tolerance,
        unit="kept weights",
        steps=64,
        grain=0.1,
    )


def match_latency(
    space: Space,
    architecture: Architecture,
    latency_ms: float,
    price: Price,
    *,
    tolerance: float = 0.05,
    like: Architecture | None = None,
    seed: int = 0,
    steps: int = 16,
) -> Architecture:
    """The architecture at the density at which it takes a time; as `match`, with prices in place of counts.

    Args:
        space, architecture, like: as for `match`.
        latency_ms: wanted, in milliseconds.
        price: says how long a network takes; it gets real networks with their masks drawn. Noise costs closeness, nothing else.
        tolerance: largest difference allowed, as a fraction of `latency_ms`.
        seed: of the weights and masks that are priced.
        steps: densities priced at most.

    Raises:
        MatchError: it is too quick even when dense, too slow at the lowest density, or the closest is not close enough.
        ValueError: `latency_ms` or `tolerance` makes no sense.
    """
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise ValueError(f"expected latency_ms > 0, got {latency_ms}")
    _check_tolerance(tolerance)

    def cost(found: Architecture) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = space.build(found).eval()
        draw_masks_(network, torch.Generator().manual_seed(seed))
        return float(price(network))

    return _search(
        Scaled(space, architecture, like), cost, float(latency_ms), tolerance=tolerance, unit="ms", steps=steps, grain=0
    )


class Scaled:
    """An architecture as a function of one number t in (0, 1]: all its densities in proportion, the lowest of them t.

    So at 1 it is dense, and at its own `lowest` it is itself (but for patterns). Decisions called `<name>.density` are
    those of `Chooser.sparse` and `Chooser.allocate`.

    Raises:
        MatchError: no decision of the architecture is a density that can be changed.
    """

    def __init__(self, space: Space, architecture: Architecture, like: Architecture | None = None) -> None:
        self.space = space
        self.architecture = architecture
        self._own = architecture.as_dict()
        self._like = {} if like is None else like.as_dict()
        patterns = [str(value) for name, value in self._like.items() if name.endswith(".pattern")]
        self._usual = max(dict.fromkeys(patterns), key=patterns.count, default=None)
        self._densities = {
            name: float(value)
            for name, value in self._own.items()
            if name.endswith(".density") and isinstance(value, int | float)
        }
        if not self._densities:
            raise MatchError(f"{space.name} {architecture.digest} decides no density, so its cost cannot be changed")
        self.lowest = min(self._densities.values())

    def at(self, t: float) -> Architecture:
        """The architecture whose lowest density is t; densities the space cannot have there stay what they are.

        Raises:
            SpaceError: an allocation rule cannot spread so low a density.
        """
        given: dict[str, Value] = {
            n: t if d == self.lowest else min(1.0, d / self.lowest * t) for n, d in self._densities.items()
        }
        return self.space.draw(lambda name, options: self._decide(name, options, given), given)

    def _decide(self, name: str, options: tuple[Value, ...], given: Mapping[str, Value]) -> Value:
        if name in self._densities:
            return next((d for d in (given[name], self._own[name]) if d in options), max(options, key=_number))
        if name.endswith(".pattern"):
            free = [p for p in options if parse_pattern(str(p)).fixed_density is None]
            wanted = [self._like.get(name, self._usual), self._own.get(name), UNSTRUCTURED, *free]
            return next((p for p in wanted if p in free), options[0])
        like = self._like.get(name) if name.endswith(".rule") else None
        return next((v for v in (like, self._own.get(name)) if v in options), options[0])


def _search(
    scaled: Scaled,
    cost: Callable[[Architecture], float],
    wanted: float,
    *,
    tolerance: float,
    unit: str,
    steps: int,
    grain: float,
) -> Architecture:
    """The architecture whose cost is nearest to `wanted`, by bisection of its lowest density, helped by interpolation if `grain`.

    Ends where the densities on both sides differ by less than `grain` would cost if it were spread over the network.
    """
    who = f"{scaled.space.name} {scaled.architecture.digest}"
    best = scaled.at(1.0)
    full = reached = cost(best)
    if full < wanted - tolerance * wanted:
        raise MatchError(f"{who}: expected {_text(wanted)} {unit}, but it has {_text(full)} even at density 1")
    low: tuple[float, float | None] = (LOWEST / 2, None)
    high = (1.0, full)
    lowest: float | None = None
    starts = (LOWEST, scaled.lowest)
    for step in range(steps):
        t = starts[step] if step < len(starts) else _between(low, high, wanted, step % 3 != 0 and grain > 0)
        try:
            found = scaled.at(t)
        except SpaceError:  # too low for the rule that spreads it over the layers
            low = (t, None)
            continue
        here = cost(found)
        lowest = here if lowest is None else min(lowest, here)
        if abs(here - wanted) < abs(reached - wanted):
            best, reached = found, here
        if here < wanted:
            low = max(low, (t, here), key=lambda point: point[0])
        else:
            high = min(high, (t, here), key=lambda point: point[0])
        if reached == wanted or high[0] == LOWEST or (high[0] - low[0]) * full < grain:
            break
    if abs(reached - wanted) <= tolerance * wanted:
        return best
    if lowest is not None and lowest > wanted:
        raise MatchError(f"{who}: expected {_text(wanted)} {unit}, but it has {_text(lowest)} at the lowest density")
    raise MatchError(
        f"{who}: expected {_text(wanted)} {unit} within {tolerance:.3g} of that, but the closest it can have is {_text(reached)}; "
        "allow a larger tolerance"
    )


def _between(low: tuple[float, float | None], high: tuple[float, float], wanted: float, guess: bool) -> float:
    """A density between two others, (density, cost) each: in the middle, or where a straight line guesses the cost to be `wanted`.

    If one side is much nearer, the guess goes as far beyond on the other, so that both sides close in.
    """
    (t0, c0), (t1, c1) = low, high
    if guess and c0 is not None and c1 > c0:
        under, over = wanted - c0, c1 - wanted
        aim = wanted - over if over < under / 4 else wanted + under if under < over / 4 else wanted
        t = t0 + (aim - c0) / (c1 - c0) * (t1 - t0)
        if t0 < t < t1:
            return t
    return math.sqrt(t0 * t1) if t1 > 4 * t0 else (t0 + t1) / 2


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise ValueError(f"expected a tolerance in [0, 1), a fraction of what is wanted, got {tolerance}")


def _number(value: Value) -> float:
    return float(value)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
