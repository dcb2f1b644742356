import base64
import csv
import json
import os
import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image

from d2ssl.data.datasets import register_image_folder
from d2ssl.data.datasets.open_images import register_open_images
from d2ssl.errors import D2SSLError
from d2ssl.evaluation.submission import write_submission

TOOL = Path(__file__).resolve().parents[2] / "tools" / "write_submission.py"
SIZES = {"0a1b": (40, 30), "77c1": (25, 50), "f00d": (60, 60)}  # width and height
CLASSES = "/m/01g317,Person\n/m/0k4j,Car\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "challenge-2019-classes-description-segmentable.csv").write_text(CLASSES)
    (tmp_path / "images" / "test").mkdir(parents=True)
    for key, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / "images" / "test" / f"{key}.jpg")
    register_open_images("oi", str(tmp_path))
    return tmp_path


def prediction(image_id, category_id, score, seed=0):
    """One as Detectron2 writes it, and its mask: noise."""
    width, height = list(SIZES.values())[image_id]
    mask = np.random.RandomState(seed).rand(height, width) < 0.4
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [0.0, 0.0, float(width), float(height)],
        "score": score,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }, mask


def write(root, predictions, **kwargs):
    (root / "results.json").write_text(json.dumps(predictions))
    return write_submission("oi_test", str(root / "results.json"), str(root / "out.csv"), **kwargs)


def read(path):
    """{ImageID: [(label, score, mask)]}, decoded as the challenge describes."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["ImageID", "ImageWidth", "ImageHeight", "PredictionString"]
    found = {}
    for row in rows:
        size = [int(row["ImageHeight"]), int(row["ImageWidth"])]
        assert tuple(size[::-1]) == SIZES[row["ImageID"]]
        words = row["PredictionString"].split()
        found[row["ImageID"]] = [
            (
                words[i],
                float(words[i + 1]),
                coco_mask.decode(
                    {"size": size, "counts": zlib.decompress(base64.b64decode(words[i + 2]))}
                ).astype(bool),
            )
            for i in range(0, len(words), 3)
        ]
    return found


def test_masks_come_back_pixel_for_pixel(root):
    made = [prediction(2, 1, 0.75, 1), prediction(0, 0, 0.5, 2), prediction(2, 0, 0.8765432, 3)]
    assert write(root, [row for row, _ in made]) == (3, 3)
    found = read(root / "out.csv")
    assert list(found) == list(SIZES)  # a row for each photo
    assert found["77c1"] == []
    assert [(label, score) for label, score, _ in found["f00d"]] == [
        ("/m/01g317", 0.876543),
        ("/m/0k4j", 0.75),
    ]
    assert (found["f00d"][0][2] == made[2][1]).all()
    assert (found["f00d"][1][2] == made[0][1]).all()
    assert (found["0a1b"][0][2] == made[1][1]).all()
    assert (root / "out.csv").read_text().splitlines()[2] == "77c1,25,50,"


def test_the_best_few_above_the_threshold(root):
    scores = [0.3, 0.9, 0.05, 0.1, 0.9, 0.2, 0.0999]
    made = [prediction(0, i % 2, score, i)[0] for i, score in enumerate(scores)]
    write(root, made)
    assert [score for _, score, _ in read(root / "out.csv")["0a1b"]] == [0.9, 0.9, 0.3, 0.2, 0.1]
    assert write(root, made, score_threshold=0.25, max_detections=2) == (3, 2)
    kept = read(root / "out.csv")["0a1b"]
    assert [label for label, _, _ in kept] == ["/m/0k4j", "/m/01g317"]  # of equals the first first
    assert write(root, made, score_threshold=0, max_detections=1) == (3, 1)
    assert (read(root / "out.csv")["0a1b"][0][2] == prediction(0, 0, 0.9, 1)[1]).all()


def test_default_limits_the_detections_of_a_photo(root):
    write(root, [prediction(1, 0, 0.5, i)[0] for i in range(20)])
    assert len(read(root / "out.csv")["77c1"]) == 8


def without(key):
    return lambda row: row.pop(key)


def with_value(key, value):
    return lambda row: row.__setitem__(key, value)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("segmentation"), "prediction 0 is not complete .KeyError: 'segmentation'"),
        (without("image_id"), "prediction 0 is not complete .KeyError: 'image_id'"),
        (with_value("segmentation", [[1, 2, 3]]), "prediction 0 is not complete"),
        (with_value("segmentation", {"size": [1, 2], "counts": [2]}), "not COCO's compressed RLE"),
        (with_value("image_id", 7), "prediction 0 is of image 7, which is not in the set"),
        (with_value("category_id", 2), "category 2, of 2 in the set"),
        (with_value("score", 1.5), "score 1.5; give 0..1"),
        (with_value("score", float("nan")), "not a JSON list"),
        (with_value("image_id", 1), "a mask of 40x30 on .*77c1.jpg, which is 25x50"),
    ],
)
def test_predictions_that_cannot_be_right(root, change, message):
    (root / "out.csv").write_text("before")
    row, _ = prediction(0, 0, 0.5)
    change(row)
    with pytest.raises(D2SSLError, match=message):
        write(root, [row])
    assert (root / "out.csv").read_text() == "before"
    assert [path.name for path in root.glob("out.csv*")] == ["out.csv"]


@pytest.mark.parametrize("content", ["", "{}", "[", '[{"image_id": 0', "[{}", '[{"a" 1}]'])
def test_damaged_predictions(root, content):
    (root / "results.json").write_text(content)
    message = "complete" if content == "[{}" else "results.json: not a JSON list, or cut short"
    with pytest.raises(D2SSLError, match=message):
        write_submission("oi_test", str(root / "results.json"), str(root / "out.csv"))
    assert not (root / "out.csv").exists()


def test_other_bad_input(root):
    with pytest.raises(D2SSLError, match="none.json: no such file"):
        write_submission("oi_test", str(root / "none.json"), str(root / "out.csv"))
    with pytest.raises(D2SSLError, match="out.csv: cannot be written .No such file"):
        write_submission("oi_test", str(root / "none.json"), str(root / "none" / "out.csv"))
    register_image_folder("plain_photos", str(root / "images"))
    with pytest.raises(D2SSLError, match="'plain_photos': has no labels"):
        write_submission("plain_photos", str(root / "none.json"), str(root / "out.csv"))
    for option in ({"score_threshold": 1.1}, {"max_detections": 0}):
        with pytest.raises(D2SSLError, match="give 0..1 and 1 or more"):
            write(root, [], **option)


@pytest.fixture
def main(root, monkeypatch):
    """The command's main(), with a my_sets.py to import."""
    (root / "my_sets.py").write_text(
        "from d2ssl.data.datasets.open_images import register_open_images\n"
        f"def register_all():\n    register_open_images('mine', {str(root)!r})\n"
    )
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "my_sets", raising=False)
    return runpy.run_path(str(TOOL))["main"]


def test_command(root, main, capsys):
    row, mask = prediction(0, 1, 0.5)
    (root / "results.json").write_text(json.dumps([row]))
    words = ["--register", "my_sets:register_all", "--dataset", "mine_test"]
    words += ["--predictions", str(root / "results.json"), "--output", str(root / "out.csv")]
    main(words)
    assert capsys.readouterr().out == f"{root / 'out.csv'}: 1 detections in 3 photos\n"
    ((label, _, found),) = read(root / "out.csv")["0a1b"]
    assert label == "/m/0k4j" and (found == mask).all()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset", "oi_test", "--register", "my_sets:all"], "error: --register my_sets:all: "),
        (["--dataset", "oi_tset"], "error: data set 'oi_tset': not registered; did you mean"),
        (["--dataset", "oi_test"], "error: none.json: no such file"),
    ],
)
def test_command_on_bad_input(root, main, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--predictions", "none.json", "--output", str(root / "out.csv")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith(message) and error.count("\n") == 1


def test_command_answers_before_it_imports_anything_slow(root):
    assert os.access(TOOL, os.X_OK)
    (root / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**os.environ, "PYTHONPATH": str(root)}
    for words, code in ((["--help"], 0), (["--dataset", "oi_test"], 2)):
        done = subprocess.run(
            [sys.executable, str(TOOL), *words], env=env, capture_output=True, text=True
        )
        assert done.returncode == code and "torch was" not in done.stderr
        assert "--max-detections" in done.stdout + done.stderr
