"""Colorization (Zhang et al., ECCV 2016; Larsson et al., CVPR 2017): colours from lightness."""

import torch
from detectron2.config import configurable

from d2ssl.modeling.colour import lab_to_rgb, rgb_to_lab
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY
from d2ssl.modeling.methods.reconstruction import Reconstruction

AB_SCALE = 110.0  # the largest a or b of an sRGB colour is 108
TARGETS = {"ab": (2, (-1.0, 1.0)), "rgb": (3, (0.0, 1.0))}  # planes, and their range


@PRETEXT_REGISTRY.register()
class Colorization(Reconstruction):
    """A view in grey goes in; a and b of Lab come out, or the whole RGB picture.

    The grey has the view's own lightness L. A regression as in Zhang et al., eq. 1, with L1 for
    L2: their classes answer its greyish results, which a pretext task need not mind.

    Args:
        target: "ab", in units of 110, or "rgb", in units of 255.
        image_format: the config's colour order, "RGB" or "BGR".
    """

    captions = ("grey", "coloured")

    @configurable
    def __init__(self, *, target: str, image_format: str, **kwargs):
        super().__init__(**kwargs)
        self.target, self.image_format = target, image_format

    @classmethod
    def from_config(cls, cfg, trunk):
        target = cfg.SSL.COLORIZATION.TARGET
        return {
            **super().from_config(cfg, trunk),
            "decoder": cls.decoder_for(cfg, trunk, *TARGETS[target]),
            "target": target,
            "image_format": cfg.INPUT.FORMAT,
        }

    def pose(self, view):
        lab = rgb_to_lab(self._reordered(view.pixels))
        grey = lab_to_rgb(lab * lab.new_tensor([1, 0, 0]).view(3, 1, 1))  # in any colour order
        if self.target == "ab":
            target = lab[:, 1:] / AB_SCALE
        else:
            target = self._reordered(view.pixels) / 255
        return grey, target, torch.ones_like(lab[:, :1], dtype=torch.bool)

    def answer(self, view, prediction):
        if self.target == "rgb":
            return self._reordered(255 * prediction)
        lightness = rgb_to_lab(self._reordered(view.pixels))[:, :1]
        return self._reordered(lab_to_rgb(torch.cat([lightness, AB_SCALE * prediction], dim=1)))

    def _reordered(self, pixels: torch.Tensor) -> torch.Tensor:
        """From the config's colour order to R first, or back."""
        return pixels.flip(1) if self.image_format == "BGR" else pixels
