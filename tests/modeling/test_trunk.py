import pytest

from d2ssl.modeling.trunk import part_of


@pytest.mark.parametrize(
    "name, part",
    [
        ("backbone.bottom_up.stem.conv1.weight", "STEM"),
        ("backbone.bottom_up.res4.0.conv1.norm.bias", "RES4"),
        ("backbone.bottom_up.linear.weight", "OTHER"),
        ("backbone.fpn_lateral2.weight", "FPN"),
        ("backbone.res4.0.conv1.weight", "RES4"),  # without an FPN
        ("proposal_generator.rpn_head.conv.weight", "RPN"),
        ("roi_heads.box_predictor.cls_score.weight", "BOX_HEAD"),
        ("roi_heads.mask_head.mask_fcn1.weight", "MASK_HEAD"),
        ("roi_heads.res5.0.conv1.weight", "OTHER"),
    ],
)
def test_parts_of_stock_detectors(name, part):
    assert part_of(name) == part
