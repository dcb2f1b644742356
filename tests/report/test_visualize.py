"""Pictures of labels, views and predictions: which photos, in which order, as files or a page."""

import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from d2ssl.config import pretrain_cfg
from d2ssl.data.datasets import register_balloon
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.errors import D2SSLError
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.report import visualize
from d2ssl.report.pictures import COLORS, draw_labels
from d2ssl.report.visualize import (
    show_annotations,
    show_predictions,
    show_training,
    show_views,
    write_pictures,
)
from tests.conftest import REPO

SCRIPT = REPO / "tools" / "visualize_data.py"
GREY = 90


@pytest.fixture
def photos(tmp_path):
    """Name of a set of six grey photos of 200 x 100 px with a square of 40 px each."""
    dicts = []
    for i in range(6):
        path = tmp_path / f"photo{i}.png"
        Image.new("RGB", (200, 100), (GREY,) * 3).save(path)
        label = {"bbox": [20, 20, 60, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
                 "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]]}  # fmt: skip
        dicts.append({"file_name": str(path), "image_id": 10 + i, "height": 100, "width": 200,
                      "annotations": [label]})  # fmt: skip
    register_dataset("shown_val", lambda: dicts, thing_classes=["cat"])
    yield "shown_val"
    DatasetCatalog.remove("shown_val")
    MetadataCatalog.remove("shown_val")


def predictions(tmp_path, *rows):
    path = tmp_path / "coco_instances_results.json"
    path.write_text(json.dumps([
        {"image_id": 10 + i, "category_id": 0, "bbox": [100, 20, 40, 40], "score": score}
        for i, score in rows
    ]))  # fmt: skip
    return str(path)


def is_drawn(image, x, y):
    return np.abs(image[y, x].astype(int) - GREY).max() > 20


@pytest.mark.parametrize("side", [400, 100])
def test_labels_at_their_places_whatever_the_size(photos, side):
    shown = list(show_annotations([photos], 2, None, side))
    assert [x.file for x in shown] == ["shown_val_00000_photo0.jpg", "shown_val_00001_photo1.jpg"]
    assert shown[0].caption == "photo0.png: 1 object"
    image, scale = shown[0].image, side / 200
    assert image.shape == (side // 2, side, 3)
    for x, y, drawn in ((40, 40, True), (22, 57, True), (16, 40, False), (64, 40, False)):
        assert is_drawn(image, int(x * scale), int(y * scale)) == drawn, (x, y)


def test_a_mask_of_pixels_and_a_box_alone_are_scaled_too():
    photo = {"height": 400, "width": 800}
    mask = np.zeros((400, 800), np.uint8)
    mask[80:240, 80:240] = 1
    from d2ssl.data.masks import encode

    box = {"bbox": [80, 80, 160, 160], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    small, metadata = np.full((50, 100, 3), GREY, np.uint8), MetadataCatalog.get("none")
    for label, inside in (({**box, "segmentation": encode(mask)}, True), (box, False)):
        image = draw_labels({**photo, "annotations": [label]}, small, metadata, 200)
        assert is_drawn(image, 40, 40) == inside
        assert is_drawn(image, 21, 40) and not is_drawn(image, 66, 40)


def test_classes_of_pixels_have_their_colours(tmp_path):
    labels = np.full((50, 100), 255, np.uint8)
    labels[:, :50] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    metadata = MetadataCatalog.get("pixels_drawn").set(stuff_classes=["a", "b"])
    image = draw_labels({"sem_seg_file_name": str(tmp_path / "labels.png")},
                        np.full((50, 100, 3), GREY, np.uint8), metadata, 100)  # fmt: skip
    tint = 0.4 * np.array(COLORS[1]) + 0.6 * GREY
    assert image[40, 10] == pytest.approx(tint, abs=3) and not is_drawn(image, 80, 40)


def test_a_random_choice_is_that_of_the_seed(photos):
    def files(seed):
        return [x.file for x in show_annotations([photos], 3, seed, 64)]

    assert files(1) == files(1) and len({tuple(files(seed)) for seed in range(6)}) > 2
    assert len(list(show_annotations([photos], 99, 0, 64))) == 6


def test_predictions_in_order(photos, tmp_path):
    path = predictions(tmp_path, (1, 0.6), (3, 0.9), (3, 0.8), (4, 0.7), (5, 0.2))

    def captions(**options):
        return [x.caption.split(".png")[0] for x in show_predictions(photos, path, 4, None, 200,
                                                                     **options)]  # fmt: skip

    assert captions() == ["photo0", "photo1", "photo2", "photo3"]
    assert captions(by_confidence=True) == ["photo3", "photo4", "photo1", "photo0"]
    shown = list(show_predictions(photos, path, 4, None, 200, by_confidence=True))
    assert shown[0].caption == "photo3.png: 1 labelled, 2 predicted with a mean score of 85%"
    assert shown[0].file == "shown_val_00000_photo3.jpg"
    image = shown[0].image
    assert image.shape == (100, 408, 3)
    assert is_drawn(image, 40, 40) and not is_drawn(image, 120, 40)  # label
    assert is_drawn(image, 208 + 100, 40) and not is_drawn(image, 208 + 40, 40)  # prediction
    low = list(show_predictions(photos, path, 6, None, 64, min_score=0.1))
    assert "1 predicted" in low[5].caption


def test_predictions_of_something_else(photos, tmp_path):
    path = tmp_path / "other.json"
    for content, message in (
        ('[{"image_id": 999, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]', "other photos"),
        ('[{"image_id": 10, "score": 1}]', "no predictions for this set"),
        ('{"images": []}', "no predictions for this set"),
        ("[", "not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(D2SSLError, match=message):
            list(show_predictions(photos, str(path), 4, None, 64))
    with pytest.raises(D2SSLError, match="no such file"):
        list(show_predictions(photos, "none.json", 4, None, 64))


@pytest.mark.parametrize("method, sheets", [("SoCo", ["views"]), ("PLMoCo", ["views", "matches"]),
                                            ("DenseCL", ["views", "matches"])])  # fmt: skip
def test_views_of_a_method(tiny_cfg, method, sheets):
    cfg = tiny_cfg("SSL.METHOD", method)
    shown = list(show_views(cfg, 3, seed=2))
    assert [x.file for x in shown] == [f"{name}.png" for name in sheets]
    fewer = list(show_views(cfg, 2, seed=2))
    rows = [x[0].image.shape[0] for x in (shown, fewer)]
    assert rows[0] > 1.3 * rows[1]  # a row a photo
    again = list(show_views(cfg, 3, seed=2))
    assert all((a.image == b.image).all() for a, b in zip(shown, again))


def test_matches_are_found_by_twins_of_the_loaded_weights(tiny_cfg, tmp_path, monkeypatch):
    seen = []

    def of_matches(trainer, num_photos):
        seen.append(trainer.module)
        return SimpleNamespace(draw=lambda: None)

    monkeypatch.setattr(visualize.PutPictures, "of_matches", of_matches)
    weights = PretextModel(pretrain_cfg(tiny_cfg("SSL.METHOD", "DenseCL"))).trunk.state_dict()
    torch.save({"model": weights}, tmp_path / "weights.pth")
    list(show_views(tiny_cfg("SSL.METHOD", "DenseCL", "MODEL.WEIGHTS",
                             str(tmp_path / "weights.pth"), "SEED", "5"), 2, None))  # fmt: skip
    ((online, twin), *_) = seen[0].twins()
    for name, value in online.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    loaded = dict(seen[0].trunk.named_parameters())
    assert torch.equal(loaded[next(iter(loaded))], weights[next(iter(loaded))])


@pytest.mark.parametrize("opts", [(), ("SSL.FINETUNE.COPY_PASTE", "1.0"),
                                  ("MODEL.MASK_ON", "False")])  # fmt: skip
def test_training_examples_beside_their_objects(tiny_cfg, photos, opts):
    """The photos of the fixture in red, which is GREY on the right but for the objects."""
    red = (200, 50, 20)
    for entry in DatasetCatalog.get(photos):
        Image.new("RGB", (200, 100), red).save(entry["file_name"])
    cfg = tiny_cfg("DATASETS.TRAIN", f"('{photos}',)", "INPUT.RANDOM_FLIP", "none", *opts)
    shown = list(show_training(cfg, 2, None, 400))
    assert sorted(x.file[-10:] for x in shown) == ["photo0.jpg", "photo1.jpg"]
    for one in shown:
        assert one.caption[6:] in (".png: 1 object", ".png: 2 objects")
        assert one.image.shape == (200, 800, 3)
        assert np.abs(one.image[:, :400] - np.array(red)).max() <= 1
        assert is_drawn(one.image, 400 + 38, 80) and not is_drawn(one.image, 400 + 130, 80)
    with_seed = tiny_cfg("DATASETS.TRAIN", f"('{photos}',)", *opts)
    files = {x.file[-10:] for seed in range(4) for x in show_training(with_seed, 2, seed, 64)}
    assert len(files) > 2


def test_files_and_page_show_the_same(photos, tmp_path):
    out = tmp_path / "new" / "folder"
    assert write_pictures(str(out), "title", show_annotations([photos], 2, None, 64)) == 2
    files = sorted(out.iterdir())
    assert [f.name for f in files] == ["shown_val_00000_photo0.jpg", "shown_val_00001_photo1.jpg"]
    assert Image.open(files[0]).size == (64, 32)
    kept = out / "mine.txt"
    kept.write_text("mine")
    write_pictures(str(out), "title", show_annotations([photos], 1, None, 64))
    assert kept.read_text() == "mine"  # the folder is the user's
    page = tmp_path / "new" / "page.html"
    write_pictures(str(page), "<i>title", show_annotations([photos], 2, None, 64))
    text = page.read_text()
    assert text.count("<img ") == 2 and "&lt;i&gt;title" in text and "<i>" not in text
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]{0,30})", text)
    assert all(source.startswith("data:image/") for source in sources) and "http" not in text


# ---- the command


@pytest.fixture
def command(capsys):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("visualize_data_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*args):
        try:
            code = module.run([str(a) for a in args])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def test_each_source(command, photos, demo_root, tmp_path):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    found = predictions(tmp_path, (1, 0.6))
    small = ["MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS",
             "64", "SSL.INPUT.VIEW_SIZE", "64", "SSL.METHOD", "SimCLR"]  # fmt: skip
    for source, options, count in (
        ("annotations", ["--dataset", photos, "--dataset", "balloon_demo_val"], 4),
        ("predictions", ["--dataset", photos, "--predictions", found, "--sort", "confidence"], 2),
        ("views", ["--config-file", REPO / "configs/demo.yaml", "--seed", "1", *small], 1),
        ("training", ["--dataset", "balloon_demo_train", "SSL.ENABLED", "False"], 2),
    ):
        out = tmp_path / source
        code, text, err = command(
            "--source", source, "--num-photos", "2", "--output", out, *options
        )
        assert not code, err
        assert text == f"{count} picture{'s' * (count > 1)}: {out}\n"
        assert len(list(out.iterdir())) == count


def test_wrong_usage(command, photos, tmp_path):
    for args, message in (
        (["--source", "annotations"], "needs --dataset"),
        (["--source", "predictions", "--dataset", photos], "needs --predictions"),
        (["--source", "annotations", "--dataset", "nosuch"], "not registered"),
        (["--source", "annotations", "--dataset", photos, "SEED", "1"], "--source views"),
        (["--source", "annotations", "--dataset", photos, "--num-photos", "0"], "1 or more"),
        (["--source", "views", "--config-file", "none.yaml"], "no such file"),
        (["--source", "nothing"], "invalid choice"),
    ):
        code, out, err = command(*args, "--output", tmp_path / "out")
        assert code == 2 and message in err and "Traceback" not in err, err
        assert not (tmp_path / "out").exists()


def test_help_answers_without_torch():
    code = f"""
import runpy, sys
sys.argv = ["visualize_data.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    assert not {{"torch", "detectron2", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "--source" in done.stdout, done.stderr
