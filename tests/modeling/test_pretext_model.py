"""What methods are given: views, and encodings that are made once."""

from types import SimpleNamespace

import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.errors import D2SSLError
from d2ssl.modeling.pretext_model import PretextModel, ViewBatch
from d2ssl.modeling.units import Boxes


@pytest.fixture
def count_calls():
    """Callable: module -> list that gets the images of each of its forward passes."""

    def watch(module):
        calls = []
        module.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
        return calls

    return watch


SEVERAL = '[["SoCo", 1.0], ["BYOL", 0.5], ["PLMoCo", 0.5], ["SimCLR", 0.5]]'


def test_a_view_is_encoded_once_for_all_methods(model_and_batch, count_calls):
    """SoCo draws three views and compares the first with the others; the other methods ask for
    the first two again, the twin's and the trunk's own."""
    model, batch = model_and_batch("SoCo", "SSL.METHODS", SEVERAL)
    online, twin = count_calls(model.trunk), count_calls(model.trunk_twin)
    model(batch)
    for calls in (online, twin):
        assert len(calls) == 3
        assert len({images.sum().item() for images in calls}) == 3  # each another view


def test_what_nobody_asks_for_is_not_encoded(model_and_batch, count_calls):
    """MoCo one way: queries of the first view, keys of the second."""
    model, batch = model_and_batch("MoCo", "SSL.QUEUE.SYMMETRIC", "False")
    online, twin = count_calls(model.trunk), count_calls(model.trunk_twin)
    views = model.see(batch)
    assert not online and not twin
    model.method(views)
    assert len(online) == len(twin) == 1
    assert torch.equal(online[0], views[0].images) and torch.equal(twin[0], views[1].images)


def test_without_levels_of_the_fpn_it_is_not_computed(model_and_batch, count_calls):
    model, batch = model_and_batch("BYOL", "SSL.LEVELS", "['res5']")
    calls = [count_calls(trunk.backbone.fpn_output2) for trunk in (model.trunk, model.trunk_twin)]
    view = model.see(batch)[0]
    assert sorted(view.online.pyramid) == ["res2", "res3", "res4", "res5"]
    model(batch)
    assert calls == [[], []]
    torch.testing.assert_close(view.online.pyramid["res5"], model.trunk(view.images)["res5"])


def test_a_method_without_twin_has_none(model_and_batch):
    model, _ = model_and_batch("SimCLR")
    assert not hasattr(model, "trunk_twin") and model.twins() == []


def test_the_twin_has_no_gradient(model_and_batch):
    model, batch = model_and_batch("SoCo")
    view = model.see(batch)[0]
    for encoding, learns in ((view.online, True), (view.momentum, False)):
        maps = [*encoding.pyramid.values(), encoding.box_features(view.boxes)]
        assert all(m.requires_grad == learns for m in maps)
    sum(model(batch).values()).backward()
    assert len(model.twins()) == 2  # the trunk's and the projector's
    for online, twin in model.twins():
        assert any(p.grad is not None for p in online.parameters())
        assert all(p.grad is None and not p.requires_grad for p in twin.parameters())


def test_no_graph_where_none_is_wanted(model_and_batch):
    model, batch = model_and_batch("MoCo")
    with torch.no_grad():
        assert not model.see(batch)[0].online.pyramid["p2"].requires_grad


def test_who_asks_first_does_not_decide_on_gradients(model_and_batch):
    """A method that only looks at features must not take the gradient from one that learns."""
    model, batch = model_and_batch("SoCo")
    view = model.see(batch)[0]
    with torch.no_grad():
        pyramid = view.online.pyramid
    assert pyramid["p2"].requires_grad
    assert view.online.box_features(view.boxes).requires_grad


def test_pyramid_and_box_features_are_the_trunks(model_and_batch):
    model, batch = model_and_batch("SoCo")
    model.eval()
    view = model.see(batch)[1]
    size = view.pixels.shape[-1]
    for level, stride in zip("2345", (4, 8, 16, 32)):
        for name, channels in (("p", 32), ("res", 16 << int(level))):
            expected = (4, channels, size // stride, size // stride)
            assert view.online.pyramid[name + level].shape == expected
    features = view.online.box_features(view.boxes)
    assert features.shape == (*view.boxes.shape[:2], model.trunk.box_dim)
    # A photo's boxes are read off that photo's maps.
    alone = model.see(batch[2:3])[1]
    same = alone.online.box_features(alone.boxes)[0]
    assert torch.allclose(same, features[2], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["RLMoCo", "Inpainting"])
def test_views_hold_what_the_mapper_made(model_and_batch, name):
    std = ["MODEL.PIXEL_STD", "[50.0, 60.0, 70.0]"]
    model, batch = model_and_batch(name, "SSL.REGIONS.SOURCE", "grid", *std)
    for number, item in enumerate(batch):
        item["index"] = 7 * number
    for index, view in enumerate(model.see(batch)):
        assert view.photos.tolist() == [0, 7, 14, 21]
        mean, std = (103.53, 116.28, 123.675), (50, 60, 70)  # BGR
        for n, item in enumerate(batch):
            pixels = item["views"][index]
            assert torch.equal(view.pixels[n], pixels)
            assert torch.equal(view.windows[n], item["windows"][index])
            for c in range(3):
                expected = (pixels[c] - mean[c]) / std[c]
                assert torch.allclose(view.images[n, c], expected, atol=1e-5)
            for key in ("regions", "holes"):
                made = getattr(view, key)
                assert (made is None) == (key not in item)
                assert made is None or torch.equal(made[n], item[key][index])
        assert view.boxes is None and view.box_ids is None
    assert ("regions" in batch[0], "holes" in batch[0]) == (name == "RLMoCo", name != "RLMoCo")


def test_another_picture_goes_through_the_trunk_that_learns(model_and_batch, count_calls):
    model, batch = model_and_batch("MoCo")
    view = model.eval().see(batch)[0]
    calls = count_calls(model.trunk)
    maps = view.encode(255 - view.pixels).pyramid
    assert maps["p3"].requires_grad and not torch.allclose(maps["p3"], view.online.pyramid["p3"])
    assert torch.equal(view.encode(view.pixels).pyramid["p3"], view.online.pyramid["p3"])
    assert len(calls) == 3 and torch.equal(calls[0], model.normalize(255 - view.pixels))


def test_boxes_of_different_pairs_never_match():
    """Views 0 and 1 and views 0 and 2 share boxes; the same id in both pairs is no match, nor is
    -1 with anything."""

    def pair(ids, first):
        boxes = [torch.full((2, 4), first + side) for side in (0.0, 1.0)]
        return {"ids": torch.tensor(ids), "boxes": boxes}

    items = [
        {"views": [torch.zeros(3, 32, 32)] * 3, "windows": torch.zeros(3, 4), "index": 0,
         "pairs": [pair(ids, 10.0), pair(ids, 20.0)]}
        for ids in ([5, 8], [0, -1])
    ]  # fmt: skip
    method = SimpleNamespace(view_pairs=((0, 1), (0, 2)))
    model = SimpleNamespace(pixel_mean=torch.zeros(3, 1, 1), method=method)
    views = [ViewBatch(model, items, index) for index in range(3)]
    assert [view.boxes[0, :, 0].tolist() for view in views] == [
        [10, 10, 20, 20],
        [11] * 2,
        [21] * 2,
    ]

    matches = [Boxes(8).compare(views[0], views[other])[0].int().tolist() for other in (1, 2)]
    assert matches[0] == [[[1, 0], [0, 1], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [0, 0]]]
    assert matches[1] == [[[0, 0], [0, 0], [1, 0], [0, 1]], [[0, 0], [0, 0], [1, 0], [0, 0]]]
    assert not Boxes(8).compare(views[1], views[2])[0].any()


def test_a_part_that_the_method_does_not_reach_is_refused(tiny_cfg):
    cfg = tiny_cfg("SSL.METHOD", "MoCo", "SSL.LEVELS", '["res5"]', "SSL.TRAIN", '["fpn"]')
    with pytest.raises(D2SSLError, match="SSL.TRAIN fpn: MoCo trains bottom_up only"):
        PretextModel(pretrain_cfg(cfg))
