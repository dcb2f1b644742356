"""Box retrieval: its arithmetic, its extremes, and that boxes show the same thing in both views."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2ssl.config import pretrain_cfg
from d2ssl.data.datasets import register_image_folder
from d2ssl.errors import D2SSLError
from d2ssl.evaluation.retrieval import MAX_BOXES, MAX_IOU, BoxRetrieval, different_boxes, top1
from d2ssl.modeling.trunk import Trunk

SAME_COLOURS = {"jitter_p": 0.0, "gray": 0.0, "blur_p": 0.0, "solarize_p": 0.0}
NOTHING = {"crop_scale": None, "flip": 0.0, **SAME_COLOURS}
HELDOUT = ["balloon_demo_val"]


def random_trunk(cfg):
    torch.manual_seed(0)
    return Trunk(**Trunk.from_config(pretrain_cfg(cfg), view_size=cfg.SSL.INPUT.VIEW_SIZE))


@pytest.fixture
def cfg(tiny_cfg):
    return tiny_cfg()


def test_top1_equals_plain_arithmetic():
    rng = np.random.default_rng(0)
    key = rng.normal(size=(40, 6))
    query = 3 * key + rng.normal(size=(40, 6)) * rng.uniform(0, 6, (40, 1))
    hits = 0
    for i in range(40):
        cosines = [q @ query[i] / np.linalg.norm(q) / np.linalg.norm(query[i]) for q in key]
        hits += int(np.argmax(cosines)) == i
    assert 8 < hits < 32  # else it would prove little
    assert top1(torch.from_numpy(query), torch.from_numpy(key)) == pytest.approx(hits / 40)


def test_top1_at_its_extremes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 16, generator=generator)
    assert top1(rows, 2 * rows) == 1.0
    assert top1(rows, rows.roll(1, 0)) == 0.0
    assert top1(rows, torch.randn(600, 16, generator=generator)) < 5 / 600  # chance: 1 of 600


def test_a_tie_is_no_hit():
    rows = torch.randn(9, 100, generator=torch.Generator().manual_seed(0))
    rows[3] = 2 * rows[7]  # the same direction
    assert top1(rows, rows) == pytest.approx(7 / 9)
    assert top1(torch.ones(50, 8), torch.ones(50, 8)) == 0.0
    assert top1(torch.zeros(50, 8), torch.zeros(50, 8)) == 0.0


def iou(a, b):
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_boxes_that_are_kept_differ_in_both_views():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (2, 60, 2))
    views = np.concatenate([corner, corner + rng.uniform(10, 30, (2, 60, 2))], -1)
    kept = different_boxes(*torch.from_numpy(views).float()).tolist()
    assert kept[0] == 0 and len(kept) == MAX_BOXES
    for n, i in enumerate(kept):
        assert all(iou(boxes[i], boxes[j]) <= MAX_IOU for boxes in views for j in kept[:n])
    for i in range(kept[-1]):  # nothing was left out that could have been kept
        if i not in kept:
            earlier = [j for j in kept if j < i]
            assert any(iou(boxes[i], boxes[j]) > MAX_IOU for boxes in views for j in earlier)


def test_equal_views_find_everything(cfg):
    task = BoxRetrieval(cfg, HELDOUT, NOTHING)
    assert task.num_photos == 4 and task.num_boxes > 8
    assert task(random_trunk(cfg)) == {"fpn": 1.0, "res5": 1.0}


def test_a_constant_feature_finds_nothing(cfg):
    trunk = random_trunk(cfg)
    for parameter in trunk.parameters():
        torch.nn.init.zeros_(parameter)
    assert BoxRetrieval(cfg, HELDOUT, NOTHING)(trunk) == {"fpn": 0.0, "res5": 0.0}


def test_a_random_network_finds_some(cfg):
    task = BoxRetrieval(cfg, HELDOUT)
    found = task(random_trunk(cfg))
    assert 1 / task.num_boxes == pytest.approx(task.chance, rel=0.05)
    assert task.chance < found["fpn"] < 0.9


def test_a_box_shows_the_same_place_in_both_views(tiny_cfg, tmp_path):
    """Photos whose red and green tell the place, larger than they are held in memory."""
    height, width = 240, 360
    y, x = np.indices((height, width)) + 0.5
    ramp = np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).astype(np.uint8)
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    register_image_folder("ramps", str(tmp_path))
    task = BoxRetrieval(tiny_cfg("INPUT.FORMAT", "RGB"), ["ramps"], SAME_COLOURS)
    compared = 0
    for draw in task.draws:
        assert not torch.equal(*draw.views)
        for photo in range(3):
            sides = zip(draw.views, draw.boxes)
            for a, b in zip(*([(v[photo], box) for box in boxes[photo]] for v, boxes in sides)):
                a, b = (mean_place(view, box) for view, box in (a, b))
                # Where a view cuts a box, its mean moves by up to a quarter of the largest box.
                assert np.abs(a - b).max() < 32
                compared += 1
    assert compared > 60


def mean_place(view, box):
    x1, y1, x2, y2 = box.round().int().tolist()
    return view[:2, y1:y2, x1:x2].float().mean((1, 2)).numpy()


def test_the_task_is_the_same_for_every_seed(tiny_cfg):
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    one, other = (BoxRetrieval(tiny_cfg("SEED", seed), HELDOUT) for seed in ("1", "2"))
    assert np.array_equal(np.random.get_state()[1], before)
    for a, b in zip(one.draws, other.draws):
        assert torch.equal(a.views[0], b.views[0]) and torch.equal(a.views[1], b.views[1])
        assert all(torch.equal(x, y) for x, y in zip(a.boxes[1], b.boxes[1]))
    first, second = one.draws[:2]
    assert not torch.equal(first.views[0], second.views[0])


def test_the_trunk_is_left_alone_and_its_old_statistics_do_not_count(cfg):
    task, trunk = BoxRetrieval(cfg, HELDOUT), random_trunk(cfg).train()
    state, modes = copy.deepcopy(trunk.state_dict()), set()
    pooler = trunk.roi_heads.box_pooler
    pooler.register_forward_hook(lambda module, *_: modes.add(module.training))
    found = task(trunk)
    assert modes == {False}  # a box's feature depends on its own photo alone
    assert trunk.training and trunk.backbone.training
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())
    for name, value in trunk.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(value, 3, 2)
    assert task(trunk) == found


def test_photos_that_are_trained_on_are_refused(cfg):
    with pytest.raises(D2SSLError, match="4 of 4 held-out photos are also in SSL.DATASETS"):
        BoxRetrieval(cfg, ["balloon_demo_train@4"])


def test_boxes_that_are_too_small_to_be_seen_do_not_count(tiny_cfg, tmp_path):
    """Nor does what takes their place in pretraining: what both views show of the photo."""
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        Image.fromarray(np.full((96, 128, 3), 90, np.uint8)).save(tmp_path / name)
    register_image_folder("plain", str(tmp_path))
    boxes = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "bbox": [60, 50, 5, 5]} for i in range(3)],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    with pytest.raises(D2SSLError, match="plain: 0 boxes of all photos are seen in two views"):
        BoxRetrieval(tiny_cfg("SSL.PROPOSALS.SOURCE", str(tmp_path / "boxes.json")), ["plain"])


def test_no_held_out_photos_is_refused(cfg):
    with pytest.raises(D2SSLError, match="no held-out photos"):
        BoxRetrieval(cfg, [])
