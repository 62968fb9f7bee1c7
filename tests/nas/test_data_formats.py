"""Each file format: what is read, and one clear error for each way in which a file can be broken."""

from __future__ import annotations

import gzip
import lzma
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nas.data import load_data
from nas.datasets import known
from nas.errors import DataError
from tests.nas.data_files import cifar_records, idx_bytes, real_data, write_idx_set

# ---- idx


@pytest.mark.parametrize("ending", [".gz", ".xz", ""])
def test_idx_files_are_read_plain_or_compressed(tmp_path, ending):
    write_idx_set(tmp_path, ending="" if ending == ".xz" else ending)
    if ending == ".xz":
        for path in list(tmp_path.iterdir()):
            path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes()))
            path.unlink()
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 20)
    assert data.input_shape == (1, 6, 6)
    assert data.class_names == ("0", "1", "2", "3")
    pixels = data.test.x * data.std + data.mean
    assert torch.allclose(pixels[:, 0, 0, 0] * 255, data.test.y * 10.0, atol=1e-4)


def test_a_known_idx_set_is_found_below_nas_data_and_has_its_class_names(tmp_path, monkeypatch):
    write_idx_set(tmp_path / "fashion-mnist")
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    with pytest.raises(DataError, match='class "Coat" has 0, "Sandal" has 0'):  # the toy set has classes 0..3 only
        load_data("Fashion-MNIST")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-20], "truncated or corrupt"),
        (lambda packed: packed[:40] + b"garbage" + packed[47:], "truncated or corrupt"),
        (lambda packed: b"", "idx|truncated"),
        (lambda packed: gzip.compress(gzip.decompress(packed)[:-3]), "header promises shape"),
        (lambda packed: gzip.compress(b"<html>not here</html>"), "expected an idx file"),
        (lambda packed: gzip.compress(gzip.decompress(packed)[:9]), "header is cut off"),
        (lambda packed: gzip.compress(idx_bytes(np.zeros(5))), "expected images"),
    ],
    ids=["cut", "flipped", "empty", "short", "html", "header", "axes"],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    write_idx_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load_data(tmp_path)
    assert path.name in str(caught.value)


def test_idx_files_that_do_not_fit_together_are_refused(tmp_path):
    write_idx_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(39))))
    with pytest.raises(DataError, match="expected 40 labels, one per row of x, found 39"):
        load_data(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="missing train-labels-idx1-ubyte"):
        load_data(tmp_path)


def test_a_missing_known_set_says_which_files_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "openml_reachable", lambda: False)
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte, .* into .*mnist"):
        load_data("mnist")
    monkeypatch.delenv("NAS_DATA")
    with pytest.raises(DataError, match=r"neither path nor NAS_DATA is set.*data_batch_1.bin"):
        load_data("cifar10")


def test_a_missing_known_set_is_fetched_where_openml_answers(monkeypatch):
    import sklearn.datasets

    asked = []

    def fetch(**arguments):
        asked.append(arguments["data_id"])
        x = np.zeros((70000, 784), dtype=np.uint8)
        x[:, 0] = 255
        return type("Bunch", (), {"data": x, "target": (np.arange(70000) % 10).astype(str).astype(object)})

    monkeypatch.setattr(known, "openml_reachable", lambda: True)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    monkeypatch.delenv("NAS_DATA", raising=False)
    data = load_data("mnist", limit=100, image_size=2)
    assert asked == [554]
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 10000)

    def broken(**arguments):
        raise OSError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", broken)
    with pytest.raises(DataError, match=r"could not be fetched \(no route\)"):
        load_data("mnist")


# ---- cifar


@pytest.mark.parametrize("ending", ["", ".xz"])
def test_cifar10_batches_are_read_in_order(tmp_path, ending):
    packed = lzma.compress if ending else bytes
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin{ending}").write_bytes(packed(cifar_records(20, 1, seed=i)))
    (tmp_path / f"test_batch.bin{ending}").write_bytes(packed(cifar_records(30, 1, seed=9)))
    data = load_data("cifar10", path=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 30)
    assert data.input_shape == (3, 32, 32)
    assert data.class_names[6] == "frog"
    first = np.frombuffer(cifar_records(30, 1, seed=9), np.uint8).reshape(-1, 3073)[0, 1:].reshape(3, 32, 32)
    view = (3, 1, 1)
    assert np.allclose((data.test.x[0] * data.std.view(view) + data.mean.view(view)) * 255, first, atol=1e-3)
    assert data.test.y.tolist() == [i % 10 for i in range(30)]


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    (tmp_path / "train.bin").write_bytes(cifar_records(300, 2))
    (tmp_path / "test.bin").write_bytes(cifar_records(100, 2, seed=1))
    fine, coarse = load_data("cifar100", path=tmp_path), load_data(tmp_path, label="coarse")
    assert (fine.classes, coarse.classes) == (100, 20)
    assert torch.equal(fine.test.y % 20, coarse.test.y)
    with pytest.raises(DataError, match='label must be "fine"'):
        load_data(tmp_path, label="medium")


def test_damaged_cifar_files_are_named(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(cifar_records(10, 1))
    (tmp_path / "test_batch").write_bytes(b"x")
    with pytest.raises(DataError, match=r"expected test_batch\.bin .* pickled python version"):
        load_data(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(10, 1)[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin: expected a multiple of 3073 bytes"):
        load_data(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(bytes([99]) + cifar_records(1, 1)[1:])
    with pytest.raises(DataError, match=r"expected labels 0\.\.9, found 99 in image 0"):
        load_data(tmp_path)


# ---- folders of images


def _paint(folder, name, count=6, size=(5, 4), colour=False, seed=0):
    (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        if not colour:
            pixels[...] = pixels[..., :1]
        Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_a_folder_of_images_takes_its_classes_from_the_folders(tmp_path):
    _paint(tmp_path, "cat", colour=True)
    _paint(tmp_path, "dog")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / ".hidden.png").write_text("not an image either")
    data = load_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.input_shape == (3, 4, 5)
    assert len(data.train) + len(data.val) + len(data.test) == 12


def test_images_stored_as_rgb_but_grey_have_one_channel(tmp_path):
    _paint(tmp_path, "cat")
    _paint(tmp_path, "dog")
    assert load_data(tmp_path).input_shape == (1, 4, 5)


def test_train_and_test_folders_are_kept_apart(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for i, name in enumerate(("cat", "dog")):
            _paint(tmp_path / part, name, count, seed=i)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6)
    separate = load_data(tmp_path / "train", test=tmp_path / "test")
    assert torch.equal(separate.test.x, data.test.x)
    _paint(tmp_path / "test", "emu", 1)
    with pytest.raises(DataError, match='class "emu" has no folder in'):
        load_data(tmp_path)


def test_images_of_different_sizes_need_image_size(tmp_path):
    _paint(tmp_path, "cat")
    _paint(tmp_path, "dog", size=(8, 8))
    with pytest.raises(DataError, match=r"dog.0\.png: is 8 x 8 pixels, 0\.png is 5 x 4 .*Set image_size"):
        load_data(tmp_path)
    assert load_data(tmp_path, image_size=4).input_shape == (1, 4, 4)


def test_broken_image_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither class folders nor a known data set"):
        load_data(tmp_path)
    _paint(tmp_path, "cat")
    with pytest.raises(DataError, match='found only "cat"'):
        load_data(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog: expected images .* found none"):
        load_data(tmp_path)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        load_data(tmp_path)
    (tmp_path / "dog" / "1.png").write_text("hello")
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        load_data(tmp_path)


# ---- npz


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3), (3, 6, 6)])
def test_npz_images_of_any_axis_order_are_read(tmp_path, names, shape):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, *shape), dtype=np.uint8)
    y = np.arange(30) % 3
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(names, (x, y, x[:6], y[:6, None]))))
    data = load_data(tmp_path / "a.npz")
    channels = 1 if len(shape) == 2 else 3
    assert data.input_shape == (channels, 6, 6)
    pixels = (data.test.x * data.std.view(-1, 1, 1) + data.mean.view(-1, 1, 1)) * 255
    expected = x[:6].reshape(6, 1, 6, 6) if channels == 1 else (x[:6] if shape[0] == 3 else x[:6].transpose(0, 3, 1, 2))
    assert np.allclose(pixels, expected, atol=1e-3)


def test_npz_validation_arrays_and_other_label_names_are_used(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_val=x[:5], y_val=y[:5], x_test=x[:7], y_test=y[:7])
    data = load_data(tmp_path / "a.npz")
    assert (len(data.train), len(data.val), len(data.test)) == (20, 5, 7)
    np.savez(tmp_path / "b.npz", x=x, y=y, species=np.array(["cat", "dog", "emu", "fox"] * 5))
    assert load_data(tmp_path / "b.npz", label="species").class_names == ("cat", "dog", "emu", "fox")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 2))}, "expected arrays named x_train, y_train, x_test, y_test or x, y, found x"),
        (
            {"x": np.array([[1, np.nan]] * 4), "y": np.arange(4) % 2},
            r"a.npz: x: expected finite numbers, found nan at \[0, 1\]",
        ),
        ({"x": np.ones((4, 2)), "y": np.array([0, 1, np.nan, 1])}, "the label of row 2 is missing"),
        ({"x": np.ones((4, 2)), "y": np.array([0, 1, 0.5, 1])}, "regression target"),
        ({"x": np.ones((4, 2)), "y": np.eye(4)}, "one label per row"),
        ({"x": np.ones((4, 2)), "y": np.arange(3)}, "expected 4 labels"),
        ({"x": np.ones(4), "y": np.arange(4) % 2}, "expected rows"),
        ({"x": np.array(["a"] * 4), "y": np.arange(4) % 2}, "expected numbers"),
        ({"x": np.ones((4, 2), dtype=object), "y": np.arange(4) % 2}, "Python objects"),
    ],
)
def test_unusable_npz_archives_say_why(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "a.npz")


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_npz_archive_is_named(tmp_path, cut):
    np.savez(tmp_path / "a.npz", x=np.ones((40, 2)), y=np.arange(40) % 2)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.npz"):
        load_data(tmp_path / "a.npz")


@pytest.mark.parametrize("ending", [".pkl", ".pt", ".joblib"])
def test_pickles_are_never_opened(tmp_path, ending):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    path = tmp_path / f"a{ending}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="pickles and run code when read"):
        load_data(path)
    path.rename(tmp_path / "a.npz")
    with pytest.raises(DataError):
        load_data(tmp_path / "a.npz")
    assert not (tmp_path / "boom").exists()


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.docx").write_text("hello")
    with pytest.raises(DataError, match=r"unknown kind of file. Expected .npz, .csv or .tsv"):
        load_data(tmp_path / "a.docx")


# ---- tables


def _table(rows=40, sep=","):
    lines = [sep.join(["size", "colour", "kind", "flag"])]
    for i in range(rows):
        lines.append(
            sep.join([str(i / 7), ["red", "blue", "green"][i % 3], ["apple", "pear"][i % 2], str(bool(i % 2))])
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("ending", "sep"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.xz", "\t")])
def test_tables_are_read_with_text_columns_one_hot(tmp_path, ending, sep):
    text = _table(sep=sep).encode()
    packed = {"gz": gzip.compress, "xz": lzma.compress}.get(ending.split(".")[-1], bytes)(text)
    (tmp_path / f"fruit{ending}").write_bytes(packed)
    data = load_data(tmp_path / f"fruit{ending}", label="kind")
    assert data.class_names == ("apple", "pear")
    assert data.input_shape == (5,)  # size, three colours, flag
    assert data.name == "fruit"
    raw = data.test.x * data.std + data.mean
    assert torch.allclose(raw[:, 1:4].sum(1), torch.ones(len(raw)), atol=1e-5)
    assert torch.allclose(raw[:, 4], data.test.y.float(), atol=1e-5)  # True is pear


def test_the_label_is_the_column_asked_for_else_the_one_so_named_else_the_last(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,target,b\n" + "1,x,2\n3,y,4\n" * 10)
    assert load_data(path).class_names == ("x", "y")
    assert load_data(path, label="a").class_names == ("1", "3")
    path.write_text("a,b,c\n" + "1,x,2\n3,y,4\n" * 10)
    assert load_data(path).class_names == ("2", "4")
    with pytest.raises(DataError, match='no column "d" to use as the label; columns: a, b, c'):
        load_data(path, label="d")


def test_a_second_table_is_the_test_part_whatever_its_column_order(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,y\n" + "1,u,0\n2,v,1\n" * 10)
    (tmp_path / "b.csv").write_text("y,b,a\n0,v,5\n1,w,6\n")
    data = load_data(tmp_path / "a.csv", label="y", test=tmp_path / "b.csv")
    raw = data.test.x * data.std + data.mean
    assert torch.allclose(raw, torch.tensor([[5.0, 0, 1, 0], [6.0, 0, 0, 1]]), atol=1e-5)  # a, b=u, b=v, b=w
    (tmp_path / "b.csv").write_text("y,b,c\n0,v,5\n")
    with pytest.raises(DataError, match="in only one of the two: a, c"):
        load_data(tmp_path / "a.csv", label="y", test=tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,0\n2,1\n,0\n4,1\n", r'a gap \(NaN\) in row 3 \(line 4 of the file\), column "a"'),
        ("a,b\n1,0\ninf,1\n3,0\n4,1\n", r'an infinity in row 2 \(line 3 of the file\), column "a"'),
        ("a,b\n1,0\n2,\n3,0\n4,1\n", r'a gap \(NaN\) in row 2 .* column "b"'),
        ("5.1,3.5,setosa\n4.9,3.0,virginica\n", "expected column names in the first line"),
        ("a;b\n1;0\n2;1\n", "found the single column"),
        ("a,a\n1,0\n2,1\n", 'two columns are named "a"'),
        ("a,b\n1,0,7,7\n2,1,7,7\n", "more fields"),
        ("a,b\n1,0\n2,1,5,6\n", "cannot be read as a table"),
        ("", "cannot be read as a table"),
        ("a,b\n1,0.5\n2,1.7\n", "regression target"),
        ("a,b\n", "empty|classes"),
    ],
)
def test_unusable_tables_say_why_and_where(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "a.csv")


def test_an_identifier_column_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,y\n" + "".join(f"row{i},{i % 2}\n" for i in range(300)))
    with pytest.raises(DataError, match='text column "id" has 300 different values'):
        load_data(tmp_path / "a.csv")


def test_damaged_table_files_are_named(tmp_path):
    packed = gzip.compress(_table(2000).encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz"):
        load_data(tmp_path / "a.csv.gz")
    (tmp_path / "b.csv.gz").write_text("not packed at all")
    with pytest.raises(DataError, match=r"b\.csv\.gz"):
        load_data(tmp_path / "b.csv.gz")
    (tmp_path / "c.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"c\.csv"):
        load_data(tmp_path / "c.csv")


# ---- the real sets


@pytest.mark.parametrize(("name", "mean", "std"), [("fashion-mnist", 0.2860, 0.3530), ("mnist", 0.1307, 0.3081)])
def test_the_real_idx_sets_have_their_published_statistics(name, mean, std):
    data = load_data(name, path=real_data(name), validation=1e-4)  # six rows: the rest decides the statistics
    assert (len(data.train), len(data.val), len(data.test)) == (59994, 6, 10000)
    assert abs(float(data.mean) - mean) < 1e-4
    assert abs(float(data.std) - std) < 1e-4


def test_the_real_tables_are_read():
    folder = real_data("tabular")
    letter = load_data(folder / "letter.tsv.gz")
    assert (letter.classes, letter.input_shape) == (26, (16,))
    assert len(letter.train) + len(letter.val) + len(letter.test) == 20000
    assert load_data(folder / "madelon.npz").input_shape == (500,)


def test_the_real_cifar10_batches_are_read():
    folder = real_data("cifar10")
    raw = known.cifar._part(known.cifar._records(folder, ["test_batch.bin"], 1), 0, 1, 10, "test")
    assert raw.x.shape == (10000, 3, 32, 32)
    assert np.bincount(raw.y).tolist() == [1000] * 10


# ---- images that are too large, test folders without images


@pytest.mark.parametrize(
    "limit", [20, 60]
)  # 64 pixels: more than twice the limit (PIL's error), more than it (its warning)
def test_an_image_of_too_many_pixels_is_named_and_nothing_else_is_printed(tmp_path, monkeypatch, recwarn, limit):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"cat/0\.png: has too many pixels"):
        load_data(tmp_path)
    assert not recwarn


def test_a_test_folder_without_images_is_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other: expected one folder of images per class, named as in"):
        load_data(tmp_path / "set", test=tmp_path / "other")
