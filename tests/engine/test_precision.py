import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks

from d2ssl.config import finetune_cfg
from d2ssl.engine.precision import apply_precision


@pytest.fixture
def models(tiny_cfg):
    """The same small detector in fp32 and in bf16."""
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "MODEL.RESNETS.NORM", "BN"))
    torch.manual_seed(0)
    plain = build_model(cfg)
    mixed = build_model(cfg)
    mixed.load_state_dict(plain.state_dict())
    return plain, apply_precision(mixed, True)


def batch():
    torch.manual_seed(1)
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 50.0, 60.0]]))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64)
    instances.gt_masks = PolygonMasks([[[10.0, 8.0, 50.0, 8.0, 50.0, 60.0, 10.0, 60.0]]])
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    return [{"image": image, "instances": instances, "height": 64, "width": 96}] * 2


def losses(model):
    from detectron2.utils.events import EventStorage

    torch.manual_seed(2)
    with EventStorage(0):
        return model.train()(batch())


def test_losses_stay_fp32_and_near(models):
    plain, mixed = (losses(m) for m in models)
    for name, value in mixed.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(plain[name].item(), rel=0.1, abs=0.02), name


def test_convolutions_run_in_bf16_and_boxes_in_fp32(models):
    _, model = models
    seen = {}
    model.backbone.bottom_up.res3.register_forward_hook(lambda m, i, o: seen.update(res3=o))
    pooler = model.roi_heads.box_pooler.level_poolers[0]
    pooler.register_forward_hook(lambda m, i, o: seen.update(features=i[0], rois=i[1]))
    losses(model)
    assert seen["res3"].dtype == torch.bfloat16
    assert seen["res3"].is_contiguous(memory_format=torch.channels_last)
    assert seen["features"].dtype == torch.float32 and seen["rois"].dtype == torch.float32


def test_box_corners_are_not_rounded(models):
    """517.3 would become 516 in bf16."""
    _, model = models
    feature = torch.rand(1, 32, 160, 160)
    box = [Boxes(torch.tensor([[500.2, 401.7, 517.3, 419.1]]))]
    pooler = model.roi_heads.box_pooler
    features = [torch.nn.functional.max_pool2d(feature, 2**i) for i in range(4)]
    exact = pooler(features, box)
    coarse = pooler([f.bfloat16() for f in features], box)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0, atol=4e-3)  # only the features' rounding


def test_gradients_reach_everything_in_bf16(models):
    _, model = models
    sum(losses(model).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_heads_give_to_losses_and_box_arithmetic_is_fp32(models):
    _, model = models
    seen = []
    heads = model.roi_heads
    for module in (
        model.proposal_generator.rpn_head,
        heads.box_predictor,
        heads.mask_head.predictor,
    ):
        module.register_forward_hook(lambda m, i, o: seen.append(o))
    losses(model)
    rpn, box, mask = seen
    outputs = [*rpn[0], *rpn[1], *box, mask]
    assert len(outputs) == 13 and all(x.dtype == torch.float32 for x in outputs)


def test_each_stage_of_a_cascade_gives_fp32(tiny_cfg):
    name = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"]
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", *name, "True"))
    model = apply_precision(build_model(cfg), True)
    seen = []
    for predictor in model.roi_heads.box_predictor:
        predictor.register_forward_hook(lambda m, i, o: seen.extend(x.dtype for x in o))
    losses(model)
    assert seen == [torch.float32] * 6
