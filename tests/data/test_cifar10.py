import os
import pickle
import struct
from io import BytesIO

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets.catalog import listed
from d2ssl.data.datasets.cifar10 import CLASSES, register_cifar10
from d2ssl.data.photos import read_photo
from d2ssl.errors import D2SSLError

FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote it: every string is one of bytes."""

    def save_string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def python2(value):
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def python3(value):
    return pickle.dumps(value, protocol=2)


def batch(seed, key, number=4):
    rng = np.random.RandomState(seed)
    return {
        key("batch_label"): key("testing batch"),
        key("labels"): rng.randint(0, 10, number).tolist(),
        key("data"): rng.randint(0, 256, (number, 3072)).astype(np.uint8),
        key("filenames"): [key("../../escaped.png")] * number,
    }


def write(folder, dump=python2, key=str.encode):
    folder.mkdir()
    for seed, file in enumerate(FILES):
        (folder / file).write_bytes(dump(batch(seed, key)))
    meta = {key("label_names"): [key(name) for name in CLASSES], key("num_vis"): 3072}
    (folder / "batches.meta").write_bytes(dump(meta))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of pickles to be written, registered as ``test_cifar``; a cache beside it."""
    monkeypatch.setenv("D2SSL_CACHE", str(tmp_path / "cache"))
    register_cifar10("test_cifar", tmp_path / "set")
    return tmp_path / "set"


@pytest.mark.parametrize(
    "dump, key", [(python2, str.encode), (python3, str.encode), (python3, str)]
)
def test_pictures_and_labels_of_the_pickles(root, dump, key):
    write(root, dump, key)
    assert MetadataCatalog.get("test_cifar_train").classes == [*CLASSES]
    for split, seeds in (("train", range(5)), ("test", [5])):
        batches = [batch(seed, str) for seed in seeds]
        data = np.concatenate([each["data"] for each in batches])
        labels = [label for each in batches for label in each["labels"]]
        dicts = DatasetCatalog.get(f"test_cifar_{split}")
        assert len(dicts) == len(labels) == 4 * len(batches)
        for entry in dicts:
            number = int(os.path.basename(entry["file_name"]).removesuffix(".png"))
            assert entry["category_id"] == labels[number]
            assert (entry["height"], entry["width"]) == (32, 32)
            photo = read_photo(entry["file_name"])
            for channel in range(3):  # each a plane of 1024 bytes, row by row
                plane = data[number, 1024 * channel : 1024 * (channel + 1)]
                assert photo[..., channel].ravel().tolist() == plane.tolist()
    assert not [*root.parent.rglob("escaped.png")]


def test_second_use_writes_nothing_and_other_contents_go_elsewhere(root):
    write(root)
    first = DatasetCatalog.get("test_cifar_test")
    (cache,) = (root.parent / "cache/cifar10").iterdir()
    assert len([*cache.rglob("*.png")]) == 4  # the train batches are not unpacked for it
    os.remove(first[0]["file_name"])  # what is written again would come back
    assert len(DatasetCatalog.get("test_cifar_test")) == 3
    (root / "test_batch").write_bytes(python2(batch(9, str.encode)))
    assert len(DatasetCatalog.get("test_cifar_test")) == 4
    assert len([*(root.parent / "cache/cifar10").iterdir()]) == 2


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_a_pickle_that_would_run_a_command_is_refused(root, tmp_path, file):
    write(root)
    content = python3({"data": Malicious(tmp_path / "ran")})
    (root / file).write_bytes(content)
    with pytest.raises(D2SSLError, match=rf"{file}: asks for \w+.system, which could run anything"):
        DatasetCatalog.get("test_cifar_test")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # it would indeed


def changed(**values):
    return python3({**batch(0, str), **values})


@pytest.mark.parametrize(
    "content, message",
    [
        (python2(batch(0, str.encode))[:-100], "is no whole pickle"),
        (b"", "is no whole pickle"),
        (b"no pickle", "is no whole pickle"),
        (python3([1, 2]), "holds a list, no dict"),
        (python3({"labels": []}), "its data is no N x 3072 array"),
        (changed(data=np.zeros((4, 3071), np.uint8)), "its data is no N x 3072 array"),
        (changed(data=np.zeros((4, 32, 96), np.uint8)), "its data is no N x 3072 array"),
        (changed(data=np.zeros((4, 3072), np.float32)), "its data is no N x 3072 array"),
        (changed(labels=[1, 2, 3]), "has not one label a picture"),
        (changed(labels=None), "has not one label a picture"),
        (changed(labels=[1, 2, 3, 10]), "has the label 10, not 0 to 9"),
        (changed(labels=[1, 2, -1, 3]), "has the label -1, not 0 to 9"),
        (changed(labels=[1, 2, 3.0, 3]), "has the label 3.0, not 0 to 9"),
    ],
)
def test_damaged_batch_leaves_nothing_behind(root, content, message):
    write(root)
    (root / "data_batch_5").write_bytes(content)
    with pytest.raises(D2SSLError, match=f"data_batch_5: {message}"):
        DatasetCatalog.get("test_cifar_train")
    assert not (root.parent / "cache").exists()


def test_incomplete_or_foreign_sets_are_named(root):
    with pytest.raises(
        D2SSLError, match="set/train: no such folder; is .*set the one with batches"
    ):
        DatasetCatalog.get("test_cifar_train")
    write(root)
    (root / "batches.meta").write_bytes(python2({b"label_names": [b"apple"]}))
    with pytest.raises(D2SSLError, match="batches.meta: its classes are not CIFAR-10's"):
        DatasetCatalog.get("test_cifar_test")
    for file in ("data_batch_3", "batches.meta"):
        (root / file).unlink()
        with pytest.raises(D2SSLError, match=f"{file}: no such file"):
            DatasetCatalog.get("test_cifar_train")


def test_a_cache_that_cannot_be_written_is_named(root, tmp_path):
    write(root)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(D2SSLError, match="cannot be written .*set D2SSL_CACHE"):
        DatasetCatalog.get("test_cifar_test")


@pytest.mark.parametrize("split, each", [("train", 100), ("test", 20)])
def test_real_class_folders(shared, split, each):
    register_cifar10("real_cifar", str(shared / "data" / "cifar10_subset"))
    dicts = listed(f"real_cifar_{split}")
    assert np.bincount([entry["category_id"] for entry in dicts]).tolist() == [each] * 10
    for entry in dicts:
        assert entry["file_name"].split(os.sep)[-2] == CLASSES[entry["category_id"]]
