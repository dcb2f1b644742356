"""Photos are 80x60; masks come at other sizes, as in the challenge."""

import csv
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2ssl.data.datasets.catalog import decoded, decoder, listed
from d2ssl.data.datasets.open_images import read_hierarchy, register_open_images
from d2ssl.data.datasets.subset import ensure_registered
from d2ssl.data.masks import annotation_mask
from d2ssl.engine.open_images_ap import OpenImagesEvaluator
from d2ssl.errors import D2SSLError

WIDTH, HEIGHT = 80, 60
CLASSES = "/m/01g317,Person\n/m/03bt1vf,Woman\n/m/04yx4,Man\n/m/0k4j,Car\n"
PEOPLE = [{"LabelName": "/m/03bt1vf"}, {"LabelName": "/m/04yx4"}]
HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": "/m/01g317", "Subcategory": PEOPLE},
        {"LabelName": "/m/0k4j"},
    ],
}
MASKS = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
CLICKS = "0.86864,0.95498 0.65197 1;0.89370 0.56579 1"
# a0: two masks, a box that has one of them, one without a mask, a group. b1: labels alone. 0c: a
# mask that is larger than the photo.
FILES = {
    "masks": [
        f"a0_m04yx4_11.png,a0,/m/04yx4,11,0.25,0.5,0.333333,0.666667,{CLICKS}",
        f"a0_m0k4j_12.png,a0,/m/0k4j,12,0.0,1.0,0.0,0.5,{CLICKS}",
        f"0c_m04yx4_13.png,0c,/m/04yx4,13,0.1,0.65,0.1,0.6,{CLICKS}",
    ],
    "bbox": [
        "a0,/m/04yx4,0.2500003,0.5,0.33333334,0.6666669,0",
        "a0,/m/04yx4,0.6,0.9,0.1,0.4,0",
        "a0,/m/0k4j,0.0,1.0,0.0,0.5,0",
        "a0,/m/01g317,0.5,1.0,0.5,1.0,1",
        "0c,/m/04yx4,0.1,0.65,0.1,0.6,0",
    ],
    "labels": [
        "b1,/m/04yx4,0",
        "a0,/m/04yx4,1",
        "a0,/m/0k4j,1",
        "a0,/m/03bt1vf,0",
        "0c,/m/04yx4,1",
    ],
}
MAN, CAR, OTHER = (10, 20, 10, 20), (0, 15, 0, 40), (3, 18, 4, 24)  # see frame()
HEADERS = {
    "masks": MASKS,
    "bbox": "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf",
    "labels": "ImageID,LabelName,Confidence",
}


def frame(top, bottom, left, right, scale=2):
    """
    A mask with a hole, so that it is kept as RLE to the pixel: in half the photo's pixels, as many
    times larger as ``scale`` says.
    """
    mask = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    mask[top:bottom, left:right] = 1
    mask[top + 2 : bottom - 2, left + 2 : right - 2] = 0
    return np.kron(mask, np.ones((scale, scale), np.uint8))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "challenge-2019-classes-description-segmentable.csv").write_text(CLASSES)
    hierarchy = tmp_path / "challenge-2019-label300-segmentable-hierarchy.json"
    hierarchy.write_text(json.dumps(HIERARCHY))
    for kind, rows in FILES.items():
        path = tmp_path / f"challenge-2019-train-segmentation-{kind}.csv"
        path.write_text("\n".join([HEADERS[kind], *rows]) + "\n")
    for split, keys in (("train", ("b1", "a0", "0c")), ("test", ("d2",))):
        (tmp_path / "images" / split).mkdir(parents=True)
        for key in keys:
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / split / f"{key}.jpg")
    for digit in "a0":
        (tmp_path / "masks" / "train" / f"train-masks-{digit}").mkdir(parents=True)
    a, zero = (tmp_path / "masks" / "train" / f"train-masks-{digit}" for digit in "a0")
    Image.fromarray(frame(*MAN, scale=1) > 0).save(a / "a0_m04yx4_11.png")  # mode "1"
    Image.fromarray(frame(*CAR) * 255).save(a / "a0_m0k4j_12.png")
    Image.fromarray(frame(*OTHER, scale=4)).save(zero / "0c_m04yx4_13.png")  # 0 and 1
    register_open_images("oi", str(tmp_path))
    return tmp_path


def change(root, kind, change_rows):
    """Rewrites a CSV file: ``change_rows`` is given its rows, header first, and changes them."""
    path = root / f"challenge-2019-train-segmentation-{kind}.csv"
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    change_rows(rows)
    path.write_text("".join(",".join(row) + "\n" for row in rows))


def test_images_are_those_with_labels_in_their_order(root):
    empty, several, one = DatasetCatalog.get("oi_train")
    folder = root / "images" / "train"
    assert empty == {
        "file_name": str(folder / "b1.jpg"),
        "image_id": 0,
        "height": HEIGHT,
        "width": WIDTH,
        "positive_labels": [],
        "negative_labels": [2],
        "annotations": [],
    }
    assert several["file_name"] == str(folder / "a0.jpg") and several["image_id"] == 1
    assert several["positive_labels"] == [2, 3] and several["negative_labels"] == [1]
    assert [a["category_id"] for a in several["annotations"]] == [2, 3, 2, 0]
    assert one["image_id"] == 2 and len(one["annotations"]) == 1
    metadata = MetadataCatalog.get("oi_train")
    assert metadata.thing_classes == ["Person", "Woman", "Man", "Car"]
    assert metadata.mids == ["/m/01g317", "/m/03bt1vf", "/m/04yx4", "/m/0k4j"]
    assert metadata.evaluator_type == "coco"


def test_masks_are_scaled_to_the_photo(root):
    _, several, one = DatasetCatalog.get("oi_train")
    man, car = several["annotations"][:2]
    (other,) = one["annotations"]
    for annotation, place in ((man, MAN), (car, CAR), (other, OTHER)):
        assert (annotation_mask(annotation, HEIGHT, WIDTH) == frame(*place)).all()
        assert annotation["iscrowd"] == 0
    assert man["bbox"] == pytest.approx([20, 20, 40, 40], abs=1e-3)
    assert other["bbox"] == pytest.approx([8, 6, 52, 36])  # as drawn by people


def test_a_pixel_belongs_to_a_mask_that_covers_more_than_half_of_it(root):
    mask = frame(*OTHER, scale=4)  # 4 of its pixels are one of the photo
    mask[13, 16:96] = 0  # half of each pixel in row 6 of the photo
    mask[10, 21] = mask[11, 20:22] = 1  # three of four
    Image.fromarray(mask).save(root / "masks/train/train-masks-0/0c_m04yx4_13.png")
    (annotation,) = DatasetCatalog.get("oi_train")[2]["annotations"]
    expected = frame(*OTHER)
    expected[6] = 0
    expected[5, 10] = 1
    assert (annotation_mask(annotation, HEIGHT, WIDTH) == expected).all()


def test_objects_without_a_mask_are_crowds_in_their_box(root):
    _, several, _ = DatasetCatalog.get("oi_train")
    single, group = several["annotations"][2:]
    assert single["is_group_of"] is False and group["is_group_of"] is True
    assert single["bbox"] == pytest.approx([48, 6, 72, 24])
    assert group["bbox"] == [40, 30, 80, 60]
    for annotation, rows, columns in ((single, (6, 24), (48, 72)), (group, (30, 60), (40, 80))):
        expected = np.zeros((HEIGHT, WIDTH), bool)
        expected[slice(*rows), slice(*columns)] = True
        assert annotation["iscrowd"] == 1
        assert (annotation_mask(annotation, HEIGHT, WIDTH) == expected).all()


def test_a_group_stays_where_one_of_it_has_the_same_box(root):
    change(root, "bbox", set_cell(1, "IsGroupOf", "1"))
    annotations = DatasetCatalog.get("oi_train")[1]["annotations"]
    groups = [a["bbox"] for a in annotations if a.get("is_group_of")]
    assert len(annotations) == 5 and groups[0] == pytest.approx([20, 20, 40, 40], abs=1e-3)


def test_an_empty_mask_is_none(root):
    path = root / "masks/train/train-masks-0/0c_m04yx4_13.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(path)
    (annotation,) = DatasetCatalog.get("oi_train")[2]["annotations"]
    assert annotation["iscrowd"] == 1 and annotation["is_group_of"] is False


def test_both_names_of_the_labels_and_masks_in_one_folder(root):
    before = DatasetCatalog.get("oi_train")
    prefix = root / "challenge-2019-train-segmentation-labels.csv"
    prefix.rename(root / "challenge-2019-train-segmentation-imagelabels.csv")
    for part in (root / "masks/train").iterdir():
        for mask in part.iterdir():
            mask.rename(root / "masks/train" / mask.name)
        part.rmdir()
    assert DatasetCatalog.get("oi_train") == before


def test_listing_reads_no_picture_and_decode_travels_to_other_processes(root):
    for photo in (root / "images/train").iterdir():
        photo.write_bytes(b"")
    assert len(listed("oi_train")) == 3
    assert pickle.loads(pickle.dumps(decoder("oi_train")))


def test_parts_know_the_classes(root):
    ensure_registered(["oi_train@2"])
    assert [d["image_id"] for d in DatasetCatalog.get("oi_train@2")] == [0, 1]
    assert MetadataCatalog.get("oi_train@2").mids[3] == "/m/0k4j"


def test_true_masks_are_perfect_predictions(root):
    ensure_registered(["oi_train@3"])
    judge = OpenImagesEvaluator("oi_train@3")
    for entry in DatasetCatalog.get("oi_train"):
        annotations = entry["annotations"]
        masks = [annotation_mask(a, HEIGHT, WIDTH) for a in annotations]
        found = Instances((HEIGHT, WIDTH))
        found.pred_boxes = Boxes(np.array([a["bbox"] for a in annotations]).reshape(-1, 4))
        found.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, HEIGHT, WIDTH))
        found.pred_classes = torch.tensor([a["category_id"] for a in annotations])
        found.scores = torch.ones(len(annotations))
        judge.process([entry], [{"instances": found}])
    values = judge.evaluate()["open_images_segm"]
    assert values["AP50-Man"] == values["AP50-Car"] == 100
    assert values["AP50-Person"] == 0  # the men are persons, and "Person" found only the group
    assert values["AP50"] == pytest.approx(200 / 3) and np.isnan(values["AP50-Woman"])


def test_test_photos(root):
    (photo,) = DatasetCatalog.get("oi_test")
    assert photo["file_name"].endswith("d2.jpg") and "annotations" not in photo
    assert MetadataCatalog.get("oi_test").mids[0] == "/m/01g317"


def test_rows_of_other_images_are_left_out_and_counted(root, caplog):
    change(root, "labels", lambda rows: rows.pop())  # of 0c
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        assert len(DatasetCatalog.get("oi_train")) == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "1 masks of images without image-level labels are left out (first: 0c)" in messages[0]
    assert "1 boxes of images without" in messages[1]


def set_cell(row, column, value):
    def run(rows):
        rows[row][rows[0].index(column)] = value

    return run


@pytest.mark.parametrize(
    "kind, rows, message",
    [
        ("masks", set_cell(0, "MaskPath", "Path"), "masks.csv: has no column MaskPath"),
        ("bbox", set_cell(0, "IsGroupOf", "Group"), "bbox.csv: has no column IsGroupOf"),
        ("labels", set_cell(0, "Confidence", "Score"), "labels.csv: has no column Confidence"),
        ("labels", lambda rows: rows[2].pop(), "labels.csv: line 3 is cut short"),
        ("labels", lambda rows: rows.__delitem__(slice(1, None)), "labels.csv: has no row"),
        ("masks", set_cell(1, "LabelName", "/m/0"), "image a0 has LabelName '/m/0', which is not"),
        ("labels", set_cell(1, "LabelName", "Man"), "image b1 has LabelName 'Man', which is not"),
        ("labels", set_cell(1, "Confidence", "0.7"), "image b1 has Confidence '0.7'.*1 .present"),
        ("bbox", set_cell(2, "IsGroupOf", "yes"), "image a0 has IsGroupOf 'yes'; give 0 or 1"),
        ("masks", set_cell(3, "BoxXMax", "1.2"), "image 0c has a box of 0.1, 0.1, 1.2, 0.6"),
        ("bbox", set_cell(1, "XMin", "-0.1"), "image a0 has a box of -0.1"),
        ("bbox", set_cell(1, "XMin", "0.7"), "image a0 has a box of 0.7.*least first"),
        ("bbox", set_cell(1, "YMin", "x"), "image a0 has a box of 0.2500003, x"),
        ("masks", lambda rows: rows.append(rows[1]), "masks.csv: .*_11.png is listed twice"),
        ("masks", set_cell(1, "MaskPath", "../x.png"), "masks.csv: mask '../x.png' lies outside"),
        ("masks", set_cell(1, "MaskPath", "x.png"), "1 of 2 masks are missing, the first is .*x.p"),
        ("labels", set_cell(1, "ImageID", "../b"), "labels.csv: photo '../b.jpg' lies outside"),
        ("labels", set_cell(1, "ImageID", "b2"), "1 of 3 photos are missing, .*b2.jpg"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(root, kind, rows, message):
    change(root, kind, rows)
    with pytest.raises(D2SSLError, match=message) as caught:
        DatasetCatalog.get("oi_train")
    assert "\n" not in str(caught.value)


def write_text_mask(root):
    (root / "masks/train/train-masks-a/a0_m0k4j_12.png").write_text("no picture")


def turn_mask(root):
    Image.new("1", (HEIGHT, WIDTH)).save(root / "masks/train/train-masks-a/a0_m0k4j_12.png")


def replace(name, text):
    return lambda root: (root / f"challenge-2019-{name}").write_text(text)


@pytest.mark.parametrize(
    "damage, message",
    [
        (write_text_mask, "a0_m0k4j_12.png: cannot be read as a mask"),
        (turn_mask, "a0_m0k4j_12.png: is 60x80, its photo 80x60; was the photo rotated"),
        (replace("classes-description-segmentable.csv", ""), "has a class twice, or none at all"),
        (replace("classes-description-segmentable.csv", CLASSES * 2), "has a class twice"),
        (replace("classes-description-segmentable.csv", "Label,Name\n"), "'Label,Name' is not a"),
        (lambda root: next(root.glob("*-bbox.csv")).unlink(), "bbox.csv: no such file"),
        (lambda root: (root / "images/train").rename(root / "images/x"), "put the photos of the t"),
    ],
)
def test_damage_is_named(root, damage, message):
    damage(root)
    with pytest.raises(D2SSLError, match=message):
        DatasetCatalog.get("oi_train")


def test_a_set_that_is_not_there(tmp_path):
    register_open_images("nowhere", str(tmp_path / "none"))
    for split in ("train", "validation", "test"):
        with pytest.raises(D2SSLError, match="none: no such folder; register_open_images needs"):
            DatasetCatalog.get(f"nowhere_{split}")


def test_hierarchy(tmp_path):
    def node(name, *children):
        return {"LabelName": name, "Subcategory": list(children)}

    path = tmp_path / "h.json"
    # "x" is no class, and "c" stands in two places.
    path.write_text(json.dumps(node("x", node("a", node("x", node("b", node("c")))), node("c"))))
    assert read_hierarchy(str(path), ["a", "b", "c"]) == [set(), {0}, {0, 1}]
    with pytest.raises(D2SSLError, match=r"h.json: has no d \(1 of 2 classes are missing\)"):
        read_hierarchy(str(path), ["a", "d"])
    for content in ('{"Name": 1}', "[1]", '{"LabelName": "a", "Subcategory": [3]}'):
        path.write_text(content)
        with pytest.raises(D2SSLError, match="is not a hierarchy of Open Images"):
            read_hierarchy(str(path), ["a"])


def test_only_what_is_asked_for_is_decoded(root):
    (root / "masks/train/train-masks-0/0c_m04yx4_13.png").unlink()
    assert len(list(decoded("oi_train", listed("oi_train")[:2]))) == 2
