"""Laws of every data set: how it is split, limited, resized and normalised, whatever file it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from nas.data import Data, from_datasets, load_data, stratified
from nas.datasets.raw import check_resized
from nas.errors import DataError, UnknownName
from tests.nas.data_files import write_idx_set


def _write(path, rows=60, classes=3, shape=(5,), **more):
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(3.0, 2.0, (rows, *shape)), y=np.arange(rows) % classes, **more)
    return path


def _rows(data: Data) -> list[bytes]:
    """Every row of all parts, as bytes of the numbers before normalisation (rounded), to tell rows apart."""
    view = (-1,) + (1,) * (len(data.input_shape) - 1)
    found = []
    for split in (data.train, data.val, data.test):
        x = split.x * data.std.view(view) + data.mean.view(view)
        found += [row.numpy().round(3).tobytes() for row in x]
    return found


def test_digits_are_split_exactly_and_normalised_by_the_training_part():
    data = load_data("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (
        1294,
        144,
        359,
    )  # 359 = round(.2 * 1797), 144 = round(.1 * 1438)
    assert data.input_shape == (1, 8, 8)
    assert data.classes == 10
    assert data.class_names == tuple("0123456789")
    assert data.train.x.dtype == torch.float32
    assert data.train.y.dtype == torch.int64
    assert abs(float(data.train.x.double().mean())) < 1e-6
    assert abs(float(data.train.x.double().std(correction=0)) - 1) < 1e-6
    assert abs(float(data.val.x.mean())) > 1e-6  # not by its own statistics


def test_no_row_is_in_two_parts_and_none_is_lost(tmp_path):
    path = _write(tmp_path / "a.npz", rows=90)
    rows = _rows(load_data(path, validation=0.2))
    assert len(rows) == len(set(rows)) == 90


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = (load_data("digits", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.val.y, again.val.y)
    assert torch.equal(first.test.x, again.test.x)
    assert not torch.equal(first.val.y, other.val.y)
    assert not torch.equal(first.test.y, other.test.y)


def test_loading_leaves_the_global_generators_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_data("digits", seed=7, limit=100)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_the_validation_part_does_not_depend_on_the_test_fraction_of_a_set_that_has_its_own(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.normal(size=(50, 4)),
        "y_train": np.arange(50) % 2,
        "x_test": rng.normal(size=(9, 4)),
        "y_test": np.arange(9) % 2,
    }
    np.savez(tmp_path / "a.npz", **arrays)
    data = load_data(tmp_path / "a.npz")
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 9)
    raw = data.test.x * data.std + data.mean
    assert torch.allclose(raw, torch.from_numpy(arrays["x_test"]).float(), atol=1e-5)
    with pytest.raises(DataError, match="has a test part of its own"):
        load_data(tmp_path / "a.npz", test=0.3)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
def test_a_stratified_split_has_the_exact_size_and_shares_within_one_row(fraction):
    y = np.repeat(np.arange(4), [40, 33, 17, 110])
    first, second = stratified(y, np.arange(200), fraction, leave=1, seed=(0, 0))
    assert len(second) == round(fraction * 200)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(200))
    shares = np.bincount(y[second], minlength=4)
    assert (np.abs(shares - np.bincount(y) * fraction) < 1).all()


def test_a_stratified_split_leaves_what_it_must():
    y = np.array([0, 0, 1, 1, 1, 1])
    first, second = stratified(y, np.arange(6), 0.9, leave=2, seed=(0, 0))
    assert np.bincount(y[first]).tolist() == [2, 2]
    assert np.bincount(y[second], minlength=2).tolist() == [0, 2]


def test_limit_counts_training_rows_and_keeps_the_mix():
    data = load_data("digits", limit=200, validation=0.1)
    assert (len(data.train), len(data.val), len(data.test)) == (180, 20, 359)
    counts = torch.bincount(torch.cat([data.train.y, data.val.y]))
    assert int(counts.min()) >= 19
    assert int(counts.max()) <= 21


def test_a_limit_below_two_rows_per_class_is_refused():
    with pytest.raises(DataError, match=r"at least 2 rows for each of the 10 classes \(20\), found 19"):
        load_data("digits", limit=19)


def test_resizing_averages_areas_so_halving_equals_the_mean_of_two_by_two():
    whole, half = load_data("digits"), load_data("digits", image_size=4)
    pixels = whole.train.x * whole.std + whole.mean
    expected = pixels.reshape(-1, 1, 4, 2, 4, 2).mean((3, 5))
    assert half.input_shape == (1, 4, 4)
    assert torch.allclose(half.train.x * half.std + half.mean, expected, atol=1e-5)
    assert load_data("digits", image_size=[4, 2]).input_shape == (1, 4, 2)


def test_constant_columns_become_zero_and_large_ones_keep_their_digits(tmp_path):
    x = np.zeros((40, 3))
    x[:, 0] = 0.1  # constant; its mean is not exactly .1
    x[:, 1] = 1.6e9 + np.arange(40)  # float32 resolves 128 here
    x[:, 2] = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 2)
    data = load_data(tmp_path / "a.npz")
    assert float(data.train.x[:, 0].abs().max()) < 1e-6
    assert len(data.train.x[:, 1].unique()) == len(data.train)
    assert torch.isfinite(data.test.x).all()


def test_one_class_only_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((9, 2)), y=np.full(9, 7))
    with pytest.raises(DataError, match='at least two classes, found only "7"'):
        load_data(tmp_path / "a.npz")


def test_a_class_with_one_row_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((9, 2)), y=np.array(["a"] * 4 + ["b"] * 4 + ["lonely"]))
    with pytest.raises(DataError, match='class "lonely" has 1 '):
        load_data(tmp_path / "a.npz")


def test_a_class_of_the_test_part_without_training_rows_is_refused(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        x_train=np.ones((8, 2)),
        y_train=np.arange(8) % 2,
        x_test=np.ones((3, 2)),
        y_test=np.arange(3),
    )
    with pytest.raises(DataError, match='class "2" has 0'):
        load_data(tmp_path / "a.npz")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, True, "a"])
def test_fractions_outside_zero_to_one_are_refused(fraction):
    with pytest.raises(DataError, match="validation must be a fraction"):
        load_data("digits", validation=fraction)


@pytest.mark.parametrize("size", [0, [4], [4, 0], [4.0, 4.0]])
def test_senseless_image_sizes_are_refused(size):
    with pytest.raises(DataError, match="image_size must be"):
        load_data("digits", image_size=size)


def test_image_size_on_a_table_is_refused(tmp_path):
    with pytest.raises(DataError, match="image_size is for images"):
        load_data(_write(tmp_path / "a.npz"), image_size=4)


def test_settings_that_mean_nothing_for_a_set_are_refused(tmp_path):
    write_idx_set(tmp_path / "set")
    with pytest.raises(DataError, match='digits: has one kind of label, so label="x"'):
        load_data("digits", label="x")
    with pytest.raises(DataError, match="a known set takes no test file"):
        load_data("digits", test="other.csv")
    with pytest.raises(DataError, match='set: label="x" means nothing for this kind of data'):
        load_data(tmp_path / "set", label="x")
    with pytest.raises(DataError, match="set: has a test part of its own"):
        load_data(tmp_path / "set", test=tmp_path)


def test_unknown_names_help():
    with pytest.raises(UnknownName, match='did you mean "digits"'):
        load_data("digit")
    with pytest.raises(DataError, match="no such file or folder"):
        load_data("nowhere/table.csv")


def test_a_relative_path_is_also_looked_for_below_nas_data(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    _write(tmp_path / "sub" / "a.npz")
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    assert load_data("sub/a.npz").name == "a"
    monkeypatch.delenv("NAS_DATA")
    assert load_data("sub/a.npz", path=tmp_path).input_shape == (5,)


class _Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def test_torch_datasets_and_tensor_datasets_and_arrays_give_the_same_data():
    x, y = torch.randn(50, 2, 5, 5), torch.arange(50) % 2
    ways = [_Pairs(x, y), TensorDataset(x, y), (x, y), (x.numpy(), y.numpy())]
    made = [from_datasets(way) for way in ways]
    for data in made:
        assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 10)
        assert torch.equal(data.train.x, made[0].train.x)
        assert torch.equal(data.test.y, made[0].test.y)


def test_given_parts_of_torch_datasets_are_kept():
    parts = [_Pairs(torch.randn(n, 3), torch.arange(n) % 2) for n in (30, 8, 6)]
    data = from_datasets(*parts, class_names=["cat", "dog"], name="pets")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 8, 6)
    assert (data.class_names, data.name) == (("cat", "dog"), "pets")
    pair = from_datasets(parts[0], test=parts[2])
    assert (len(pair.train), len(pair.val), len(pair.test)) == (27, 3, 6)


def test_bad_torch_datasets_are_refused_with_the_row():
    good = (torch.randn(8, 3), torch.arange(8) % 2)
    broken = good[0].clone()
    broken[5, 1] = float("nan")
    with pytest.raises(DataError, match=r"found nan at \[5, 1\]"):
        from_datasets(TensorDataset(broken, good[1]))
    with pytest.raises(DataError, match="test rows have shape"):
        from_datasets(good, test=(torch.randn(4, 2), torch.arange(4) % 2))
    with pytest.raises(DataError, match=r"expected \(input, label\) pairs"):
        from_datasets([1, 2, 3])
    with pytest.raises(DataError, match=r"expected labels 0..1"):
        from_datasets((good[0], good[1] + 1), class_names=["a", "b"])
    with pytest.raises(DataError, match="row 1 has shape"):
        from_datasets(_Pairs([np.ones(3), np.ones(4)], [0, 1]))


@pytest.mark.parametrize("shape", [(0,), (0, 8, 8), (1, 0, 8), (1, 8, 0)])
def test_rows_without_numbers_are_refused(tmp_path, shape):
    with pytest.raises(DataError, match=r"a\.npz.*: expected at least one number per row"):
        load_data(_write(tmp_path / "a.npz", shape=shape))


def test_sizes_that_no_machine_can_hold_are_refused():
    with pytest.raises(DataError, match="image_size must be at most 4096"):
        load_data("digits", image_size=100_000)
    with pytest.raises(DataError, match=r"digits: .* images of 4096 x 4096 pixels need 12 GiB of memory"):
        check_resized(200, 1, (4096, 4096), 4, "digits", memory=2**33)
    check_resized(200, 1, (4096, 4096), 4, "digits", memory=2**34)


def test_a_set_too_large_when_resized_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("nas.datasets.raw.memory_bytes", lambda: 2**20)
    assert load_data("digits", image_size=12).input_shape == (1, 12, 12)  # 1797 * 144 * 4 bytes are just below 1 MiB
    with pytest.raises(DataError, match="Lower image_size"):
        load_data("digits", image_size=13)
    assert load_data("digits", image_size=13, limit=100).input_shape == (1, 13, 13)


def test_a_path_for_a_set_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"digits: .*read from no folder\. Remove path"):
        load_data("digits", path=tmp_path)


@pytest.mark.parametrize("main", ["a.npz", "a.csv", "images"])
@pytest.mark.parametrize("other", ["b.npz", "b.csv", "others", "b.txt"])
def test_a_test_file_of_another_kind_is_named_with_both_kinds(tmp_path, main, other):
    for stem, folder in (("a", "images"), ("b", "others")):
        _write(tmp_path / f"{stem}.npz")
        (tmp_path / f"{stem}.csv").write_text("u,v\n" + "1,0\n2,1\n" * 10)
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (4, 4), 20 * i).save(tmp_path / folder / name / f"{i}.png")
    (tmp_path / "b.txt").write_text("?")
    same = (main[1:], other[1:]) in ((".npz", ".npz"), (".csv", ".csv")) or (main, other) == ("images", "others")
    if same:
        assert len(load_data(tmp_path / main, test=tmp_path / other).test) in (60, 20, 8)
    else:
        with pytest.raises(
            DataError, match=rf"^\S*{other}: test must be of the same kind as the data, .*{main}.*remove test"
        ):
            load_data(tmp_path / main, test=tmp_path / other)


def test_a_test_archive_of_other_rows_is_named(tmp_path):
    _write(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"b\.npz: has rows of float64\[6\], but \S*a\.npz of float64\[5\]"):
        load_data(tmp_path / "a.npz", test=_write(tmp_path / "b.npz", shape=(6,)))


@pytest.mark.parametrize("validation", [0.001, 0.01, 0.5, 0.99, 0.9999])
def test_every_class_keeps_a_training_row_whatever_is_held_out(validation):
    data = load_data("digits", validation=validation)
    assert len(data.train.y.unique()) == 10
    assert len(data.val) >= 1
