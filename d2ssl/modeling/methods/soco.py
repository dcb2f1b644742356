"""SoCo: Selective Object COntrastive learning (Wei et al., NeurIPS 2021)."""

from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, view_from_cfg
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.units import Boxes


@PRETEXT_REGISTRY.register()
class SoCo(BYOL):
    """The same object in two views gets the same box feature (BYOL on boxes, no negatives).

    Sec. 3: a whole-photo view V1, a cropped V2 and a small cropped V3; K proposals that both
    views of a pair (V1, V2), (V1, V3) show. Each box is pooled from the pyramid level that the
    detector's own pooler gives it, so an object is matched across levels as its size differs
    between views; bottom-up, FPN and box head all learn.
    """

    kind = Boxes
    view_pairs = ((0, 1), (0, 2))

    @classmethod
    def draws(cls, cfg):
        size, small = cfg.SSL.INPUT.VIEW_SIZE, cfg.SSL.INPUT.SMALL_VIEW_SIZE
        return [
            view_from_cfg(cfg, size, crop=False, blur_p=1.0),
            view_from_cfg(cfg, size, crop=True, blur_p=0.1),
            view_from_cfg(cfg, small, crop=True, blur_p=0.1),
        ]


@PRETEXT_REGISTRY.register()
class SoCoStar(SoCo):
    """SoCo with a fourth view: V2's own crop at the size of a small view (sec. 4.3 and the
    authors' released schedule), no cut-outs, and a V3 nearly as large as V1."""

    view_pairs = ((0, 1), (0, 2), (0, 3))

    @classmethod
    def draws(cls, cfg):
        size, small = cfg.SSL.INPUT.VIEW_SIZE, cfg.SSL.INPUT.SMALL_VIEW_SIZE
        plain = {"cutout_p": 0.0}
        return [
            view_from_cfg(cfg, size, crop=False, blur_p=1.0),
            view_from_cfg(cfg, size, crop=True, blur_p=0.1, **plain),
            view_from_cfg(cfg, max(32, size - 32), crop=True, blur_p=0.1, **plain),
            view_from_cfg(cfg, small, crop=True, blur_p=0.1, of=1, **plain),
        ]
