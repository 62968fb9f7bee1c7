"""Tables with one network per row: timm's benchmark CSV (or the same as parquet), and HAT's latency data sets.

timm: model, infer_step_time (ms of one batch), infer_batch_size, infer_img_size, infer_gmacs, infer_macts, param_count
(millions; of one image). HAT: ten numbers of a transformer, mean and standard deviation of encoder and decoder in ms.

Source: huggingface/pytorch-image-models, results/benchmark-infer-*.csv; Wang et al., HAT (ACL 2020), latency_dataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hw_models.importers.table import ImportedTable, TableFormatError

__all__ = ["load_hat", "load_timm", "sniff_hat", "sniff_timm", "transformer_operations"]

TOKENS = 30  # HAT translates sentences of about this length, one token at a time
WIDTH = 512  # of HAT's queries, keys and values


def sniff_timm(path: Path, head: bytes) -> bool:
    """Are these timm's columns?"""
    return path.is_file() and (b"infer_step_time" in head or (path.suffix == ".parquet" and head[:4] == b"PAR1"))


def load_timm(path: Path, unit: str | None = None) -> ImportedTable:
    """Networks are `model@size`, with the run before it where a file has several."""
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    lacking = {"model", "infer_step_time"} - set(frame.columns)
    if lacking:
        raise TableFormatError(
            f"expected timm's columns; {', '.join(sorted(lacking))} are missing among {', '.join(frame.columns)}"
        )
    size = frame["infer_img_size"].astype("Int64").astype(str) if "infer_img_size" in frame else "?"
    name = frame["model"].astype(str) + "@" + size
    if "run" in frame and frame["run"].nunique() > 1:
        name = frame["run"].astype(str) + "/" + name
    batch = frame.get("infer_batch_size", 1.0)
    networks = pd.DataFrame({"ms": frame["infer_step_time"], "model": frame["model"], "batch": batch})
    for ours, theirs in (
        ("run", "run"),
        ("image", "infer_img_size"),
        ("gmacs", "infer_gmacs"),
        ("macts", "infer_macts"),
    ):
        if theirs in frame:
            networks[ours] = frame[theirs]
    if "param_count" in frame:
        networks["mparams"] = frame["param_count"]
    problems = _fill(networks)
    networks.index = pd.Index(name, name="network")
    rows: dict[str, Any] = {"network": name, "kind": "network", "batch": batch}
    for cost, column, scale in (("macs", "gmacs", 1e9), ("activations", "macts", 1e6)):
        if column in networks:
            rows[cost] = networks[column].to_numpy() * scale * np.asarray(batch)
    if "mparams" in networks:
        rows["params"] = networks["mparams"].to_numpy() * 1e6
    operations = pd.DataFrame(rows)
    costs = [c for c in ("macs", "activations") if c in operations]
    whole = operations[costs].notna().all(axis=1) if costs else pd.Series(True, index=operations.index)
    if not whole.all():
        problems.append(f"{int((~whole).sum())} networks have no macs or activations: they have no operations")
    return ImportedTable(
        networks, operations[whole].reset_index(drop=True), {"source": "timm benchmark", "unit": "ms"}, problems
    )


def _fill(networks: pd.DataFrame) -> list[str]:
    """Costs that one run left out, from another run of the same model and size in the same file."""
    filled = 0
    for column in ("gmacs", "macts"):
        if column in networks and "image" in networks:
            other = networks.groupby(["model", "image"])[column].transform("median")
            filled = max(filled, int((networks[column].isna() & other.notna()).sum()))
            networks[column] = networks[column].fillna(other)
    return (
        [f"macs and activations of {filled} networks are taken from other runs of the same model and size"]
        if filled
        else []
    )


def sniff_hat(path: Path, head: bytes) -> bool:
    """Are these HAT's columns?"""
    return path.is_file() and b"encoder_embed_dim" in head.split(b"\n")[0] and b"latency_mean" in head


def load_hat(path: Path, unit: str | None = None) -> ImportedTable:
    """Networks by row number; times of encoder, decoder and both."""
    frame = pd.read_csv(path)
    frame.index.name = "network"
    parts = [c for c in ("latency_mean_encoder", "latency_mean_decoder") if c in frame]
    if not parts:
        raise TableFormatError("expected latency_mean_encoder and latency_mean_decoder")
    networks = frame.drop(columns=[c for c in frame.columns if str(c).startswith("latency_")])
    networks.insert(0, "ms", frame[parts].sum(axis=1, min_count=len(parts)))
    for part in ("encoder", "decoder"):
        if f"latency_mean_{part}" in frame:
            networks[f"{part}_ms"] = frame[f"latency_mean_{part}"]
        if f"latency_std_{part}" in frame:
            networks[f"{part}_std_ms"] = frame[f"latency_std_{part}"]
    note = f"costs of operations assume {TOKENS} tokens and {WIDTH} wide attention"
    return ImportedTable(
        networks, transformer_operations(frame), {"source": "HAT data set", "unit": "ms", "note": note}
    )


def transformer_operations(frame: pd.DataFrame) -> pd.DataFrame:
    """HAT's ten numbers as operations: projections, attention and feed-forward layers of encoder and decoder.

    The decoder runs once per token; averages over layers stand for all layers.
    """
    blocks = []

    def add(part: str, kind: str, weights: Any, extra: Any, width: Any, heads: Any) -> None:
        steps = 1 if part == "encoder" else TOKENS
        tokens = TOKENS // steps
        depth = frame[f"{part}_layer_num"]
        known = {"network": frame.index, "kind": f"{part}_{kind}", "count": depth * steps}
        cost = {"macs": weights * tokens + extra, "activations": width * tokens, "params": weights}
        blocks.append(pd.DataFrame({**known, **cost, "heads": heads}))

    for part in ("encoder", "decoder"):
        width, hidden = frame[f"{part}_embed_dim"], frame[f"{part}_ffn_embed_dim_avg"]
        heads = frame[f"{part}_self_attention_heads_avg"]
        span = 2.0 * TOKENS * WIDTH * (TOKENS if part == "encoder" else 1)
        add(part, "self_attention", 4.0 * width * WIDTH, span, width, heads)
        add(part, "ffn", 2.0 * width * hidden, 0.0, width + hidden, np.nan)
        if part == "decoder" and "decoder_ende_attention_heads_avg" in frame:
            attended = frame.get("decoder_arbitrary_ende_attn_avg", 1.0)
            add(
                part,
                "ende_attention",
                2.0 * width * WIDTH,
                span * attended,
                width,
                frame["decoder_ende_attention_heads_avg"],
            )
    return pd.concat(blocks, ignore_index=True)
