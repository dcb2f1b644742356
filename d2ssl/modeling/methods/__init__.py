"""Pretext methods; importing this package registers them as Detectron2 meta-architectures."""

from d2ssl.modeling.methods.soco import SoCo

__all__ = ["SoCo"]
