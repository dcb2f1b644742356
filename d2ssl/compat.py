"""What d2ssl does differently from one library version to another: no other file does.

Importing this module imports neither torch nor Detectron2, so a command can answer ``--help`` or
report a missing Detectron2 at once. Call :func:`require_detectron2` before anything that imports
Detectron2.

Detectron2 v0.6 installed by ``tools/install_detectron2.py`` needs none of the repairs below. They
are for builds that users compiled themselves: v0.6 as released, or the current main branch.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
import types

from d2ssl.errors import D2SSLError


def require_detectron2() -> None:
    """Make ``import detectron2`` work, also for an unpatched build beside newer libraries.

    Raises:
        D2SSLError: Detectron2 is not installed, or its compiled part does not fit the installed
            PyTorch.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # no origin: an empty folder of that name
        raise D2SSLError(
            "detectron2: not installed; run `python tools/install_detectron2.py`, "
            "or see README, section Install, for an official build"
        )
    _restore_pillow_name()
    _restore_numpy_aliases()
    _restore_pkg_resources()
    try:
        import detectron2.layers  # noqa: F401  (the first module that loads the compiled part)
    except ImportError as error:
        raise D2SSLError(
            f"detectron2: installed, but it cannot be imported ({error}); build it anew against "
            "the installed torch, or `pip uninstall detectron2` and then "
            "`python tools/install_detectron2.py`"
        ) from error


def available_cores() -> int:
    """CPU cores that this process may use: fewer than the machine has where a cluster gave few."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bf16(device: str) -> bool:
    """Whether a device ("cuda", "cpu", ...) computes in bf16, rather than imitating it."""
    import torch

    if device != "cuda":
        return True
    # torch.cuda.is_bf16_supported says yes to an imitation, and before torch 2.4 cannot be asked.
    is_amd = torch.version.hip is not None
    return is_amd or torch.cuda.get_device_capability()[0] >= 8


def has_compiled_ops() -> bool:
    """Whether Detectron2's own operators (deformable convolution, rotated boxes) are there.

    False for the stand-in of ``tools/install_detectron2.py`` and for a build without them.
    """
    spec = importlib.util.find_spec("detectron2._C")
    return spec is not None and not str(spec.origin).endswith(".py")


def one_pass_adamw() -> dict:
    """Argument of torch's AdamW that reads each weight once a step: on one CPU core 6 times as fast
    as without, 5 % of fine-tuning's iteration. Fused CPU code came with torch 2.4.

    It ignores strides: a weight and its state must be laid out alike.
    """
    import torch

    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return {"fused": True} if version >= (2, 4) else {"foreach": True}


def command_line_allowed():
    """A context in which ``torch.load`` takes parsed command-line options for plain values.

    SoCo, DINO and others save theirs beside the weights. Before torch 2.5 they are refused.
    """
    import torch

    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    return torch.serialization.safe_globals([argparse.Namespace])


def _restore_pillow_name() -> None:
    """v0.6 says ``Image.LINEAR``; Pillow 10 kept only its other name, ``Image.BILINEAR``."""
    from PIL import Image

    if not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.BILINEAR


def _restore_numpy_aliases() -> None:
    """v0.6 says ``np.int`` and the like for Python's own types; NumPy 1.24 removed these."""
    import numpy as np

    for builtin in (bool, int, float, str):
        if builtin.__name__ not in vars(np):  # NumPy 2 has a bool of its own: leave it
            setattr(np, builtin.__name__, builtin)


def _restore_pkg_resources() -> None:
    """v0.6 and main find their model zoo with pkg_resources, which setuptools 82 removed."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        return

    def resource_filename(package: str, resource: str) -> str:
        folder = os.path.dirname(importlib.util.find_spec(package).origin)
        return os.path.join(folder, resource)

    module = types.ModuleType("pkg_resources", "The one function that Detectron2 uses.")
    module.resource_filename = resource_filename
    sys.modules["pkg_resources"] = module


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes share this machine; v0.6 only does so in its GPU launcher."""
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    import torch.distributed as dist

    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
