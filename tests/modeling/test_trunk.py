import pytest

from d2ssl.config import pretrain_cfg
from d2ssl.modeling.trunk import Trunk, part_of, pretrain_part_of


@pytest.mark.parametrize(
    "name, part, pretrain_part",
    [
        ("backbone.bottom_up.stem.conv1.weight", "STEM", "bottom_up"),
        ("backbone.bottom_up.res4.0.conv1.norm.bias", "RES4", "bottom_up"),
        ("backbone.bottom_up.linear.weight", "OTHER", "bottom_up"),
        ("backbone.fpn_lateral2.weight", "FPN", "fpn"),
        ("backbone.res4.0.conv1.weight", "RES4", ""),  # without an FPN
        ("proposal_generator.rpn_head.conv.weight", "RPN", ""),
        ("roi_heads.box_head.fc1.weight", "BOX_HEAD", "box_head"),
        ("roi_heads.box_predictor.cls_score.weight", "BOX_HEAD", ""),
        ("roi_heads.mask_head.mask_fcn1.weight", "MASK_HEAD", ""),
        ("roi_heads.res5.0.conv1.weight", "OTHER", ""),
    ],
)
def test_parts_of_stock_detectors(name, part, pretrain_part):
    assert (part_of(name), pretrain_part_of(name)) == (part, pretrain_part)


def test_a_trunk_is_all_pretrained(tiny_cfg):
    trunk = Trunk(pretrain_cfg(tiny_cfg()))
    for part, modules in trunk.parts().items():
        own = {id(p) for module in modules for p in module.parameters()}
        named = {id(p) for n, p in trunk.named_parameters() if pretrain_part_of(n) == part}
        assert own and named == own
