"""Small files in the formats of public tables, written here, and what is read from them."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hw_models.foreign import fit_table
from hw_models.importers import FORMATS, TableFormatError, read
from hw_models.importers.nn_meter import graph_operations
from hw_models.lowered_cells import arch_string, cell_operations


def written(path: Path, data: Any) -> Path:
    """A file with text, bytes, JSON or a pickle, by its name."""
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif isinstance(data, str):
        path.write_text(data)
    elif path.suffix == ".json":
        path.write_text(json.dumps(data))
    elif path.suffix == ".pt":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    return path


def test_hw_nas_bench(tmp_path: Path) -> None:
    pixel = np.linspace(2, 9, 40)
    tpu = np.where(np.arange(40) == 7, -1.0, pixel * 1.3 + np.arange(40) % 3)
    key = "ConvBlock_H28_W28_Cin24_Cout32_exp6_kernel3_stride2_group1"
    data = {
        "nasbench201": {
            "cifar10": {
                "pixel3_latency": pixel.tolist(),
                "edgetpu_latency": tpu,
                "pixel3_energy": list(pixel * 2),
                "eyeriss_arithmetic_intensity": [3.0] * 40,
                "config": [{"name": "infer.tiny", "C": 16}] * 40,
            }
        },
        "fbnet": {"pixel3_latency": {key: 4.5, "FC_Cin1504_Cout100": 0.2}, "fpga_energy": {key: 1.5}},
    }
    table = read(written(tmp_path / "HW-NAS-Bench-v1_0.pickle", data))
    assert table.provenance["format"] == "hw-nas-bench"
    assert table.series() == ["cifar10.pixel3", "cifar10.edgetpu"]
    assert table.latency("cifar10.pixel3").tolist() == pixel.tolist()
    assert len(table.latency("cifar10.edgetpu")) == 39
    assert table.networks is not None
    assert table.networks["cifar10.pixel3_mj"].iloc[1] == pytest.approx(pixel[1] * 2)
    assert any("1 of 40 values are -1" in p and p.startswith("cifar10.edgetpu_ms") for p in table.problems)
    row = table.timed_operations("pixel3").iloc[0].to_dict()
    assert {k: row[k] for k in ("kind", "c_in", "c_out", "h", "w", "expand", "kernel", "stride", "groups", "ms")} == {
        "kind": "ConvBlock", "c_in": 24, "c_out": 32, "h": 14, "w": 14, "expand": 6, "kernel": 3, "stride": 2, "groups": 1,
        "ms": 4.5
    }  # fmt: skip


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo harm > harmed",)


@pytest.mark.parametrize("name", ["table.pickle", "table.pt"])
def test_nothing_in_a_file_is_ever_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / name, [1.0, Harmful()])
    with pytest.raises(TableFormatError, match=r"wants to run (posix|nt)\.system|cannot be read"):
        read(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


def test_help_lists_one_file_or_a_folder_of_devices(tmp_path: Path) -> None:
    times = [float(t) for t in np.random.default_rng(0).uniform(5, 50, 60)]
    table = read(written(tmp_path / "raspi4.pt", times))
    assert table.provenance["device"] == "raspi4"
    assert table.latency().tolist() == times
    written(tmp_path / "fpga.pt", torch.tensor(times) * 2 + torch.arange(60))
    written(tmp_path / "notes.json", {"a": "b"})
    folder = read(tmp_path)
    assert folder.series() == ["fpga", "raspi4"]
    assert folder.latency("raspi4").tolist() == times
    assert any("notes.json was left out" in p for p in folder.problems)


@pytest.mark.parametrize("form", ["string", "tuple", "json"])
def test_lists_by_cell_become_numbers_of_the_benchmark(tmp_path: Path, form: str) -> None:
    from hw_models.lowered_cells import parse_cell

    numbers = [5, 17, 300, 15000]
    forms: dict[str, list[Any]] = {
        "string": [arch_string(i) for i in numbers],
        "tuple": [parse_cell(i) for i in numbers],
        "json": [arch_string(i) for i in numbers],
    }
    keys = forms[form]
    data = {key: 1.5 * i for key, i in zip(keys, numbers)}
    table = read(written(tmp_path / ("device.json" if form == "json" else "device.pickle"), data))
    assert table.latency().to_dict() == {i: 1.5 * i for i in numbers}
    assert fit_table(cell_operations(range(0, 15625, 1000)), {0: 1.0, 1000: 2.0}).networks == 2


OFA_YAML = """Conv-input:224x224x3-output:112x112x16:
  count: 500
  mean: 4.5
  std: 0.25
expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:5-stride:2-idskip:0:
  count: 500
  mean: 12.0
  var: 0.04
'Logits-input:7x7x1280-output:1000': {mean: 3.0, std: 0.1, count: 20}
"""


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_once_for_all(tmp_path: Path, form: str) -> None:
    if form == "yaml":
        path = written(tmp_path / "mobile.yaml", OFA_YAML)
    else:
        path = written(
            tmp_path / "mobile.json",
            {
                "Conv-input:224x224x3-output:112x112x16": {"mean": 4.5, "std": 0.25, "count": 500},
                "expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:5-stride:2-idskip:0": {
                    "mean": 12.0,
                    "var": 0.04,
                },
                "Logits-input:7x7x1280-output:1000": {"mean": 3.0, "std": 0.1, "count": 20},
            },
        )
    frame = read(path).operations
    assert frame is not None
    assert frame["kind"].tolist() == ["Conv", "expanded_conv", "Logits"]
    assert frame["ms"].tolist() == [4.5, 12.0, 3.0]
    assert frame["std_ms"].tolist() == pytest.approx([0.25, 0.2, 0.1])
    assert list(frame.loc[1, ["c_in", "c_out", "h", "w", "expand", "kernel", "stride"]]) == [16, 24, 56, 56, 6, 5, 2]
    assert list(frame.loc[2, ["c_in", "c_out", "h"]]) == [1280, 1000, 1]


def test_expansions_that_are_channels_are_seen_as_such(tmp_path: Path) -> None:
    key = "expanded_conv-input:56x56x24-output:56x56x24-expand:144-kernel:3-stride:1-idskip:1-se:1-hs:0"
    frame = read(written(tmp_path / "note10.yaml", f"{key}:\n  mean: 2.0\n")).operations
    assert frame is not None
    assert list(frame.loc[0, ["mid", "skip", "se", "hs"]]) == [144, 1, 1, 0]


def test_nn_meter_kernels(tmp_path: Path) -> None:
    config = {"HW": 14, "CIN": 98, "COUT": 120, "KERNEL_SIZE": 3, "STRIDES": 2}
    data = {
        "conv-bn-relu": {
            "id_0": {"model": "a.tflite", "shapes": [[14, 14, 98]], "config": config, "latency": "42.001 +- 1.0"},
            "id_1": {"config": config},
        }
    }
    frame = read(written(tmp_path / "profiled_results.json", data)).operations
    assert frame is not None
    assert len(frame) == 1
    assert list(frame.loc[0, ["ms", "std_ms", "c_in", "c_out", "kernel", "stride", "h"]]) == [
        42.001,
        1.0,
        98,
        120,
        3,
        2,
        7,
    ]


def node(
    kind: str, inbounds: list[str], outbounds: list[str], out: list[int], into: list[int], **attr: Any
) -> dict[str, Any]:
    inner = {"type": kind, "output_shape": [out], "input_shape": [into], "attr": attr}
    return {"attr": inner, "inbounds": inbounds, "outbounds": outbounds}


GRAPH = {
    "input": node("Placeholder", [], ["conv", "zero"], [1, 32, 32, 3], []),
    "conv": node("Conv2D", ["input"], ["relu", "dead"], [1, 16, 16, 8], [1, 32, 32, 3], strides=[1, 2, 2, 1],
                 kernel_shape=[3, 3], weight_shape=[3, 3, 3, 8]),
    "relu": node("Relu", ["conv"], ["add"], [1, 16, 16, 8], [1, 16, 16, 8]),
    "dead": node("Conv2D", ["conv"], [], [1, 16, 16, 8], [1, 16, 16, 8], kernel_shape=[1, 1], weight_shape=[1, 1, 8, 8]),
    "zero": node("ZerosLike", ["input"], ["ofzero"], [1, 16, 16, 8], [1, 32, 32, 3]),
    "ofzero": node("AvgPool", ["zero"], ["add"], [1, 16, 16, 8], [1, 16, 16, 8], ksize=[1, 3, 3, 1]),
    "add": node("AddV2", ["relu", "ofzero"], ["fc"], [1, 16, 16, 8], [1, 16, 16, 8]),
    "fc": node("MatMul", ["add"], [], [1, 10], [1, 8]),
}  # fmt: skip


def test_graphs_say_what_is_dead() -> None:
    rows = {row["dst"]: row for row in graph_operations(GRAPH)}
    alive = {row["kind"]: row["live"] for row in rows.values() if row["kind"] != "Conv2D"}
    assert alive == {"Relu": True, "ZerosLike": False, "AvgPool": False, "AddV2": True, "MatMul": True}
    convs = [row for row in rows.values() if row["kind"] == "Conv2D"]
    assert sorted((row["kernel"], row["live"]) for row in convs) == [(1, False), (3, True)]
    first = next(row for row in convs if row["kernel"] == 3)
    assert [first[k] for k in ("c_in", "c_out", "h", "w", "stride", "groups")] == [3, 8, 16, 16, 2, 1]
    assert all(row["src"] < row["dst"] for row in rows.values())


def test_nn_meter_networks(tmp_path: Path) -> None:
    lines = [
        {
            "id": f"net_{i}",
            "cortexA76cpu_tflite21": 10.5 + i,
            "myriadvpu_openvino2019r2": 7.25 * (i + 1),
            "graph": GRAPH,
        }
        for i in range(3)
    ]
    table = read(written(tmp_path / "nets.jsonl", "\n".join(json.dumps(line) for line in lines)))
    assert table.series() == ["cortexA76cpu_tflite21", "myriadvpu_openvino2019r2"]
    assert table.latency("cortexA76cpu_tflite21").to_dict() == {"net_0": 10.5, "net_1": 11.5, "net_2": 12.5}
    assert table.operations is not None
    assert table.operations.groupby("network").size().tolist() == [7, 7, 7]


@pytest.mark.parametrize("named", [True, False])
def test_fbnet_text(tmp_path: Path, named: bool) -> None:
    text = ("ir_k3_e1 ir_k5_e6 skip\n" if named else "") + "1500.5 2500.0 10.0\n900.0 1800.0 12.5\n"
    table = read(written(tmp_path / "lookup_table.txt", text))
    frame = table.operations
    assert frame is not None
    assert frame["ms"].tolist() == pytest.approx([1.5005, 2.5, 0.01, 0.9, 1.8, 0.0125])
    assert frame["layer"].tolist() == [0, 0, 0, 1, 1, 1]
    assert frame["kind"].iloc[1] == ("ir_k5_e6" if named else "op1")
    assert any("does not say its unit" in p for p in table.problems)
    other = read(tmp_path / "lookup_table.txt", unit="ms").operations
    assert other is not None
    assert other["ms"].iloc[0] == 1500.5


SPDY = """base
0.160
prunable
0.150
layer1.0.conv1
0.10 0.0000
0.12 0.4000
0.02 0.9900
fc
0.05 0.0000
0.06 0.4000
0.01 0.9900
"""


def test_spdy(tmp_path: Path) -> None:
    table = read(written(tmp_path / "rn18_unstr.txt", SPDY))
    assert table.latency().to_dict() == {"sparsity 0": 160.0}
    uniform = table.timed_operations()
    model = fit_table(uniform, table.latency())
    expected = {"sparsity 0": 160.0, "sparsity 0.4": 190.0, "sparsity 0.99": 40.0}
    assert model.predict_many(uniform)["ms"].to_dict() == pytest.approx(expected, rel=1e-3)
    mixed = uniform.drop(columns="ms").drop_duplicates("layer").assign(network="mixed", density=[0.305, 0.01, 1.0])
    assert model.predict(mixed)["ms"] == pytest.approx(70 + 10 + 10, rel=1e-2)


def sensitivity(name: str, seconds: list[float]) -> dict[str, Any]:
    return {"id": "1", "name": name, "sparse_measurements": [[s, [t, t]] for s, t in zip([None, 0.4, 0.8], seconds)]}


def test_sparseml_json(tmp_path: Path) -> None:
    data = {
        "num_cores": 4,
        "batch_size": 1,
        "results_model": sensitivity("model", [0.010, 0.012, 0.005]),
        "results": [
            sensitivity("convolution_0", [0.006, 0.008, 0.003]),
            sensitivity("depthwise_convolution_1", [0.004, 0.004, 0.002]),
        ],
    }
    table = read(written(tmp_path / "mobilenet_perf.json", data))
    assert table.latency().to_dict() == pytest.approx(
        {"mobilenet 0": 10.0, "mobilenet 0.4": 12.0, "mobilenet 0.8": 5.0}
    )
    frame = table.timed_operations()
    assert frame.groupby("network", sort=False)["ms"].sum().tolist() == pytest.approx([10, 12, 5])
    assert frame["kind"].unique().tolist() == ["conv", "depthwise_conv"]
    assert table.provenance["threads"] == 4
    other = frame.assign(layer=frame["layer"].str.replace("mobilenet", "other"), network="other " + frame["network"])
    assert fit_table(frame, table.latency()).predict_many(other)["ms"].tolist() == pytest.approx([10, 12, 5], rel=0.01)


def test_sparseml_csv_counts_fused_layers_once(tmp_path: Path) -> None:
    rows = ["model,param,sparsity,seconds,batch_size,num_cores,iterations,warmup"]
    for param, dense, sparse in (
        ("__model__", 0.01, 0.006),
        ("a.weight", 0.004, 0.002),
        ("b.weight", 0.004, 0.002),
        ("c.weight", 0.006, 0.004),
    ):
        rows += [f"net,{param},{s},{t},1,16,10,5" for s, t in ((0.0, dense), (0.8, sparse))]
    table = read(written(tmp_path / "layers.csv", "\n".join(rows)))
    frame = table.timed_operations()
    assert (frame["ms"] * frame["count"]).groupby(frame["network"]).sum().to_dict() == pytest.approx(
        {"net 0": 10.0, "net 0.8": 6.0}
    )
    assert any("count 0 times" in p for p in table.problems)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_timm(tmp_path: Path, form: str) -> None:
    frame = pd.DataFrame(
        {
            "model": ["resnet18", "resnet50"],
            "infer_samples_per_sec": [1000.0, 250.0],
            "infer_step_time": [256.0, 1024.0],
            "infer_batch_size": 256,
            "infer_img_size": 224,
            "infer_gmacs": [1.82, 4.11],
            "infer_macts": [2.48, 11.11],
            "param_count": [11.69, 25.56],
        }
    )
    path = tmp_path / f"benchmark-infer.{form}"
    frame.to_csv(path, index=False) if form == "csv" else frame.to_parquet(path)
    table = read(path)
    assert table.latency().to_dict() == {"resnet18@224": 256.0, "resnet50@224": 1024.0}
    assert table.operations is not None
    assert table.operations["macs"].tolist() == pytest.approx([1.82e9 * 256, 4.11e9 * 256])
    assert table.operations["params"].tolist() == pytest.approx([11.69e6, 25.56e6])


HAT = (
    "encoder_embed_dim,encoder_layer_num,encoder_ffn_embed_dim_avg,encoder_self_attention_heads_avg,decoder_embed_dim,"
    "decoder_layer_num,decoder_ffn_embed_dim_avg,decoder_self_attention_heads_avg,decoder_ende_attention_heads_avg,"
    "decoder_arbitrary_ende_attn_avg,latency_mean_encoder,latency_mean_decoder,latency_std_encoder,latency_std_decoder"
)


def test_hat(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        d_e, d_d = rng.choice([512, 640], 2)
        layers, f_e, f_d = int(rng.integers(1, 7)), rng.uniform(1024, 3072), rng.uniform(1024, 3072)
        encoder, decoder = 5 + 6 * d_e * f_e * 1e-6, 40 + layers * (30 + d_d * f_d * 1e-5)
        rows.append(f"{d_e},6,{f_e},4.0,{d_d},{layers},{f_d},4.0,4.0,2.0,{encoder},{decoder},0.1,1.5")
    table = read(written(tmp_path / "wmt14enfr_cpu_xeon_all.csv", "\n".join([HAT, *rows])))
    assert table.series() == ["ms", "encoder", "decoder"]
    assert table.networks is not None
    assert table.networks["ms"].tolist() == pytest.approx(
        (table.networks["encoder_ms"] + table.networks["decoder_ms"]).tolist()
    )
    assert table.operations is not None
    score = fit_table(table.operations, table.latency().iloc[:40]).score(table.operations, table.latency().iloc[40:])
    assert score["hit10"] == 1.0


def test_tf_nas_and_its_interpolated_rows(tmp_path: Path) -> None:
    measured = {mid: 0.5 + 0.01 * mid + 0.1 * np.sin(mid) for mid in range(1, 40)}
    filled = {mid: float(np.interp(mid, [1, 16, 32, 40], [0.5, 0.9, 1.1, 1.6])) for mid in range(1, 40)}
    data = {"base": 12.5, "MBI_112_16_0_24_k3_s2_relu": filled}
    table = read(written(tmp_path / "latency_cpu.pkl", data))
    assert table.provenance["base_ms"] == 12.5
    frame = table.operations
    assert frame is not None
    assert list(frame.loc[3, ["c_in", "c_out", "kernel", "stride", "h", "mid", "act"]]) == [
        16,
        24,
        3,
        2,
        56,
        4,
        "relu",
    ]
    assert any("filled in by interpolation" in p for p in table.problems)
    other = read(written(tmp_path / "honest.pkl", {"base": 1.0, "MBI_112_16_0_24_k3_s2_relu": measured}))
    assert other.problems == []


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.json", "", "is empty"),
        ("lfs.pt", "version https://git-lfs.github.com/spec/v1\noid sha256:41\nsize 9544\n", "git lfs pull"),
        ("other.txt", "hello world\nthis is text\n", "no table of a known format"),
        ("broken.json", '{"results": [', "no table of a known format"),
        ("cut.pickle", pickle.dumps(list(range(1000)))[:500], "no pickle that can be read"),
        ("words.pickle", pickle.dumps({"a": "b"}), "hw-nas-bench: expected a dictionary with 'nasbench201'"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, data: Any, words: str) -> None:
    with pytest.raises(TableFormatError, match=words):
        read(written(tmp_path / name, data))


def test_a_given_format_is_the_only_one_tried(tmp_path: Path) -> None:
    path = written(tmp_path / "list.json", [1.0, 2.0])
    assert read(path, "help").latency().tolist() == [1.0, 2.0]
    with pytest.raises(TableFormatError, match="ofa"):
        read(path, "ofa")
    with pytest.raises(ValueError, match="unknown format 'xml'; known: sparseml-json"):
        read(path, "xml")
    with pytest.raises(ValueError, match="unknown unit"):
        read(path, unit="h")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.json")


def test_every_format_has_a_test_here() -> None:
    covered = Path(__file__).read_text()
    words = {
        "sparseml-json": "test_sparseml_json",
        "sparseml-csv": "test_sparseml_csv",
        "ofa": "test_once_for_all",
        "help": "test_help_lists",
    }
    words |= {"fbnet": "test_fbnet_text", "nn-meter": "test_nn_meter"}
    for name in FORMATS:
        assert f"def {words.get(name, 'test_' + name.replace('-', '_'))}" in covered


def test_pickles_of_numpy_arrays_and_old_protocols_are_read(tmp_path: Path) -> None:
    for protocol in (2, 4, 5):
        buffer = io.BytesIO()
        pickle.dump(np.arange(1.0, 9.0), buffer, protocol=protocol)
        assert read(written(tmp_path / "array.pickle", buffer.getvalue())).latency().tolist() == list(
            np.arange(1.0, 9.0)
        )


def test_which_series_must_be_said(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        written(tmp_path / name, [1.5, 2.5, 4.0])
    table = read(tmp_path)
    with pytest.raises(ValueError, match="which series"):
        table.latency()
    with pytest.raises(ValueError, match="unknown series 'c'; known: a, b"):
        table.latency("c")
    with pytest.raises(ValueError, match="no times of operations"):
        table.timed_operations()
