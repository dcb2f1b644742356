import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from d2ssl.modeling.colour import lab_to_rgb, rgb_to_lab


@pytest.fixture(scope="module")
def colours():
    """Every seventh value of each plane, darkest and lightest among them: 1 x 3 x H x W uint8."""
    values = np.r_[0:255:7, 255].astype(np.uint8)
    cube = np.stack(np.meshgrid(values, values, values), axis=-1)  # H x W x D x 3
    return torch.from_numpy(cube.reshape(1, len(values), -1, 3)).permute(0, 3, 1, 2)


def test_equals_skimage(colours):
    expected = rgb2lab(colours[0].permute(1, 2, 0).numpy())
    lab = rgb_to_lab(colours)
    np.testing.assert_allclose(lab[0].permute(1, 2, 0).numpy(), expected, atol=2e-3)
    low, high = lab.amin((0, 2, 3)), lab.amax((0, 2, 3))  # as the docstring says
    assert (low > torch.tensor([-0.01, -87, -108])).all()
    assert (high < torch.tensor([100.01, 99, 95])).all()


def test_there_and_back(colours):
    assert (lab_to_rgb(rgb_to_lab(colours)) - colours).abs().max() < 0.01


def test_colours_that_cannot_be_shown_are_clipped():
    lab = torch.tensor([[60.0, 110.0, -110.0], [101.0, 0, 0], [-5.0, 0, 0]]).view(3, 3, 1, 1)
    rgb = lab_to_rgb(lab)
    assert rgb.isfinite().all() and rgb.min() == 0 and rgb.max() == pytest.approx(255, abs=0.01)


def test_fp32_inside_autocast(colours):
    lab = rgb_to_lab(colours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rgb_to_lab(colours)
        back = lab_to_rgb(inside)
    assert inside.dtype == back.dtype == torch.float32
    assert (inside == lab).all() and (back == lab_to_rgb(lab)).all()
