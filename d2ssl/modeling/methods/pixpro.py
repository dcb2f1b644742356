"""PixPro (Xie et al., CVPR 2021): pixel-to-propagation consistency."""

import torch
from detectron2.config import configurable
from lightly.models.modules.heads import BYOLProjectionHead
from torch import nn
from torch.nn import functional as F

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod, apply_head
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.units import Cells


@PRETEXT_REGISTRY.register()
class PixPro(BYOL):
    """A cell, smoothed over the cells of its view that look like it, predicts the other view's
    cells at its place.

    Sec. 3.2, eq. 2-4, with a sharpness of 2 and a transform of one layer; positives by distance in
    the photo (eq. 1). The smoothing stands where BYOL has its predictor.
    """

    kind = Cells

    @configurable
    def __init__(self, *, hidden_dim, out_dim, **kwargs):
        PretextMethod.__init__(self, **kwargs)  # BYOL's predictor is not wanted
        self.projector = BYOLProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.transform = nn.Linear(out_dim, out_dim)
        self.add_twin("projector")
        self.loss_range = (-4.0, 4.0)

    def predict(self, rows, view):
        level = self.units.lattice(view).level
        with torch.autocast(rows.device.type, enabled=False):  # similarities need fp32
            unit = F.normalize(rows.float(), dim=-1)
            likeness = (unit @ unit.mT).clamp(min=0) ** 2  # N x R x R
            likeness = likeness * (level[:, None] == level)  # within a level
            return likeness @ F.normalize(apply_head(self.transform, rows.float()), dim=-1)
