"""Inpainting (Pathak et al., "Context Encoders", CVPR 2016): fill in what was cut out."""

import torch
from detectron2.config import configurable

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.reconstruction import Reconstruction


@PRETEXT_REGISTRY.register()
class Inpainting(Reconstruction):
    """A view with holes of mean colour goes in; the pixels of the holes come out, as shares of 255.

    Random blocks of sec. 3.3 and the loss of sec. 3.2, eq. 1 in L1, without the adversarial part.
    Only holes count: over the whole picture the loss would mostly reward copying what is seen.
    """

    captions = ("cut out", "filled in")

    @configurable
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.needs = frozenset({"holes"})

    @classmethod
    def from_config(cls, cfg, trunk):
        decoder = cls.decoder_for(cfg, trunk, channels=3, value_range=(0.0, 1.0))
        return {**super().from_config(cfg, trunk), "decoder": decoder}

    def pose(self, view):
        mean = view.model.pixel_mean  # 0 once normalised
        return torch.where(view.holes, mean, view.pixels), view.pixels / 255, view.holes

    def answer(self, view, prediction):
        return torch.where(view.holes, 255 * prediction, view.pixels)
