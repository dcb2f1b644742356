"""InfoNCE: find a row's other views among many keys."""

import math

import torch
from torch.nn import functional as F

from d2ssl.losses.precision import in_fp32


@in_fp32
def cosines(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cosine of every row with every key, in [-1, 1]; gradients flow into both.

    Args:
        query: N x R x D, need not be normalised.
        keys: N x S x D, each photo's own, or K x D, one set for all photos (a batch, a queue).
    Returns:
        N x R x S, or N x R x K; 0 for a row or key that is all zeros.
    """
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT


@in_fp32
def info_nce_loss(
    similarity: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross entropy of a row's positives among its positives and negatives.

    CPC (van den Oord et al. 2018, eq. 4) on cosines with a temperature as in SimCLR (Chen et al.
    2020, eq. 1), MoCo (He et al. 2020, eq. 1) and DetCon (Henaff et al. 2021, eq. 1-2). Several
    positives share one softmax and their -log p is averaged, as in SupCon (Khosla et al. 2020,
    eq. 2).

    Args:
        similarity: N x R x M, cosines in [-1, 1] of R rows of each photo with M keys.
        positive: bool, broadcastable to N x R x M: keys that show what the row shows.
        negative: the same for keys that show something else. What is in neither (the row itself,
            another copy of its photo, an empty place of a queue) takes no part.
        temperature: > 0; cosines are divided by it.
    Returns:
        scalar: mean over a photo's rows that have a positive, then over photos. With m keys that
        take part it lies in [0, log(1 + (m - 1) e^(2 / temperature))], see
        :func:`info_nce_bound`; log m where all cosines are equal. With P positives a row it is at
        least log P. A photo without any positive counts as 0 and gets no gradient.
    """
    positive = positive.expand_as(similarity)
    # Finite: a row where nothing takes part would be NaN on the way if filled with -inf.
    lowest = torch.finfo(similarity.dtype).min
    logits = (similarity / temperature).masked_fill(~(positive | negative), lowest)
    log_p = logits.log_softmax(-1).masked_fill(~positive, 0)  # N x R x M
    per_row = -log_p.sum(-1) / positive.sum(-1).clamp(min=1)  # N x R
    rows = positive.any(-1).sum(-1)  # N
    return (per_row.sum(-1) / rows.clamp(min=1)).mean()


def info_nce_bound(num_keys: int, temperature: float) -> float:
    """The largest InfoNCE of a row: its positive at cosine -1, its other keys at 1."""
    # log(1 + (m - 1) e^(2 / T)), written so that a low temperature does not overflow.
    return 2 / temperature + math.log(num_keys - 1 + math.exp(-2 / temperature))
