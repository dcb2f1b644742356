import copy
import os
import pickle

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.datasets import register_dataset
from d2ssl.engine.checkpoint import Checkpointer, fitting, load_weights
from d2ssl.engine.finetuning import FinetuneTrainer
from d2ssl.errors import D2SSLError


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 2)


def test_report_counts_each_tensor_once(tmp_path):
    state = Net().state_dict()
    state["head.weight"] = torch.zeros(3, 4)  # another number of classes
    del state["head.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "a.pth")
    net = Net()
    report = load_weights(net, str(tmp_path / "a.pth"))
    assert report.loaded == ["stem.weight", "stem.bias"]
    assert report.missing == ["head.bias"] and report.mismatched == ["head.weight"]
    assert report.unused == ["extra.weight"]
    assert torch.equal(net.stem.weight, state["stem.weight"])


def test_weights_saved_from_several_processes(tmp_path):
    state = Net().state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    report = load_weights(Net(), str(tmp_path / "a.pth"))
    assert report.loaded == [*state] and not report.unused


def test_report_has_what_a_hand_off_says_of_itself(tmp_path):
    state, path = Net().state_dict(), str(tmp_path / "a.pth")
    record = {"method": "BYOL", "after": ["SoCo"], "config": {"INPUT.FORMAT": "BGR"}}
    for content, expected in (
        ({"model": state, "d2ssl": record}, record),
        ({"model": state}, {}),
        (state, {}),
    ):
        torch.save(content, path)
        report = load_weights(Net(), path)
        assert report.record == expected and report.conventions == expected.get("config", {})
    assert load_weights(Net(), "").record == {}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(D2SSLError, match="bad.pth cannot be loaded") as error:
        load_weights(Net(), str(path))
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(D2SSLError, match="not one tensor fits"):
        load_weights(Net(), str(tmp_path / "a.pth"))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path):
    net = Net()
    checkpointer = Checkpointer(net, str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    class Unwritable:
        def state_dict(self):
            return {"bad": lambda: None}  # fails in the middle of torch.save

    checkpointer.add_checkpointable("bad", Unwritable())
    with pytest.raises(Exception):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]


def test_fpn_with_norm_takes_a_stock_fpns_bias(tiny_cfg, tmp_path):
    """Pretraining puts norms in the FPN; a pretrained FPN must still compute the same."""
    stock = build_model(finetune_cfg(tiny_cfg("SSL.ENABLED", "False")))
    torch.manual_seed(0)
    for module in stock.backbone.modules():
        if isinstance(module, Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    torch.save({"model": stock.state_dict()}, tmp_path / "stock.pth")
    trunk = build_model(pretrain_cfg(tiny_cfg())).trunk
    report = load_weights(trunk, str(tmp_path / "stock.pth"))
    assert "backbone.fpn_output2.norm.bias" in report.loaded
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = stock.backbone.eval()(images), trunk.eval()(images)
    for level in ("p2", "p5"):
        torch.testing.assert_close(got[level], expected[level], rtol=1e-3, atol=1e-3)


# ---- detectors for other classes


def detector_cfg(tiny_cfg, name, classes, *opts):
    """Fine-tuning on the demo's photos, labelled with the last of these classes."""

    def load():
        dicts = copy.deepcopy(DatasetCatalog.get("balloon_demo_train"))
        for annotation in (a for d in dicts for a in d["annotations"]):
            annotation["category_id"] = len(classes) - 1
        return dicts

    register_dataset(name, load, thing_classes=[*classes], evaluator_type="coco")
    opts = ["SSL.ENABLED", "False", "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", *opts]
    cfg = finetune_cfg(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", str(len(classes)), *opts))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


def trained_on_abc(tiny_cfg, *opts):
    """Path of a detector for a, b and c, with predictors far from their initial values."""
    trainer = FinetuneTrainer(detector_cfg(tiny_cfg, "abc", "abc", *opts))
    heads = trainer.module.roi_heads
    for layer in (*heads.box_predictor.children(), heads.mask_head.predictor):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return trainer.module, trainer.save_weights("model_result")


@torch.no_grad()
def logits(model):
    """Scores, box deltas and masks of a few boxes, in float64: the order of sums plays no part."""
    model = copy.deepcopy(model).eval().double()
    heads = model.roi_heads
    torch.manual_seed(1)
    features = model.backbone(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    boxes = [Boxes(torch.tensor([[4.0, 4, 40, 50], [10, 0, 60, 30], [0, 0, 64, 64]]).double())]
    maps = [features[name] for name in heads.box_in_features]
    pooled = heads.box_pooler(maps, boxes).double()  # it pools in float32
    scores, deltas = heads.box_predictor(heads.box_head(pooled))
    masks = heads.mask_head.layers(heads.mask_pooler(maps, boxes).double())
    return scores, deltas.unflatten(1, (-1, 4)), masks


def test_a_detector_keeps_the_classes_that_it_knows(tiny_cfg):
    old, path = trained_on_abc(tiny_cfg)
    assert torch.load(path, weights_only=True)["thing_classes"] == ["a", "b", "c"]
    trainer = FinetuneTrainer(detector_cfg(tiny_cfg, "cx", "cx", "MODEL.WEIGHTS", path))
    (scores, deltas, masks), (new_scores, new_deltas, new_masks) = map(
        logits, (old, trainer.module)
    )
    assert new_scores.shape == (3, 3) and new_masks.shape[:2] == (3, 2)
    same = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(new_scores[:, [0, 2]], scores[:, [2, 3]], **same)
    torch.testing.assert_close(new_deltas[:, 0], deltas[:, 2], **same)
    torch.testing.assert_close(new_masks[:, 0], masks[:, 2], **same)
    assert new_scores[:, 1].abs().max() < 0.1 * scores.abs().max()
    trainer.train()
    final = os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth")
    for saved in (final, trainer.save_weights("model_result")):
        assert torch.load(saved, weights_only=True)["thing_classes"] == ["c", "x"]
    assert FinetuneTrainer(trainer.cfg, resume=True).start_iter == 4


def test_the_report_says_what_was_kept(tiny_cfg):
    _, path = trained_on_abc(tiny_cfg)
    cfg = detector_cfg(tiny_cfg, "cx", "cx")
    report = load_weights(build_model(cfg), path, *fitting(cfg))
    assert "  predictors: 1 of 2 classes kept by name (c), 1 re-initialised" in str(report)
    assert not (report.missing or report.mismatched or report.unused)
    for name, classes, said in (("abc", "abc", ""), ("bca", "bca", "3 of 3 classes kept")):
        cfg = detector_cfg(tiny_cfg, name, classes)
        assert load_weights(build_model(cfg), path, *fitting(cfg)).predictors.startswith(said)
        assert said or not load_weights(build_model(cfg), path, *fitting(cfg)).predictors


def test_class_agnostic_boxes_are_kept_for_any_classes(tiny_cfg):
    agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    old, path = trained_on_abc(tiny_cfg, *agnostic)
    for classes in ("cx", "x"):
        cfg = detector_cfg(tiny_cfg, "new", classes, *agnostic)
        model = build_model(cfg)
        assert not load_weights(model, path, *fitting(cfg)).mismatched
        assert torch.equal(
            model.roi_heads.box_predictor.bbox_pred.weight,
            old.roi_heads.box_predictor.bbox_pred.weight,
        )
    # From one class to several, only the model tells that these rows are for all of them.
    torch.save({"model": model.state_dict(), "thing_classes": ["x"]}, path)
    cfg = detector_cfg(tiny_cfg, "abc", "abc", *agnostic)
    again = build_model(cfg)
    assert not load_weights(again, path, *fitting(cfg)).mismatched
    assert torch.equal(
        again.roi_heads.box_predictor.bbox_pred.weight,
        old.roi_heads.box_predictor.bbox_pred.weight,
    )


def test_weights_that_do_not_say_their_classes(tiny_cfg, tmp_path):
    old, _ = trained_on_abc(tiny_cfg)
    path = str(tmp_path / "zoo.pkl")
    arrays = {name: value.numpy() for name, value in old.state_dict().items()}
    content = {"model": arrays, "__author__": "Zoo", "matching_heuristics": True}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))

    def load(*opts):
        cfg = detector_cfg(tiny_cfg, "cx", "cx", *opts)
        torch.manual_seed(0)
        model = build_model(cfg)
        before = model.roi_heads.box_predictor.cls_score.weight.detach().clone()
        report = load_weights(model, path, *fitting(cfg))
        return report, before, model.roi_heads.box_predictor.cls_score.weight

    report, before, after = load()
    assert "SSL.FINETUNE.WEIGHTS_CLASSES can say" in report.predictors and torch.equal(
        before, after
    )
    never = "SSL.FINETUNE.FIT_PREDICTORS", "never"
    report, before, after = load(*never, "SSL.FINETUNE.WEIGHTS_CLASSES", "('a','b','c')")
    assert not report.predictors and torch.equal(before, after)
    report, before, after = load("SSL.FINETUNE.WEIGHTS_CLASSES", "('a','b','c')")
    assert report.predictors.startswith("1 of 2")
    score = old.roi_heads.box_predictor.cls_score.weight
    assert torch.equal(after[[0, 2]], score[[2, 3]])
    with pytest.raises(D2SSLError, match="zoo.pkl cannot be loaded: 80 classes are named.*has 3"):
        load("SSL.FINETUNE.WEIGHTS_CLASSES", "coco")
