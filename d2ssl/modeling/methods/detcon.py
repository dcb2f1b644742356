"""DetCon (Henaff et al., ICCV 2021): SimCLR on regions."""

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.simclr import SimCLR
from d2ssl.modeling.units import Regions


@PRETEXT_REGISTRY.register()
class DetCon(SimCLR):
    """DetCon_S (sec. 3): the mean over a region against all regions of the batch.

    Each region of ``SSL.REGIONS`` that both views show counts once, where the paper draws 16 of
    them with replacement.
    """

    kind = Regions
    needs_others = False  # a photo's other regions are negatives, too
