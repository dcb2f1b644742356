"""From the feature pyramid back to a picture."""

from typing import Dict, Tuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn
from torch.nn import functional as F

STRIDE = 4  # of P2, where the levels meet


class Decoder(nn.Module):
    """The semantic branch of Panoptic FPN (Kirillov et al., CVPR 2019, sec. 3) for pixels.

    Every level is brought to stride 4 and they are summed; there each cell predicts its own 4 x 4
    pixels, so that edges can be sharper than an enlarged map's. Norms are BatchNorm as in the FPN:
    maps give it many values of few photos, and unlike GroupNorm it leaves a photo's own level,
    which is what is to be predicted.

    Args:
        levels: channels and stride of each level.
        channels: planes of the picture.
        conv_dim: width of the convolutions.
        value_range: least and largest value of a pixel; predictions stay between them.
    """

    def __init__(
        self,
        levels: Dict[str, ShapeSpec],
        channels: int,
        conv_dim: int,
        value_range: Tuple[float, float],
    ):
        super().__init__()
        self.value_range = value_range
        self.branch = SemSegFPNHead(
            levels,
            num_classes=channels * STRIDE**2,
            conv_dims=conv_dim,
            common_stride=STRIDE,
            norm="BN",
        )
        # A start in the middle of the range, where the sigmoid is steep; and alike for all pixels
        # of a cell, or their pattern shows for long (Aitken et al., 2017).
        weight = torch.randn(channels, conv_dim, 1, 1).mul_(0.01)
        self.branch.predictor.weight.data = weight.repeat_interleave(STRIDE**2, dim=0)

    def forward(self, pyramid: Dict[str, torch.Tensor]) -> torch.Tensor:
        """{"p2": N x C x H/4 x W/4, ...} -> N x channels x H x W in ``value_range``."""
        low, high = self.value_range
        pixels = F.pixel_shuffle(self.branch.layers(pyramid), STRIDE)
        return low + (high - low) * pixels.sigmoid()
