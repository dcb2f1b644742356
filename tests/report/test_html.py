"""The page: made from a run's files alone, whatever of them is there."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from d2ssl.config import load_cfg
from d2ssl.data.datasets import register_balloon
from d2ssl.report.html import write_report

RESULTS = {
    "bbox": {"AP": 41.23, "AP50": 62.5, "AP75": 43.75, "APs": float("nan"), "APm": 31.5, "APl": 50},
    "segm": {"AP": 37.89, "AP50": 61.5, "AP75": 42.25, "APs": float("nan"), "APm": 30.5, "APl": 49},
}


@pytest.fixture
def cfg(demo_root, tmp_path):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    return make_cfg(tmp_path)


def make_cfg(folder, *opts):
    return load_cfg(
        "",
        [
            "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
            "DATASETS.TRAIN", ("balloon_demo_train",),
            "DATASETS.TEST", ("balloon_demo_val",),
            "SSL.DATASETS", ("balloon_demo_unlabeled",),
            "SSL.MOMENTUM", 0.9875,
            "OUTPUT_DIR", str(folder),
            *opts,
        ],
    )  # fmt: skip


def write_metrics(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pretraining(folder):
    write_metrics(
        folder / "pretrain" / "metrics.json",
        [{"iteration": i, "total_loss": -i / 10, "lr": 0.1, "embedding_spread": 0.9}
         for i in (19, 39)],
    )  # fmt: skip
    Image.new("RGB", (64, 32)).save(folder / "pretrain" / "views.png")
    record = {
        "method": "SoCo",
        "trained": ["bottom_up", "fpn"],
        "initial_weights": "<b>donor.pth</b>",
        "datasets": ["balloon_demo_unlabeled"],
        "num_photos": 8,
        "iterations": 123,
        "photos_per_iteration": 16,
        "seed": 4,
        "versions": {"torch": str(torch.__version__)},
        "config": {"INPUT.FORMAT": "BGR"},
        "probe": torch.zeros(1),
    }
    torch.save(
        {"model": {"a": torch.zeros(2)}, "d2ssl": record}, folder / "pretrain/model_pretrained.pth"
    )


def write_finetuning(folder, results=RESULTS):
    rows = [{"iteration": i, "total_loss": 9 / i, "lr": 0.1, "segm/AP": 3.0} for i in (19, 39)]
    write_metrics(folder / "finetune" / "metrics.json", rows)
    (folder / "finetune" / "inference").mkdir()
    (folder / "finetune" / "results.json").write_text(json.dumps({"results": results}))
    (folder / "finetune" / "inference" / "coco_instances_results.json").write_text("[]")


def read(path):
    with open(path) as file:
        return file.read()


def test_a_whole_run(cfg, tmp_path):
    write_pretraining(tmp_path)
    write_finetuning(tmp_path)
    path = write_report(cfg)
    assert path == str(tmp_path / "report.html")
    page = read(path)
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page.split("<tr>")]
    assert ["Masks", "37.9", "61.5", "42.2", "–", "30.5", "49.0"] in rows
    assert ["Boxes", "41.2", "62.5", "43.8", "–", "31.5", "50.0"] in rows
    assert "4 photos" in page and "noise" in page  # the drawn test set is tiny
    assert "123 iterations of 16 photos" in page and "INPUT.FORMAT: BGR" in page  # provenance
    assert "SSL.MOMENTUM: 0.9875" in page and "SSL.PRECISION: " not in page
    # loss, collapse, lr, views; loss, AP, lr, and a picture a test photo
    assert page.count("<img ") == 4 + 3 + 4
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("prefix, photos", [("", "test"), ("dev/", "dev")])
def test_it_says_which_photos_the_curve_is_of(cfg, tmp_path, prefix, photos):
    write_metrics(tmp_path / "finetune/metrics.json", [{"iteration": 9, f"{prefix}segm/AP": 3.0}])
    page = read(write_report(cfg))
    assert set(re.findall(r"AP on the (\w+) photos", page)) == {photos}


def test_the_challenge_s_ap_stands_beside_coco_s(cfg, tmp_path):
    write_finetuning(
        tmp_path, {**RESULTS, "open_images_segm": {"AP50": 41.0, "AP50-balloon": 41.0}}
    )
    page = read(write_report(cfg))
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page.split("<tr>")]
    assert ["Masks, by the challenge", "–", "41.0", *["–"] * 4] in rows
    assert ["balloon", "Masks, by the challenge, AP50", "41.0"] in rows
    assert "predicted nothing" not in page


def test_it_is_self_contained(cfg, tmp_path):
    write_pretraining(tmp_path)
    write_finetuning(tmp_path)
    page = read(write_report(cfg))
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]{0,30})", page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert "<script" not in page and "<link" not in page


def test_text_from_outside_is_escaped(demo_root, tmp_path):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    write_pretraining(tmp_path)
    write_finetuning(
        tmp_path, {"segm": {"AP": 1.0, "AP-<i>red & round": 1.0}, "<u>task": {"AP": 2.0}}
    )
    page = read(write_report(make_cfg(tmp_path, "MODEL.WEIGHTS", "x/<script>alert(1)<script>")))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>donor" not in page and "&lt;b&gt;donor.pth" in page
    assert "<i>red" not in page and "&lt;i&gt;red &amp; round" in page
    assert "<u>task" not in page


def test_nothing_run_yet(cfg):
    page = read(write_report(cfg))
    assert page.count("Not run yet.") == 2 and "Not evaluated yet." in page
    assert "<img" not in page and "random weights" in page


def test_only_pretrained(cfg, tmp_path):
    write_pretraining(tmp_path)
    page = read(write_report(cfg))
    assert page.count("Not run yet.") == 1 and page.count("<img ") == 4


def test_reconstructions_where_the_method_makes_any(cfg, tmp_path):
    write_pretraining(tmp_path)
    assert "What the network makes of it" not in read(write_report(cfg))
    Image.new("RGB", (48, 32), (1, 200, 3)).save(tmp_path / "pretrain" / "reconstructions.png")
    page = read(write_report(cfg))
    assert "What the network makes of it" in page and page.count("<img ") == 5
    content = re.search(r'what the network made[^>]*base64,([^"]*)', page)
    image = Image.open(io.BytesIO(base64.b64decode(content[1])))
    assert image.size == (48, 32) and image.getpixel((9, 9)) == pytest.approx((1, 200, 3), abs=5)


def test_matches_where_the_method_has_any(cfg, tmp_path):
    write_pretraining(tmp_path)
    assert "What it is told is the same" not in read(write_report(cfg))
    Image.new("RGB", (40, 32), (200, 1, 3)).save(tmp_path / "pretrain" / "matches.png")
    page = read(write_report(cfg))
    views, matches = page.index("What the network sees"), page.index("What it is told is the same")
    assert views < matches < page.index("Hand-off") and page.count("<img ") == 5
    content = re.search(r"what is the same[^>]*base64,([^\"]*)", page)
    image = Image.open(io.BytesIO(base64.b64decode(content[1])))
    assert image.size == (40, 32) and image.getpixel((9, 9)) == pytest.approx((200, 1, 3), abs=5)


def test_without_pretraining(demo_root, tmp_path):
    """Files of an earlier pretraining in the same folder do not count."""
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    write_pretraining(tmp_path)
    write_finetuning(tmp_path)
    page = read(write_report(make_cfg(tmp_path, "SSL.ENABLED", False)))
    assert "plain fine-tuning" in page and "Hand-off" not in page
    assert page.count("<img ") == 3 + 4


def test_predictions_of_an_earlier_run_are_not_shown(cfg, tmp_path):
    write_finetuning(tmp_path)
    (tmp_path / "finetune" / "results.json").unlink()  # as a fresh start does
    page = read(write_report(cfg))
    assert "Labels and predictions" not in page and "Not evaluated yet." in page


def test_several_test_sets(demo_root, tmp_path):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    names = ("balloon_demo_train", "balloon_demo_val")
    augmented = [f"{name}_TTA" for name in names]
    results = {n: {"segm": {"AP": 10.0 + i}} for i, n in enumerate([*names, *augmented])}
    write_finetuning(tmp_path, results)
    page = read(write_report(make_cfg(tmp_path, "DATASETS.TEST", names)))
    assert all(f"<h3>{name}</h3>" in page for name in results)
    assert all(f"{10 + i}.0" in page for i in range(4))
