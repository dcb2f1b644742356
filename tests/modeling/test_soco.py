import copy

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from d2ssl.config import pretrain_cfg
from d2ssl.data.build import build_pretrain_loader
from d2ssl.engine.trainer import PretrainTrainer
from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods import find_method


@pytest.fixture
def method_and_batch(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg())
    torch.manual_seed(0)
    method = build_model(cfg).train()
    stream = build_pretrain_loader(cfg, method.views(cfg), method.view_pairs).stream
    return method, [stream[i] for i in range(4)]


def test_loss_equals_the_paper_written_out(method_and_batch):
    """Boxes one view, pair and direction at a time, loss in float64 NumPy."""
    method, batch = method_and_batch
    expected = {"loss_v1_v2": 0.0, "loss_v1_v3": 0.0}

    def rows(view, twin):
        """All boxes of a view in one go (batch statistics), by photo, pair and box."""
        trunk = method.trunk_twin if twin else method.trunk
        projector = method.projector_twin if twin else method.projector
        shown = [(i, pair.index(view)) for i, pair in enumerate(method.view_pairs) if view in pair]
        boxes = [torch.cat([x["pairs"][i]["boxes"][side] for i, side in shown]) for x in batch]
        z = projector(trunk.box_features(trunk(method.stack_view(batch, view)), boxes))
        z = (z if twin else method.predictor(z)).detach().double().numpy()
        z = (z / np.linalg.norm(z, axis=1, keepdims=True)).reshape(len(batch), len(shown), 4, -1)
        return {i: z[:, j] for j, (i, _) in enumerate(shown)}

    with torch.no_grad():
        online = [rows(v, False) for v in range(3)]
        twin = [rows(v, True) for v in range(3)]
    for i, (a, b) in enumerate(method.view_pairs):
        for q, k in ((online[a][i], twin[b][i]), (online[b][i], twin[a][i])):
            for n, item in enumerate(batch):
                ids = item["pairs"][i]["ids"].numpy()
                match = (ids[:, None] == ids[None]) & (ids >= 0)[:, None]
                cosine = (match * (q[n] @ k[n].T)).sum() / max(match.sum(), 1)
                expected[f"loss_v{a + 1}_v{b + 1}"] += -2 * cosine / len(batch)

    losses = method(batch)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, abs=1e-4)


def test_photos_without_a_match_are_masked(method_and_batch):
    method, batch = method_and_batch
    for item in batch:
        for pair in item["pairs"]:
            pair["ids"] = torch.full_like(pair["ids"], -1)
    assert all(loss.item() == 0 for loss in method(batch).values())


def test_gradients_reach_bottom_up_fpn_box_head_and_heads(method_and_batch):
    method, batch = method_and_batch
    sum(method(batch).values()).backward()
    for name, parameter in method.named_parameters():
        if "twin" in name:
            assert parameter.grad is None, name
        elif ".fpn_output" not in name:  # a level that no box of these few falls on has zero
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_boxes_go_to_the_level_that_will_see_them_later(tiny_cfg):
    """An object of side s in fine-tuning has side s * view / short side in the view."""
    from detectron2.modeling.poolers import assign_boxes_to_levels
    from detectron2.structures import Boxes

    from d2ssl.config import finetune_cfg

    sizes = ["INPUT.MIN_SIZE_TRAIN", "(512,)", "SSL.INPUT.VIEW_SIZE", "256"]
    pretrain = build_model(pretrain_cfg(tiny_cfg(*sizes))).trunk.roi_heads.box_pooler
    finetune = build_model(finetune_cfg(tiny_cfg(*sizes))).roi_heads.box_pooler

    def levels(pooler, sides):
        boxes = [Boxes(torch.tensor([[0.0, 0.0, s, s] for s in sides]))]
        return assign_boxes_to_levels(
            boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size,
            pooler.canonical_level,
        ).tolist()  # fmt: skip

    sides = [20.0, 100.0, 130.0, 250.0, 500.0]
    assert levels(finetune, sides) == levels(pretrain, [s / 2 for s in sides]) == [0, 0, 1, 2, 3]


def test_loss_falls_and_embeddings_stay_apart(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.SOLVER.MAX_ITER", "30", "SSL.SOLVER.CHECKPOINT_PERIOD", "100"))
    trainer = PretrainTrainer(cfg)
    losses, step = [], trainer.run_step

    def run_step():
        step()
        losses.append(trainer.storage.latest()["total_loss"][0])

    trainer.run_step = run_step
    trainer.train()
    low, high = trainer.module.loss_range
    assert all(low <= loss <= high for loss in losses)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert trainer.storage.latest()["embedding_spread"][0] > 0.3


def test_a_detector_without_fpn_is_refused(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"))
    with pytest.raises(D2SSLError, match="needs build_resnet_fpn_backbone with StandardROIHeads"):
        find_method("SoCo").from_config(copy.deepcopy(cfg))
