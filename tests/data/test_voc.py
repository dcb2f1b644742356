import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from d2ssl.data.datasets.catalog import listed
from d2ssl.data.datasets.voc import VOC_CLASSES, register_voc
from d2ssl.data.masks import annotation_mask, iou
from d2ssl.errors import D2SSLError

HEIGHT, WIDTH = 24, 32
STEM = "2007_000032"

# Two dogs (12) that touch, one person (15) in front of void, and background.
OBJECTS = np.zeros((HEIGHT, WIDTH), np.uint8)
OBJECTS[2:10, 2:10], OBJECTS[2:10, 10:20], OBJECTS[12:22, 20:30] = 1, 2, 3
OBJECTS[11, :] = 255
CLASSES = np.array([0, 12, 12, 15, *[0] * 251, 255], np.uint8)[OBJECTS]


def write_palette(file, ids):
    picture = Image.fromarray(ids)
    picture.putpalette([(37 * i) % 256 for i in range(768)])  # brightness is not the index
    picture.save(file)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    """Two photos in VOC's layout: the first is for training, the second for validation."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (root / folder).mkdir(parents=True)
    for stem in (STEM, "2007_000033"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{stem}.jpg")
        write_palette(root / "SegmentationClass" / f"{stem}.png", CLASSES)
        write_palette(root / "SegmentationObject" / f"{stem}.png", OBJECTS)
    write_lists(root, train=STEM, val="2007_000033\n")
    register_voc("test_voc", root)
    return root


def write_lists(root, **lists):
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    for split, text in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)


def test_instances(root):
    (record,) = DatasetCatalog.get("test_voc_train")
    assert record["file_name"] == str(root / "JPEGImages" / f"{STEM}.jpg")
    assert record["image_id"] == 0
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    names = [VOC_CLASSES[a["category_id"]] for a in record["annotations"]]
    assert names == ["dog", "dog", "person"]
    for value, annotation in enumerate(record["annotations"], 1):
        assert iou(annotation_mask(annotation, HEIGHT, WIDTH), OBJECTS == value) >= 0.98
    metadata = MetadataCatalog.get("test_voc_train")
    assert len(metadata.thing_classes) == 20 and metadata.evaluator_type == "coco"


def test_semantic(root, cache):
    (record,) = DatasetCatalog.get("test_voc_sem_seg_val")
    assert "annotations" not in record and (record["height"], record["width"]) == (HEIGHT, WIDTH)
    assert record["sem_seg_file_name"].startswith(str(cache))
    assert (read_image(record["sem_seg_file_name"], "L")[..., 0] == CLASSES).all()
    metadata = MetadataCatalog.get("test_voc_sem_seg_val")
    assert metadata.stuff_classes == ["background", *VOC_CLASSES]
    assert metadata.ignore_label == 255 and metadata.evaluator_type == "sem_seg"


def test_the_list_reads_no_picture(root):
    for file in root.glob("*/*.*g"):
        file.write_text("no picture")
    expected = [{"file_name": str(root / "JPEGImages" / f"{STEM}.jpg"), "image_id": 0}]
    assert listed("test_voc_train") == listed("test_voc_sem_seg_train") == expected


def test_own_classes_and_no_instances_for_semantic(root):
    (root / "SegmentationObject").rename(root / "elsewhere")
    register_voc("test_voc", root, classes=[f"kind {i}" for i in range(1, 16)])
    assert len(DatasetCatalog.get("test_voc_sem_seg_train")) == 1
    assert MetadataCatalog.get("test_voc_train").thing_classes[11] == "kind 12"
    with pytest.raises(D2SSLError, match="train.txt: 1 of 1 masks are missing.*SegmentationObject"):
        DatasetCatalog.get("test_voc_train")


def test_a_class_may_be_uncertain_at_the_outline(root):
    kinds = CLASSES.copy()
    kinds[2:4, 2:5] = 0  # 6 of the 64 pixels of the first instance: background
    kinds[12:20, 20:30] = 255  # most of the third is void, and has no say
    write_palette(root / "SegmentationClass" / f"{STEM}.png", kinds)
    (record,) = DatasetCatalog.get("test_voc_train")
    assert [a["category_id"] for a in record["annotations"]] == [11, 11, 14]


def classes(change):
    """Damage that changes the picture of classes."""

    def damage(root):
        kinds = CLASSES.copy()
        kinds[OBJECTS == 2] = change
        write_palette(root / "SegmentationClass" / f"{STEM}.png", kinds)

    return damage


def two_classes(root):
    kinds = CLASSES.copy()
    kinds[2, 2:9] = 3  # 7 of 64
    write_palette(root / "SegmentationClass" / f"{STEM}.png", kinds)


def other_size(root):
    write_palette(root / "SegmentationObject" / f"{STEM}.png", OBJECTS.T.copy())


def text(root):
    (root / "SegmentationObject" / f"{STEM}.png").write_text("no picture")


def no_mask(root):
    os.remove(root / "SegmentationClass" / f"{STEM}.png")


def no_photo(root):
    os.remove(root / "JPEGImages" / f"{STEM}.jpg")


def outside(root):
    write_lists(root, train=f"../../JPEGImages/{STEM}")


def twice(root):
    write_lists(root, train=f"{STEM}\n{STEM}")


def empty(root):
    write_lists(root, train="\n\n")


def no_list(root):
    os.remove(root / "ImageSets" / "Segmentation" / "train.txt")


def no_root(root):
    root.rename(root.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            classes(21),
            f"SegmentationClass/{STEM}.png: has class 21 where .* instance 2, and .*1..20",
        ),
        (classes(0), f"SegmentationClass/{STEM}.png: has class 0 where"),
        (classes(255), f"SegmentationClass/{STEM}.png: has class 0 where"),
        (two_classes, rf"SegmentationClass/{STEM}.png: has classes \[3, 12\] where .* instance 1;"),
        (other_size, f"SegmentationObject/{STEM}.png: is 24x32, its photo 32x24"),
        (text, f"SegmentationObject/{STEM}.png: cannot be read as a mask"),
        (no_mask, f"train.txt: 1 of 1 masks are missing, .*SegmentationClass/{STEM}.png"),
        (no_photo, f"train.txt: 1 of 1 photos are missing, .*JPEGImages/{STEM}.jpg"),
        (outside, "train.txt: photo .* lies outside .*JPEGImages"),
        (twice, f"train.txt: .*{STEM}.jpg is listed twice"),
        (empty, "train.txt: names no photo"),
        (no_list, "ImageSets/Segmentation/train.txt: no such file"),
        (no_root, "VOC2012: no such folder; unpack VOCtrainval"),
    ],
)
def test_sets_that_cannot_be_right_are_refused(root, damage, message):
    damage(root)
    with pytest.raises(D2SSLError, match=message) as caught:
        DatasetCatalog.get("test_voc_train")
    assert "\n" not in str(caught.value)


def test_unknown_class_and_wrong_size_are_refused_for_semantic_too(root, cache):
    classes(21)(root)
    with pytest.raises(D2SSLError, match=f"{STEM}.png: holds 21, which is no class"):
        DatasetCatalog.get("test_voc_sem_seg_train")
    write_palette(root / "SegmentationClass" / f"{STEM}.png", CLASSES[:-1])
    with pytest.raises(D2SSLError, match=f"{STEM}.png: is 32x23, its photo 32x24"):
        DatasetCatalog.get("test_voc_sem_seg_train")


def test_absent_split_leaves_the_others_usable(root):
    with pytest.raises(D2SSLError, match="trainval.txt: no such file"):
        DatasetCatalog.get("test_voc_trainval")
    assert len(DatasetCatalog.get("test_voc_val")) == 1


def test_real_instances(shared, tmp_path):
    """The pictures say what a COCO file of the same annotations does, beside what is covered."""
    source = shared / "data" / "voc_labelme_instance" / "data_dataset_voc"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
        (tmp_path / folder).symlink_to(source / folder)
    write_lists(tmp_path, trainval="2011_000003\n2011_000006\n2011_000025\n")
    register_voc("test_voc", tmp_path)
    coco = json.loads((source.parent / "data_dataset_coco" / "annotations.json").read_text())
    ids = {os.path.basename(image["file_name"]): image["id"] for image in coco["images"]}
    names = {c["id"]: c["name"] for c in coco["categories"]}
    for record in DatasetCatalog.get("test_voc_trainval"):
        image_id = ids[os.path.basename(record["file_name"])]
        expected = [a for a in coco["annotations"] if a["image_id"] == image_id]
        assert len(record["annotations"]) == len(expected)
        for ours, theirs in zip(record["annotations"], expected):
            assert VOC_CLASSES[ours["category_id"]] == names[theirs["category_id"]]
            x, y, w, h = theirs["bbox"]
            assert ours["bbox"] == pytest.approx([x, y, x + w, y + h], abs=5)


def test_real_classes(shared, cache):
    root = shared / "data" / "voc_twsfar_4"
    register_voc("test_voc", root)
    train = DatasetCatalog.get("test_voc_sem_seg_train")
    assert len(train) == 4
    for record in train[:2]:
        assert record["sem_seg_file_name"].startswith(str(cache))
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        original = np.asarray(Image.open(root / "SegmentationClass" / f"{stem}.png"))
        assert (read_image(record["sem_seg_file_name"], "L")[..., 0] == original).all()
        present = {"2007_000032": {0, 1, 15, 255}, "2007_000039": {0, 20, 255}}
        assert {*np.unique(original).tolist()} == present[stem]
