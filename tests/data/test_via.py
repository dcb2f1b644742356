import json
import logging
import os

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets.via import load_via_json, register_via
from d2ssl.errors import D2SSLError

WIDTH, HEIGHT = 60, 40
SQUARE = ([10, 20, 20, 10], [5, 5, 15, 15])


def polygon(xs, ys, **attributes):
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    return {"shape_attributes": shape, "region_attributes": attributes}


def other(name, **numbers):
    return {"shape_attributes": {"name": name, **numbers}, "region_attributes": {}}


@pytest.fixture
def load(tmp_path, caplog):
    """Writes one grey photo of 60x40 a list of regions, then loads; ``load.warnings`` after."""

    def run(*photos, filename=None, exif=None, **kwargs):
        entries = {}
        for i, regions in enumerate(photos):
            name = f"{i}.jpg"
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name, exif=exif or Image.Exif())
            entries[f"{name}-1"] = {"filename": filename or name, "size": -1, "regions": regions}
        (tmp_path / "via.json").write_text(json.dumps(entries))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "d2ssl.data"):
            dicts = load_via_json(str(tmp_path / "via.json"), str(tmp_path), **kwargs)
        run.warnings = [record.getMessage() for record in caplog.records]
        return dicts

    return run


def rasterize(annotation, height=HEIGHT, width=WIDTH):
    rles = pycocotools.mask.frPyObjects(annotation["segmentation"], height, width)
    return pycocotools.mask.decode(pycocotools.mask.merge(rles)).astype(bool)


def test_polygon_is_moved_half_a_pixel_and_its_box_is_not(load, tmp_path):
    (record,) = load({"0": polygon(*SQUARE)})
    assert {k: v for k, v in record.items() if k != "annotations"} == {
        "file_name": str(tmp_path / "0.jpg"),
        "image_id": 0,
        "height": HEIGHT,
        "width": WIDTH,
    }
    (annotation,) = record["annotations"]
    assert annotation["segmentation"] == [[10.5, 5.5, 20.5, 5.5, 20.5, 15.5, 10.5, 15.5]]
    assert annotation["bbox"] == [10, 5, 20, 15] and annotation["bbox_mode"] == 0
    assert annotation["category_id"] == 0 and annotation["iscrowd"] == 0
    assert load.warnings == []


def test_regions_as_a_list_and_image_ids_in_order(load):
    records = load([polygon(*SQUARE)], {"0": polygon(*SQUARE), "1": polygon(*SQUARE)})
    assert [r["image_id"] for r in records] == [0, 1]
    assert [len(r["annotations"]) for r in records] == [1, 2]


def test_via_2_project_file(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.jpg")
    entry = {"filename": "0.jpg", "regions": [polygon(*SQUARE)]}
    (tmp_path / "p.json").write_text(
        json.dumps({"_via_settings": {}, "_via_img_metadata": {"0.jpg-1": entry}})
    )
    assert len(load_via_json(str(tmp_path / "p.json"), str(tmp_path))[0]["annotations"]) == 1


def test_rect_circle_and_ellipse(load):
    regions = [
        other("rect", x=3, y=4, width=20, height=10),
        other("circle", cx=30, cy=20, r=10),
        other("ellipse", cx=30, cy=20, rx=16, ry=8),
        other("ellipse", cx=30, cy=20, rx=16, ry=8, theta=np.pi / 2),
    ]
    rect, circle, flat, upright = load(regions)[0]["annotations"]
    assert rect["bbox"] == [3, 4, 23, 14]
    assert rasterize(rect).sum() == pytest.approx(200, rel=0.1)
    assert circle["bbox"] == pytest.approx([20, 10, 40, 30])
    assert rasterize(circle).sum() == pytest.approx(np.pi * 100, rel=0.05)
    assert flat["bbox"] == pytest.approx([14, 12, 46, 28])
    assert upright["bbox"] == pytest.approx([22, 4, 38, 36])
    assert rasterize(upright).sum() == pytest.approx(np.pi * 128, rel=0.05)


@pytest.mark.parametrize("name", ["point", "polyline", None])
def test_shapes_without_area_are_refused(load, name):
    with pytest.raises(D2SSLError, match=r"0.jpg, region 0: is a .*draw a polygon"):
        load([other(name, cx=3, cy=4, all_points_x=[1, 9, 9], all_points_y=[1, 1, 9])])


def test_few_pixels_off_the_photo_are_clipped_with_one_warning(load):
    over = polygon([50, 63, 63, 50], [10, 10, 20, 20])
    records = load([over, over], [over])
    for record in records:
        for annotation in record["annotations"]:
            assert annotation["bbox"] == [50, 10, 60, 20]
            assert max(annotation["segmentation"][0][::2]) == 60.5
    (warning,) = load.warnings
    assert "3 outlines leave their photo" in warning and "0.jpg, region 0" in warning


def test_points_at_the_very_edge_are_kept(load):
    (annotation,) = load([polygon([0, 60, 60, 0], [0, 0, 40, 40])])[0]["annotations"]
    assert annotation["bbox"] == [0, 0, 60, 40] and load.warnings == []
    assert annotation["segmentation"] == [[0.5, 0.5, 60.5, 0.5, 60.5, 40.5, 0.5, 40.5]]


def test_a_circle_may_leave_the_photo(load):
    (annotation,) = load([other("circle", cx=50, cy=20, r=20)])[0]["annotations"]
    assert annotation["bbox"] == pytest.approx([30, 0, 60, 40])
    assert len(load.warnings) == 1


def test_regions_without_area_are_dropped_and_counted(load):
    (record,) = load([polygon([3, 9], [4, 9]), polygon(*SQUARE), polygon([], [])])
    assert len(record["annotations"]) == 1
    (warning,) = load.warnings
    assert "2 outlines enclose no area" in warning


def test_exif_rotation_decides_the_frame(load):
    exif = Image.Exif()
    exif[274] = 6  # 60x40 is shown as 40x60
    (record,) = load([polygon([10, 30, 30], [5, 5, 55])], exif=exif)
    assert (record["height"], record["width"]) == (60, 40)
    with pytest.raises(D2SSLError, match=r"would fit a photo of 60x40: is .*0.jpg rotated"):
        load([polygon([10, 55, 55], [5, 5, 30])], exif=exif)


@pytest.mark.parametrize("empty", [{}, []])
def test_photo_without_regions_is_kept_and_counted(load, empty):
    records = load(empty, [polygon(*SQUARE)], empty)
    assert [len(r["annotations"]) for r in records] == [0, 1, 0]
    (warning,) = load.warnings
    assert "2 photos have no region" in warning


def test_classes(load):
    regions = [polygon(*SQUARE, kind="dog", colour="red"), polygon(*SQUARE, kind="cat")]
    (record,) = load(regions, classes=("cat", "dog"))
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]
    regions = [polygon(*SQUARE, kind=""), polygon(*SQUARE, name="balloon")]
    (record,) = load(regions, classes=("balloon",))
    assert [a["category_id"] for a in record["annotations"]] == [0, 0]


def test_ticked_boxes(load):
    ticked = [{"dog": True}, {"dog": False, "cat": True}, {"dog": True, "large": True}]
    regions = [polygon(*SQUARE, kind=boxes) for boxes in ticked]
    (record,) = load(regions, classes=("cat", "dog"))
    assert [a["category_id"] for a in record["annotations"]] == [1, 0, 1]
    with pytest.raises(D2SSLError, match="region 0: .*name 2 known classes"):
        load([polygon(*SQUARE, kind={"cat": True, "dog": True})], classes=("cat", "dog"))


def test_the_attribute_that_counts(load):
    regions = [polygon(*SQUARE, kind="dog", friend="cat"), polygon(*SQUARE, kind="cat")]
    (record,) = load(regions, classes=("cat", "dog"), attribute="kind")
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]
    with pytest.raises(D2SSLError, match="0.jpg, region 1: .*name 0 known classes"):
        load(regions, classes=("cat", "dog"), attribute="friend")


def test_without_classes_regions_must_not_be_named(load):
    (record,) = load([polygon(*SQUARE), polygon(*SQUARE, kind="", size={})])
    assert [a["category_id"] for a in record["annotations"]] == [0, 0]
    regions = [polygon(*SQUARE, kind="dog", size={"large": True}), polygon(*SQUARE, kind="cat")]
    with pytest.raises(D2SSLError, match=r"\(kind is dog, cat; size is large\).*classes="):
        load(regions)
    with pytest.raises(D2SSLError, match=r"\(kind is dog, cat\)"):
        load(regions, attribute="kind")


def test_register_via(load, tmp_path):
    load([polygon(*SQUARE, kind="dog")], classes=("cat", "dog"))  # writes the files
    register_via("pets", tmp_path, "via.json", classes=["cat", "dog"])
    (record,) = DatasetCatalog.get("pets")
    assert record["annotations"][0]["category_id"] == 1
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"] and metadata.evaluator_type == "coco"
    # Photos in another folder than the annotations, and only one class.
    (tmp_path / "labels").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "0.jpg").rename(tmp_path / "photos" / "0.jpg")
    entry = {"filename": "0.jpg", "regions": [polygon(*SQUARE)]}
    (tmp_path / "labels" / "a.json").write_text(json.dumps({"": entry}))
    register_via("pets", tmp_path, "labels/a.json", images="photos")
    (record,) = DatasetCatalog.get("pets")
    assert record["file_name"] == str(tmp_path / "photos" / "0.jpg")
    assert MetadataCatalog.get("pets").thing_classes == ["object"]


def test_missing_folder(tmp_path):
    register_via("pets", tmp_path / "gone")
    with pytest.raises(D2SSLError, match="gone: no such folder; check the path"):
        DatasetCatalog.get("pets")


@pytest.mark.parametrize(
    "attributes, classes",
    [
        ({"kind": "baloon"}, ("balloon",)),
        ({"colour": "red"}, ("balloon",)),
        ({}, ("cat", "dog")),
        ({"a": "cat", "b": "dog"}, ("cat", "dog")),
    ],
)
def test_unknown_or_ambiguous_class_is_refused(load, attributes, classes):
    with pytest.raises(D2SSLError, match=rf"0.jpg, region 0: .*name one of \['{classes[0]}'"):
        load([polygon(*SQUARE, **attributes)], classes=classes)


@pytest.mark.parametrize(
    "region",
    [
        polygon([1, 2, 3], [1, 2]),
        polygon(["1", "2", "3"], [1, 2, 3]),
        polygon([1, 2, float("nan")], [1, 5, 3]),
        polygon([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        polygon(None, [1]),
        other("circle", cx=3),
        other("rect", x=1, y=1, width="a", height=2),
        {"shape_attributes": None},
        "text",
        {**polygon(*SQUARE), "region_attributes": ["balloon"]},
    ],
)
def test_damaged_region_is_refused_by_name(load, region):
    with pytest.raises(D2SSLError, match=r"via.json: 0.jpg, region 0: "):
        load([region])


@pytest.mark.parametrize("name", ["../0.jpg", "/etc/0.jpg", "a/../../0.jpg"])
def test_path_out_of_the_folder_is_refused(load, name):
    with pytest.raises(D2SSLError, match="lies outside"):
        load([polygon(*SQUARE)], filename=name)


def test_photo_listed_twice_is_refused(load):
    with pytest.raises(D2SSLError, match="0.jpg is listed twice"):
        load([polygon(*SQUARE)], [polygon(*SQUARE)], filename="0.jpg")


def test_missing_photos_are_counted(load):
    with pytest.raises(D2SSLError, match="1 of 1 photos are missing, the first is .*gone.jpg"):
        load([polygon(*SQUARE)], filename="gone.jpg")


def test_unreadable_photo_is_refused(load, tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(D2SSLError, match="text.jpg: cannot be read"):
        load([polygon(*SQUARE)], filename="text.jpg")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": {"filename": "0.jpg", "regi', "not valid JSON.*cut short"),
        ("", "not valid JSON"),
        ("[]", "holds no photos"),
        ("{}", "holds no photos"),
        ('{"images": [], "annotations": []}', "COCO"),
        ('{"a": 3}', "'a' is not an entry of VIA"),
        ('{"a": {"filename": "0.jpg"}}', "'a' has no regions"),
    ],
)
def test_bad_json_is_refused(tmp_path, content, message):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "0.jpg")
    (tmp_path / "via.json").write_text(content)
    with pytest.raises(D2SSLError, match=f"via.json: .*{message}"):
        load_via_json(str(tmp_path / "via.json"), str(tmp_path))


def test_missing_or_binary_json_is_refused(tmp_path):
    with pytest.raises(D2SSLError, match="via.json: no such file"):
        load_via_json(str(tmp_path / "via.json"), str(tmp_path))
    (tmp_path / "via.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(D2SSLError, match="not UTF-8 text"):
        load_via_json(str(tmp_path / "via.json"), str(tmp_path))
    with pytest.raises(D2SSLError, match="cannot be read"):
        load_via_json(str(tmp_path), str(tmp_path))


def test_only_headers_are_read(tmp_path):
    """A photo that is cut off behind its header still loads: its pixels are not touched."""
    noise = np.random.RandomState(0).randint(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg")
    os.truncate(tmp_path / "0.jpg", 1000)
    entry = {"filename": "0.jpg", "regions": [polygon(*SQUARE)]}
    (tmp_path / "via.json").write_text(json.dumps({"0": entry}))
    assert load_via_json(str(tmp_path / "via.json"), str(tmp_path))[0]["width"] == WIDTH


@pytest.mark.parametrize("split, photos, polygons", [("train", 61, 255), ("val", 13, 50)])
def test_real_balloon(shared, split, photos, polygons, caplog):
    folder = shared / "data" / "balloon" / split
    raw = json.loads((folder / "via_region_data.json").read_text())
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        dicts = load_via_json(str(folder / "via_region_data.json"), str(folder))
    assert len(dicts) == photos and not caplog.records
    assert sum(len(d["annotations"]) for d in dicts) == polygons
    assert [os.path.basename(d["file_name"]) for d in dicts] == [
        entry["filename"] for entry in raw.values()
    ]
    first = next(iter(raw.values()))["regions"]["0"]["shape_attributes"]
    annotation = dicts[0]["annotations"][0]
    assert annotation["segmentation"][0][::2] == [x + 0.5 for x in first["all_points_x"]]
    assert annotation["bbox"][3] == max(first["all_points_y"])


def test_a_file_by_another_name_is_pointed_to(tmp_path):
    """VIA saves as via_export_json.json, or by the project's name."""
    register_via("test_named", tmp_path)
    with pytest.raises(D2SSLError, match="via_region_data.json: no such file; check the path"):
        DatasetCatalog.get("test_named")
    (tmp_path / "via_export_json.json").write_text("{}")
    with pytest.raises(D2SSLError, match="there is via_export_json.json: json_file='via_export_"):
        DatasetCatalog.get("test_named")
