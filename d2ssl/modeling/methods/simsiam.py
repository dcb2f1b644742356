"""SimSiam (Chen and He, CVPR 2021): predict the other view's projection, without a twin."""

from detectron2.config import configurable
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead

from d2ssl.losses.cosine import matched_cosine_loss
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod
from d2ssl.modeling.methods.byol import BYOL


@PRETEXT_REGISTRY.register()
class SimSiam(BYOL):
    """BYOL whose targets are its own projections with the gradient stopped (algorithm 1).

    The loss is scaled as in the paper: with both directions it lies in [-1, 1].
    """

    uses_twin = False

    @configurable
    def __init__(self, *, hidden_dim, out_dim, **kwargs):
        PretextMethod.__init__(self, **kwargs)  # BYOL's heads are not wanted
        self.projector = SimSiamProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.predictor = SimSiamPredictionHead(out_dim, max(1, out_dim // 4), out_dim)
        self.loss_range = (-1.0, 1.0)

    @classmethod
    def draws(cls, cfg):
        return super(BYOL, cls).draws(cfg)  # both drawn alike

    def keys(self, views, rows):
        return rows

    def contrast(self, query, key, same, different):
        return matched_cosine_loss(query, key, same) / 4
