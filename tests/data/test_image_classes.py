import logging
import pickle

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.catalog import decoder, listed
from d2ssl.data.datasets.image_classes import register_image_classes
from d2ssl.errors import D2SSLError

NAME = "test_classes"


def put(root, *names):
    """Photos of 20x30 (width x height)."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30)).save(root / name)


def labels(name, root):
    """{path in ``root``: category_id}, in the set's order."""
    return {
        entry["file_name"].removeprefix(f"{root}/"): entry["category_id"]
        for entry in DatasetCatalog.get(name)
    }


def test_all_splits_share_the_classes_of_train(tmp_path):
    put(tmp_path, "train/dog/deep/b.JPEG", "train/dog/a.png", "train/cat/x.webp", "val/dog/v.jpg")
    put(tmp_path, "train/ape/.hidden.jpg", "train/ape/1.jpg", "train/ape/.thumbs/1.jpg")
    put(tmp_path, ".git/x.jpg", "train/.trash/cat.jpg", "train/loose.jpg")
    (tmp_path / "train/cat/notes.txt").write_text("no photo")
    register_image_classes(NAME, tmp_path)
    found = listed(f"{NAME}_train")
    assert found[0] == {
        "file_name": str(tmp_path / "train/ape/1.jpg"),
        "image_id": 0,
        "category_id": 0,
    }
    assert DatasetCatalog.get(f"{NAME}_train")[0] == {**found[0], "height": 30, "width": 20}
    names = ["ape/1.jpg", "cat/x.webp", "dog/a.png", "dog/deep/b.JPEG"]
    expected = {f"train/{file}": i for file, i in zip(names, (0, 1, 2, 2))}
    train = labels(f"{NAME}_train", tmp_path)
    assert train == expected and [*train] == [*expected]
    assert [entry["image_id"] for entry in found] == [0, 1, 2, 3]
    assert labels(f"{NAME}_val", tmp_path) == {"val/dog/v.jpg": 2}
    assert MetadataCatalog.get(f"{NAME}_val").classes == ["ape", "cat", "dog"]


def test_listing_reads_no_photo(tmp_path):
    put(tmp_path, "train/cat/1.jpg")
    (tmp_path / "train/cat/0.jpg").write_text("no photo")
    register_image_classes(NAME, tmp_path, splits=["train"])
    bad, good = listed(f"{NAME}_train")
    decode = pickle.loads(pickle.dumps(decoder(f"{NAME}_train")))
    assert decode(good)["height"] == 30
    with pytest.raises(D2SSLError, match="0.jpg: cannot be read"):
        decode(bad)


def test_given_classes_decide_the_order_and_may_lack_photos(tmp_path, caplog):
    put(tmp_path, "cat/1.jpg", "dog/1.jpg")
    register_image_classes(NAME, tmp_path, classes=("dog", "yak", "cat"), splits=())
    assert MetadataCatalog.get(NAME).classes == ["dog", "yak", "cat"]  # before any use
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        assert labels(NAME, tmp_path) == {"cat/1.jpg": 2, "dog/1.jpg": 0}
    assert not caplog.records


def test_parts_of_a_set_know_its_classes(tmp_path):
    put(tmp_path, "cat/1.jpg", "dog/1.jpg")
    register_image_classes(NAME, tmp_path, splits=())
    ensure_registered([f"{NAME}@1"])
    assert labels(f"{NAME}@1", tmp_path) == {"cat/1.jpg": 0}
    assert MetadataCatalog.get(f"{NAME}@1").classes == ["cat", "dog"]


def test_empty_class_folders_are_counted(tmp_path, caplog):
    put(tmp_path, "dog/1.jpg")
    for empty in ("ape", "cat"):
        (tmp_path / empty).mkdir()
    register_image_classes(NAME, tmp_path, splits=())
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        assert labels(NAME, tmp_path) == {"dog/1.jpg": 2}
    (record,) = caplog.records
    assert "2 class folders hold no photo (first: ape)" in record.getMessage()


def test_folders_that_cannot_be_right_are_named(tmp_path):
    def refused(name, message):
        with pytest.raises(D2SSLError, match=message):
            DatasetCatalog.get(name)

    register_image_classes(NAME, tmp_path)
    refused(f"{NAME}_val", "train: no such folder; put the photos there")
    (tmp_path / "train").mkdir()
    refused(f"{NAME}_train", "train: no class folder in it")
    (tmp_path / "train/.hidden").mkdir()
    refused(f"{NAME}_train", "train: no class folder in it")
    (tmp_path / "train/cat").mkdir()
    refused(f"{NAME}_train", "train: no photo in its class folders; put files with .jpg")
    put(tmp_path, "train/cat/1.jpg", "val/Cat/1.jpg")
    refused(f"{NAME}_val", "val: Cat is none of the 1 classes; rename")
    refused(f"{NAME}_test", "test: no such folder")
    assert labels(f"{NAME}_train", tmp_path) == {"train/cat/1.jpg": 0}
