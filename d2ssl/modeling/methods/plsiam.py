"""PLSiam: SimSiam on cells of the feature maps."""

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.simsiam import SimSiam
from d2ssl.modeling.units import NearestCells


@PRETEXT_REGISTRY.register()
class PLSiam(SimSiam):
    """PLMoCo's pairs without negatives: a cell and the cell of the other view nearest to it in the
    photo predict each other.

    Pairs by distance as in PixPro (Xie et al., CVPR 2021, eq. 1), no twin as in SimSiam (Chen and
    He, CVPR 2021).
    """

    kind = NearestCells
