"""Finding a ResNet in a file, and saying it in Detectron2's names, on ResNet-18 and -50."""

import pytest
import torch
import torchvision
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torchvision.models.feature_extraction import create_feature_extractor

from d2ssl.errors import D2SSLError
from d2ssl.modeling.donors import detectron2_name, find_donor, fold, torchvision_features


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def under(prefix, tensors, plus=0.0):
    """With a prefix before each name, and other values where ``plus`` is not 0."""
    return {prefix + name: value + plus if plus else value for name, value in tensors.items()}


def numbered(net):
    """The names that ``nn.Sequential(*net.children())`` gives, without the classifier's."""
    return torch.nn.Sequential(*list(net.children())[:-1]).state_dict()


# What a file holds, (names as the online network's, as its twin's), and the prefix to be taken.
FILES = {
    "torchvision": ("", None),
    "DDP": ("state_dict.module.", None),
    "MoCo v1, v2": ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),
    "MoCo v3": ("state_dict.module.base_encoder.", "state_dict.module.momentum_encoder."),
    "DenseCL": ("state_dict.encoder_q.0.", "state_dict.encoder_k.0."),
    "solo-learn": ("state_dict.backbone.", "state_dict.momentum_backbone."),
    "BYOL": ("online_network.encoder.", "target_network.encoder."),
    "BYOL, lucidrains": ("online_encoder.net.", "target_encoder.net."),
    "SoCo, PixPro": ("model.module.encoder.", "model.module.encoder_k."),
    "SoCo's EMA": ("model.module.encoder.", "model_ema.encoder."),
    "DINO": ("student.module.backbone.", "teacher.backbone."),
    "VISSL": ("classy_state_dict.base_model.model.trunk._feature_blocks.", None),
    "d2ssl": ("model.trunk.backbone.bottom_up.", "model.trunk_twin.backbone.bottom_up."),
}


@pytest.mark.parametrize("online, twin", FILES.values(), ids=FILES)
def test_the_online_network_is_found_under_its_prefix(net, online, twin):
    tensors = net.state_dict()
    if "bottom_up" in online:
        tensors = {detectron2_name(n): v for n, v in tensors.items() if not n.startswith("fc")}
    file = {"queue": torch.rand(3, 3), f"{online}projector.0.weight": torch.rand(4, 4)}
    if twin:
        file |= under(twin, tensors, 1.0)  # first: order must not decide
    donor = find_donor({**file, **under(online, tensors)})
    assert donor.prefix == online
    assert len(donor.state) == 100  # 20 convolutions with norms of 4 tensors each
    for name, value in net.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(donor.state[detectron2_name(name)], value)
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    of_twin = len(tensors) - len(counters) if twin else 0
    classifier = 0 if "bottom_up" in online else 2
    assert len(donor.unused) == of_twin + classifier + 2  # queue and projector


@pytest.mark.parametrize("prefix", ["", "backbone.", "online_network_state_dict.encoder."])
def test_the_children_of_a_sequential_are_found_by_number(net, prefix):
    file = {**under(prefix, numbered(net)), f"{prefix}9.weight": torch.rand(2)}
    file |= under("backbone_momentum.", numbered(net), 1.0)
    donor = find_donor(file)
    assert (donor.layout, donor.prefix) == ("Sequential", prefix)
    expected = find_donor(net.state_dict())
    assert donor.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(donor.tensors[n], expected.tensors[n]) for n in donor.tensors)
    assert f"{prefix}9.weight" in donor.unused


@pytest.mark.parametrize("depth, block", [(18, BasicBlock), (50, BottleneckBlock)])
def test_names_and_shapes_are_detectron2s(depth, block):
    made = getattr(torchvision.models, f"resnet{depth}")()
    stages, width, out = [], 64, 64 if depth == 18 else 256
    for i in range(4):
        count = len(getattr(made, f"layer{i + 1}"))
        more = {} if depth == 18 else {"bottleneck_channels": 64 << i}
        stages.append(ResNet.make_stage(
            block, count, stride_per_block=[1 + (i > 0)] + [1] * (count - 1),
            in_channels=width, out_channels=out << i, norm="BN", **more,
        ))  # fmt: skip
        width = out << i
    stock = ResNet(BasicStem(norm="BN"), stages, out_features=["res5"]).state_dict()
    wanted = {n: v.shape for n, v in stock.items() if "num_batches_tracked" not in n}
    assert {n: v.shape for n, v in find_donor(made.state_dict()).state.items()} == wanted


def test_one_of_several_can_be_named_and_must_be_where_they_differ(net):
    tensors = net.state_dict()
    file = {**under("a.", tensors), **under("b.", tensors, 1.0), **under("ema.", tensors, 2.0)}
    with pytest.raises(D2SSLError, match="several.* --prefix from a., b., ema.$"):
        find_donor(file)
    assert torch.equal(find_donor(file, "ema.").tensors["conv1.weight"], file["ema.conv1.weight"])
    with pytest.raises(D2SSLError, match='--prefix "c."; choose from a., b., ema.'):
        find_donor(file, "c.")
    same = {**under("net.", tensors), **under("online_encoder.net.", tensors)}
    assert find_donor(same).prefix == "net."  # one network, saved under two names
    only = under("teacher.", tensors)
    assert find_donor(only).prefix == "teacher."


def test_what_holds_no_resnet():
    tensors = {"patch_embed.weight": torch.rand(1), "conv1.weight": torch.rand(1)}
    with pytest.raises(D2SSLError, match="no ResNet in it.*patch_embed.weight"):
        find_donor(tensors)


def test_a_folded_convolution_computes_the_same_up_to_the_border():
    torch.manual_seed(0)
    weight, picture = torch.rand(4, 3, 7, 7) - 0.5, torch.randint(0, 256, (3, 20, 24)).float()
    mean = torch.tensor([124.0, 116.0, 104.0]).view(3, 1, 1)
    std, new_std = [58.0, 57.0, 56.0], [2.0, 1.0, 3.0]

    def convolve(pixels, weight):
        return torch.nn.functional.conv2d(pixels[None], weight, stride=2, padding=3)

    expected = convolve((picture - mean) / torch.tensor(std).view(3, 1, 1), weight)
    other = (picture - mean).flip(0) / torch.tensor(new_std).view(3, 1, 1)
    got = convolve(other, fold(weight, True, std[::-1], new_std))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(convolve(other, fold(weight, True, std, new_std)), expected)


def test_torchvisions_own_network_is_rebuilt(net):
    resnext = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], groups=4, width_per_group=8
    ).eval()
    images = torch.randn(1, 3, 64, 96)
    for made in (net, resnext):
        levels = {f"layer{i}": f"res{i + 1}" for i in range(1, 5)}
        with torch.no_grad():
            expected = create_feature_extractor(made, levels)(images)
            got = torchvision_features(find_donor(made.state_dict()).tensors, images)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_what_torchvision_does_not_build_is_one_line(net):
    tensors = find_donor(net.state_dict()).tensors
    tensors["layer1.0.se.weight"] = torch.rand(1)
    with pytest.raises(D2SSLError, match="layer1.0.se.weight") as error:
        torchvision_features(tensors, torch.rand(1, 3, 64, 64))
    assert "\n" not in str(error.value)
