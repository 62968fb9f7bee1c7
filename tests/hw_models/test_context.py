"""The network around a step: effects that are there are found, others are not invented, and back and forth is where one began."""

import json

import numpy as np
import pandas as pd
import pytest

from hw_models.context import CLASSES, REFERENCE, Context, class_of, surroundings

SLOPES = (0.0006, 0.0003, 0.08, 0.05, 0.02, 0.01)
_KIND = {"torch": "torch.linear", "fetch": "fetch", "conversions": "to_lanes"}


def _networks(count: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            name: np.exp(rng.uniform(8, 16, count))
            for name in ("weight_bytes", "arena_bytes", "handed_bytes", "moved_bytes")
        }
    )


def _steps(networks: pd.DataFrame, slopes: tuple[float, ...], keys: int = 6, noise: float = 0.0) -> pd.DataFrame:
    """Steps of every class, the same in every network but for what the network does to them."""
    rng = np.random.default_rng(1)
    rows = []
    for number, name in enumerate(CLASSES):
        kernel = name if name in ("torch", "portable", "specialised") else "lanes"
        kind = _KIND.get(name, "halo" if name == "lanes" else "conv")
        for k in range(keys):
            base = 0.01 * (k + 1)
            for network, measures in zip(networks.index, surroundings(networks)):
                away = (measures - REFERENCE)[1 if number < 2 else 0]
                ms = base + slopes[number] * away if number < 2 else base * np.exp(slopes[number] * away)
                rows.append(
                    (
                        f"{name}{k}",
                        f"{kind}/{kernel}",
                        kind,
                        kernel,
                        network,
                        ms * np.exp(noise * rng.standard_normal()),
                    )
                )
    frame = pd.DataFrame(rows, columns=["key", "family", "kind", "kernel", "network", "ms"])
    return frame.assign(dense_macs=1e6, in_bytes=1e6, out_bytes=1e6)


def test_every_class_is_told_apart() -> None:
    frame = _steps(_networks(1), SLOPES, keys=1)
    assert [CLASSES[i] for i in class_of(frame)] == list(CLASSES)


def test_known_effects_are_found() -> None:
    networks = _networks()
    found = Context.fit(_steps(networks, SLOPES, noise=0.02), networks)
    np.testing.assert_allclose(found.slopes[:2], SLOPES[:2], rtol=0.35)  # drawn to 0
    np.testing.assert_allclose(found.slopes[2:], SLOPES[2:], atol=0.005)


def test_where_there_is_no_effect_none_is_found() -> None:
    networks = _networks()
    found = Context.fit(_steps(networks, (0.0,) * 6, noise=0.02), networks)
    assert max(found.slopes[:2]) < 3e-5
    assert max(found.slopes[2:]) < 0.003


def test_a_few_disturbed_times_do_not_make_one() -> None:
    networks = _networks()
    steps = _steps(networks, SLOPES, noise=0.02)
    steps.loc[steps.sample(frac=0.05, random_state=0).index, "ms"] *= 4
    found = Context.fit(steps, networks)
    np.testing.assert_allclose(found.slopes[2:], SLOPES[2:], atol=0.01)


def test_steps_met_once_say_nothing_but_light_ones_stand_for_each_other() -> None:
    networks = _networks()
    steps = _steps(networks, SLOPES)
    alone = steps.assign(key=[f"own {i}" for i in range(len(steps))])
    assert Context.fit(alone, networks).slopes == (0.0,) * 6
    light = alone[alone["kind"] == "fetch"].assign(dense_macs=0.0, in_bytes=40.0, out_bytes=40.0)
    assert Context.fit(light, networks).slopes[1] == pytest.approx(SLOPES[1], rel=0.3)


def test_detached_and_attached_again_is_where_one_began() -> None:
    networks = _networks()
    steps = _steps(networks, SLOPES)
    context = Context(SLOPES)
    away = context.detached(steps, networks)
    size = surroundings(networks)[steps["network"].to_numpy()]
    np.testing.assert_allclose(context.attached(away["ms"].to_numpy(), class_of(steps), size), steps["ms"], rtol=1e-9)
    assert away.groupby("key")["ms"].std().max() < 1e-9


def test_sums_by_class_are_sums_of_steps() -> None:
    networks = _networks()
    steps, context = _steps(networks, (0.0,) * 6), Context(SLOPES)
    size = surroundings(networks)
    slow = [
        context.attached(rows["ms"].to_numpy(), class_of(rows), size[network]).sum()
        for network, rows in steps.groupby("network")
    ]
    of = class_of(steps)
    table = steps.assign(of=of).pivot_table(index="of", columns="network", values="ms", aggfunc=["sum", "count"])
    fast = context.sums(table["sum"].to_numpy(), table["count"].to_numpy(), size)
    np.testing.assert_allclose(fast, slow, rtol=1e-6)


def test_nothing_becomes_negative() -> None:
    context = Context((1.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    assert (context.attached(np.array([0.001, 0.001]), np.array([0, 1]), np.zeros(2)) > 0).all()


def test_nothing_known_changes_nothing() -> None:
    networks = _networks()
    steps = _steps(networks, SLOPES)
    pd.testing.assert_frame_equal(Context().detached(steps, networks), steps)
    assert Context.fit(steps.iloc[:0], networks) == Context()


def test_json_there_and_back() -> None:
    assert Context.from_dict(json.loads(json.dumps(Context(SLOPES).to_dict()))) == Context(SLOPES)
