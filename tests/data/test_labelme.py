import base64
import io
import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.labelme import register_labelme
from d2ssl.data.masks import annotation_mask, iou
from d2ssl.errors import D2SSLError

WIDTH, HEIGHT = 60, 40
NAME = "test_labelme"
SQUARE = [[10, 5], [20, 5], [20, 15], [10, 15]]


def shape(label="cat", points=SQUARE, kind="polygon", group=None, **more):
    flags = {"flags": {}, "group_id": group}
    return {"label": label, "points": points, "shape_type": kind, **flags, **more}


def png(mask):
    file = io.BytesIO()
    Image.fromarray(np.asarray(mask, dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def load(tmp_path, caplog):
    """Writes a JSON and a photo for each list of shapes, then loads; ``load.warnings`` after."""

    def run(*photos, images="", classes=None, exif=None, **keys):
        (tmp_path / images).mkdir(exist_ok=True)
        for i, shapes in enumerate(photos):
            photo = tmp_path / images / f"{i}.jpg"
            Image.new("RGB", (WIDTH, HEIGHT)).save(photo, exif=exif or Image.Exif())
            content = {
                "version": "5.4.1",
                "flags": {},
                "shapes": shapes,
                "imagePath": f"{i}.jpg",
                "imageData": None,
                "imageHeight": HEIGHT,
                "imageWidth": WIDTH,
            }
            (tmp_path / f"{i}.json").write_text(json.dumps({**content, **keys}))
        register_labelme(NAME, tmp_path, images, classes)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "d2ssl.data"):
            dicts = DatasetCatalog.get(NAME)
        run.warnings = [record.getMessage() for record in caplog.records]
        return dicts

    return run


def masks(record):
    return [annotation_mask(a, record["height"], record["width"]) for a in record["annotations"]]


def test_polygon_is_not_moved(load, tmp_path):
    (record,) = load([shape(points=[[10.25, 5], [20.5, 5], [20, 15.75]])])
    (annotation,) = record.pop("annotations")
    assert record == {
        "file_name": str(tmp_path / "0.jpg"),
        "image_id": 0,
        "height": HEIGHT,
        "width": WIDTH,
    }
    assert annotation["segmentation"] == [[10.25, 5, 20.5, 5, 20, 15.75]]
    assert annotation["bbox"] == [10.25, 5, 20.5, 15.75] and annotation["bbox_mode"] == 0
    assert annotation["category_id"] == 0 and annotation["iscrowd"] == 0
    assert load.warnings == []


def test_rectangle_and_circle(load):
    corners = [[23, 14], [3, 4]]  # in any order
    (record,) = load([shape(points=corners, kind="rectangle")])
    assert record["annotations"][0]["bbox"] == [3, 4, 23, 14]
    assert masks(record)[0][4:14, 3:23].all() and masks(record)[0].sum() == 200
    centre_and_rim = [[30, 20], [36, 28]]
    (record,) = load([shape(points=centre_and_rim, kind="circle")])
    assert masks(record)[0].sum() == pytest.approx(np.pi * 100, rel=0.02)
    assert record["annotations"][0]["bbox"] == pytest.approx([20, 10, 40, 30])
    (record,) = load([shape(points=[[55, 20], [55, 35]], kind="circle")])  # may leave the photo
    assert record["annotations"][0]["bbox"] == pytest.approx([40, 5, 60, 35])


@pytest.mark.parametrize("high", [1, 255])
def test_mask(load, high):
    patch = np.zeros((10, 20), bool)
    patch[2:7, 3:18] = patch[8, 5] = True
    box = [[7, 12], [26, 21]]  # of the first and the last pixel
    (record,) = load([shape(points=box, kind="mask", mask=png(patch * high))])
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[12:22, 7:27] = patch
    assert (masks(record)[0] == expected).all()
    assert record["annotations"][0]["bbox"] == [10, 14, 25, 21]


def test_mask_over_the_edge_of_the_photo(load):
    patch = np.tri(12, 12) * 255
    corners = [[[-2, -3], [9, 8]], [[52, 30], [63, 41]]]
    (record,) = load([shape(points=box, kind="mask", mask=png(patch)) for box in corners])
    first, last = masks(record)
    assert (first[:9, :10] == np.tri(12, 12)[3:, 2:]).all() and first[9:].sum() == 0
    assert (last[30:, 52:] == np.tri(12, 12)[:10, :8]).all() and last[:30].sum() == 0
    (warning,) = load.warnings
    assert "2 outlines leave their photo" in warning


def test_shapes_of_a_group_are_one_instance(load):
    other = [[30, 5], [40, 5], [40, 10], [30, 10]]
    patch = png(np.full((5, 5), 255))
    shapes = [
        shape("cat", SQUARE, group=0),
        shape("dog", SQUARE, group=0),  # of another label: another instance
        shape("cat", SQUARE),
        shape("cat", other, group=0),
        shape("cat", other, group=1),
        shape("cat", [[50, 30], [54, 34]], kind="mask", group=1, mask=patch),
        shape("cat", other),
    ]
    (record,) = load(shapes)
    areas = [100 + 50, 100, 100, 50 + 25, 50]
    assert [mask.sum() for mask in masks(record)] == areas
    assert [a["category_id"] for a in record["annotations"]] == [0, 1, 0, 0, 0]
    assert len(record["annotations"][0]["segmentation"]) == 2
    assert record["annotations"][0]["bbox"] == [10, 5, 40, 15]
    assert record["annotations"][3]["bbox"] == [30, 5, 55, 35]


def test_classes(load):
    shapes = [shape("dog"), shape("__ignore__"), shape("cat"), shape("_background_")]
    (record,) = load(shapes)
    assert MetadataCatalog.get(NAME).thing_classes == ["cat", "dog"]
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]
    (record,) = load(shapes, classes=["dog", "bird", "cat"])
    assert [a["category_id"] for a in record["annotations"]] == [0, 2]
    with pytest.raises(D2SSLError, match=r"shape 2 \(cat\): its label is no class; .*'dog'"):
        load(shapes, classes=["dog"])


def test_part_of_a_set_knows_the_classes(load):
    load([shape("dog")], [shape("cat")])
    ensure_registered([f"{NAME}@1"])
    assert len(DatasetCatalog.get(f"{NAME}@1")) == 1
    assert MetadataCatalog.get(f"{NAME}@1").thing_classes == ["cat", "dog"]


def test_where_the_photo_is(load, tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "sub" / "a.jpg")
    # The photo in the JSON is not looked at.
    (record,) = load([shape()], imagePath="sub\\a.jpg", imageData=png(np.zeros((9, 9))))
    assert record["file_name"] == str(tmp_path / "sub" / "a.jpg")
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    (record,) = load([shape()], imagePath="D:\\elsewhere\\0.jpg", images="moved")
    assert record["file_name"] == str(tmp_path / "moved" / "0.jpg")
    with pytest.raises(D2SSLError, match="1 of 1 photos are missing, the first is .*gone.jpg"):
        load([shape()], imagePath="gone.jpg")
    with pytest.raises(D2SSLError, match="'../0.jpg' lies outside"):
        load([shape()], imagePath="..\\0.jpg")
    with pytest.raises(D2SSLError, match="0.jpg is listed twice"):
        load([shape()], [shape()], imagePath="0.jpg")


def test_files_of_the_first_versions(load, tmp_path):
    content = {"imagePath": "0.jpg", "shapes": [{"label": "cat", "points": SQUARE}]}
    load([shape()])
    (tmp_path / "0.json").write_text(json.dumps({**content, "lineColor": [0, 255, 0, 128]}))
    (record,) = DatasetCatalog.get(NAME)
    assert record["annotations"][0]["bbox"] == [10, 5, 20, 15] and record["height"] == HEIGHT


def test_what_is_kept_with_a_warning(load):
    tiny, bow = [[3, 4], [9, 9]], [[10, 5], [50, 35], [50, 5], [10, 35]]
    empty = shape(points=[[1, 1], [5, 5]], kind="mask", mask=png(np.zeros((5, 5))))
    records = load([], [shape(points=tiny), shape(points=bow), empty])
    assert [len(r["annotations"]) for r in records] == [0, 1]
    assert [r["image_id"] for r in records] == [0, 1]
    for warning, what in zip(
        sorted(load.warnings),
        [
            "1 masks are empty and are dropped (first: 1.json, shape 2 (cat))",
            "1 outlines cross themselves; parts enclosed twice become holes (first: 1.json, shape",
            "1 outlines enclose no area and are dropped (first: 1.json, shape 0 (cat))",
            "1 photos have no shape and are kept",
        ],
        strict=True,
    ):
        assert what in warning


@pytest.mark.parametrize("kind", ["line", "point", "linestrip", "points"])
def test_shapes_without_area_are_refused(load, kind):
    with pytest.raises(D2SSLError, match=rf"0.json: shape 0 \(cat\): is a '{kind}'.*draw a poly"):
        load([shape(kind=kind)])


@pytest.mark.parametrize(
    "damaged, message",
    [
        (shape(points=None), "not pairs of numbers"),
        (shape(points=[[1, 2, 3]]), "not pairs of numbers"),
        (shape(points=[["1", "2"]]), "not pairs of numbers"),
        (shape(points=[[1, float("nan")]]), "not finite"),
        (shape(kind="circle"), "is a circle of 4 points"),
        (shape(kind="rectangle", points=[[1, 2]]), "is a rectangle of 1 points"),
        (shape(points=[[70, 5], [80, 5], [80, 15]]), "lies wholly off the photo of 60x40"),
        (shape(points=[[5, 5], [90, 5], [90, 15]]), "leaves the photo of 60x40 by 30 pixels"),
        (shape(kind="mask", points=[[1, 1], [5, 5]]), "its mask is damaged"),
        (shape(kind="mask", points=[[1, 1], [5, 5]], mask="AAAA"), "its mask is damaged"),
        (shape(kind="mask", mask=png(np.ones((5, 5)))), "its mask is damaged"),
        (shape(kind="mask", points=[[1, 1], [5, 9]], mask=png(np.ones((5, 5)))), "for a box of"),
        (
            shape(kind="mask", points=[[1, 1], [5, 5]], mask=png(np.ones((5, 5, 3)))),
            r"an array of \(5, 5, 3\)",
        ),
        (shape(kind="mask", points=[[70, 1], [74, 5]], mask=png(np.ones((5, 5)))), "wholly off"),
    ],
)
def test_damaged_shape_is_refused(load, damaged, message):
    with pytest.raises(D2SSLError, match=rf"0.json: shape 1 \(cat\): .*{message}") as caught:
        load([shape(), damaged])
    assert "\n" not in str(caught.value)
    assert not hasattr(MetadataCatalog.get(NAME), "thing_classes")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"shapes": [', "not valid JSON.*cut short"),
        ("[]", "has no imagePath and shapes"),
        ('{"shapes": []}', "has no imagePath and shapes"),
        ('{"imagePath": "0.jpg", "shapes": {}}', "has no imagePath and shapes"),
        ('{"imagePath": "0.jpg", "shapes": [{"points": []}]}', "shape 0 has no label"),
        ('{"imagePath": "0.jpg", "shapes": ["cat"]}', "shape 0 has no label"),
    ],
)
def test_bad_json_is_refused(load, tmp_path, content, message):
    load([shape()])
    (tmp_path / "1.json").write_text(content)
    with pytest.raises(D2SSLError, match=f"1.json: {message}"):
        DatasetCatalog.get(NAME)


def test_folder_that_is_not_the_right_one(load, tmp_path):
    register_labelme(NAME, tmp_path)
    with pytest.raises(D2SSLError, match="has 0 JSON files and no labelled shape"):
        DatasetCatalog.get(NAME)
    with pytest.raises(D2SSLError, match="has 1 JSON files and no labelled shape"):
        load([shape("__ignore__")])
    register_labelme(NAME, tmp_path / "gone")
    with pytest.raises(D2SSLError, match="gone: no such folder"):
        DatasetCatalog.get(NAME)


def test_size_that_contradicts_the_photo(load):
    with pytest.raises(D2SSLError, match=r"0.json: .*0.jpg is 60x40, but its labels are for 60x90"):
        load([shape()], imageHeight=90)
    exif = Image.Exif()
    exif[274] = 6  # 60x40 is shown as 40x60
    with pytest.raises(D2SSLError, match="would fit a photo of 60x40: is .*0.jpg rotated by EXIF"):
        load([shape()], exif=exif)
    (record,) = load([shape()], exif=exif, imageHeight=WIDTH, imageWidth=HEIGHT)
    assert (record["height"], record["width"]) == (WIDTH, HEIGHT)


def test_real_files(shared):
    """LabelMe's own converters made pictures of instances and a COCO file of the same photos."""
    root = shared / "data" / "voc_labelme_instance"
    register_labelme(NAME, root / "data_annotated")
    dicts = DatasetCatalog.get(NAME)
    classes = MetadataCatalog.get(NAME).thing_classes
    assert classes == ["bottle", "bus", "car", "chair", "person", "sofa"]
    truth = json.loads((root / "data_dataset_coco" / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    assert len(dicts) == 3
    for record in dicts:
        stem = record["file_name"].split("/")[-1].removesuffix(".jpg")
        picture = Image.open(root / "data_dataset_voc" / "SegmentationObject" / f"{stem}.png")
        picture = np.asarray(picture)
        image_id = ids[f"JPEGImages/{stem}.jpg"]
        entries = [a for a in truth["annotations"] if a["image_id"] == image_id]
        assert len(entries) == len(record["annotations"])
        for mask, annotation, entry in zip(masks(record), record["annotations"], entries):
            assert classes[annotation["category_id"]] == names[entry["category_id"]]
            assert iou(mask, annotation_mask(entry, *mask.shape)) > 0.999
            # The picture's outlines are a pixel thick, which small objects feel.
            best = max(iou(mask, picture == value) for value in np.unique(picture))
            assert best > (0.95 if mask.sum() > 900 else 0.93)
            # As is their box, which LabelMe rounds to whole pixels.
            x, y, w, h = entry["bbox"]
            assert annotation["bbox"] == pytest.approx([x, y, x + w, y + h], abs=1)
