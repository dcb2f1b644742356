"""What generative methods share: something is taken out of a view, and a decoder predicts it."""

from typing import List, Tuple

import torch

from d2ssl.losses.pixels import masked_l1_loss
from d2ssl.modeling.decoder import Decoder
from d2ssl.modeling.methods.base import PretextMethod, view_from_cfg
from d2ssl.modeling.units import Units


class Reconstruction(PretextMethod):
    """One view, spoilt; targets are the view itself, so that nothing can collapse.

    The view keeps the photo's own colours, since these are what is to be learnt. Among other
    methods the first of the shared views is taken, whose colours and cut-outs are then learnt.

    Args:
        decoder: predicts from the pyramid; its range gives that of the loss.
    """

    view_pairs = ()  # nothing is contrasted
    captions: Tuple[str, str]  # of what goes in, and of what comes out

    def __init__(self, *, decoder: Decoder, **kwargs):
        super().__init__(**kwargs)
        self.decoder = decoder
        low, high = decoder.value_range
        self.loss_range = (0.0, high - low)

    @classmethod
    def from_config(cls, cfg, trunk):
        return {"views": cls.draws(cfg), "units": Units()}

    @classmethod
    def draws(cls, cfg):
        spoilers = ("blur_p", "jitter_p", "gray", "solarize_p", "plane_shift", "cutout_p")
        off = dict.fromkeys(spoilers, 0.0)
        return [view_from_cfg(cfg, cfg.SSL.INPUT.VIEW_SIZE, crop=True, **off)]

    @staticmethod
    def decoder_for(cfg, trunk, channels: int, value_range: Tuple[float, float]) -> Decoder:
        """On all levels of the trunk's FPN but P6, which is P5 subsampled."""
        levels = {k: v for k, v in trunk.backbone.output_shape().items() if k != "p6"}
        return Decoder(levels, channels, cfg.SSL.DECODER.CONV_DIM, value_range)

    def pose(self, view) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the trunk is given, N x 3 x S x S in 0..255 and the config's colour order; what
        the decoder is to predict of it; and where that counts, N x 1 x S x S bool."""
        raise NotImplementedError

    def answer(self, view, prediction: torch.Tensor) -> torch.Tensor:
        """The picture that a prediction makes, N x 3 x S x S in 0..255, colour order as above."""
        raise NotImplementedError

    def encodings(self, views):
        return [views[0].encode(self.pose(views[0])[0])]

    def forward(self, views):
        view = views[0]
        given, target, counts = self.pose(view)
        prediction = self.decoder(view.encode(given).pyramid)
        return {"loss_pixels": masked_l1_loss(prediction, target, counts)}

    @torch.no_grad()
    def pictures(self, views) -> List[Tuple[str, torch.Tensor]]:
        view = views[0]
        given, _, _ = self.pose(view)
        made = self.answer(view, self.decoder(view.encode(given).pyramid))
        shown = [x.round().clamp(0, 255).byte() for x in (given, made)]
        return [*zip(self.captions, shown), ("original", view.pixels)]
