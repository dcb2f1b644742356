import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns


@pytest.fixture
def posed(model_and_batch):
    """A model whose decoder says what ``answer`` holds (4 x 3 x 64 x 64), and a batch."""
    model, batch = model_and_batch("Inpainting")
    del model.method.decoder
    model.answer = torch.full((4, 3, 64, 64), 0.25)
    model.method.decoder = lambda pyramid: model.answer
    return model, batch


def stacked(batch):
    views, holes = (torch.stack([item[name][0] for item in batch]) for name in ("views", "holes"))
    return views, holes.expand_as(views)


def test_loss_is_the_distance_inside_the_holes(posed):
    model, batch = posed
    expected = [
        np.mean([np.abs(plane[item["holes"][0][0].numpy()] / 255 - 0.25).mean()
                 for plane in item["views"][0].numpy()])
        for item in batch
    ]  # fmt: skip
    assert model(batch)["loss_pixels"].item() == pytest.approx(np.mean(expected), abs=1e-5)
    assert model.method.loss_range == (0, 1)


def test_only_holes_count(posed):
    """What is predicted elsewhere changes neither loss nor picture; the truth has no loss."""
    model, batch = posed
    views, holes = stacked(batch)
    model.answer = torch.where(holes, views / 255, torch.rand(views.shape))
    assert model(batch)["loss_pixels"].item() < 1e-6
    pictures = dict(model.method.pictures(model.see(batch)))
    assert list(pictures) == ["cut out", "filled in", "original"]
    assert (pictures["filled in"] == views).all() and (pictures["original"] == views).all()
    assert (pictures["cut out"] == views)[~holes].all()
    assert (pictures["cut out"] != views)[holes].float().mean() > 0.9

    model.answer = torch.where(holes, 1 - views / 255, views / 255)
    assert (dict(model.method.pictures(model.see(batch)))["filled in"] == 255 - views)[holes].all()
    assert model(batch)["loss_pixels"] > 0.1

    for item in batch:
        item["holes"] = [torch.zeros_like(h) for h in item["holes"]]
    assert model(batch)["loss_pixels"] == 0


def test_the_trunk_sees_zero_in_holes_and_nothing_of_what_was_there(posed):
    model, batch = posed
    views, holes = stacked(batch)
    seen = []
    model.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch)
    assert (seen[0][holes] == 0).all()
    assert (seen[0] == model.normalize(views))[~holes].all()
    for item in batch:
        item["views"][0][item["holes"][0].expand(3, -1, -1)] = 0
    model(batch)
    assert (seen[0] == seen[1]).all()


def test_learns(train):
    assert_learns(*train("Inpainting", "SSL.SOLVER.BASE_LR", "0.1"), fall=0.02, spread=None)


def test_pictures_of_several_methods_stand_side_by_side(model_and_batch):
    members = '[["Colorization", 1.0], ["Inpainting", 0.5], ["SimSiam", 1.0]]'
    model, batch = model_and_batch("SoCo", "SSL.METHODS", members)
    pictures = model.method.pictures(model.see(batch))
    captions = ["grey", "coloured", "original", "cut out", "filled in"]
    assert [caption for caption, _ in pictures] == captions
    assert all(x.shape == (4, 3, 64, 64) and x.dtype == torch.uint8 for _, x in pictures)
    losses = model(batch)
    assert {"loss_colorization_pixels", "loss_inpainting_pixels"} < losses.keys()
