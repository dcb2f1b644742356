"""Similarity of matched pairs, without negatives."""

import torch
from torch.nn import functional as F

from d2ssl.losses.precision import in_fp32


@in_fp32
def matched_cosine_loss(query: torch.Tensor, key: torch.Tensor, match: torch.Tensor):
    """Twice the negative cosine of matched rows, averaged within and then over images.

    SoCo (Wei et al. 2021, sec. 3.2, eq. 3) for boxes, PixPro (Xie et al. 2021, eq. 3) for pixels.

    Args:
        query: N x K x D, predictions; need not be normalised.
        key: N x L x D, targets; no gradient flows into them.
        match: N x K x L bool, which row of ``query`` shows what row of ``key`` shows.
    Returns:
        scalar in [-2, 2]; -2 where all matched rows are parallel. An image without any match
        counts as 0 and gets no gradient.
    """
    query = F.normalize(query, dim=-1)  # N x K x D
    key = F.normalize(key.detach(), dim=-1)  # N x L x D
    cosine = torch.einsum("nkd,nld->nkl", query, key)  # N x K x L
    match = match.to(cosine.dtype)
    per_image = (cosine * match).sum((1, 2)) / match.sum((1, 2)).clamp(min=1)  # N
    return -2 * per_image.mean()
