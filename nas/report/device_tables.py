"""Devices as tables: `devices_sheet` for all of them, `device_sheet` for every figure of one with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nas.report.sheet import Column, Sheet
from nas.report.units import MISSING, digits

if TYPE_CHECKING:
    from hw_models.descriptor import DeviceDescriptor

_COLUMNS = (
    Column("device"),
    Column("name", rank=4),
    Column("kind", rank=3),
    Column("cores", True, 2),
    Column("threads", True, 6),
    Column("FP32 GFLOP/s", True),
    Column("memory GB/s", True),
    Column("peak W", True, 5),
    Column("figures are", rank=1),
)


def devices_sheet(devices: Sequence[DeviceDescriptor]) -> Sheet:
    """One row per device."""
    rows, keys = [], []
    for d in devices:
        bandwidth = d.bandwidth_gbs if math.isnan(d.bandwidth_measured_gbs) else d.bandwidth_measured_gbs
        how = "measured" if d.measured else "this machine's own account" if d.id == "host" else "from data sheets"
        numbers = (d.peak_gflops, bandwidth, d.peak_w)
        counts = (f"{d.cores:,}" if d.cores else MISSING, f"{d.threads:,}" if d.threads else MISSING)
        rows.append((d.id, d.name, d.device_class, *counts, *map(_number, numbers), how))
        keys.append((None, None, None, float(d.cores), float(d.threads), *map(_key, numbers), None))
    notes = ["GFLOP/s of the threads that are used; every figure and its source: nas devices DEVICE"]
    if any(d.id == "host" and not d.measured for d in devices):
        notes.append("host is this machine; nas calibrate measures it")
    return Sheet("Devices", _COLUMNS, tuple(rows), tuple(notes), keys=tuple(keys))


def device_sheet(device: DeviceDescriptor) -> Sheet:
    """One row per known figure."""
    rows = [
        (field, _number(value) if isinstance(value, float) else f"{value:,}", device.sources.get(field, MISSING))
        for field, value in device.known.items()
    ]
    how = "measured" if device.measured else "not measured"
    title = f"{device.id}: {device.name} ({device.device_class}, {how})"
    return Sheet(
        title,
        (Column("figure"), Column("value", True), Column("from")),
        tuple(rows),
        (device.note,) if device.note else (),
    )


def _number(value: float) -> str:
    return MISSING if math.isnan(value) else digits(value)


def _key(value: float) -> float | None:
    return None if math.isnan(value) else value
