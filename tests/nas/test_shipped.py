"""Data and space of a run on a machine that has not got them: they come with the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nas.config import RunConfig, load_config
from nas.data import Data
from nas.errors import DataError
from nas.setup import make_data, prepare
from nas.shipped import DATA, read_data, ship, write_data

SPACE = """
from torch import nn
def tiny(c, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, c.choice("width", [4, 8])), nn.LazyLinear(classes))
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rng = np.random.default_rng(0)
    (tmp_path / "driver").mkdir()
    np.savez(tmp_path / "driver" / "set.npz", x=rng.normal(size=(60, 4)).astype("float32"), y=np.arange(60) % 3)
    (tmp_path / "driver" / "my.py").write_text(SPACE)
    return load_config(
        {
            "run": {"name": "r", "executor": "ray", "address": "head:6379"},
            "data": {"name": str(tmp_path / "driver" / "set.npz")},
            "space": {"name": "my.py:tiny"},
        }
    )


def equal(one: Data, two: Data) -> bool:
    parts = [(getattr(one, name), getattr(two, name)) for name in ("train", "val", "test")]
    facts = [(d.classes, d.class_names, d.input_shape, d.name) for d in (one, two)]
    return (
        facts[0] == facts[1]
        and torch.equal(one.mean, two.mean)
        and torch.equal(one.std, two.std)
        and all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in parts)
    )


def prepared(config: RunConfig, folder: Path, space_folder: Path) -> tuple[Data, str]:
    plain = {"config": json.dumps(config.as_dict()), "name": "r", "folder": str(folder)}
    _, found, data, space = prepare(plain | {"space_folder": str(space_folder)})
    assert found == folder
    return data, space.sample(0).to_json()


def test_all_of_the_data_comes_back_bit_by_bit(tmp_path: Path, config: RunConfig) -> None:
    data = make_data(config)
    write_data(tmp_path / DATA, data)
    assert equal(read_data(tmp_path / DATA), data)


def test_a_machine_without_the_data_and_the_space_file_uses_what_was_shipped(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(config)
    run = tmp_path / "run"
    (run / "space").mkdir(parents=True)
    (run / "space" / "my.py").write_text(SPACE)
    assert ship(config, run, data) == ("space/my.py", DATA)
    before = prepared(config, run, tmp_path / "driver")
    (tmp_path / "driver").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(run)
    found, drawn = prepared(config, run, tmp_path / "driver")
    assert equal(found, data)
    assert drawn == before[1]


def test_a_machine_with_other_data_of_the_same_name_uses_what_was_shipped(tmp_path: Path, config: RunConfig) -> None:
    data = make_data(config)
    run = tmp_path / "run"
    (run / "space").mkdir(parents=True)
    (run / "space" / "my.py").write_text(SPACE)
    ship(config, run, data)
    np.savez(tmp_path / "driver" / "set.npz", x=np.ones((60, 4), dtype="float32"), y=np.arange(60) % 3)
    (tmp_path / "driver" / "my.py").write_text("raise RuntimeError")
    found, _ = prepared(config, run, tmp_path / "driver")
    assert equal(found, data)


def test_without_what_was_shipped_the_missing_data_are_named(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "driver" / "set.npz").unlink()
    with pytest.raises((DataError, ValueError), match=r"set\.npz"):
        prepared(config, tmp_path, tmp_path / "driver")


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_file_is_never_used(tmp_path: Path, config: RunConfig, damage: str) -> None:
    path = tmp_path / DATA
    write_data(path, make_data(config))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-8:]
    elif damage == "flipped":
        content[-20] ^= 1
    else:
        content = bytearray(b"no tensors")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.safetensors"):
        read_data(path)


def test_data_are_written_once(tmp_path: Path, config: RunConfig) -> None:
    data = make_data(config)
    write_data(tmp_path / DATA, data)
    first = (tmp_path / DATA).stat().st_ino
    write_data(tmp_path / DATA, data)
    assert (tmp_path / DATA).stat().st_ino == first


def test_nothing_is_shipped_to_workers_of_this_machine(tmp_path: Path, config: RunConfig) -> None:
    here = load_config(config.as_dict(), {"run.address": ""})
    assert ship(here, tmp_path, make_data(config)) == ()
    assert list(tmp_path.iterdir()) == [tmp_path / "driver"]
