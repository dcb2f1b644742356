import pytest
import torch
from detectron2.layers import ShapeSpec

from d2ssl.modeling.decoder import Decoder

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def decoder(strides=STRIDES, channels=2, value_range=(-1.0, 3.0)):
    torch.manual_seed(0)
    levels = {name: ShapeSpec(channels=8, stride=stride) for name, stride in strides.items()}
    return Decoder(levels, channels, conv_dim=16, value_range=value_range)


def pyramid(size=128, strides=STRIDES):
    return {
        name: torch.randn(3, 8, size // stride, size // stride, requires_grad=True)
        for name, stride in strides.items()
    }


def test_a_picture_of_the_views_size_in_its_range():
    pictures = decoder()(pyramid())
    assert pictures.shape == (3, 2, 128, 128)
    # In the middle at first, the pixels of a cell alike.
    assert (pictures - 1).abs().mean() < 0.5
    cells = pictures.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (cells == cells[..., :1]).all() and pictures.std() > 0.01
    model = decoder()
    torch.nn.init.normal_(model.branch.predictor.weight, std=10)
    pictures = model(pyramid())
    assert pictures.min() >= -1 and pictures.max() <= 3 and pictures.std() > 1


def test_each_pixel_of_a_cell_is_predicted_for_itself():
    """What a cell's output says about its 16 pixels lands row by row in its 4 x 4 place."""
    model = decoder(channels=1, value_range=(0.0, 1.0)).eval()
    torch.nn.init.zeros_(model.branch.predictor.weight)
    wanted = torch.linspace(0.1, 0.9, 16)
    with torch.no_grad():
        model.branch.predictor.bias.copy_(wanted.logit())
    pictures = model(pyramid(64))
    torch.testing.assert_close(pictures, wanted.view(4, 4).tile(3, 1, 16, 16))


@pytest.mark.parametrize("level", STRIDES)
def test_a_level_speaks_about_its_own_place(level):
    """A change in one cell changes the picture around that cell's centre, on every level."""
    model = decoder().eval()  # batch statistics would carry it everywhere
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.constant_(conv.weight, 0.01)  # even kernels lean to no side
    maps = {name: torch.zeros_like(m) for name, m in pyramid(512).items()}
    before = model(maps)
    stride = STRIDES[level]
    row, column = 256 // stride, 128 // stride
    maps[level][0, :, row, column] = 5.0
    change = (model(maps) - before)[0].abs().sum(0)  # 512 x 512
    assert (model(maps) - before)[1:].abs().sum() == 0
    place = torch.arange(512) + 0.5
    centre = [(change.sum(axis) * place).sum() / change.sum() for axis in (1, 0)]
    for found, cell in zip(centre, (row, column)):
        assert abs(found.item() - (cell + 0.5) * stride) < 0.1


def test_all_levels_get_gradients():
    maps, model = pyramid(), decoder()
    model(maps).square().mean().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps.values())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_pyramid_without_p2_does_as_well():
    strides = {"p3": 8, "p4": 16, "p5": 32}
    assert decoder(strides)(pyramid(strides=strides)).shape == (3, 2, 128, 128)
