"""Registered sets as COCO files, read back by Detectron2 and pycocotools."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.coco import COCO

from d2ssl.data import masks
from d2ssl.data.convert import convert_to_coco
from d2ssl.data.datasets import register_balloon, register_dataset
from d2ssl.data.datasets.mask_folder import register_pennfudan
from d2ssl.errors import D2SSLError

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "convert_to_coco.py"
HEIGHT, WIDTH = 40, 60
SQUARE = [10.5, 5.5, 20.5, 5.5, 20.5, 15.5, 10.5, 15.5]


def disc(x, y, radius, hole=0):
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    distance = np.hypot(columns - x, rows - y)
    return (distance <= radius) & (distance >= hole)


def annotation(segmentation=None, category_id=0, box=(10, 5, 20, 15), **more):
    given = {} if segmentation is None else {"segmentation": segmentation}
    kind = {"category_id": category_id, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    return {"bbox": [*box], **kind, **given, **more}


@pytest.fixture
def save(tmp_path):
    """Callable: the annotations of each photo -> the written file's content; see below."""

    def run(*photos, metadata=None, name="test_convert", image_ids=None, **options):
        dicts = []
        for i, annotations in enumerate(photos):
            file = tmp_path / "photos" / f"{i % 2}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (WIDTH, HEIGHT)).save(file)
            image_id = image_ids[i] if image_ids else 100 + i
            record = {"file_name": str(file), "image_id": image_id}
            record |= {"height": HEIGHT, "width": WIDTH, "annotations": annotations}
            dicts.append({k: v for k, v in record.items() if v is not None})
        metadata = {"thing_classes": ["a", "b"]} if metadata is None else metadata
        register_dataset(name, lambda: dicts, **metadata)
        run.file = str(tmp_path / "coco.json")
        run.done = convert_to_coco(name, run.file, **options)
        return json.loads(Path(run.file).read_text())

    return run


def read_back(file, image_root, name):
    """By Detectron2's loader, with its ids of classes."""
    MetadataCatalog.pop(name, None)
    return load_coco_json(file, str(image_root), name)


def assert_same(dicts, again, least_iou):
    """Images, classes and boxes are those before; masks of 200 pixels or more nearly."""
    assert [d["file_name"] for d in again] == [d["file_name"] for d in dicts]
    compared = 0
    for old, new in zip(dicts, again):
        size = old["height"], old["width"]
        assert (new["image_id"], new["height"], new["width"]) == (old["image_id"], *size)
        assert len(new["annotations"]) == len(old["annotations"])
        for a, b in zip(old["annotations"], new["annotations"]):
            assert (b["category_id"], b["iscrowd"]) == (a["category_id"], a["iscrowd"])
            box = BoxMode.convert(b["bbox"], b["bbox_mode"], a["bbox_mode"])
            assert box == pytest.approx(a["bbox"], abs=1e-3)
            mask = masks.annotation_mask(a, *size)
            if mask.sum() >= 200:
                assert masks.iou(mask, masks.annotation_mask(b, *size)) >= least_iou
                compared += 1
    return compared


@pytest.mark.parametrize("rle", [False, True])
def test_pennfudan_and_back(shared, tmp_path, rle):
    """Against the published masks, not against what the loader made of them."""
    root = shared / "data" / "PennFudanPed"
    register_pennfudan("test_convert_pf", str(root))
    file = str(tmp_path / "coco.json")
    done = convert_to_coco("test_convert_pf_val", file, rle=rle, num_workers=2)
    again = read_back(file, done.image_root, "test_convert_pf_again")
    assert len(again) == done.images == 34
    total = 0
    for record in again:
        stem = Path(record["file_name"]).stem
        ids = np.asarray(Image.open(root / "PedMasks" / f"{stem}_mask.png"))
        assert ids.shape == (record["height"], record["width"])
        assert len(record["annotations"]) == ids.max()
        for value, entry in enumerate(record["annotations"], 1):
            found = masks.annotation_mask(entry, *ids.shape)
            assert masks.iou(found, ids == value) >= 0.98
            rows, columns = np.nonzero(ids == value)
            sides = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert entry["bbox"] == sides
            total += 1
    assert total == done.annotations == done.polygons + done.rles
    assert (done.polygons > 0.5 * total) != rle and (done.polygons == 0) == rle


def test_balloon_polygons_and_back(shared, tmp_path):
    register_balloon("test_convert_b", str(shared / "data" / "balloon"))
    name, file = "test_convert_b_train@20#seed1", str(tmp_path / "coco.json")
    done = convert_to_coco(name, file)
    dicts = DatasetCatalog.get(name)
    again = read_back(file, done.image_root, "test_convert_b_again")
    assert assert_same(dicts, again, least_iou=1.0) == done.polygons > 20
    assert done.image_root == str(shared / "data/balloon/train")
    old, new = (d[0]["annotations"][0]["segmentation"] for d in (dicts, again))
    assert new == old  # untouched, digit for digit


def test_holes_and_crowds_are_rle_and_the_rest_polygons(save):
    ring, full = disc(30, 20, 14, hole=6), disc(20, 20, 12)
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": [5, 300, HEIGHT * WIDTH - 305]}
    given = [
        annotation(masks.encode(ring)),
        annotation(masks.encode(full)),
        annotation(masks.encode(full), iscrowd=1),
        annotation([SQUARE, [30.5, 5.5, 40.5, 5.5, 40.5, 15.5]]),
        annotation([SQUARE], iscrowd=1),
        annotation(full),
        annotation(uncompressed),
    ]
    content = save(given)
    kinds = [type(a["segmentation"]) for a in content["annotations"]]
    assert kinds == [dict, list, dict, list, dict, list, list]
    assert (save.done.polygons, save.done.rles) == (4, 3)
    assert [a["area"] for a in content["annotations"]][:3] == [ring.sum(), full.sum(), full.sum()]
    (again,) = read_back(save.file, "", "test_convert_again")
    for before, after in zip(given, again["annotations"]):
        if isinstance(before["segmentation"], np.ndarray):
            before = {"segmentation": masks.encode(before["segmentation"])}
        a, b = (masks.annotation_mask(x, HEIGHT, WIDTH) for x in (before, after))
        assert masks.iou(a, b) >= (1.0 if isinstance(after["segmentation"], dict) else 0.98)
    content = save(given, rle=True)
    assert {type(a["segmentation"]["counts"]) for a in content["annotations"]} == {str}
    assert (save.done.polygons, save.done.rles) == (0, 7)
    (exact,) = read_back(save.file, "", "test_convert_again")
    for before, after in zip(given[3:5], exact["annotations"][3:5]):
        a, b = (masks.annotation_mask(x, HEIGHT, WIDTH) for x in (before, after))
        assert (a == b).all()


def test_photos_without_annotations_and_with_several(save, tmp_path):
    three = [annotation([SQUARE], c, (10, 5 + c, 20.25, 15)) for c in (0, 1, 1)]
    content = save([], three, None, [annotation([SQUARE])])
    assert [i["id"] for i in content["images"]] == [100, 101, 102, 103]
    assert [i["file_name"] for i in content["images"]] == [
        "0/0.png",
        "1/1.png",
        "0/2.png",
        "1/3.png",
    ]
    assert {(i["width"], i["height"]) for i in content["images"]} == {(WIDTH, HEIGHT)}
    assert save.done.image_root == str(tmp_path / "photos")
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]
    assert [a["image_id"] for a in content["annotations"]] == [101, 101, 101, 103]
    assert [a["category_id"] for a in content["annotations"]] == [1, 2, 2, 1]
    assert content["annotations"][1]["bbox"] == [10, 6, 10.25, 9]
    assert content["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    assert content["info"]["dataset"] == "test_convert"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(save.file)
    assert [len(coco.getAnnIds([i])) for i in (100, 101, 102, 103)] == [0, 3, 0, 1]
    assert coco.annToMask(coco.anns[1]).sum() == coco.anns[1]["area"] == 100
    above = save([], image_root=str(tmp_path))
    assert above["images"][0]["file_name"] == "photos/0/0.png" and above["annotations"] == []


def test_boxes_alone_empty_masks_and_keypoints(save, caplog):
    nothing = masks.encode(np.zeros((HEIGHT, WIDTH), bool))
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        content = save(
            [
                annotation(),
                annotation([]),
                annotation(nothing),
                annotation([[1, 1, 9, 1, 5, 1]]),
                annotation([[1, 1, 9, 1]]),
            ],
            [annotation(keypoints=[3.5, 4.5, 2, 7.5, 0.5, 1, 0.5, 0.5, 0])],
        )
    boxes, points = content["annotations"][:2], content["annotations"][2]
    assert [(b["area"], "segmentation" in b) for b in boxes] == [(100, False)] * 2
    assert (save.done.annotations, save.done.polygons, save.done.rles) == (3, 0, 0)
    assert points["keypoints"] == [3, 4, 2, 7, 0, 1, 0, 0, 0] and points["num_keypoints"] == 2
    again = read_back(save.file, "", "test_convert_again")[1]["annotations"][0]
    assert again["keypoints"] == [3.5, 4.5, 2, 7.5, 0.5, 1, 0.5, 0.5, 0]
    (note,) = [r.getMessage() for r in caplog.records if "empty" in r.getMessage()]
    assert "test_convert: 3 masks are empty" in note and "0.png, annotation 2" in note


def test_ids_that_the_set_came_with(save):
    """COCO's own have gaps, and need not be in the order of the classes."""
    places = {7: 0, 3: 1, 90: 2}
    metadata = {"thing_classes": ["a", "b", "c"], "thing_dataset_id_to_contiguous_id": places}
    content = save([annotation([SQUARE], c) for c in (2, 0, 1)], metadata=metadata)
    named = {c["id"]: c["name"] for c in content["categories"]}
    assert named == {7: "a", 3: "b", 90: "c"}
    assert [a["category_id"] for a in content["annotations"]] == [90, 7, 3]
    again = read_back(save.file, "", "test_convert_again")[0]["annotations"]
    classes = MetadataCatalog.get("test_convert_again").thing_classes
    assert [classes[a["category_id"]] for a in again] == ["c", "a", "b"]


@pytest.mark.parametrize(
    "given, expected, originals",
    [
        ([9, 4, 7], [9, 4, 7], [None] * 3),
        ([np.int64(9), 4, 7], [9, 4, 7], [None] * 3),
        (["x", "007", 5], [0, 1, 2], ["x", "007", "5"]),
        ([5, 6, 5], [0, 1, 2], [5, 6, 5]),
        ([True, 4, 5], [0, 1, 2], ["True", "4", "5"]),
    ],
)
def test_image_ids(save, caplog, given, expected, originals):
    with caplog.at_level(logging.WARNING, "d2ssl.data"):
        content = save(*[[annotation()]] * 3, image_ids=given)
    assert [i["id"] for i in content["images"]] == expected
    assert [a["image_id"] for a in content["annotations"]] == expected
    assert [i.get("original_id") for i in content["images"]] == originals
    assert len(caplog.records) == (originals[0] is not None)


def test_evaluation_against_the_file(save, tmp_path):
    """Predictions on the set that the file makes are found again: AP is 100."""
    import torch
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    save([annotation([SQUARE], 1)], [], image_ids=["first", "second"])
    dicts = read_back(save.file, tmp_path / "photos", "test_convert_again")
    MetadataCatalog.get("test_convert_again").set(json_file=save.file, evaluator_type="coco")
    evaluator = COCOEvaluator("test_convert_again", output_dir=None, use_fast_impl=False)
    evaluator.reset()
    for record in dicts:
        found = Instances((HEIGHT, WIDTH))
        rows = [[10.0, 5.0, 20.0, 15.0]] * len(record["annotations"])
        found.pred_boxes = Boxes(torch.tensor(rows).reshape(-1, 4))
        found.scores = torch.ones(len(rows))
        found.pred_classes = torch.ones(len(rows), dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def _complete(record):
    if record["image_id"] == 37 and os.path.exists(record["file_name"] + ".stop"):
        raise D2SSLError("the mask of 37 is damaged")
    return {**record, "annotations": [annotation(masks.encode(disc(20, 20, 12)))]}


def test_parallel_and_interrupted(tmp_path):
    """Processes change no byte of the file; a photo that cannot be read leaves the old file."""
    photo, output = tmp_path / "p.png", tmp_path / "out" / "coco.json"
    Image.new("L", (WIDTH, HEIGHT)).save(photo)
    output.parent.mkdir()
    size = {"file_name": str(photo), "height": HEIGHT, "width": WIDTH}
    dicts = [{**size, "image_id": i} for i in range(80)]
    register_dataset("test_convert_many", lambda: dicts, _complete, thing_classes=["a"])
    written = []
    for workers in (0, 2):
        done = convert_to_coco("test_convert_many", str(output), num_workers=workers)
        assert done[1:] == (80, 80, 80, 0)
        written.append(output.read_bytes())
    assert written[0] == written[1]
    Path(f"{photo}.stop").touch()
    for workers in (0, 2):
        with pytest.raises(D2SSLError, match="37 is damaged"):
            convert_to_coco("test_convert_many", str(output), num_workers=workers)
    assert list(output.parent.iterdir()) == [output] and output.read_bytes() == written[0]


def test_an_rle_is_decoded_once_and_polygons_never(save, monkeypatch):
    calls = []
    decode = masks.coco_mask.decode
    full = masks.encode(disc(20, 20, 12))
    monkeypatch.setattr(masks, "_polygons", lambda *_: None)  # which decodes small crops
    monkeypatch.setattr(masks.coco_mask, "decode", lambda runs: calls.append(1) or decode(runs))
    save([annotation(full), annotation(full, iscrowd=1), annotation([SQUARE])])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"category_id": 2}, "0.png, annotation 1: category_id 2, but the set has 2 classes"),
        ({"category_id": -1}, "category_id -1"),
        ({"bbox_mode": BoxMode.XYXY_REL}, "a box in XYXY_REL; give"),
        ({"bbox_mode": BoxMode.XYWHA_ABS, "bbox": [1, 2, 3, 4, 5]}, "a box in XYWHA_ABS; give"),
        ({"bbox": [1, 2, 3]}, "annotation 1: is damaged"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 1: is damaged"),
        ({"segmentation": [[1, 2, float("nan"), 4, 5, 6]]}, "a polygon with points 100000 pixels"),
        ({"segmentation": [[1, 2, 1e7, 4, 5, 6]]}, "a polygon with points 100000 pixels"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "needs x and y of three points"),
        ({"segmentation": masks.encode(np.ones((60, 40), bool))}, "a mask of 40x60 on a photo of"),
        ({"segmentation": {"size": [40, 60], "counts": [5, 3]}}, "annotation 1: a damaged mask"),
        ({"segmentation": {"size": [40, 60], "counts": b""}, "iscrowd": 1}, "a damaged mask"),
        ({"segmentation": {"size": [40, 60]}}, "a damaged mask"),
        ({"segmentation": np.ones((60, 40), bool)}, "a mask of 40x60 on a photo of"),
    ],
)
def test_annotations_that_cannot_be_right(save, tmp_path, change, message):
    with pytest.raises(D2SSLError, match=message):
        save([annotation([SQUARE]), {**annotation([SQUARE]), **change}])
    assert os.listdir(tmp_path) == ["photos"]


CLASSES = {"thing_classes": ["a"]}


@pytest.mark.parametrize(
    "record, metadata, message",
    [
        ({"category_id": 1}, {"classes": ["a", "b"]}, "is a classification set"),
        ({"sem_seg_file_name": "x.png"}, {"stuff_classes": ["a"]}, "is a semantic set"),
        ({}, {}, "has no classes; register it with thing_classes"),
        (None, CLASSES, "the data set is empty"),
        ({"file_name": "gone.png"}, CLASSES, "1 of 1 photos are missing, the first is .*gone.png"),
        ({"file_name": None}, CLASSES, "an image has no file"),
        ({}, {**CLASSES, "thing_dataset_id_to_contiguous_id": {4: 1}}, "correct the metadata"),
    ],
)
def test_sets_that_are_refused(tmp_path, record, metadata, message):
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "0.png")
    dicts = (
        [] if record is None else [{"file_name": str(tmp_path / "0.png"), "image_id": 0} | record]
    )
    register_dataset("test_convert", lambda: dicts, **metadata)
    with pytest.raises(D2SSLError, match=f"test_convert: .*{message}"):
        convert_to_coco("test_convert", str(tmp_path / "coco.json"))
    assert os.listdir(tmp_path) == ["0.png"]


def test_places_that_are_refused(save, tmp_path):
    with pytest.raises(D2SSLError, match="does not hold all photos of test_convert, but"):
        save([], [], image_root=str(tmp_path / "photos" / "0"))
    with pytest.raises(D2SSLError, match="absent: no such folder; make it"):
        convert_to_coco("test_convert", str(tmp_path / "absent" / "coco.json"))
    with pytest.raises(D2SSLError, match="is a folder"):
        convert_to_coco("test_convert", str(tmp_path))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Callable: arguments -> exit code, in a folder with a photo and a module ``my_sets``."""
    spec = importlib.util.spec_from_file_location("convert_to_coco", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "0.png")
    (tmp_path / "my_sets.py").write_text(
        "from d2ssl.data.datasets import register_dataset\n"
        "def load():\n"
        "    a = {'bbox': [1, 2, 3, 4], 'bbox_mode': 0, 'category_id': 0}\n"
        "    return [{'file_name': '0.png', 'image_id': 5, 'annotations': [a]}]\n"
        "def register():\n"
        "    register_dataset('mine', load, thing_classes=['a'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_sets", None)  # another test's

    def run(*args):
        try:
            return script.run(args) or 0
        except SystemExit as error:
            return error.code

    yield run
    sys.modules.pop("my_sets", None)
    if "mine" in DatasetCatalog.list():
        DatasetCatalog.remove("mine")


def test_command(command, capsys, tmp_path):
    given = ("--register", "my_sets:register", "--dataset", "mine@1", "--output", "c.json")
    assert command(*given) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("c.json: 1 images, 1 annotations (0 polygons, 0 RLE, 1 boxes) in ")
    assert second == f'register_coco_instances("my_set", {{}}, "c.json", "{tmp_path}")'
    assert json.loads((tmp_path / "c.json").read_text())["images"] == [
        {"id": 5, "file_name": "0.png", "height": HEIGHT, "width": WIDTH}
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--register", "my_sets:nothing"], "error: --register my_sets:nothing: "),
        ([], "error: data set 'mine': not registered"),
        (["--workers", "-1"], "--workers -1: give 0 or more"),
    ],
)
def test_command_refuses_in_a_line(command, capsys, tmp_path, args, message):
    assert command("--dataset", "mine", "--output", "c.json", *args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


def test_help_needs_no_torch():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )  # fmt: skip
    assert process.returncode == 0 and "--image-root" in process.stdout
    assert " torch" not in process.stderr
