"""The engine of one-shot searches: one seed one result however often it is interrupted, halves that do not meet, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.checkpoint import Checkpoints, read_facts
from nas.data import Data, Split
from nas.errors import DataError, EvaluationFailed, RunError
from nas.oneshot.engine import RESULT, Result, read_log, read_result, train_algorithm
from nas.oneshot.halves import Augmentation, Batches, halves
from search_spaces import Space, get_space
from tests.nas.oneshot_fakes import Fake, make_fake, toy_data

torch.set_num_threads(1)


class Stop(BaseException):
    """Stands in for a kill at this very point."""


class Clock:
    """Every look at it takes a second, so that every step is due for a checkpoint."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(scope="module")
def space() -> Space:
    return get_space("mlp", input_shape=(1, 2, 2), classes=3)


@pytest.fixture(scope="module")
def data() -> Data:
    return toy_data()


def without_time(result: Result) -> tuple[Any, ...]:
    log = [{key: value for key, value in row.items() if key != "seconds"} for row in result.log]
    facts = {k: v for k, v in result.facts.items() if k not in ("seconds", "peak_memory_bytes", "options")}
    return result.found, log, facts


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    facts = json.loads((folder / RESULT).read_text())["facts"]
    assert facts["algorithm"] == "fake"
    newest = max(folder.glob("checkpoint-*"))
    from safetensors.torch import load_file

    return load_file(newest)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, run: Any) -> None:
    """Run and be stopped before the step of this count (over all phases, and this process)."""
    whole = Fake.step

    def step(self: Fake, *args: Any) -> Any:
        if self.count == at:
            raise Stop
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "step", step)
        with pytest.raises(Stop):
            run()


# -- one seed, one result ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(space: Space, data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_algorithm(make_fake(space, data), data, folder, seed=0)


@pytest.mark.parametrize("checkpoint_s", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_interrupted_at_any_step_and_continued_is_uninterrupted_bit_for_bit(
    space, data, uninterrupted, tmp_path, monkeypatch, at, checkpoint_s
):
    def run() -> Result:
        made = make_fake(space, data, checkpoint_s=checkpoint_s)
        return train_algorithm(made, data, tmp_path, seed=0, clock=Clock())

    interrupted(monkeypatch, at, run)
    if checkpoint_s != 3.0:  # 3 steps per epoch
        assert bool(list(tmp_path.glob("checkpoint-*"))) == (checkpoint_s == 0 or at >= 3)
    torch.manual_seed(at)  # whatever else the process did meanwhile
    result = run()
    assert without_time(result) == without_time(uninterrupted[1])
    ours, theirs = final_state(tmp_path), final_state(uninterrupted[0])
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_interrupted_before_every_single_step_it_still_ends_the_same(space, data, uninterrupted, tmp_path, monkeypatch):
    def run() -> Result:
        return train_algorithm(make_fake(space, data, checkpoint_s=0.0), data, tmp_path, seed=0, clock=Clock())

    for at in range(1, 12):
        interrupted(monkeypatch, at, run)
    assert without_time(run()) == without_time(uninterrupted[1])


def test_another_seed_gives_another_search(space, data, uninterrupted, tmp_path):
    other = train_algorithm(make_fake(space, data, seed=1), data, tmp_path, seed=1)
    assert without_time(other) != without_time(uninterrupted[1])


def test_the_global_generator_is_as_before(space, data, tmp_path):
    algorithm = make_fake(space, data)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train_algorithm(algorithm, data, tmp_path, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_search_is_read_and_not_trained(space, data, uninterrupted, monkeypatch):
    monkeypatch.setattr(Fake, "step", lambda *_: pytest.fail("trained again"))
    again = train_algorithm(make_fake(space, data), data, uninterrupted[0], seed=0)
    assert again == uninterrupted[1]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nas.oneshot.engine import train_algorithm
from search_spaces import get_space
from tests.nas.oneshot_fakes import Fake, make_fake, toy_data
folder = Path(sys.argv[1])
Fake.marker = folder / "died"
data = toy_data()
made = make_fake(get_space("mlp", input_shape=(1, 2, 2), classes=3), data, checkpoint_s=0.0, die_at=7)
train_algorithm(made, data, folder, seed=0)
"""


def test_a_process_killed_by_the_kernel_is_continued_to_the_same_result(uninterrupted, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert first.returncode == -9
    assert read_log(tmp_path)
    assert not (tmp_path / RESULT).exists()
    subprocess.run(command, env=environment, check=True, timeout=60)
    ours, theirs = final_state(tmp_path), final_state(uninterrupted[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_result(tmp_path).found == uninterrupted[1].found


# -- data -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(10, 10, 10), (7, 5, 3), (1, 1, 1, 1), (2, 9), (1, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_halves_are_disjoint_stratified_and_together_everything(sizes, seed):
    y = torch.cat([torch.full((n,), label) for label, n in enumerate(sizes)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    one, two = halves(y, seed)
    assert sorted(one.tolist() + two.tolist()) == list(range(len(y)))
    assert abs(len(one) - len(two)) <= 1
    for label in range(len(sizes)):
        assert abs(int((y[one] == label).sum()) - int((y[two] == label).sum())) <= 1
    assert torch.equal(halves(y, seed)[0], one)


def test_another_seed_cuts_other_halves():
    y = torch.arange(60) % 3
    assert not torch.equal(halves(y, 0)[0], halves(y, 1)[0])


def test_one_row_cannot_be_cut():
    with pytest.raises(DataError, match="at least 2 rows"):
        halves(torch.tensor([0]), 0)


def test_weights_see_one_half_and_alphas_the_other_and_nobody_anything_else(space, data, tmp_path):
    algorithm = make_fake(space, data)
    result = train_algorithm(algorithm, data, tmp_path, seed=0)  # NaN in the other parts would be in the losses
    of_weights, of_alphas = halves(data.train.y, 0)
    everything = {tuple(row.tolist()): number for number, row in enumerate(data.train.x.flatten(1))}
    for batches, rows in ((algorithm.seen, of_weights), (algorithm.seen_held, of_alphas)):
        seen = Counter(everything[tuple(row.tolist())] for x, _ in batches for row in x.flatten(1))
        assert set(seen) <= set(rows.tolist())
        assert len(set(seen)) > len(rows) * 0.9
        labels = [
            (everything[tuple(r.tolist())], int(c)) for x, y in batches for r, c in zip(x.flatten(1), y, strict=True)
        ]
        assert all(int(data.train.y[row]) == label for row, label in labels)
    assert all(row["supernet_loss"] > 0 for row in result.log)


def test_every_epoch_of_every_phase_has_an_order_of_its_own(space, data, tmp_path):
    algorithm = make_fake(space, data)
    train_algorithm(algorithm, data, tmp_path, seed=0)
    steps = len(algorithm.seen) // 4
    epochs = [torch.cat([x for x, _ in algorithm.seen[i * steps : (i + 1) * steps]]) for i in range(4)]
    for one in range(4):
        for two in range(one):
            assert not torch.equal(epochs[one], epochs[two])


def test_every_round_and_chunk_is_augmented_otherwise(monkeypatch):
    monkeypatch.setattr("nas.oneshot.halves.CHUNK_BYTES", 1)
    rows = Split(torch.ones(16, 1, 9, 9), torch.arange(16))  # equal images: only what is done to them differs
    batches = Batches(rows, 8, seed=0, stream="w", augmentation=Augmentation(("crop", "cutout"), 3, 2))
    made = [batches[number][0] for number in range(4)]
    assert all(not torch.equal(made[one], made[two]) for one in range(4) for two in range(one))


def test_every_round_of_batches_has_every_row_once_in_an_order_of_its_own():
    rows = Split(torch.arange(24.0).view(24, 1), torch.arange(24))
    batches = Batches(rows, 8, seed=0, stream="weights")
    turns = [torch.cat([batches[3 * turn + i][1] for i in range(3)]) for turn in range(4)]
    for turn in turns:
        assert sorted(turn.tolist()) == list(range(24))
    assert len({tuple(turn.tolist()) for turn in turns}) == 4
    assert not torch.equal(turns[0], torch.cat([Batches(rows, 8, seed=0, stream="alphas")[i][1] for i in range(3)]))


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_a_batch_depends_on_its_number_and_on_nothing_asked_before(monkeypatch, chunk_bytes):
    monkeypatch.setattr("nas.oneshot.halves.CHUNK_BYTES", chunk_bytes)
    rows = Split(torch.randn(40, 1, 8, 8), torch.arange(40))

    def stream() -> Batches:
        return Batches(rows, 8, seed=0, stream="w", augmentation=Augmentation(("crop", "flip", "cutout"), 2, 3))

    in_order = stream()
    all_of_them = [in_order[i] for i in range(12)]
    for number in (11, 3, 7, 4, 0):
        x, y = stream()[number]
        assert torch.equal(x, all_of_them[number][0])
        assert torch.equal(y, all_of_them[number][1])
        assert not torch.equal(x, rows.x[y])


def test_a_half_smaller_than_a_batch_is_one_batch(space, data, tmp_path):
    result = train_algorithm(make_fake(space, data, batch_size=1000), data, tmp_path, seed=0)
    assert len(result.log) == 4


# -- the log ----------------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_row_of_the_log(uninterrupted):
    log = uninterrupted[1].log
    assert [(row["phase"], row["epoch"]) for row in log] == [("warm", 1), ("warm", 2), ("search", 1), ("search", 2)]
    assert log[-1]["supernet_accuracy"] > 0.5
    assert len(log[-1]["alphas"]["all"]) == 4
    assert uninterrupted[1].facts["epochs"] == 4
    assert uninterrupted[1].facts["peak_memory_bytes"] > 1e6


def test_reports_say_how_far_it_is_and_never_go_back(space, data, tmp_path):
    told: list[dict[str, Any]] = []
    train_algorithm(make_fake(space, data), data, tmp_path, seed=0, report=told.append, clock=Clock())
    shares = [info["done"] for info in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {info["phase"] for info in told} == {"warm", "search"}
    assert told[-1]["accuracy"] is not None
    json.dumps(told)


def test_the_log_can_be_read_while_the_search_runs(space, data, uninterrupted, tmp_path, monkeypatch):
    assert read_log(tmp_path) == []
    interrupted(monkeypatch, 7, lambda: train_algorithm(make_fake(space, data), data, tmp_path, seed=0))
    assert [row["epoch"] for row in read_log(tmp_path)] == [1, 2]
    assert read_log(uninterrupted[0]) == uninterrupted[1].log


# -- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
def test_a_loss_of_nan_names_the_step_and_keeps_the_last_good_checkpoint(space, data, tmp_path, checkpoint_s):
    algorithm = make_fake(space, data, nan_at=7, checkpoint_s=checkpoint_s)
    with pytest.raises(
        EvaluationFailed, match=r"nan in phase search, epoch 1 of 2, step 2 of 3.*options.fake"
    ) as caught:
        train_algorithm(algorithm, data, tmp_path, seed=0, clock=Clock())
    assert str(tmp_path) in str(caught.value)
    facts = read_facts(tmp_path)
    assert facts is not None
    assert (facts["phase"], facts["epoch"], facts["step"]) in {(0, 2, 0), (1, 0, 1)}
    with pytest.raises(EvaluationFailed, match="epoch 1 of 2, step 2 of 3"):  # and again, from that checkpoint
        train_algorithm(
            make_fake(space, data, nan_at=7, checkpoint_s=checkpoint_s), data, tmp_path, seed=0, clock=Clock()
        )


@pytest.mark.parametrize("nan_first", [True, False])
def test_masks_that_cannot_be_ranked_are_a_search_that_diverged(space, data, tmp_path, nan_first):
    algorithm = make_fake(space, data, **({"nan_at": 3} if nan_first else {}))
    step, taken = algorithm.step, []

    def ranks(*arguments):
        taken.append(1)
        if len(taken) == 5:
            raise ValueError("2 of 9 scores are NaN")
        return step(*arguments)

    algorithm.step = ranks
    expected = (
        "the loss is nan in phase" if nan_first else r"diverged in phase \w+, epoch 2 of \d, step 2 of 3: 2 of 9 scores"
    )
    with pytest.raises(EvaluationFailed, match=expected):
        train_algorithm(algorithm, data, tmp_path, seed=0)


def test_another_value_error_of_an_algorithm_stays_what_it_is(space, data, tmp_path):
    algorithm = make_fake(space, data)

    def fails(*arguments):
        raise ValueError("no such candidate")

    algorithm.step = fails
    with pytest.raises(ValueError, match="no such candidate"):
        train_algorithm(algorithm, data, tmp_path, seed=0)


def test_weights_of_nan_are_never_saved_even_where_the_loss_was_fine(space, data, tmp_path, monkeypatch):
    whole = Fake.step

    def step(self: Fake, *args: Any) -> Any:
        report = whole(self, *args)
        if self.count == 5:
            self.alpha.data[0] = float("nan")
        return report

    monkeypatch.setattr(Fake, "step", step)
    with pytest.raises(EvaluationFailed, match="alpha holds NaN in phase warm, epoch 2 of 2, after step 2 of 3"):
        train_algorithm(make_fake(space, data, checkpoint_s=0.0), data, tmp_path, seed=0, clock=Clock())
    loaded = read_facts(tmp_path)
    assert loaded is not None
    assert (loaded["epoch"], loaded["step"]) == (1, 1)


def test_out_of_memory_names_the_options_that_help(space, data, tmp_path):
    with pytest.raises(EvaluationFailed, match=r"batch_size below 8.*options.fake.checkpointing = true"):
        train_algorithm(make_fake(space, data, error="memory"), data, tmp_path, seed=0)


def test_other_errors_are_not_taken_for_it(space, data, tmp_path):
    with pytest.raises(ValueError, match="9 GiB"):
        train_algorithm(make_fake(space, data, error="other"), data, tmp_path, seed=0)


def half_way(space: Space, data: Data, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    interrupted(monkeypatch, 7, lambda: train_algorithm(make_fake(space, data, **options), data, folder, seed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, r"expected options.lr = 0.5, found options.lr = 0.025.*remove the folder"),
        ({"epochs": 6}, "options.epochs"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(space, data, tmp_path, monkeypatch, change, message):
    half_way(space, data, tmp_path, monkeypatch)
    with pytest.raises(RunError, match=message):
        train_algorithm(make_fake(space, data, **change), data, tmp_path, seed=0)


def test_a_checkpoint_of_another_seed_or_run_is_refused(space, data, tmp_path, monkeypatch):
    half_way(space, data, tmp_path, monkeypatch)
    with pytest.raises(RunError, match="expected seed = 1, found seed = 0"):
        train_algorithm(make_fake(space, data), data, tmp_path, seed=1)
    with pytest.raises(RunError, match=r"expected space = .*darts.*, found space = None"):
        train_algorithm(make_fake(space, data), data, tmp_path, seed=0, identity={"space": {"name": "darts"}})


def test_options_that_decide_nothing_may_change(space, data, uninterrupted, tmp_path, monkeypatch):
    half_way(space, data, tmp_path, monkeypatch)
    result = train_algorithm(make_fake(space, data, checkpoint_s=5.0, seeds=3), data, tmp_path, seed=0)
    assert without_time(result) == without_time(uninterrupted[1])


def test_tensors_of_another_shape_are_refused(space, data, tmp_path, monkeypatch):
    half_way(space, data, tmp_path, monkeypatch)
    wider = make_fake(space, data)
    wider.net = torch.nn.Linear(5, 3)
    with pytest.raises(RunError, match=r"does not fit the supernet.*remove the folder"):
        train_algorithm(wider, data, tmp_path, seed=0)


def test_a_damaged_result_says_what_to_remove(space, data, uninterrupted, tmp_path):
    (tmp_path / RESULT).write_text("{")
    with pytest.raises(RunError, match=r"result.json.*remove it"):
        train_algorithm(make_fake(space, data), data, tmp_path, seed=0)


# -- checkpoints ------------------------------------------------------------------------------------------------------------

ONE = {"a": torch.arange(6.0).view(2, 3).t(), "flag": torch.tensor([True, False]), "none": torch.empty(0, 3)}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    store = Checkpoints(tmp_path / "deep", {"seed": 0})
    store.save({**ONE, "count": torch.tensor(7)}, {"loss": float("nan"), "third": 1 / 3})
    back = store.load()
    assert back is not None
    for name, tensor in ONE.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].dtype == tensor.dtype
    assert back.tensors["count"].shape == ()
    assert back.facts["third"] == 1 / 3
    assert back.facts["loss"] != back.facts["loss"]


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    base = torch.arange(8.0)
    store = Checkpoints(tmp_path, {})
    store.save({"base": base, "part": base[2:4]}, {})
    back = store.load()
    assert back is not None
    assert back.tensors["part"].tolist() == [2.0, 3.0]


def test_two_generations_are_kept(tmp_path):
    store = Checkpoints(tmp_path, {})
    for number in range(5):
        store.save(ONE, {"number": number})
    assert len(list(tmp_path.iterdir())) == 2
    assert store.load().facts == {"number": 4}


@pytest.mark.parametrize("stage", ["open", "write", "fsync", "replace", "folder", "unlink"])
def test_a_write_killed_at_any_stage_leaves_a_whole_checkpoint(tmp_path, monkeypatch, stage):
    store = Checkpoints(tmp_path, {})
    for number in range(3):
        store.save(ONE, {"number": number})

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    calls = {"fsync": 0}
    real_fsync, real_open = os.fsync, Path.open

    def fsync(descriptor: int) -> None:
        calls["fsync"] += 1
        if calls["fsync"] == (1 if stage == "fsync" else 2):
            raise Stop
        real_fsync(descriptor)

    def torn(self: Path, *args: Any, **kwargs: Any) -> Any:
        with real_open(self, "wb") as file:
            file.write(b"\x10\x00\x00")
        raise Stop

    with monkeypatch.context() as patch:
        if stage == "open":
            patch.setattr(Path, "open", stop)
        elif stage == "write":
            patch.setattr(Path, "open", torn)
        elif stage in ("fsync", "folder"):
            patch.setattr(os, "fsync", fsync)
        elif stage == "replace":
            patch.setattr(os, "replace", stop)
        else:
            patch.setattr(Path, "unlink", stop)
        with pytest.raises(Stop):
            store.save(ONE, {"number": 3})
    back = store.load()
    assert back is not None
    assert back.facts["number"] == (3 if stage in ("folder", "unlink") else 2)
    assert all(torch.equal(back.tensors[name], ONE[name]) for name in ONE)
    store.save(ONE, {"number": 4})
    assert store.load().facts == {"number": 4}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_checkpoint_says_what_to_remove_and_the_one_before_goes_on(tmp_path, damage):
    store = Checkpoints(tmp_path, {})
    paths = [store.save({"a": torch.ones(64)}, {"number": number}) for number in range(2)]
    content = bytearray(paths[1].read_bytes())
    if damage == "flip":
        content[-5] ^= 0x40
    paths[1].write_bytes({"cut": content[:-20], "flip": content, "empty": b"", "foreign": b"x" * 300}[damage])
    with pytest.raises(RunError, match=f"{paths[1].name}.*remove it, and the search goes on from the one before"):
        store.load()
    paths[1].unlink()
    assert store.load().facts == {"number": 0}
    paths[0].write_bytes(b"")
    with pytest.raises(RunError, match="remove the folder"):
        store.load()


def test_a_folder_that_cannot_be_written_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, {})
    store.save(ONE, {"number": 0})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        store.save(ONE, {"number": 1})
    assert store.load().facts == {"number": 0}
    assert len(list(tmp_path.iterdir())) == 1
