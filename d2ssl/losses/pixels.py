"""Pixels that a decoder predicts."""

import torch

from d2ssl.losses.precision import in_fp32


@in_fp32
def masked_l1_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean absolute difference inside a mask, averaged within and then over photos.

    Inpainting: Context Encoders (Pathak et al. 2016, eq. 1, sec. 3.2: L1 does as well as L2).
    Colour from grey: Larsson et al. (2016; 2017), with values in place of their histograms.

    Args:
        prediction: N x C x H x W.
        target: N x C x H x W, in the unit of ``prediction``.
        mask: N x 1 x H x W bool, True where the prediction counts.
    Returns:
        scalar in [0, inf), in the unit of ``target``. A photo with an empty mask counts as 0 and
        gets no gradient.
    """
    mask = mask.expand_as(prediction)
    difference = (prediction - target).abs().masked_fill(~mask, 0)
    per_photo = difference.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
    return per_photo.mean()
