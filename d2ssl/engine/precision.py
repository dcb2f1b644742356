"""bf16 where it is fast and harmless, on any device."""

import logging

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn

from d2ssl.compat import has_bf16

logger = logging.getLogger("d2ssl")

# Their outputs enter losses and box arithmetic.
_OUTPUT_MODULES = ("rpn_head", "box_predictor", "predictor")


def apply_precision(model: nn.Module, bf16: bool) -> nn.Module:
    """Run a model in bf16 autocast with channels_last weights, in place.

    Detectron2's ``AMPTrainer`` is CUDA and fp16 only. bf16 has the range of fp32, so no gradient
    scaling is needed. Three things stay fp32: RoIAlign (its boxes would be rounded to the
    features' dtype: 517.3 becomes 516), everything behind the heads, and the losses.
    """
    if not bf16:
        return model
    device = next(model.parameters()).device.type
    if not has_bf16(device):
        logger.warning("This GPU has no bf16 (it came with Ampere); training in fp32 instead.")
        return model
    model.to(memory_format=torch.channels_last)
    for name in ("forward", "inference"):  # test-time augmentation calls the second
        if hasattr(model, name):
            setattr(model, name, torch.autocast(device, torch.bfloat16)(getattr(model, name)))
    for name, module in model.named_modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(_float_features)
        # Not by name alone: Cascade R-CNN has a list of box predictors.
        elif isinstance(module, FastRCNNOutputLayers) or _last(name) in _OUTPUT_MODULES:
            module.register_forward_hook(_float_output)
    return model


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _float_features(pooler, args):
    features, *rest = args
    return [f.float() for f in features], *rest


def _float_output(module, args, output):
    if isinstance(output, torch.Tensor):
        return output.float()
    return type(output)(_float_output(module, args, item) for item in output)
