"""DenseCL (Wang et al., CVPR 2021): MoCo on cells that are matched by their features."""

import torch
from torch.nn import functional as F

from d2ssl.losses.contrastive import cosines
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.combined import Combined
from d2ssl.modeling.methods.moco import MoCo
from d2ssl.modeling.units import Cells


@PRETEXT_REGISTRY.register()
class DenseMoCo(MoCo):
    """The dense half: a cell's positive is the other view's cell whose feature is most alike.

    Sec. 3.3, eq. 4: by the trunk's features before the head, not by geometry. Negatives are the
    mean keys of other photos only (sec. 3.2), so a photo sends one key a level to the queue.
    """

    kind = Cells

    @classmethod
    def keys_of_a_photo(cls, cfg):
        return len(cfg.SSL.LEVELS)

    @torch.no_grad()
    def compare(self, a, b):
        level = self.units.lattice(a).level  # R
        likeness = cosines(self.units.rows(a.online, a), self.units.rows(b.momentum, b))
        likeness = likeness.masked_fill(level[:, None] != level, -torch.inf)  # N x R x R
        best = F.one_hot(likeness.argmax(2), likeness.shape[2]).bool()
        return best, torch.zeros_like(best)

    def enqueued(self, key, view):
        level, count = self.units.lattice(view).level, len(self.units.levels)
        member = F.one_hot(level, count).to(key.dtype)  # R x levels
        means = torch.einsum("rl,nrd->nld", member, key)  # up to their length
        return means, torch.ones(means.shape[:2], dtype=torch.bool, device=key.device)


@PRETEXT_REGISTRY.register()
class DenseCL(Combined):
    """MoCo on whole photos and on cells, half each (eq. 5 with lambda 0.5)."""

    members = (("MoCo", 0.5), ("DenseMoCo", 0.5))
    needs_others = True
