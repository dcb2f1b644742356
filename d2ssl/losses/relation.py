"""How matched rows differ between two views, compared across a photo."""

import torch
from torch.nn import functional as F

from d2ssl.losses.precision import in_fp32

# Views that agree have a difference without a direction. Below this length (rows have length 1) it
# counts in proportion instead of in full, so that the gradient of a row stays finite.
SHORT = 1e-3


@in_fp32
def difference_alignment_loss(
    query: torch.Tensor, key: torch.Tensor, match: torch.Tensor
) -> torch.Tensor:
    """Negative cosine between the differences of a photo's matched rows.

    Relational pretraining (PRCL), an unpublished relative of SimSiam on patches: what a patch's
    feature has in one view and not in the other comes from augmentation and context, which the
    whole view shares, so all patches' differences should point the same way.

    Args:
        query: N x K x D; need not be normalised.
        key: N x L x D, targets; no gradient flows into them.
        match: N x K x L bool, which row of ``query`` shows what row of ``key`` shows.
    Returns:
        scalar: a matched row's difference is its unit vector minus the mean of its matches' unit
        vectors; minus the cosine of two of them, averaged over the n (n - 1) ordered pairs of a
        photo's n matched rows, then over photos. In [-1, 1 / (n - 1)], so never above 1: -1 where
        all differences are parallel, the upper end where they cancel. A photo with n < 2 counts as
        0 and gets no gradient.
    """
    query = F.normalize(query, dim=-1)  # N x K x D
    key = F.normalize(key.detach(), dim=-1)  # N x L x D
    target = match.to(key.dtype) @ key / match.sum(-1, keepdim=True).clamp(min=1)  # N x K x D
    matched = match.any(-1)  # N x K
    unit = F.normalize(query - target, dim=-1, eps=SHORT) * matched[..., None]
    # The square of the sum holds every pair's cosine, and each row's with itself.
    cosines = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # N
    n = matched.sum(-1)
    return -(cosines / (n * (n - 1)).clamp(min=1)).mean()
