"""What a network computes on one small picture, to compare it after it has changed hands.

Names and shapes of weights say nothing about colour order, mean, std, stride or which norm reads
them; "zero missing keys" can be true of a network that computes something else.
"""

from typing import Dict

import numpy as np
import torch
from detectron2.structures import Boxes
from torch import nn

PROBE_BOXES = [[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0], [0.0, 0.0, 64.0, 64.0]]


def probe_image() -> torch.Tensor:
    """3 x 64 x 64 uint8 in RGB: smooth waves plus noise, different in each plane and direction."""
    y, x = np.mgrid[0:64, 0:64] / 64.0
    waves = [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((1, 2), (3, 1), (2, -3))]
    offset = np.array([150.0, 110.0, 70.0])[:, None, None]  # a colour cast: BGR would show
    noise = np.random.RandomState(0).uniform(-20, 20, (3, 64, 64))
    return torch.from_numpy((offset + 60 * np.stack(waves) + noise).clip(0, 255).astype("uint8"))


@torch.no_grad()
def fingerprint(backbone: nn.Module, roi_heads: nn.Module, cfg, probe: torch.Tensor) -> Dict:
    """Activations on the probe, in eval mode and fp32: res2..res5, p2..p5, box_head.

    Args:
        backbone: Detectron2's ResNet-FPN; roi_heads: what holds ``box_pooler`` and ``box_head``.
        cfg: says colour order, mean and std, as a detector's preprocessing reads them.
        probe: 3 x H x W uint8 RGB, see :func:`probe_image`.
    """
    backbone.eval()
    roi_heads.eval()
    device = next(backbone.parameters()).device
    image = probe.float().to(device)
    if cfg.INPUT.FORMAT == "BGR":
        image = image.flip(0)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in
                 (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))  # fmt: skip
    image = ((image - mean) / std)[None]
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    with torch.backends.cudnn.flags(allow_tf32=False):  # else a GPU convolves in 10 bits
        values = dict(backbone.bottom_up(image))
        pyramid = backbone(image)
        values.update({name: pyramid[name] for name in names})
        boxes = [Boxes(torch.tensor(PROBE_BOXES, device=device))]
        pooled = roi_heads.box_pooler([pyramid[name] for name in names], boxes)
        values["box_head"] = roi_heads.box_head(pooled)
    return {name: value.float().cpu() for name, value in values.items()}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||; infinite where shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
