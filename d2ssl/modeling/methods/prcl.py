"""PRCL: relational pretraining on the differences of matched cells."""

from detectron2.config import configurable
from lightly.models.modules.heads import BYOLProjectionHead

from d2ssl.losses.relation import difference_alignment_loss
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.units import Cells


@PRETEXT_REGISTRY.register()
class PRCL(BYOL):
    """Two cells at one place of the photo differ by augmentation and context alone: over a photo,
    all such differences are to have one direction.

    Where PLSiam lets a predictor model the difference, here the difference itself is confined.
    """

    kind = Cells

    @configurable
    def __init__(self, *, hidden_dim, out_dim, **kwargs):
        PretextMethod.__init__(self, **kwargs)  # no predictor
        self.projector = BYOLProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.add_twin("projector")
        self.loss_range = (-2.0, 2.0)

    def predict(self, rows, view):
        return rows

    def contrast(self, query, key, same, different):
        return difference_alignment_loss(query, key, same)
