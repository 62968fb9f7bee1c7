"""A profile in words and as a table: what `nas profile` prints. Start with `profile_lines` and `profile_sheet`.

The picture is `nas.report.profile_picture`; the numbers are `hw_models.profile`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nas.report.plans import Operation, read_plan
from nas.report.sheet import Column, Sheet
from nas.report.units import MISSING, compact, digits, interval, missing, shorten

if TYPE_CHECKING:
    from hw_models.profile import Profile

_COLUMNS = (  # header, aligned right, rank (see nas.report.sheet.Column)
    ("operation", False, 0),
    ("computes", False, 6),
    ("density", True, 1),
    ("pattern", False, 7),
    ("MACs", True, 9),
    ("kernel", False, 0),
    ("ms", True, 0),
    ("share", True, 0),
    ("dense ms", True, 1),
    ("sparse ms", True, 3),
    ("predicted ms", True, 2),
    ("how", False, 5),
    ("dense faster", False, 2),
    ("mJ", True, 8),
)


def profile_lines(profile: Profile) -> list[str]:
    """The whole network in a few lines: measured, predicted, energy, and what to know about them."""
    lines = []
    if profile.measured is not None and profile.dense is not None:
        m, dense = profile.measured, profile.dense
        settled = "" if m.quality == "ok" else f" (not settled: quality {m.quality})"
        lines.append(
            f"measured   {interval(m.floor_ms, m.lo_ms, m.hi_ms)} ms{settled}; dense "
            f"{interval(dense.floor_ms, dense.lo_ms, dense.hi_ms)} ms: {gain_text(profile.gain)}"
        )
        lines.append(f"under load {digits(m.median_ms)} ms (median), {digits(m.p90_ms)} ms (90th percentile)")
        rest = m.floor_ms - float(profile.table["ms"].sum())
        if rest >= 0.01 * m.floor_ms:
            lines.append(f"the call   {digits(rest)} ms of it, outside of all operations ({rest / m.floor_ms:.0%})")
    if profile.predicted is not None and profile.predicted_dense is not None:
        p, dense_ms = profile.predicted, profile.predicted_dense.ms
        against = f"; {p.ms / profile.ms - 1:+.1%} of measured" if profile.measured is not None else ""
        lines.append(
            f"predicted  {interval(p.ms, p.lo_ms, p.hi_ms)} ms ({p.source}{against}); dense {digits(dense_ms)} ms: "
            f"{gain_text(dense_ms / p.ms)}"
        )
    if profile.energy is not None:
        e = profile.energy
        known = f"{interval(e.mj, e.lo_mj, e.hi_mj)} mJ per call ({e.method}: {e.note})"
        lines.append(f"energy     {f'not known: {e.note}' if missing(e.mj) else known}")
    if profile.model:
        lines.append(f"predicted by {profile.model}")
    return [*lines, *profile.notes]


def profile_sheet(profile: Profile, title: str = "Operations") -> Sheet:
    """One row per operation; columns without any value are left out."""
    rows, keys, styles = [], [], []
    total = profile.ms
    for op, row in zip(read_plan(profile.table), profile.table.to_dict("records"), strict=True):
        rows.append(_cells(op, row, total))
        keys.append(_keys(op, row))
        styles.append("" if op.density is not None or op.kind == "torch" else "dim")
    keep = [i for i, _ in enumerate(_COLUMNS) if i == 0 or any(row[i] not in (MISSING, "") for row in rows)]
    timed = profile.measured is not None
    notes = [
        "ms: in its place in the running network, with the changes of layout it asks for; dense ms, sparse ms: in the same "
        "network all dense, all sparse; share: of the whole network's time"
        if timed
        else "ms: predicted, as nothing was measured",
        "dense faster: above that density the dense kernel is the faster one, says the model"
        if not profile.table["crossover_density"].isna().all()
        else "from which density on dense would be faster: not known without a model"
        if profile.predicted is None
        else "no layer has a choice between dense and sparse kernels",
    ]
    return Sheet(
        title,
        tuple(Column(*_COLUMNS[i]) for i in keep),
        tuple(tuple(row[i] for i in keep) for row in rows),
        tuple(notes),
        tuple(styles),
        tuple(tuple(key[i] for i in keep) for key in keys),
    )


def profile_record(profile: Profile, title: str) -> dict[str, Any]:
    """Everything as plain values for JSON: numbers exact, None where not known."""
    record: dict[str, Any] = {"network": title, "batch": profile.batch, "threads": profile.threads}
    for name, m in (("measured", profile.measured), ("dense", profile.dense)):
        of_measured = ("floor_ms", "lo_ms", "hi_ms", "median_ms", "p90_ms", "quality")
        record[name] = m and {n.removeprefix("floor_"): getattr(m, n) for n in of_measured}
    for name, e in (("predicted", profile.predicted), ("predicted_dense", profile.predicted_dense)):
        record[name] = e and {n: getattr(e, n) for n in ("ms", "lo_ms", "hi_ms", "source", "note")}
    if profile.energy is not None:
        of_energy = ("mj", "lo_mj", "hi_mj", "method", "note")
        record["energy"] = {n: None if missing(v := getattr(profile.energy, n)) else v for n in of_energy}
    record |= {"model": profile.model, "notes": list(profile.notes)}
    rows = profile.table.to_dict("records")
    record["operations"] = [{k: None if missing(v) else v for k, v in row.items()} for row in rows]
    return record


def gain_text(gain: float) -> str:
    """ "3.21 times as fast", "as fast", or "1.30 times slower"."""
    if not math.isfinite(gain) or gain <= 0:
        return MISSING
    if abs(gain - 1) < 0.005:
        return "as fast"
    return f"{digits(gain)} times as fast" if gain > 1 else f"{digits(1 / gain)} times slower"


def crossover_text(density: Any) -> str:
    """From which density on the dense kernel is faster: "above 0.31", "never", "always"."""
    if missing(density):
        return MISSING
    return "never" if density >= 1 else "always" if density <= 0 else f"above {density:.2g}"


def fixed(ms: float, total: float) -> str:
    """A part of a network's time, with as many decimals as show a thousandth of the whole: alike in all lines."""
    decimals = max(0, 3 - math.floor(math.log10(total))) if total > 0 else 3
    return f"{ms:,.{decimals}f}"


def _cells(op: Operation, row: dict[Any, Any], total: float) -> tuple[str, ...]:
    layer = op.density is not None
    ms = row["predicted_ms"] if missing(row["ms"]) else row["ms"]
    dense, sparse = _other(row, "dense_ms", layer), _other(row, "sparse_ms", layer)
    return (
        shorten(op.name, 40),
        op.what,
        f"{op.density:.3g}" if op.density is not None else MISSING,
        op.pattern,
        compact(op.macs) if op.macs else MISSING,
        op.kernel if layer else "",
        _ms(ms, total),
        MISSING if missing(row["share"]) else f"{row['share']:.1%}",
        _ms(dense, total),
        _ms(sparse, total),
        _between(row, total),
        row["predicted_source"] or "",
        crossover_text(row["crossover_density"]) if layer else MISSING,
        _number(row["energy_mj"]),
    )


def _keys(op: Operation, row: dict[Any, Any]) -> tuple[float | str | None, ...]:
    numbers = {
        2: op.density,
        4: op.macs,
        6: row["predicted_ms"] if missing(row["ms"]) else row["ms"],
        7: row["share"],
        8: row["dense_ms"],
        9: row["sparse_ms"],
        10: row["predicted_ms"],
        12: row["crossover_density"],
        13: row["energy_mj"],
    }
    return tuple(None if missing(numbers.get(i)) else float(numbers[i]) for i in range(len(_COLUMNS)))


def _other(row: dict[Any, Any], name: str, layer: bool) -> Any:
    """Measured time on another kernel, predicted where that is all there is."""
    if not layer:
        return None
    return row[f"predicted_{name}"] if missing(row["ms"]) else row[name]


def _ms(value: Any, total: float) -> str:
    return MISSING if missing(value) else fixed(float(value), total)


def _between(row: dict[Any, Any], total: float) -> str:
    if missing(row["predicted_ms"]):
        return MISSING
    ms, lo, hi = (fixed(row[f"predicted_{name}ms"], total) for name in ("", "lo_", "hi_"))
    return f"{ms} [{lo}, {hi}]"


def _number(value: Any) -> str:
    return MISSING if missing(value) else digits(float(value))
