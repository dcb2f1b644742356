import os

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image
from scipy.ndimage import gaussian_filter

from d2ssl.data import masks
from d2ssl.data.masks import (
    annotation_mask,
    encode,
    grey_label_file,
    iou,
    label_image_annotations,
    mask_annotation,
    read_label_image,
)
from d2ssl.errors import D2SSLError


def blobs(seed, height=40, width=60):
    """A mask with parts of many shapes, seldom with holes, that also touches the border."""
    generator = np.random.RandomState(seed)
    smooth = gaussian_filter(generator.rand(height, width), generator.choice([0.8, 1.5, 4]))
    return smooth > np.quantile(smooth, 0.8)


def drawn(*rows):
    return np.array([[c == "#" for c in row] for row in rows])


RING = drawn("####", "#  #", "####")
SHAPES = {
    "pixel": drawn("   ", " # ", "   "),
    "corner pixel": drawn("#  ", "   "),
    "two pixels": drawn("    ", " ## "),
    "line": drawn("#####"),
    "diagonal": drawn("#   ", " #  ", "  ##", "  ##"),
    "parts": drawn("##  ", "##  ", "   #"),
    "bay": drawn("####", "#  #", "#  #"),
    "bay through a corner": drawn("### ", "# # ", "## #", "    "),
    "everything": np.ones((5, 7), bool),
    "border": drawn("   ###", "   ###", "######"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_become_polygons_that_give_them_back(shape):
    mask = SHAPES[shape]
    annotation = mask_annotation(mask, 3)
    assert isinstance(annotation["segmentation"], list)
    assert (annotation_mask(annotation, *mask.shape) == mask).all()
    y, x = np.nonzero(mask)
    assert annotation["bbox"] == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert annotation["bbox_mode"] == 0  # XYXY_ABS
    assert annotation["category_id"] == 3 and annotation["iscrowd"] == 0


def test_parts_that_touch_in_a_corner_are_polygons_of_their_own():
    assert len(mask_annotation(SHAPES["diagonal"], 0)["segmentation"]) == 3


@pytest.mark.parametrize("seed", range(10))
def test_round_trip(seed, monkeypatch):
    mask = blobs(seed)
    simplified = mask_annotation(mask, 0)
    monkeypatch.setattr(masks, "TOLERANCE", 0.0)
    exact = mask_annotation(mask, 0)
    assert (annotation_mask(exact, *mask.shape) == mask).all()
    assert iou(annotation_mask(simplified, *mask.shape), mask) >= 0.98
    if isinstance(exact["segmentation"], list):
        points = [sum(map(len, a["segmentation"])) for a in (simplified, exact)]
        assert points[0] <= points[1]


def test_a_large_outline_is_simplified():
    y, x = np.mgrid[:200, :200]
    disc = (x - 90) ** 2 + (y - 110) ** 2 < 80**2
    annotation = mask_annotation(disc, 0)
    (polygon,) = annotation["segmentation"]
    assert len(polygon) < 2 * np.pi * 80  # it has fewer points than half of its length in pixels
    assert iou(annotation_mask(annotation, 200, 200), disc) >= 0.98


@pytest.mark.parametrize(
    "mask, iscrowd", [(RING, 0), (np.pad(RING, 3), 0), (SHAPES["parts"], 1), (SHAPES["line"], 1)]
)
def test_holes_and_crowds_are_run_lengths(mask, iscrowd):
    annotation = mask_annotation(mask, 0, iscrowd)
    assert annotation["segmentation"]["size"] == [*mask.shape]
    assert annotation["iscrowd"] == iscrowd
    assert (pycocotools.mask.decode(annotation["segmentation"]) == mask).all()
    assert (annotation_mask(annotation, *mask.shape) == mask).all()


def test_what_polygons_would_not_reproduce_is_a_run_length(monkeypatch):
    monkeypatch.setattr(masks, "LEAST_IOU", 1.01)
    assert isinstance(mask_annotation(SHAPES["bay"], 0)["segmentation"], dict)


def test_empty_mask_and_numbers_as_a_mask():
    assert mask_annotation(np.zeros((4, 5)), 0) is None
    numbers = np.array([[0, 7, 0], [0, 0.5, 0]])
    assert mask_annotation(numbers, 0)["bbox"] == [1, 0, 2, 2]


@pytest.mark.parametrize("dtype", [np.uint8, ">u2", np.int32])
def test_instances_of_a_picture_of_ids_are_those_of_its_masks(dtype):
    ids = np.zeros((40, 60), dtype)
    for i, value in enumerate([200, 3, 77, 4]):
        ids[blobs(i)] = value
    ids[10:13, 10:13] = 9
    ids[11, 11] = 3  # a hole in 9, far from the rest of 3
    kinds = {0: None, 3: (0, 0), 4: (1, 1), 9: (2, 0), 77: None, 200: (0, 0)}
    found = label_image_annotations(ids, kinds.get)
    assert found == [mask_annotation(ids == v, *kinds[v]) for v in (3, 4, 9, 200)]
    assert [isinstance(a["segmentation"], dict) for a in found][1:3] == [True, True]


def test_zero_may_be_an_instance_and_one_bit_pictures_do():
    one_bit = drawn(" ##", "   ")
    found = label_image_annotations(one_bit, lambda value: (int(value), 0))
    assert [a["category_id"] for a in found] == [0, 1]
    assert (annotation_mask(found[0], 2, 3) == ~one_bit).all()


def test_large_and_negative_ids():
    seen = []
    found = label_image_annotations(np.array([[-3, 0, 70000]]), lambda v: seen.append(v) or (0, 0))
    assert seen == [-3, 0, 70000]
    assert [a["bbox"] for a in found] == [[x, 0, x + 1, 1] for x in range(3)]


@pytest.mark.parametrize("form", ["bytes", "text", "list"])
def test_any_run_length_is_read(form):
    mask = drawn(" # ", "## ")  # column by column: 1 off, 3 on, 2 off
    counts = {"bytes": encode(mask)["counts"], "list": [1, 3, 2]}
    counts["text"] = counts["bytes"].decode()
    annotation = {"segmentation": {"size": [2, 3], "counts": counts[form]}}
    assert (annotation_mask(annotation, 2, 3) == mask).all()


@pytest.mark.parametrize(
    "segmentation, message",
    [
        (None, "without a mask"),
        ([], "without a mask"),
        ({"size": [3, 2], "counts": [6]}, "a mask of 2x3 on a photo of 3x2"),
        ({"size": [2, 3]}, "a damaged mask .KeyError: 'counts'"),
        ({"size": [2, 3], "counts": [1, 3]}, "runs of 4 pixels in all, of 6"),
        ({"size": [2, 3], "counts": [1, 3, 3]}, "runs of 7 pixels in all, of 6"),
        ({"size": [2, 3], "counts": b"zz"}, "a damaged mask"),
        ([[1, 2, 3, 4]], "three points"),
        ([[0, 0, 2, 0, 2, 2], [1, 2, 3, 4, 5, 6, 7]], "three points"),
        ([["a"] * 6], "a damaged mask"),
    ],
)
def test_damaged_masks_are_refused(segmentation, message):
    with pytest.raises(D2SSLError, match=message):
        annotation_mask({"segmentation": segmentation}, 2, 3)


def test_iou_by_hand():
    assert iou(drawn("##  "), drawn(" ## ")) == pytest.approx(1 / 3)
    assert iou(drawn("  "), drawn("  ")) == 1


IDS = np.array([[0, 1, 2], [2, 255, 7]], np.uint8)


def write_palette(path, ids):
    """As VOC's: the colours are no rising sequence of greys, and black is there twice."""
    picture = Image.fromarray(ids)
    picture.putpalette([*[0, 0, 0], *[128, 0, 0], *[0, 128, 0], *[0, 0, 0]] * 64)
    picture.save(path)


def test_pictures_of_ids(tmp_path):
    write_palette(tmp_path / "palette.png", IDS)
    Image.fromarray(IDS).save(tmp_path / "grey.png")
    Image.fromarray(IDS.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(IDS > 1).save(tmp_path / "bit.png")
    assert Image.open(tmp_path / "palette.png").mode == "P"
    for name, expected in {
        "palette": IDS,
        "grey": IDS,
        "deep": IDS.astype(int) * 257,
        "bit": IDS > 1,
    }.items():
        assert (read_label_image(str(tmp_path / f"{name}.png"), (2, 3)) == expected).all(), name


def test_pictures_that_are_no_masks_are_refused(tmp_path):
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (3, 2)).save(tmp_path / f"{mode}.png")
        with pytest.raises(D2SSLError, match=f"{mode}.png: is a picture of mode {mode}; "):
            read_label_image(str(tmp_path / f"{mode}.png"))
    Image.fromarray(blobs(0, 90, 90)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 300)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut", "text"):
        with pytest.raises(D2SSLError, match=f"{name}.png: cannot be read as a mask"):
            read_label_image(str(tmp_path / f"{name}.png"))
    with pytest.raises(D2SSLError, match="gone.png: no such mask"):
        read_label_image(str(tmp_path / "gone.png"))


def test_another_size_than_the_photo_names_both(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "a.png")
    with pytest.raises(D2SSLError, match="a.png: is 3x2, its photo 2x3; "):
        read_label_image(str(tmp_path / "a.png"), (3, 2))


LABELS = {0: 0, 1: 5, 2: 1, 7: 255, 255: 255}


@pytest.fixture
def palette(tmp_path, monkeypatch):
    monkeypatch.setenv("D2SSL_CACHE", str(tmp_path / "cache"))
    write_palette(tmp_path / "a.png", IDS)
    return str(tmp_path / "a.png")


def test_the_grey_copy_survives_detectron2s_conversion(palette):
    assert set(np.unique(read_image(palette, "L"))) == {0, 38, 75}  # luminances: why we copy
    copy = grey_label_file(palette, LABELS, (2, 3))
    expected = np.array([[0, 5, 1], [1, 255, 255]])
    assert (read_image(copy, "L")[..., 0] == expected).all()  # as its mapper reads it
    assert (np.asarray(Image.open(copy), dtype=int) == expected).all()  # and its evaluator


def test_the_grey_copy_is_made_once_and_anew_after_changes(palette):
    copy = grey_label_file(palette, LABELS, (2, 3))
    made = os.stat(copy).st_mtime_ns
    assert grey_label_file(palette, LABELS, (2, 3)) == copy
    assert os.stat(copy).st_mtime_ns == made
    assert grey_label_file(palette, {**LABELS, 1: 6}, (2, 3)) != copy
    write_palette(palette, IDS[::-1])
    os.utime(palette, ns=(1, 1))
    assert (np.asarray(Image.open(grey_label_file(palette, LABELS, (2, 3))))[1, 1]) == 5
    with pytest.raises(D2SSLError, match="its photo 4x4"):  # the photo was replaced
        grey_label_file(palette, LABELS, (4, 4))


def test_nothing_is_left_of_a_copy_that_fails(palette, tmp_path, monkeypatch):
    with pytest.raises(D2SSLError, match="a.png: holds 7, which is no class"):
        grey_label_file(palette, {0: 0, 1: 1, 2: 2, 255: 255}, (2, 3))

    def full(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(D2SSLError, match="cannot be written .disk full.; set D2SSL_CACHE"):
        grey_label_file(palette, LABELS, (2, 3))
    assert os.listdir(tmp_path / "cache" / "labels") == []
    with pytest.raises(D2SSLError, match="gone.png: cannot be read"):
        grey_label_file(str(tmp_path / "gone.png"), LABELS, (2, 3))
