import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from tests.modeling.conftest import assert_learns


def rgb_views(batch, image_format):
    """N x S x S x 3 uint8 RGB."""
    views = np.stack([item["views"][0].numpy().transpose(1, 2, 0) for item in batch])
    return views[..., ::-1] if image_format == "BGR" else views


def constant(*values):
    """In place of the decoder: always these values."""
    return lambda pyramid: torch.tensor(values).view(1, -1, 1, 1).expand(4, -1, 64, 64)


def make(model_and_batch, image_format, *opts):
    model, batch = model_and_batch("Colorization", "INPUT.FORMAT", image_format, *opts)
    del model.method.decoder  # a plain function can take its place
    return model, batch


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_loss_is_the_distance_in_a_and_b(model_and_batch, image_format):
    model, batch = make(model_and_batch, image_format)
    model.method.decoder = constant(0.3, -0.2)
    ab = rgb2lab(rgb_views(batch, image_format))[..., 1:] / 110
    expected = np.abs(ab - [0.3, -0.2]).mean()
    assert model(batch)["loss_pixels"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_loss_is_the_distance_in_rgb(model_and_batch, image_format):
    model, batch = make(model_and_batch, image_format, "SSL.COLORIZATION.TARGET", "rgb")
    model.method.decoder = constant(0.9, 0.5, 0.1)
    expected = np.abs(rgb_views(batch, image_format) / 255 - [0.9, 0.5, 0.1]).mean()
    assert model(batch)["loss_pixels"].item() == pytest.approx(expected, abs=1e-5)
    assert model.method.loss_range == (0, 1)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("target", ["ab", "rgb"])
def test_the_truth_has_no_loss_and_its_picture_is_the_photo(model_and_batch, target, image_format):
    model, batch = make(model_and_batch, image_format, "SSL.COLORIZATION.TARGET", target)
    rgb = rgb_views(batch, image_format)
    planes = rgb / 255 if target == "rgb" else rgb2lab(rgb)[..., 1:] / 110
    truth = torch.tensor(planes.transpose(0, 3, 1, 2), dtype=torch.float32)
    model.method.decoder = lambda pyramid: truth
    assert model(batch)["loss_pixels"].item() < 1e-5
    pictures = dict(model.method.pictures(model.see(batch)))
    assert list(pictures) == ["grey", "coloured", "original"]
    views = torch.stack([item["views"][0] for item in batch])
    assert (pictures["original"] == views).all()
    assert (pictures["coloured"].int() - views.int()).abs().max() <= 1


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_the_trunk_sees_grey_of_the_same_lightness(model_and_batch, image_format):
    model, batch = make(model_and_batch, image_format)
    model.method.decoder = constant(0.0, 0.0)
    seen = []
    model.trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch)
    given = (seen[0] * model.pixel_std + model.pixel_mean).permute(0, 2, 3, 1).numpy()
    assert len(seen) == 1 and np.ptp(given, axis=3).max() < 0.05  # three planes alike, in 0..255
    lightness = rgb2lab(rgb_views(batch, image_format))[..., 0]
    np.testing.assert_allclose(rgb2lab(given.astype(np.float64) / 255)[..., 0], lightness, atol=0.1)
    pictures = dict(model.method.pictures(model.see(batch)))
    difference = pictures["grey"].int() - pictures["coloured"].int()
    assert difference.abs().max() <= 1  # a and b 0 add nothing but what rounding does


def test_views_keep_the_photos_colours(model_and_batch):
    """Crops and flips move colours and mix neighbours; nothing else happens to them."""
    options = ["SSL.INPUT.COLOR_JITTER_PROB", "1.0", "SSL.INPUT.GRAY_PROB", "1.0",
               "SSL.INPUT.SOLARIZE_PROB", "1.0", "SSL.INPUT.PLANE_SHIFT", "0.5"]  # fmt: skip
    _, expected = model_and_batch("Colorization")
    _, batch = model_and_batch("Colorization", *options)
    for a, b in zip(batch, expected):
        assert (a["views"][0] == b["views"][0]).all() and len(a["views"]) == 1


def test_learns(train):
    assert_learns(*train("Colorization", "SSL.SOLVER.BASE_LR", "0.1"), fall=0.03, spread=None)
