"""The function must survive; eval mode alone would prove only algebra."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from d2ssl.errors import D2SSLError
from d2ssl.modeling import norm


def wrong_statistics_net(seed=0, depth=4):
    """Frozen norms whose statistics do not match what flows through, as in a trained detector."""
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        frozen = FrozenBatchNorm2d(8)
        frozen.weight.uniform_(0.5, 2)
        frozen.bias.uniform_(-1, 1)
        frozen.running_mean.uniform_(-2, 2)
        frozen.running_var.uniform_(0.2, 5)
        layers += [nn.Conv2d(8, 8, 3, padding=1), frozen, nn.ReLU()]
    return nn.Sequential(*layers)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(16, 8, 12, 12) * 3 + 1


def test_calibrated_net_keeps_its_function_in_training_mode(images):
    frozen = wrong_statistics_net()
    before = frozen(images)

    naive = norm.unfreeze(copy.deepcopy(frozen)).train()
    assert difference(naive(images), before) > 0.3  # what a plain switch does

    net = norm.unfreeze(copy.deepcopy(frozen))
    norm.calibrate(net, net, [images[:8], images[8:]])
    assert difference(net.train()(images), before) < 1e-4
    assert difference(net.eval()(images), before) < 0.2  # running statistics moved by one step


def test_calibration_keeps_the_eval_function_and_measures_the_input(images):
    frozen = wrong_statistics_net()
    net = norm.unfreeze(copy.deepcopy(frozen))
    names = norm.calibrate(net, net, [images[:3], images[3:]])
    assert names == ["1", "4", "7", "10"]
    assert difference(net.eval()(images), frozen(images)) < 1e-5
    x = frozen[0](images).double()  # input of the first norm, float64 and in one piece
    torch.testing.assert_close(
        net[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6
    )
    expected = x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(net[1].running_var.double(), expected, rtol=1e-5, atol=1e-6)


def test_variance_of_a_large_mean_survives():
    norm_layer = nn.BatchNorm2d(1)
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    norm.calibrate(norm_layer, norm_layer, [x[:4], x[4:]])
    assert norm_layer.running_var.item() == pytest.approx(
        x.double().var(correction=0).item(), rel=1e-3
    )


def test_only_loaded_norms_are_calibrated(images):
    net = norm.unfreeze(wrong_statistics_net())
    untouched = net[4].weight.clone()
    assert norm.calibrate(net, net, [images], only=["1.bias"]) == ["1"]
    assert torch.equal(net[4].weight, untouched)


def test_freeze_undoes_unfreeze(images):
    frozen = wrong_statistics_net()
    expected = frozen(images)
    for conv in frozen[:3].parameters():
        conv.requires_grad_(False)
    net = norm.unfreeze(frozen)
    assert all(p.requires_grad for p in net.parameters())
    assert all(n.num_batches_tracked is not None for n in net if isinstance(n, nn.BatchNorm2d))
    back = norm.freeze(net)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in back) == 4
    assert difference(back(images), expected) < 1e-6


def test_fold_into_convolution(images):
    torch.manual_seed(0)
    conv = Conv2d(8, 6, 3, padding=1, bias=False, norm=nn.BatchNorm2d(6))
    net = nn.Sequential(conv).train()
    for _ in range(5):
        net(images)
    conv.norm.weight.data.uniform_(0.5, 2)
    conv.norm.bias.data.uniform_(-1, 1)
    expected = net.eval()(images)
    norm.fold(net)
    assert conv.norm is None and set(dict(net.named_parameters())) == {"0.weight", "0.bias"}
    assert difference(net(images), expected) < 1e-6


def test_recalibrate_recovers_population_statistics(images):
    net = nn.Sequential(nn.BatchNorm2d(8))
    norm.recalibrate(net, net, list(images.split(1)))
    torch.testing.assert_close(net[0].running_mean, images.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net[0].running_var, images.var((0, 2, 3)), rtol=2e-2, atol=0)


def test_no_recalibrated_variance_is_negative():
    x = 1000 + 0.01 * torch.randn(8, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    norm_layer = nn.BatchNorm2d(64)
    norm.recalibrate(norm_layer, norm_layer, list(x.split(2)))
    assert (norm_layer.running_var >= 0).all()


def test_random_frozen_norms_are_refused_until_measured(images):
    net = nn.Sequential(nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8))
    with pytest.raises(D2SSLError, match="mean 0 and variance 1"):
        norm.refuse_uncalibrated(net)
    net = norm.unfreeze(net)
    norm.recalibrate(net, net, [images])
    norm.refuse_uncalibrated(norm.freeze(net))


def test_recalibrated_resnet_computes_in_eval_mode_what_training_mode_computes():
    """A whole ResNet: with one photo a batch, each would be whitened by itself."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.DEPTH = "BN", 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.BACKBONE.FREEZE_AT = 64, 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    torch.manual_seed(0)
    net = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    # Photos differ from one another in brightness and contrast, as real ones do.
    photos = torch.randn(32, 3, 64, 64) * torch.rand(32, 1, 1, 1) + torch.randn(32, 3, 1, 1)

    def error_after(batches):
        norm.recalibrate(net, net, batches)
        with torch.no_grad():
            return difference(net.eval()(photos)["res5"], net.train()(photos)["res5"])

    together, alone = error_after(list(photos.split(16))), error_after(list(photos.split(1)))
    assert together < 0.3 and together < 0.5 * alone
