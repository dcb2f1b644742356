import logging
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.datasets.mask_folder import register_mask_folder, register_pennfudan
from d2ssl.data.masks import annotation_mask, iou
from d2ssl.errors import D2SSLError

HEIGHT, WIDTH = 20, 30


def write(root, images, masks, photos, suffix=""):
    """Photos, and for each the mask with the two instances 1 and 7, except for None."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[2:10, 3:9], ids[5:20, 20:30] = 7, 1
    (root / images).mkdir(parents=True)
    (root / masks).mkdir()
    for name in photos:
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / images / name)
        stem = os.path.splitext(name)[0]
        Image.fromarray(ids).save(root / masks / f"{stem}{suffix}.png")


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "images", "masks", ["b.png", "a.jpg"])
    register_mask_folder("test_masks", tmp_path, classes=["cat"])
    return tmp_path


def test_each_value_is_an_instance(root):
    first, second = DatasetCatalog.get("test_masks")
    assert [first["image_id"], second["image_id"]] == [0, 1]
    assert first["file_name"] == str(root / "images" / "a.jpg")
    assert (second["height"], second["width"]) == (HEIGHT, WIDTH)
    assert [a["bbox"] for a in first["annotations"]] == [[20, 5, 30, 20], [3, 2, 9, 10]]
    areas = [annotation_mask(a, HEIGHT, WIDTH).sum() for a in first["annotations"]]
    assert areas == pytest.approx([10 * 15, 6 * 8], rel=0.02)  # outlines are simplified
    assert {a["category_id"] for a in first["annotations"]} == {0}
    metadata = MetadataCatalog.get("test_masks")
    assert metadata.thing_classes == ["cat"] and metadata.evaluator_type == "coco"


def test_the_list_reads_neither_photos_nor_masks(root):
    for file in root.glob("*/*"):
        file.write_text("no picture")
    dicts = listed("test_masks")
    assert dicts == [
        {"file_name": str(root / "images" / name), "image_id": i}
        for i, name in enumerate(["a.jpg", "b.png"])
    ]
    with pytest.raises(D2SSLError, match="a.jpg: cannot be read"):
        list(decoded("test_masks", dicts))


def test_folders_and_suffix(tmp_path):
    write(tmp_path / "own", "photos", "labels", ["a.jpg"], "_seg")
    register_mask_folder("test_masks", tmp_path / "own", "photos", "labels", "_seg")
    (record,) = DatasetCatalog.get("test_masks")
    assert len(record["annotations"]) == 2
    assert MetadataCatalog.get("test_masks").thing_classes == ["object"]


def test_photos_without_a_mask_are_kept_and_counted(root, caplog):
    os.remove(root / "masks" / "a.png")
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        dicts = DatasetCatalog.get("test_masks")
    assert [len(d["annotations"]) for d in dicts] == [0, 2] and dicts[0]["width"] == WIDTH
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "1 photos have no mask" in warning and "a.jpg" in warning


def test_black_mask_is_no_instance(root):
    Image.new("L", (WIDTH, HEIGHT)).save(root / "masks" / "a.png")
    assert DatasetCatalog.get("test_masks")[0]["annotations"] == []


def lonely_mask(root):
    os.remove(root / "images" / "b.png")


def other_size(root):
    Image.new("L", (WIDTH, HEIGHT + 1)).save(root / "masks" / "b.png")


def colours(root):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "masks" / "b.png")


def text(root):
    (root / "masks" / "b.png").write_text("no picture")


def no_masks(root):
    (root / "masks").rename(root / "elsewhere")


def no_photos(root):
    (root / "images").rename(root / "elsewhere")


def empty(root):
    no_photos(root)
    (root / "images").mkdir()


def twins(root):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / "b.jpg")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lonely_mask, "masks: 1 of 2 masks have no photo in .*images, the first is b.png"),
        (other_size, "masks/b.png: is 30x21, its photo 30x20"),
        (colours, "masks/b.png: is a picture of mode RGB"),
        (text, "masks/b.png: cannot be read as a mask"),
        (no_masks, "masks: no such folder"),
        (no_photos, "images: no such folder"),
        (empty, "images: no photo in it"),
        (twins, "b.jpg and b.png share the mask b.png"),
    ],
)
def test_sets_that_cannot_be_right_are_refused(root, damage, message):
    damage(root)
    with pytest.raises(D2SSLError, match=message) as caught:
        DatasetCatalog.get("test_masks")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [["cat", "dog"], [], "cat"])
def test_several_classes_are_refused_at_once(tmp_path, classes):
    with pytest.raises(D2SSLError, match="test_refused: classes is .*a list of one name"):
        register_mask_folder("test_refused", tmp_path, classes=classes)
    assert "test_refused" not in DatasetCatalog.list()


@pytest.mark.parametrize("images, kind", [("PNGImages", "png"), ("images", "jpg")])
def test_pennfudan_splits(tmp_path, images, kind):
    names = [f"Ped{i:05d}" for i in range(11)]
    write(tmp_path, images, "PedMasks", [f"{name}.{kind}" for name in names], "_mask")
    os.remove(tmp_path / "PedMasks" / "Ped00000_mask.png")
    register_pennfudan("test_ped", tmp_path)
    stems = {}
    for split in ("train", "val", "unlabeled"):
        dicts = DatasetCatalog.get(f"test_ped_{split}")
        stems[split] = [os.path.splitext(os.path.basename(d["file_name"]))[0] for d in dicts]
        assert [d["image_id"] for d in dicts] == [*range(len(dicts))]
        assert all(d["height"] == HEIGHT for d in dicts)
        assert all(("annotations" in d) == (split != "unlabeled") for d in dicts)
    assert stems["val"] == ["Ped00004", "Ped00009"]
    assert sorted(stems["train"] + stems["val"]) == names
    assert stems["unlabeled"] == stems["train"]
    assert MetadataCatalog.get("test_ped_val").thing_classes == ["person"]


def test_pennfudan_that_is_not_there(tmp_path):
    register_pennfudan("test_ped", tmp_path / "PennFudanPed")
    with pytest.raises(D2SSLError, match="PennFudanPed: no such folder; unpack PennFudanPed.zip"):
        DatasetCatalog.get("test_ped_val")


def test_real_pennfudan(shared):
    root = shared / "data" / "PennFudanPed"
    register_pennfudan("test_ped", root)
    assert len(listed("test_ped_train")) == len(listed("test_ped_unlabeled")) == 136
    val = DatasetCatalog.get("test_ped_val")
    assert len(val) == 34
    for record in val:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        ids = np.asarray(Image.open(root / "PedMasks" / f"{stem}_mask.png"))
        values = range(1, ids.max() + 1)  # published as counting without a gap
        assert len(record["annotations"]) == len(values)
        for value, annotation in zip(values, record["annotations"]):
            assert iou(annotation_mask(annotation, *ids.shape), ids == value) >= 0.98
