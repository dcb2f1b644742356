"""How the rows of a photo differ from each other, compared between two views."""

import torch
from torch.nn import functional as F

from d2ssl.losses.precision import in_fp32

# Two rows that are equal differ in no direction. Below this length (rows have length 1) a
# difference counts in proportion instead of in full, so that its gradient stays finite.
SHORT = 1e-2


@in_fp32
def difference_alignment_loss(
    query: torch.Tensor, key: torch.Tensor, match: torch.Tensor
) -> torch.Tensor:
    """Negative cosine of the difference of two rows with the difference of their matches.

    Relational pretraining (PRCL): the way from one place of a photo to another is to have the same
    direction in both views. Rows that are all the same have no way between them, so collapse
    gains nothing.

    Args:
        query: N x K x D; need not be normalised.
        key: N x L x D, targets; no gradient flows into them.
        match: N x K x L bool, which row of ``query`` shows what row of ``key`` shows.
    Returns:
        scalar in [-1, 1]: rows are brought to length 1 and a row's target is the mean of its
        matches; minus the cosine of query_i - query_j with target_i - target_j, averaged over the
        n (n - 1) ordered pairs of a photo's n matched rows, then over photos. -1 where all are
        parallel. Two rows with equal targets count as 0, and so does a photo with n < 2; neither
        gets a gradient.
    """
    query = F.normalize(query, dim=-1)  # N x K x D
    key = F.normalize(key.detach(), dim=-1)  # N x L x D
    target = match.to(key.dtype) @ key / match.sum(-1, keepdim=True).clamp(min=1)  # N x K x D
    # All pairs by their products: the N x K x K x D differences themselves would be gigabytes.
    lengths = _products(query, query).clamp(min=SHORT**2) * _products(target, target).clamp(
        min=SHORT**2
    )
    cosine = _products(query, target) * lengths.rsqrt()  # N x K x K
    matched = match.any(-1).to(cosine.dtype)  # N x K; a row's difference from itself is 0
    n = matched.sum(-1)
    return -(
        torch.einsum("nij,ni,nj->n", cosine, matched, matched) / (n * (n - 1)).clamp(min=1)
    ).mean()


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a_i - a_j) . (b_i - b_j) of N x K x D rows: N x K x K."""
    products = a @ b.mT
    own = products.diagonal(dim1=1, dim2=2)
    return own[:, :, None] + own[:, None] - products - products.mT
