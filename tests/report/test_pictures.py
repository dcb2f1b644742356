"""Sheets: a box is drawn where it is, in all views that share it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image

from d2ssl.config import finetune_cfg, get_cfg
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.loader import PhotoStream
from d2ssl.data.views import View
from d2ssl.report.pictures import (
    COLORS,
    PutPictures,
    compare_predictions,
    numbered_boxes,
    predictions_file,
    views_sheet,
)

VIEWS = [View(size=256, crop_scale=None), View(size=128)]
PAIRS = [(0, 1)]
BOXES_A = [[16, 40, 100, 200], [120, 30, 256, 90]]
BOXES_B = [[8, 20, 50, 100], [60, 60, 128, 128]]
FILL = (10, 20, 30)  # RGB of every pixel of the views


def item(ids=(7, 3), image_format="RGB"):
    color = torch.tensor(FILL if image_format == "RGB" else FILL[::-1], dtype=torch.uint8)
    boxes = [torch.tensor(b, dtype=torch.float32) for b in (BOXES_A, BOXES_B)]
    return {
        "image_id": 5,
        "views": [color.view(3, 1, 1).repeat(1, v.size, v.size) for v in VIEWS],
        "pairs": [{"boxes": boxes, "ids": torch.tensor(ids)}],
    }


def corner_of_views(sheet, count=2):
    """(x, y) of the top left pixel of each view of the first photo, found by its colour."""
    plain = (sheet == FILL).all(2)
    top = int(np.flatnonzero(plain.any(1))[0])
    starts = np.flatnonzero(np.diff(plain[top].astype(int)) == 1) + 1
    assert len(starts) == count
    return [(int(x), top) for x in starts]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_matched_boxes_at_their_places(image_format):
    sheet = views_sheet([item(image_format=image_format)], VIEWS, PAIRS, image_format)
    for (x0, y0), boxes in zip(corner_of_views(sheet), (BOXES_A, BOXES_B)):
        for color, (x1, y1, x2, y2) in zip(COLORS, boxes):
            # The middle of each side; the number stands at the top left corner.
            for x, y in (
                (x1, (y1 + y2) // 2),
                (x2 - 1, (y1 + y2) // 2),
                ((x1 + x2) // 2, y2 - 1),
                ((x1 + x2) // 2 + 8, y1),
            ):
                assert tuple(sheet[y0 + y, x0 + x]) == color, (x, y)
            assert tuple(sheet[y0 + y2 - 4, x0 + x2 - 4]) == FILL  # nothing inside


def test_small_views_are_enlarged_together():
    """Views of 64 and 32 px: one factor for both, boxes with them."""
    views = [View(size=64), View(size=32)]
    shown = item(ids=(0, 0))
    shown["views"] = [torch.tensor(FILL).view(3, 1, 1).repeat(1, s, s).byte() for s in (64, 32)]
    boxes = [torch.tensor([[8.0, 16, 40, 48]]), torch.tensor([[4.0, 8, 20, 24]])]
    shown["pairs"] = [{"boxes": boxes, "ids": torch.tensor([0])}]
    sheet = views_sheet([shown], views, PAIRS, "RGB")
    for (x0, y0), (x1, y1, x2, y2) in zip(corner_of_views(sheet), (b[0].int() for b in boxes)):
        assert tuple(sheet[y0 + 4 * int(y2) - 1, x0 + 2 * int(x1 + x2)]) == COLORS[0]
        assert tuple(sheet[y0 + 2 * int(y1 + y2), x0 + 4 * int(x1)]) == COLORS[0]


def test_nothing_shared_draws_no_box():
    sheet = views_sheet([item(ids=(-1, -1))], VIEWS, PAIRS, "RGB")
    for (x0, y0), view in zip(corner_of_views(sheet), VIEWS):
        assert (sheet[y0 : y0 + view.size, x0 : x0 + view.size] == FILL).all()
    # but says so: its caption is wider than that of a photo with boxes
    x0, y0 = corner_of_views(sheet)[0]
    strip = slice(y0 - 20, y0)
    with_boxes = views_sheet([item()], VIEWS, PAIRS, "RGB")
    assert (sheet[strip] < 128).sum() > 2 * (with_boxes[strip] < 128).sum()


def test_a_repeated_proposal_keeps_its_number():
    pair = {"boxes": [torch.rand(3, 4), torch.rand(3, 4)], "ids": torch.tensor([9, 4, 9])}
    views = numbered_boxes([pair, pair], [(0, 1), (0, 2)], 3)
    assert [number for number, _ in views[0]] == [1, 2, 1, 3, 4, 3]
    assert [number for number, _ in views[1]] == [1, 2, 1]
    assert [number for number, _ in views[2]] == [3, 4, 3]


def test_views_without_pairs():
    shown = {**item(), "pairs": []}
    sheet = views_sheet([shown, shown], VIEWS, [], "RGB")
    assert len(corner_of_views(sheet)) == 2


def test_hook_writes_the_streams_first_views_and_no_random_state_moves(tmp_path):
    class Mapper:
        views, view_pairs, image_format = VIEWS, PAIRS, "RGB"

        def __call__(self, dataset_dict):
            np.random.rand(3), torch.rand(3)
            return item()

    stream = PhotoStream([{"image_id": i} for i in range(3)], Mapper(), seed=0)
    trainer = SimpleNamespace(
        loader=SimpleNamespace(stream=stream), cfg=SimpleNamespace(OUTPUT_DIR=str(tmp_path))
    )
    hook = PutPictures.of_views(get_cfg(), trainer)
    hook.trainer = trainer
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    with EventStorage(0) as trainer.storage:
        hook.before_train()
        (name, image, _), = trainer.storage._vis_data  # fmt: skip
    assert (np.random.get_state()[1] == before[0]).all()
    assert (torch.get_rng_state() == before[1]).all()
    sheet = np.array(Image.open(tmp_path / "views.png"))
    assert (sheet == views_sheet([item()] * 3, VIEWS, PAIRS, "RGB")).all()
    assert name == "views" and (image == sheet.transpose(2, 0, 1)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]


@pytest.fixture
def test_photos(tmp_path):
    """Three grey photos of 200 x 100 px with a label each; categories have ids 40 and 70."""
    dicts = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (200, 100), (90, 90, 90)).save(path)
        label = {
            "bbox": [20, 20, 60, 60],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 1,
            "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]],
        }
        dicts.append({"file_name": str(path), "image_id": f"photo {i}", "height": 100, "width": 200,
                      "annotations": [label]})  # fmt: skip
    name = "report_pictures_test"
    register_dataset(name, lambda: dicts, thing_classes=["cat", "dog"],
                     thing_dataset_id_to_contiguous_id={40: 0, 70: 1})  # fmt: skip
    cfg = get_cfg()
    cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    yield finetune_cfg(cfg)
    DatasetCatalog.remove(name)


def test_predictions_beside_labels(test_photos, tmp_path):
    (tmp_path / "output" / "finetune" / "inference").mkdir(parents=True)
    sure = {"image_id": "photo 1", "category_id": 70, "bbox": [100, 20, 40, 40], "score": 0.9}
    unsure = {**sure, "bbox": [150, 60, 20, 20], "score": 0.4}
    with open(predictions_file(test_photos), "w") as file:
        json.dump([sure, unsure], file)
    shown = compare_predictions(test_photos, num_photos=2, side=400)
    assert [x.name for x in shown] == ["0.png", "1.png"]
    assert [(x.num_labels, x.num_predictions) for x in shown] == [(1, 0), (1, 1)]
    image = shown[1].image.astype(int)
    assert image.shape == (200, 2 * 400 + 8, 3)
    grey = np.array([90, 90, 90])
    label, plain = image[80, 80], image[80, 240]  # photo pixels (40, 40) and (120, 40)
    assert np.abs(label - grey).max() > 30 and np.abs(plain - grey).max() <= 2
    # right half: the box drawn at x = 100 .. 140, its left side at 2 * 100; the unsure one is not
    assert np.abs(image[80, 408 + 198 : 408 + 203] - grey).max() > 30
    assert np.abs(image[120:160, 408 + 300] - grey).max() <= 2
