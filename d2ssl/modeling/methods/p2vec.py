"""P2Vec: Word2Vec (Mikolov et al., 2013) with the cells of a feature map for words."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from d2ssl.losses.contrastive import cosines, info_nce_bound, info_nce_loss
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, apply_head
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.units import Cells


class Surroundings(Cells):
    """Cells, and what lies around each."""

    def context(self, encoding):
        """Mean over the up to eight neighbours of each cell, itself left out: N x R x C."""
        maps = []
        for cells in self.maps(encoding):  # N x C x H x W
            around = cells.new_ones(cells.shape[1], 1, 3, 3)
            around[:, :, 1, 1] = 0
            total = F.conv2d(cells, around, padding=1, groups=len(around))
            count = F.conv2d(torch.ones_like(cells[:1, :1]), around[:1], padding=1)
            maps.append(total / count.clamp(min=1))
        return self.as_rows(maps)


@PRETEXT_REGISTRY.register()
class P2Vec(BYOL):
    """The most probable word, given its context: a cell of the other view's momentum encoding,
    given what the FPN says about the cells around its place in this one.

    As in CBOW, the context is a mean over neighbours without the word itself, and the probability
    a softmax over the vocabulary: all cells of the photo's other view. Words of other photos are
    not in it, so that no photo has to differ from another.
    """

    kind = Surroundings

    @configurable
    def __init__(self, *, temperature: float, num_rows: int, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.loss_range = (0.0, 2 * info_nce_bound(num_rows, temperature))

    @classmethod
    def from_config(cls, cfg, trunk):
        return {
            **super().from_config(cfg, trunk),
            "temperature": cfg.SSL.TEMPERATURE,
            "num_rows": cls.kind.count(cfg),
        }

    def online_rows(self, view):
        return apply_head(self.projector, self.units.context(view.online))

    def contrast(self, query, key, same, different):
        return info_nce_loss(cosines(query, key), same, different, self.temperature)
