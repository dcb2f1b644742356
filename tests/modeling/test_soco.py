import numpy as np
import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.errors import D2SSLError
from d2ssl.modeling.pretext_model import PretextModel
from tests.modeling.conftest import assert_learns


@pytest.mark.parametrize("name", ["SoCo", "SoCoStar"])
def test_loss_equals_the_paper_written_out(model_and_batch, name):
    """Boxes one view, pair and direction at a time, loss in float64 NumPy."""
    model, batch = model_and_batch(name)
    method = model.method
    expected = {f"loss_v{a + 1}_v{b + 1}": 0.0 for a, b in method.view_pairs}
    images = [model.normalize(torch.stack([x["views"][v] for x in batch])) for v in range(4)
              if v < len(method.views)]  # fmt: skip

    def rows(view, twin):
        """All boxes of a view in one go (batch statistics), by photo, pair and box."""
        trunk = model.trunk_twin if twin else model.trunk
        projector = method.projector_twin if twin else method.projector
        shown = [(i, pair.index(view)) for i, pair in enumerate(method.view_pairs) if view in pair]
        boxes = [torch.cat([x["pairs"][i]["boxes"][side] for i, side in shown]) for x in batch]
        z = projector(trunk.box_features(trunk(images[view]), boxes))
        z = (z if twin else method.predictor(z)).detach().double().numpy()
        z = (z / np.linalg.norm(z, axis=1, keepdims=True)).reshape(len(batch), len(shown), 4, -1)
        return {i: z[:, j] for j, (i, _) in enumerate(shown)}

    with torch.no_grad():
        online = [rows(v, False) for v in range(len(images))]
        twin = [rows(v, True) for v in range(len(images))]
    for i, (a, b) in enumerate(method.view_pairs):
        for q, k in ((online[a][i], twin[b][i]), (online[b][i], twin[a][i])):
            for n, item in enumerate(batch):
                ids = item["pairs"][i]["ids"].numpy()
                match = (ids[:, None] == ids[None]) & (ids >= 0)[:, None]
                cosine = (match * (q[n] @ k[n].T)).sum() / max(match.sum(), 1)
                expected[f"loss_v{a + 1}_v{b + 1}"] += -2 * cosine / len(batch)

    losses = model(batch)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, abs=1e-4)


def test_photos_without_a_match_are_masked(model_and_batch):
    model, batch = model_and_batch("SoCo")
    for item in batch:
        for pair in item["pairs"]:
            pair["ids"] = torch.full_like(pair["ids"], -1)
    assert all(loss.item() == 0 for loss in model(batch).values())


def test_boxes_go_to_the_level_that_will_see_them_later(tiny_cfg):
    """An object of side s in fine-tuning has side s * view / short side in the view."""
    from detectron2.modeling import build_model
    from detectron2.modeling.poolers import assign_boxes_to_levels
    from detectron2.structures import Boxes

    from d2ssl.config import finetune_cfg

    sizes = ["INPUT.MIN_SIZE_TRAIN", "(512,)", "SSL.INPUT.VIEW_SIZE", "256"]
    pretrain = PretextModel(pretrain_cfg(tiny_cfg(*sizes))).trunk.roi_heads.box_pooler
    finetune = build_model(finetune_cfg(tiny_cfg(*sizes))).roi_heads.box_pooler

    def levels(pooler, sides):
        boxes = [Boxes(torch.tensor([[0.0, 0.0, s, s] for s in sides]))]
        return assign_boxes_to_levels(
            boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size,
            pooler.canonical_level,
        ).tolist()  # fmt: skip

    sides = [20.0, 100.0, 130.0, 250.0, 500.0]
    assert levels(finetune, sides) == levels(pretrain, [s / 2 for s in sides]) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("name, fall", [("SoCo", 0.3), ("SoCoStar", 0.5)])
def test_learns(train, name, fall):
    assert_learns(*train(name), fall=fall, unseen=["fpn_output"])  # not every level meets a box


def test_the_fourth_view_of_the_star_is_the_second_made_small(model_and_batch):
    model, batch = model_and_batch("SoCoStar")
    for item in batch:
        second, fourth = (sorted(item["windows"][v].tolist()) for v in (1, 3))
        assert second == pytest.approx(fourth)
        assert item["views"][3].shape[-1] < item["views"][1].shape[-1]


def test_a_detector_without_fpn_is_refused(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"))
    with pytest.raises(D2SSLError, match="needs build_resnet_fpn_backbone with StandardROIHeads"):
        PretextModel(cfg)
