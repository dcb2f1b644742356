import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets.catalog import listed
from d2ssl.data.datasets.cityscapes import register_cityscapes
from d2ssl.data.masks import annotation_mask, iou
from d2ssl.errors import D2SSLError

HEIGHT, WIDTH = 24, 48
STEM = "aachen_000000_000019"

# Road, a group of persons, two cars of which one has a hole, a caravan, an instance that is stuff.
INSTANCES = np.full((HEIGHT, WIDTH), 7, np.uint16)
INSTANCES[2:8, 2:12] = 24
INSTANCES[10:20, 2:12], INSTANCES[10:20, 14:24] = 26000, 26001
INSTANCES[14, 18] = 7
INSTANCES[10:20, 26:36], INSTANCES[2:8, 26:36] = 29000, 7001
LABELS = np.where(INSTANCES < 1000, INSTANCES, INSTANCES // 1000).astype(np.uint8)
LABELS[0, :34] = range(34)  # each id once


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "cityscapes"
    for split, stem in [("train", STEM), ("train", "ulm_000000_000019"), ("val", "zug_0_1")]:
        city = stem.split("_")[0]
        for folder in ("leftImg8bit", "gtFine"):
            (root / folder / split / city).mkdir(parents=True)
        photo = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
        Image.new("RGB", (WIDTH, HEIGHT)).save(photo)
        masks = root / "gtFine" / split / city
        Image.fromarray(INSTANCES).save(masks / f"{stem}_gtFine_instanceIds.png")
        Image.fromarray(LABELS).save(masks / f"{stem}_gtFine_labelIds.png")
        (masks / f"{stem}_gtFine_polygons.json").write_text("{}")  # published too, not needed
    (root / "leftImg8bit" / "train" / "license.txt").write_text("")
    register_cityscapes("test_city", root)
    return root


def photo(root):
    return root / "leftImg8bit" / "train" / "aachen" / f"{STEM}_leftImg8bit.png"


def mask(root, kind):
    return root / "gtFine" / "train" / "aachen" / f"{STEM}_gtFine_{kind}.png"


def test_instances(root):
    first, second = DatasetCatalog.get("test_city_train")
    assert len(DatasetCatalog.get("test_city_val")) == 1
    assert first["file_name"] == str(photo(root)) and "ulm" in second["file_name"]
    assert [first["image_id"], second["image_id"]] == [0, 1]
    assert (first["height"], first["width"]) == (HEIGHT, WIDTH)
    names = MetadataCatalog.get("test_city_train").thing_classes
    assert names == "person rider car truck bus train motorcycle bicycle".split()
    found = [(names[a["category_id"]], a["iscrowd"]) for a in first["annotations"]]
    assert found == [("person", 1), ("car", 0), ("car", 0)]
    for value, annotation in zip([24, 26000, 26001], first["annotations"]):
        assert iou(annotation_mask(annotation, HEIGHT, WIDTH), INSTANCES == value) >= 0.98
    assert MetadataCatalog.get("test_city_train").evaluator_type == "coco"


def test_semantic(root, cache):
    record = DatasetCatalog.get("test_city_sem_seg_train")[0]
    assert record["sem_seg_file_name"].startswith(str(cache)) and "annotations" not in record
    labels = np.asarray(Image.open(record["sem_seg_file_name"]))
    # The published trainId of each id from 0 to 33.
    published = [*[255] * 7, 0, 1, 255, 255, 2, 3, 4, *[255] * 3, 5, 255, 6, 7, 8, 9, 10]
    published += [11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
    assert labels[0, :34].tolist() == published
    assert (labels == np.array(published)[LABELS]).all()
    metadata = MetadataCatalog.get("test_city_sem_seg_train")
    assert len(metadata.stuff_classes) == 19 and metadata.ignore_label == 255
    assert metadata.stuff_classes[labels[15, 5]] == "car"
    assert metadata.evaluator_type == "sem_seg"


def test_the_list_reads_no_picture(root):
    for file in root.rglob("*.png"):
        file.write_text("no picture")
    for name in ("test_city_train", "test_city_sem_seg_train"):
        assert [sorted(d) for d in listed(name)] == [["file_name", "image_id"]] * 2


def unknown_instance(root):
    Image.fromarray(np.full((HEIGHT, WIDTH), 34001, np.uint16)).save(mask(root, "instanceIds"))


def unknown_class(root):
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint16)).save(mask(root, "instanceIds"))


def other_size(root):
    Image.fromarray(INSTANCES[::2]).save(mask(root, "instanceIds"))


def text(root):
    mask(root, "instanceIds").write_text("no picture")


def no_mask(root):
    os.remove(mask(root, "instanceIds"))


def bad_photo(root):
    photo(root).write_text("no picture")


def no_photos(root):
    for file in root.glob("leftImg8bit/train/*/*"):
        os.remove(file)


def no_annotations(root):
    (root / "gtFine").rename(root / "elsewhere")


def no_root(root):
    root.rename(root.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage, message",
    [
        (unknown_instance, "instanceIds.png: holds 34001, but classes are 0..33"),
        (unknown_class, "instanceIds.png: holds 255, but classes are 0..33"),
        (other_size, "instanceIds.png: is 48x12, its photo 48x24"),
        (text, "instanceIds.png: cannot be read as a mask"),
        (no_mask, f"train: 1 of 2 masks are missing, .*aachen/{STEM}_gtFine_instanceIds.png"),
        (bad_photo, f"{STEM}_leftImg8bit.png: cannot be read"),
        (no_photos, r"leftImg8bit/train: no <city>/\*_leftImg8bit.png in it"),
        (no_annotations, "gtFine/train: no such folder; unpack gtFine_trainvaltest.zip in"),
        (no_root, "leftImg8bit/train: no such folder; unpack leftImg8bit_trainvaltest.zip in"),
    ],
)
def test_sets_that_cannot_be_right_are_refused(root, damage, message):
    damage(root)
    with pytest.raises(D2SSLError, match=message) as caught:
        DatasetCatalog.get("test_city_train")
    assert "\n" not in str(caught.value)


def test_unknown_label_is_refused(root):
    Image.fromarray(np.full((HEIGHT, WIDTH), 34, np.uint8)).save(mask(root, "labelIds"))
    with pytest.raises(D2SSLError, match="labelIds.png: holds 34, which is no class"):
        DatasetCatalog.get("test_city_sem_seg_train")


def test_real_frames(shared, tmp_path):
    source = shared / "data" / "cityscapes_pix2pixHD"
    kinds = {
        "train_img": "leftImg8bit/train/aachen/{}_leftImg8bit.png",
        "train_inst": "gtFine/train/aachen/{}_gtFine_instanceIds.png",
        "train_label": "gtFine/train/aachen/{}_gtFine_labelIds.png",
    }
    stems = ["aachen_000000_000019", "aachen_000003_000019"]
    for stem in stems:
        for folder, target in kinds.items():
            target = tmp_path / target.format(stem)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source / folder / target.name)
    register_cityscapes("test_city", tmp_path)
    things = [24, 25, 26, 27, 28, 31, 32, 33]
    total = 0
    for stem, record in zip(stems, DatasetCatalog.get("test_city_train")):
        assert (record["height"], record["width"]) == (1024, 2048)
        ids = np.asarray(Image.open(tmp_path / kinds["train_inst"].format(stem)))
        values, areas = np.unique(ids, return_counts=True)
        expected = {v: a for v, a in zip(values.tolist(), areas.tolist()) if v // 1000 in things}
        single = [a for a in record["annotations"] if not a["iscrowd"]]
        crowds = len(record["annotations"]) - len(single)
        assert crowds == len(set(values.tolist()) & set(things))
        assert [things[a["category_id"]] for a in single] == [v // 1000 for v in expected]
        found = [annotation_mask(a, 1024, 2048).sum() for a in single]
        assert found == pytest.approx([*expected.values()], rel=0.02)
        total += len(single)
    assert total > 20
    for stem, record in zip(stems, DatasetCatalog.get("test_city_sem_seg_train")):
        ids = np.asarray(Image.open(tmp_path / kinds["train_label"].format(stem)))
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        for kind, label in {7: 0, 11: 2, 21: 8, 23: 10, 26: 13, 33: 18}.items():
            assert ((labels == label) == (ids == kind)).all()
        assert (
            (labels == 255) == np.isin(ids, [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30])
        ).all()
