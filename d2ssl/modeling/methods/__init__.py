"""Pretext methods; importing this package registers them as Detectron2 meta-architectures."""

from detectron2.modeling import META_ARCH_REGISTRY

from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods.base import PretextMethod
from d2ssl.modeling.methods.soco import SoCo

__all__ = ["PretextMethod", "SoCo", "find_method"]


def find_method(name: str) -> type:
    """The pretext method registered under a name; raises :class:`D2SSLError` if there is none."""
    methods = {n: c for n, c in META_ARCH_REGISTRY if issubclass(c, PretextMethod)}
    if name not in methods:
        raise D2SSLError(f"SSL.METHOD {name}: choose from {', '.join(sorted(methods))}")
    return methods[name]
