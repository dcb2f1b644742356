"""RLMoCo: MoCo on regions."""

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.moco import MoCo
from d2ssl.modeling.units import Regions


@PRETEXT_REGISTRY.register()
class RLMoCo(MoCo):
    """The mean over a region finds the mean over the same region in the other view.

    Regions are superpixels or k-means clusters of the photo (``SSL.REGIONS``); negatives are its
    other regions and the queue's regions of other photos.
    """

    kind = Regions
    needs_others = False  # a photo's other regions are negatives, too
