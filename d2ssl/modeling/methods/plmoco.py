"""PLMoCo and PLMoCo+: MoCo on cells of the feature maps."""

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.combined import Combined
from d2ssl.modeling.methods.moco import MoCo
from d2ssl.modeling.units import NearestCells


@PRETEXT_REGISTRY.register()
class PLMoCo(MoCo):
    """Patch-level MoCo: a cell finds the cell of the other view nearest to it in the photo.

    Positives by distance in the photo as in PixPro (Xie et al., CVPR 2021, sec. 3.1), the nearest
    one only; negatives are the photo's other places and the queue's cells of other photos.
    """

    kind = NearestCells
    needs_others = False  # a photo's own places are negatives, too


@PRETEXT_REGISTRY.register()
class PLMoCoPlus(Combined):
    """The mean of MoCo's and PLMoCo's losses."""

    members = (("MoCo", 0.5), ("PLMoCo", 0.5))
    needs_others = True  # half of it
