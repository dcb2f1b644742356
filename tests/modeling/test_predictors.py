import pytest
import torch

from d2ssl.errors import D2SSLError
from d2ssl.modeling.predictors import class_names, describe_fit, fit_predictors

BOX, MASK = "roi_heads.box_predictor.", "roi_heads.mask_head.predictor."


def predictors(classes, width=6, box_classes=None, prefix=BOX):
    rows = {
        f"{prefix}cls_score": (classes + 1, width),
        f"{prefix}bbox_pred": (4 * (box_classes or classes), width),
        f"{MASK[:-1]}": (classes, width, 1, 1),
    }
    state = {f"{name}.weight": torch.randn(shape) for name, shape in rows.items()}
    return {**state, **{f"{name}.bias": torch.randn(s[0]) for name, s in rows.items()}}


def test_rows_go_by_name_and_the_background_stays_last():
    old = predictors(3)
    new = fit_predictors(old, ["a", "b", "c"], ["c", "x", "a", "y"])
    assert new.keys() == old.keys()
    for leaf in ("weight", "bias"):
        score, box, mask = (
            [state[name + leaf] for state in (old, new)]
            for name in (f"{BOX}cls_score.", f"{BOX}bbox_pred.", MASK)
        )
        assert torch.equal(score[1][[0, 2, 4]], score[0][[2, 0, 3]])
        assert torch.equal(box[1][:4], box[0][8:]) and torch.equal(box[1][8:12], box[0][:4])
        assert torch.equal(mask[1][[0, 2]], mask[0][[2, 0]])
        assert [len(x[1]) for x in (score, box, mask)] == [5, 16, 4]


@pytest.mark.parametrize(
    "layer, per_class, std", [(f"{BOX}cls_score.", 1, 0.01), (f"{BOX}bbox_pred.", 4, 1e-3),
                              (MASK, 1, 1e-3)]
)  # fmt: skip
def test_other_rows_are_as_detectron2_begins_them(layer, per_class, std):
    torch.manual_seed(0)
    new = fit_predictors(predictors(2, width=1000), ["a", "b"], ["b", *"wxyz"])
    fresh = new[f"{layer}weight"].flatten(1)[per_class : 5 * per_class]
    assert 0.95 * std < fresh.std() < 1.05 * std and fresh.mean().abs() < 0.1 * std
    assert (new[f"{layer}bias"][per_class : 5 * per_class] == 0).all()


def test_class_agnostic_boxes_are_left_alone():
    old = predictors(3, box_classes=1)
    old[f"{MASK}weight"], old[f"{MASK}bias"] = torch.randn(1, 6, 1, 1), torch.randn(1)
    new = fit_predictors(old, ["a", "b", "c"], ["c", "x"])
    assert set(new) == {f"{BOX}cls_score.weight", f"{BOX}cls_score.bias"}


def test_cascades_and_arrays():
    old = predictors(3, box_classes=1, prefix="roi_heads.box_predictor.2.")
    arrays = {name: value.numpy() for name, value in old.items()}
    new = fit_predictors(arrays, ["a", "b", "c"], ["b"])
    name = "roi_heads.box_predictor.2.cls_score.weight"
    assert torch.equal(new[name], old[name][[1, 3]])
    assert fit_predictors({"backbone.bottom_up.stem.conv1.weight": arrays[name]}, "ab", "b") == {}


def test_the_wrong_number_of_names():
    with pytest.raises(D2SSLError, match="2 classes are named.*has 3; name all"):
        fit_predictors(predictors(3), ["a", "b"], ["a"])


def test_names_and_words():
    coco = class_names("coco")
    assert len(coco) == 80 and coco[:3] == ["person", "bicycle", "car"]
    assert class_names(("a", "b")) == ["a", "b"] and class_names("") == []
    assert describe_fit(coco, ["balloon"]) == "0 of 1 classes kept by name, 1 re-initialised"
    voc = ["cat", "sofa", "dog", "person", "bus"]
    expected = "4 of 5 classes kept by name (cat, dog, person, ...), 1 re-initialised"
    assert describe_fit(coco, voc) == expected
