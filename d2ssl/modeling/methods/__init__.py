"""Pretext methods; importing this package registers them."""

from typing import Type

from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod
from d2ssl.modeling.methods.byol import BYOL
from d2ssl.modeling.methods.colorization import Colorization
from d2ssl.modeling.methods.combined import Combined
from d2ssl.modeling.methods.densecl import DenseCL
from d2ssl.modeling.methods.detcon import DetCon
from d2ssl.modeling.methods.inpainting import Inpainting
from d2ssl.modeling.methods.moco import MoCo
from d2ssl.modeling.methods.p2vec import P2Vec
from d2ssl.modeling.methods.pixpro import PixPro
from d2ssl.modeling.methods.plmoco import PLMoCo, PLMoCoPlus
from d2ssl.modeling.methods.plsiam import PLSiam
from d2ssl.modeling.methods.prcl import PRCL
from d2ssl.modeling.methods.rlmoco import RLMoCo
from d2ssl.modeling.methods.simclr import SimCLR
from d2ssl.modeling.methods.simsiam import SimSiam
from d2ssl.modeling.methods.soco import SoCo, SoCoStar

__all__ = [
    "BYOL", "Colorization", "Combined", "DenseCL", "DetCon", "Inpainting", "MoCo", "P2Vec",
    "PLMoCo", "PLMoCoPlus", "PLSiam", "PRCL", "PRETEXT_REGISTRY", "PixPro", "PretextMethod",
    "RLMoCo", "SimCLR", "SimSiam", "SoCo", "SoCoStar", "build_method", "method_class",
]  # fmt: skip


def build_method(cfg, trunk) -> PretextMethod:
    """The method that a config names, see :func:`method_class`."""
    return method_class(cfg)(cfg, trunk)


def method_class(cfg) -> Type[PretextMethod]:
    """What ``SSL.METHOD`` names, or :class:`Combined` where ``SSL.METHODS`` names several.

    Raises:
        D2SSLError: a name that is not registered.
    """
    names = [name for name, _ in cfg.SSL.METHODS] or [cfg.SSL.METHOD]
    for name in names:
        if name not in PRETEXT_REGISTRY:
            known = ", ".join(sorted(name for name, _ in PRETEXT_REGISTRY))
            key = "SSL.METHODS" if cfg.SSL.METHODS else "SSL.METHOD"
            raise D2SSLError(f"{key} {name}: choose from {known}")
    return Combined if cfg.SSL.METHODS else PRETEXT_REGISTRY.get(cfg.SSL.METHOD)
