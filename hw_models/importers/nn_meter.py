"""nn-Meter: kernels as JSON ({"conv-bn-relu": {"id": {"config": {"HW": 14, "CIN": ...}, "latency": "42.0 +- 1.0"}}}) and
its data set of networks as JSON lines ({"id", "<device>": ms, "graph": {node: {"attr": ..., "inbounds", "outbounds"}}}).

Graphs become operations with `live`: nodes whose output does not reach the network's, or whose input is zero, are not.

Source: Zhang et al., nn-Meter (MobiSys 2021).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from hw_models.importers.table import ImportedTable, TableFormatError, kept_columns

__all__ = ["graph_operations", "load", "sniff"]

_CONFIG = {
    "hw": "hw",
    "cin": "c_in",
    "cout": "c_out",
    "kernel_size": "kernel",
    "kernelsize": "kernel",
    "strides": "stride",
}
_CONFIG |= {"stride": "stride", "cin1": "c_in", "pool_strides": "stride"}
_SOURCES = re.compile(r"const|placeholder|variable|readvariable|^input$", re.I)
_ZERO = re.compile(r"zero", re.I)


def sniff(path: Path, head: bytes) -> bool:
    """Are there latencies beside configurations, or graphs with inbounds?"""
    if not path.is_file() or head.lstrip()[:1] != b"{":
        return False
    return (
        (b'"latency"' in head and (b'"config"' in head or b"+-" in head)) or b'"inbounds"' in head or b'"graph"' in head
    )


def load(path: Path, unit: str | None = None) -> ImportedTable:
    """Read kernels or networks."""
    with path.open() as file:
        first = file.readline()
    try:
        line = json.loads(first)
    except json.JSONDecodeError:
        line = None
    if isinstance(line, dict) and ("graph" in line or "id" in line):
        return _networks(path)
    data = json.loads(path.read_text())
    if not isinstance(data, dict):
        raise TableFormatError("expected a dictionary of kernels")
    return _kernels(data)


def _kernels(data: dict[str, Any]) -> ImportedTable:
    rows = []
    for kind, entries in data.items():
        if not isinstance(entries, dict):
            raise TableFormatError(f"{kind}: expected kernels by name, got {type(entries).__name__}")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or "latency" not in entry:
                continue  # described, not yet measured
            row: dict[str, Any] = {"network": f"{kind}/{name}", "kind": kind, "stride": 1}
            for key, value in (entry.get("config") or {}).items():
                if isinstance(value, int | float):
                    row[_CONFIG.get(key.lower(), key.lower())] = value
            row["ms"], row["std_ms"] = _latency(entry["latency"], f"{kind}/{name}")
            if "hw" in row:  # of the input
                row["h"] = row["w"] = -(-int(row.pop("hw")) // max(1, int(row["stride"])))
            if row.get("c_out") is None and "c_in" in row:
                row["c_out"] = row["c_in"]
            rows.append(row)
    if not rows:
        raise TableFormatError("no kernel in it has a latency")
    return ImportedTable(None, kept_columns(pd.DataFrame(rows)), {"source": "nn-Meter kernels", "unit": "ms"})


def _latency(value: Any, where: str) -> tuple[float, float]:
    """From "42.0 +- 1.0" or a number."""
    parts = re.split(r"\s*(?:\+-|\+/-|±)\s*", str(value).strip())
    try:
        return float(parts[0]), float(parts[1]) if len(parts) > 1 else float("nan")
    except ValueError as error:
        raise TableFormatError(f"{where}: expected a latency such as '42.0 +- 1.0', got {value!r}") from error


def _networks(path: Path) -> ImportedTable:
    networks, operations = [], []
    problems = []
    with path.open() as file:
        for at, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name = str(entry.pop("id", at - 1))
                graph = entry.pop("graph", None)
            except (json.JSONDecodeError, AttributeError, TypeError) as error:
                raise TableFormatError(f"line {at} is no network: {error}") from error
            times = {
                f"{key}_ms": float(v)
                for key, v in entry.items()
                if isinstance(v, int | float) and not isinstance(v, bool)
            }
            networks.append({"network": name, **times})
            if isinstance(graph, dict):
                try:
                    operations += [{"network": name, **row} for row in graph_operations(graph)]
                except (KeyError, TypeError, ValueError, IndexError, AttributeError, nx.NetworkXException) as error:
                    problems.append(f"network {name}: its graph cannot be read ({error!r}); it has no operations")
    if not networks:
        raise TableFormatError("no network in it")
    frame = pd.DataFrame(networks).set_index("network")
    described = kept_columns(pd.DataFrame(operations)) if operations else None
    return ImportedTable(frame, described, {"source": "nn-Meter networks", "unit": "ms"}, problems)


def graph_operations(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """Nodes of an nn-Meter graph as rows of `fit_table`, in an order that follows the edges."""
    net: nx.DiGraph[str] = nx.DiGraph()
    for name, node in graph.items():
        net.add_node(name)
        net.add_edges_from((source, name) for source in node.get("inbounds", ()) if source in graph)
        net.add_edges_from((name, target) for target in node.get("outbounds", ()) if target in graph)
    kind = {name: str(graph[name].get("attr", {}).get("type", "")) for name in net}
    order = list(nx.topological_sort(net))
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[p] for p in net.predecessors(name)), default=-1)
    ends = [name for name in order if not net.out_degree(name)]
    end = max(ends, key=lambda name: (depth[name], order.index(name)))
    reached = nx.ancestors(net, end) | {end}
    zero: set[str] = set()
    for name in order:
        inputs = [
            p for p in net.predecessors(name) if not (_SOURCES.search(kind[p]) and not net.in_degree(p)) or p in zero
        ]
        if _ZERO.search(kind[name]) or (inputs and all(p in zero for p in inputs)):
            zero.add(name)
    place = {name: i for i, name in enumerate(order)}
    rows = []
    for name in order:
        if not net.in_degree(name) or (_SOURCES.search(kind[name]) and kind[name]):
            continue
        inputs = [p for p in net.predecessors(name) if p in place]
        live = name in reached and name not in zero
        row = {"kind": kind[name] or "unknown", "live": live, "src": place[inputs[-1]], "dst": place[name]}
        rows.append(row | _shape(graph[name].get("attr", {})))
    return rows


def _shape(node: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a node; tensors are [batch, height, width, channels], or with channels first where weights say so."""
    inner = node.get("attr") or {}
    out, into = _first(node.get("output_shape")), _first(node.get("input_shape"))
    row: dict[str, Any] = {}
    weights = inner.get("weight_shape")
    kernel, stride = inner.get("kernel_shape") or inner.get("ksize"), inner.get("strides")
    if kernel:
        row["kernel"] = max(int(k) for k in kernel)
    if stride:
        row["stride"] = max(int(s) for s in stride)
    last = True
    if out and len(out) == 4:
        if weights and len(weights) == 4:  # TensorFlow: height, width, in, out; ONNX: out, in, height, width
            last = out[3] in (weights[3], weights[2] * weights[3]) or out[1] != weights[0]
        else:
            last = not (out[2] == out[3] and out[1] != out[2])
        row |= {"c_out": out[3] if last else out[1], "h": out[1] if last else out[2], "w": out[2] if last else out[3]}
    elif out:
        row["c_out"], row["h"], row["w"] = out[-1], 1, 1
    if into:
        row["c_in"] = into[-1] if last or len(into) != 4 else into[1]
    if weights and len(weights) == 4 and "c_in" in row:
        per_group = weights[2] if last else weights[1]
        depthwise = "depthwise" in str(node.get("type", "")).lower()
        row["groups"] = row["c_in"] if depthwise else max(1, int(row["c_in"]) // max(1, int(per_group)))
    return {name: int(value) for name, value in row.items() if value is not None}


def _first(shapes: Any) -> list[int] | None:
    """The first shape of a list of shapes, or the shape itself; the batch, often -1, does not matter."""
    if not shapes:
        return None
    shape = shapes[0] if isinstance(shapes[0], list | tuple) else shapes
    return [int(s) for s in shape] or None
