"""PRCL: relational pretraining on the differences of matched cells."""

from detectron2.config import configurable
from lightly.models.modules.heads import BYOLProjectionHead

from d2ssl.losses.relation import difference_alignment_loss
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.units import Cells


@PRETEXT_REGISTRY.register()
class PRCL(BYOL):
    """The difference of two cells is to point where the difference of the same two places points
    in the other view's momentum encoding.

    Where PLSiam compares places one by one, here only their relations count: what the whole view
    shares, such as its colours, may shift all rows alike.
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
