"""Sheets: a box is drawn where it is, in all views that share it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from PIL import Image

from d2ssl.config import pretrain_cfg
from d2ssl.data.build import build_pretrain_loader
from d2ssl.data.loader import PhotoStream
from d2ssl.data.views import View
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.modeling.units import Cells, Regions
from d2ssl.report.pictures import COLORS
from d2ssl.report.sheets import (
    PutPictures,
    matches_sheet,
    numbered_boxes,
    reconstructions_sheet,
    spread_out,
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
    hook = PutPictures.of_views(trainer)
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


def test_rows_that_are_shown_are_far_apart_and_share_no_match():
    """Nine places in a row; 0 to 3 have a match in common, 4 has none."""
    places = np.stack([np.arange(9.0), np.zeros(9)], axis=1)
    match = np.eye(9, dtype=bool)
    match[:4, 0], match[4] = True, False
    assert spread_out(places, match, 2) == [0, 8]
    assert spread_out(places, match, 3) == [0, 5, 8]  # not 4, which lies farther from both
    assert spread_out(places, match, 12) == [0, 5, 6, 7, 8]
    assert spread_out(places, np.zeros((9, 9), bool), 12) == []


def plain_views(size, **more):
    color = torch.tensor(FILL[::-1], dtype=torch.uint8).view(1, 3, 1, 1)  # BGR
    pixels = color.repeat(1, 1, size, size)
    windows = torch.tensor([[0.0, 0, size, size]])
    return SimpleNamespace(pixels=pixels, windows=windows, **more)


def test_matched_cells_at_their_places():
    """Views of 128 and 96 px at P3 (16 and 12 cells a side, 14 and 12 of them kept) and P4 (8 and
    6): P4 is shown, thrice its size. Two cells match, one of them two cells."""
    views = plain_views(128), plain_views(96)
    units = Cells({"p3": 4, "p4": 4}, 14, 0.7)
    same = torch.zeros(1, 14 * 14 + 64, 12 * 12 + 36, dtype=torch.bool)
    same[0, 5, 5] = True  # on P3
    for a, b in ((8 * 1 + 2, 6 * 3 + 4), (8 * 6 + 7, 6 * 1 + 1), (8 * 6 + 7, 6 * 2 + 3)):
        same[0, 196 + a, 144 + b] = True
    sheet = matches_sheet(units, views, same, ["V1", "V2"], ["x"], "BGR")
    expected = ([(1, 1, 2), (2, 6, 7)], [(1, 3, 4), (2, 1, 1), (2, 2, 3)])  # number, row, column
    for (x0, y0), view, cells in zip(corner_of_views(sheet), views, expected):
        size = 3 * view.pixels.shape[-1]
        picture = sheet[y0 : y0 + size, x0 : x0 + size]
        frames = np.zeros(picture.shape[:2], int)
        for number, row, column in cells:
            y, x = 48 * row, 48 * column
            assert (picture[y + 47, x : x + 48] == COLORS[number - 1]).all()
            assert (picture[y + 20 : y + 48, x] == COLORS[number - 1]).all()
            frames[y : y + 48, x : x + 48] = 1
        assert (picture[frames == 0] == FILL).all()


def test_where_all_levels_are_coarse_the_finest_is_shown():
    units, same = Cells({"p5": 4, "p4": 4}, 14, 0.7), torch.zeros(1, 20, 20, dtype=torch.bool)
    same[0, 4 + 4 * 1 + 2, 4 + 4 * 3 + 1] = True  # at P4, 4 cells a side; 64 px, 6 times enlarged
    views = plain_views(64), plain_views(64)
    sheet = matches_sheet(units, views, same, ["V1", "V2"], ["x"], "BGR")
    for (x0, y0), row, column in zip(corner_of_views(sheet), (1, 3), (2, 1)):
        y, x = y0 + 96 * row + 95, x0 + 96 * column
        assert (sheet[y, x : x + 96] == COLORS[0]).all() and tuple(sheet[y, x - 1]) == FILL


def test_views_without_a_match_have_no_frame():
    views = plain_views(64), plain_views(64)
    units, same = Cells({"p3": 4}, 14, 0.7), torch.zeros(1, 64, 64, dtype=torch.bool)
    sheet = matches_sheet(units, views, same, ["V1", "V2"], ["x"], "BGR")
    for x0, y0 in corner_of_views(sheet):
        assert (sheet[y0 : y0 + 384, x0 : x0 + 384] == FILL).all()


def test_shared_regions_have_one_tint():
    """64 px, 6 times enlarged. Left halves are region 3 in the first view, 1 in the second; right
    halves the other way round; at the bottom, each shows a region that the other does not."""
    labels = torch.tensor([[3, 1], [0, 0]]), torch.tensor([[1, 3], [2, 2]])
    views = [
        plain_views(64, regions=x.repeat_interleave(8, 0).repeat_interleave(8, 1)[None],
                    photos=torch.zeros(1))
        for x in labels
    ]  # fmt: skip
    units = Regions({"p2": 4, "p3": 4}, 4)
    same, _ = units.compare(*views)
    sheet = matches_sheet(units, views, same, ["V1", "V2"], ["x"], "BGR")
    grey = np.array(Image.new("RGB", (1, 1), FILL).convert("L"))[0, 0]
    top = np.flatnonzero((sheet != 255).all(2).mean(1) > 0.5)[0]  # of the views
    for left, order in ((12, (2, 1)), (12 + 384 + 12, (1, 2))):
        picture = sheet[top : top + 384, left : left + 384]
        for x, number in zip((5, 380), order):
            tint = (np.array(COLORS[number - 1]) + grey) / 2
            assert picture[5, x] == pytest.approx(tint, abs=1)
        for half, number in zip((picture[:, :192], picture[:, 192:]), order):
            y, x = (half == COLORS[number - 1]).all(2).nonzero()  # the patch with the number
            assert abs(y.mean() - 96) < 24 and abs(x.mean() - 96) < 24  # a cell off at most
        assert (np.abs(picture[200:, :] - (128 + float(grey)) / 2) <= 1).all()


def pictures_of(cfg, folder):
    """A trainer in front of its first step, and the pictures that the hook of matches put."""
    torch.manual_seed(0)
    model = PretextModel(cfg).train()
    method = model.method
    loader = build_pretrain_loader(cfg, method.views, method.view_pairs, method.needs)
    out = SimpleNamespace(OUTPUT_DIR=str(folder))
    trainer = SimpleNamespace(loader=loader, module=model, cfg=out)
    calls = []
    model.trunk.register_forward_pre_hook(lambda module, args: calls.append(module))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hook = PutPictures.of_matches(trainer, num_photos=3)
    hook.trainer = trainer
    with EventStorage(0) as trainer.storage:
        hook.before_train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    return trainer, trainer.storage._vis_data, len(calls)


@pytest.mark.parametrize("name", ["PLMoCo", "RLMoCo", "DenseCL"])
def test_hook_shows_what_the_loss_takes_for_the_same(tiny_cfg, tmp_path, name):
    cfg = pretrain_cfg(tiny_cfg("SSL.METHOD", name, "SSL.REGIONS.SOURCE", "grid"))
    trainer, put, calls = pictures_of(cfg, tmp_path)
    model, stream = trainer.module, trainer.loader.stream
    method = model.method.methods[1] if hasattr(model.method, "methods") else model.method
    views = model.eval().see([stream[i] for i in range(3)])
    by_place = method.units.compare(*views)[0]
    same = getattr(method, "compare", method.units.compare)(*views)[0]
    assert same.any() and calls == (name == "DenseCL")  # the only one that must encode
    assert torch.equal(same, by_place) == (name != "DenseCL")
    names = [stream[i]["image_id"] for i in range(3)]
    captions = ["V1 crop 64 px", "V2 crop 64 px"]
    sheet = matches_sheet(method.units, views, same, captions, names, cfg.INPUT.FORMAT)
    assert (np.array(Image.open(tmp_path / "matches.png")) == sheet).all()
    ((tag, image, _),) = put
    assert tag == "matches" and (image == sheet.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("name", ["SoCo", "Colorization"])
def test_hook_puts_nothing_where_there_are_no_cells_or_regions(tiny_cfg, tmp_path, name):
    _, put, _ = pictures_of(pretrain_cfg(tiny_cfg("SSL.METHOD", name)), tmp_path)
    assert not put and not (tmp_path / "matches.png").exists()


def test_reconstructions_in_rows_and_columns():
    """Two photos of 64 px, four times enlarged: each picture is plain, in BGR."""
    colours = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [90, 80, 70]]], np.uint8)
    columns = [
        (caption, torch.from_numpy(bgr[:, :, None, None]).repeat(1, 1, 64, 64))
        for caption, bgr in zip(("what went in", "what came out"), colours)
    ]
    sheet = reconstructions_sheet(columns, ["x", "y"], "BGR")
    for column, left in enumerate((12, 12 + 256 + 12)):
        for row in (0, 1):
            shown = (sheet == colours[column][row][::-1]).all(2)
            y, x = np.nonzero(shown)
            assert shown.sum() == 256 * 256 and x.min() == left and np.ptp(x) == 255
            assert np.ptp(y) == 255 and (y.min() > 256) == (row == 1)


@pytest.mark.parametrize("name", ["Colorization", "Inpainting"])
def test_hook_shows_reconstructions_after_the_last_step_and_nothing_moves(tiny_cfg, tmp_path, name):
    cfg = pretrain_cfg(tiny_cfg("SSL.METHOD", name))
    torch.manual_seed(0)
    model = PretextModel(cfg).train()
    method = model.method
    loader = build_pretrain_loader(cfg, method.views, method.view_pairs, method.needs)
    out = SimpleNamespace(OUTPUT_DIR=str(tmp_path))
    hook = PutPictures.of_reconstructions(
        SimpleNamespace(loader=loader, module=model, cfg=out), num_photos=3
    )
    path = tmp_path / "reconstructions.png"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=3, storage=storage)
        hook.before_train()
        for hook.trainer.iter in range(3):
            assert not path.exists() and not storage._vis_data
            hook.after_step()
        ((tag, image, _),) = storage._vis_data
    assert (np.random.get_state()[1] == state[0]).all()
    assert (torch.get_rng_state() == state[1]).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())

    items = [loader.stream[i] for i in range(3)]
    with torch.no_grad():
        pictures = method.pictures(model.eval().see(items))
    names = [x["image_id"] for x in items]
    sheet = reconstructions_sheet(pictures, names, cfg.INPUT.FORMAT)
    assert (np.array(Image.open(path)) == sheet).all()
    assert tag == "reconstructions" and (image == sheet.transpose(2, 0, 1)).all()


def test_pretraining_leaves_reconstructions_only_of_itself(tiny_cfg, tmp_path):
    """In the folder and in TensorBoard; another method in the same folder has none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from d2ssl.pipeline import pretrain

    folder = tmp_path / "out" / "pretrain"
    short = ["SSL.SOLVER.MAX_ITER", "2"]
    pretrain(tiny_cfg("SSL.METHOD", "Inpainting", *short))
    assert (folder / "reconstructions.png").exists()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"views", "reconstructions"} <= set(events.Tags()["images"])
    pretrain(tiny_cfg("SSL.METHOD", "SimSiam", *short))
    assert not (folder / "reconstructions.png").exists()
