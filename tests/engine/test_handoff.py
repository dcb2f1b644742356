"""What pretraining hands off must compute the same in stock Detectron2, without d2ssl."""

import os
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2ssl.config import pretrained_path
from d2ssl.engine.handoff import read_record
from d2ssl.errors import D2SSLError
from d2ssl.pipeline import evaluate_only, finetune, pretrain

# Runs where d2ssl cannot be imported, and builds everything from stock.yaml.
STOCK = """
import sys, torch
sys.modules["d2ssl"] = None
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg).eval()
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
content = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["d2ssl"]
image = content["probe"].flip(0)  # the demo's config is BGR
with torch.no_grad():
    batch = model.preprocess_image([{"image": image}]).tensor
    pyramid = model.backbone(batch)
    values = {**model.backbone.bottom_up(batch), **pyramid}
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0], [0.0, 0.0, 64.0, 64.0]])
    heads = model.roi_heads
    pooled = heads.box_pooler([pyramid[f] for f in heads.box_in_features], [Boxes(boxes)])
    values["box_head"] = heads.box_head(pooled)
for name, expected in sorted(content["fingerprint"].items()):
    print(name, ((values[name] - expected).norm() / expected.norm()).item())
assert not any(m.startswith("d2ssl.") for m in sys.modules)
"""


@pytest.fixture(scope="module")
def handed_off(demo_root, tmp_path_factory):
    """A pretraining run, handed off: (config, content of model_pretrained.pth)."""
    from d2ssl.config import load_cfg
    from d2ssl.data.datasets import register_balloon
    from d2ssl.engine.auto import resolve_auto
    from tests.conftest import CONFIGS, TINY

    register_balloon("balloon_demo", demo_root / "balloon_demo")
    out = tmp_path_factory.mktemp("handoff")
    cfg = resolve_auto(load_cfg(str(CONFIGS / "demo.yaml"), [*TINY, "OUTPUT_DIR", str(out)]))
    pretrain(cfg)
    return cfg, torch.load(pretrained_path(cfg), weights_only=True)


def test_stock_process_computes_the_same(handed_off):
    cfg, _ = handed_off
    yaml = os.path.join(os.path.dirname(pretrained_path(cfg)), "stock.yaml")
    run = subprocess.run(
        [sys.executable, "-c", STOCK, yaml],
        capture_output=True,
        text=True,
        cwd="/",
        env=without_d2ssl(),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    differences = dict(line.split() for line in run.stdout.splitlines() if len(line.split()) == 2)
    assert set(differences) == {"res2", "res3", "res4", "res5", "p2", "p3", "p4", "p5", "box_head"}
    assert all(float(value) < 1e-5 for value in differences.values()), differences


def without_d2ssl():
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def test_names_are_the_stock_detectors(handed_off):
    from detectron2.modeling import build_model

    from d2ssl.config import finetune_cfg

    cfg, content = handed_off
    stock = build_model(finetune_cfg(cfg)).state_dict()
    names = set(content["model"])
    assert names <= set(stock)
    assert all(content["model"][name].shape == stock[name].shape for name in names)
    backbone = {name for name in stock if name.startswith(("backbone.", "roi_heads.box_head."))}
    assert names == backbone  # what was neither trained nor loaded (RPN, mask head) stays out


def test_norms_hold_the_photos_statistics(handed_off):
    """Not those of pretraining's small views, and not the initial ones."""
    cfg, content = handed_off
    checkpoint = torch.load(
        os.path.join(cfg.OUTPUT_DIR, "pretrain", "model_final.pth"), weights_only=True
    )["model"]
    name = "backbone.bottom_up.res3.0.conv1.norm.running_mean"
    handed = content["model"][name]
    assert handed.abs().sum() > 0 and not torch.allclose(
        handed, checkpoint[f"trunk.{name}"], rtol=0.05
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
        ("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
    ],
)
def test_training_refuses_what_no_tensor_shows(handed_off, tmp_path, key, value):
    cfg, _ = handed_off
    path = pretrained_path(cfg)
    other = cfg.clone()
    other.defrost()
    other.merge_from_list(
        [key, value, "SSL.ENABLED", False, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path)]
    )
    with pytest.raises(D2SSLError, match=f"were made with {key}.*doctor"):
        finetune(other)
    with pytest.raises(D2SSLError, match=f"were made with {key}"):
        evaluate_only(other)
    assert not list(tmp_path.rglob("*.pth"))


def test_provenance_says_what_the_weights_are(handed_off):
    _, content = handed_off
    about = content["d2ssl"]
    assert about["method"] == "SoCo" and about["num_photos"] == 8 and about["iterations"] == 4
    assert about["initial_weights"] == "random"
    assert about["config"]["INPUT.FORMAT"] == "BGR"
    assert about["config"]["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    assert len(about["config"]["MODEL.PIXEL_MEAN"]) == 3


def test_one_method_after_another(handed_off, tiny_cfg, tmp_path):
    """Each starts from what the last handed off, and the record names all that came before."""
    cfg, first = handed_off
    assert first["d2ssl"]["after"] == []
    weights = pretrained_path(cfg)
    for name, after in (("SimSiam", ["SoCo"]), ("BYOL", ["SoCo", "SimSiam"])):
        opts = ["SSL.METHOD", name, "MODEL.WEIGHTS", weights, "SSL.SOLVER.MAX_ITER", "1"]
        cfg = tiny_cfg(*opts, output_dir=tmp_path / name)
        pretrain(cfg)
        weights = pretrained_path(cfg)
        content = torch.load(weights, weights_only=True)
        about = content["d2ssl"]
        assert (about["method"], about["after"]) == (name, after)
        assert about["initial_weights"] == "model_pretrained.pth"
    # Neither trains the box head: they pass on the first one's.
    box_head = [key for key in first["model"] if key.startswith("roi_heads.box_head")]
    assert box_head
    assert all(torch.equal(content["model"][key], first["model"][key]) for key in box_head)
    stem = "backbone.bottom_up.stem.conv1.weight"
    change = (content["model"][stem] - first["model"][stem]).norm() / first["model"][stem].norm()
    assert 0 < change < 0.1  # it went on from there


def test_predictors_of_a_detector_keep_their_classes(tiny_cfg, tmp_path):
    """Two classes, of which the training set has one, known only once that set is listed."""
    from d2ssl.config import finetune_cfg
    from d2ssl.data.datasets import register_dataset
    from d2ssl.data.datasets.catalog import set_metadata

    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "SSL.ENABLED", "False"]
    donor = build_model(finetune_cfg(tiny_cfg(*opts))).state_dict()
    weights = str(tmp_path / "donor.pth")
    torch.save({"model": donor, "thing_classes": ["kite", "balloon"]}, weights)

    def load():
        set_metadata("late_train", thing_classes=["balloon"])
        return DatasetCatalog.get("balloon_demo_train")

    register_dataset("late_train", load, evaluator_type="coco")
    opts = [
        "MODEL.WEIGHTS",
        weights,
        "SSL.SOLVER.MAX_ITER",
        "1",
        "DATASETS.TRAIN",
        "('late_train',)",
    ]
    cfg = tiny_cfg(*opts, output_dir=tmp_path / "late")
    pretrain(cfg)
    content = torch.load(pretrained_path(cfg), weights_only=True)
    DatasetCatalog.remove("late_train")
    assert content["thing_classes"] == ["balloon"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(content["model"][name], donor[name][1:])  # balloon, background
    assert torch.equal(content["model"]["roi_heads.mask_head.predictor.weight"],
                       donor["roi_heads.mask_head.predictor.weight"][1:])  # fmt: skip


def test_a_hand_off_that_is_not_there_has_no_record(handed_off, tmp_path):
    cfg, content = handed_off
    record = read_record(pretrained_path(cfg))
    assert record["tensors"] == len(content["model"]) and record.keys() >= content["d2ssl"].keys()
    assert read_record(str(tmp_path / "none.pth")) == {}
