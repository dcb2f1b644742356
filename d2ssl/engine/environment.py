"""By what a result was made: kept with it, for those who repeat it."""

import platform
from typing import Dict, List, Sequence

import detectron2
import torch

from d2ssl import __version__


def versions() -> Dict[str, str]:
    return {
        "d2ssl": __version__,
        "Detectron2": detectron2.__version__,
        "PyTorch": str(torch.__version__),  # its own class would not load with weights_only
        "Python": platform.python_version(),
    }


def in_words(versions: Dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def device_name(cfg) -> str:
    """The config's device as this machine has it, e.g. ``NVIDIA H100`` or ``CPU, 2 thread(s)``."""
    device = cfg.MODEL.DEVICE
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} thread(s)"
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return device


def made_by(results: Sequence[dict]) -> Dict[str, List]:
    """``versions`` and ``devices`` that results were made with, each once; a result may lack its
    ``versions`` or ``device``."""
    return {
        "versions": _distinct([r["versions"] for r in results if r.get("versions")]),
        "devices": _distinct([r["device"] for r in results if r.get("device")]),
    }


def _distinct(values: List) -> List:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def made_by_in_words(made: Dict[str, List]) -> str:
    return "; ".join([*map(in_words, made["versions"]), *made["devices"]])
