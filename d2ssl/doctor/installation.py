"""Would training work here? Checks that need nothing but Python to start with.

Each check is a function without arguments that returns findings. It imports what it looks at
itself, since any of these imports may be what is broken.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import replace
from typing import Callable, List

from d2ssl import compat
from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, one_thread
from d2ssl.errors import D2SSLError

MIN_PYTHON = (3, 10)
# Module and distribution. lightly is not imported as a whole: that takes seconds.
PACKAGES = (
    ("numpy", "numpy"),
    ("PIL", "Pillow"),
    ("fvcore", "fvcore"),
    ("lightly.utils.lars", "lightly"),
    ("pycocotools._mask", "pycocotools"),
    ("scipy", "scipy"),
    ("skimage", "scikit-image"),
    ("shapely", "shapely"),
    ("imagehash", "ImageHash"),
    ("ijson", "ijson"),
    ("submitit", "submitit"),
    ("matplotlib", "matplotlib"),
    ("tensorboard", "tensorboard"),
    ("tqdm", "tqdm"),
    ("tabulate", "tabulate"),
)
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)  # fmt: skip


def check_installation() -> List[Finding]:
    """All checks, in the order in which a fix of one may repair the next."""
    findings: List[Finding] = []
    follows = "first repair what is reported above: this may follow from it"
    for name, check in (
        ("Python", check_python),
        ("torch", check_torch),
        ("torchvision", check_torchvision),
        ("packages", check_packages),
        ("cv2", check_opencv),
        ("detectron2", check_detectron2),
        ("Mask R-CNN", check_detector),
        ("device", check_device),
    ):
        broken = any(f.status == FAIL and f.name in ("torch", "torchvision") for f in findings)
        if broken and name in ("torchvision", "Mask R-CNN", "device"):
            continue
        findings += [
            replace(f, fix=follows)
            if broken and f.status == FAIL and f.detail != "not installed"
            else f
            for f in _guarded(name, check)
        ]
    return findings


def _guarded(name: str, check: Callable[[], List[Finding]]) -> List[Finding]:
    """A broken library may raise anything, while it is imported or later."""
    try:
        return check()
    except Exception as error:
        fix = "please report this with the lines above, unless one of them explains it"
        return [Finding(FAIL, name, _one_line(error), fix)]


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def tested_range(distribution: str) -> str:
    """The versions that d2ssl's own metadata allow, e.g. ``<2.13,>=2.3``; "" where unknown."""
    try:
        requirements = importlib.metadata.requires("d2ssl") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout, not installed
        return ""
    for text in requirements:
        requirement = text.split(";")[0].strip()
        name = re.match(r"[\w.-]*\w", requirement).group()
        if name.lower() == distribution.lower():
            return requirement[len(name) :].strip(" ()")
    return ""


def _package(distribution: str, version: str, detail: str = "") -> Finding:
    """OK, or WARN where the version is outside of what was tested."""
    allowed = tested_range(distribution)
    detail = f"{version}{detail}"
    if allowed:
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(allowed).contains(version.split("+")[0], prereleases=True):
            return Finding(
                WARN, distribution, f"{detail}; tested are {allowed}",
                f'pip install "{distribution}{allowed}"',
            )  # fmt: skip
    return Finding(OK, distribution, detail)


def check_python() -> List[Finding]:
    version = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        return [Finding(FAIL, "Python", version, f"use Python {wanted} or newer")]
    return [Finding(OK, "Python", version)]


def check_torch() -> List[Finding]:
    try:
        import torch
    except Exception as error:
        return [Finding(FAIL, "torch", f"cannot be imported: {_one_line(error)}",
                        "see https://pytorch.org/get-started")]  # fmt: skip
    return [_package("torch", str(torch.__version__))]


def torchvision_for(torch_version: str) -> str:
    """The torchvision series made for a torch 2.x version: ``2.12.1+cpu`` -> ``0.27``."""
    major, minor = torch_version.split(".")[:2]
    return f"0.{int(minor) + 15}" if major == "2" else ""


def check_torchvision() -> List[Finding]:
    """RoIAlign and NMS come from torchvision's compiled part, which must fit torch exactly."""
    import torch

    wanted = torchvision_for(str(torch.__version__))
    pip = f'pip install "torchvision=={wanted}.*"'
    fix = f"torch {torch.__version__} needs torchvision {wanted}: {pip}"
    try:
        import torchvision

        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
            scores = torch.tensor([0.9, 0.8, 0.7])
            kept = torchvision.ops.nms(boxes.to(device), scores.to(device), 0.5).tolist()
            if kept != [0, 2]:
                return [Finding(FAIL, "torchvision", f"NMS on {device} is wrong: {kept}", fix)]
    except Exception as error:
        detail = f"{_version('torchvision')} beside torch {torch.__version__}: {_one_line(error)}"
        fix += ", from the same index (CPU or CUDA) as torch"
        return [Finding(FAIL, "torchvision", detail, fix)]
    version = str(torchvision.__version__)
    if wanted and not version.startswith(f"{wanted}."):
        return [Finding(WARN, "torchvision", f"{version}; its operators work all the same", fix)]
    return [_package("torchvision", version, ", its compiled operators work")]


def check_packages() -> List[Finding]:
    findings = []
    for module, distribution in PACKAGES:
        try:
            importlib.import_module(module)
        except Exception as error:
            there = importlib.util.find_spec(module.split(".")[0]) is not None
            fix = f"pip install {'--force-reinstall ' * there}{distribution}"
            detail = f"cannot be imported: {_one_line(error)}"
            findings.append(Finding(FAIL, distribution, detail, fix))
        else:
            findings.append(_package(distribution, _version(distribution)))
    return findings


def check_opencv() -> List[Finding]:
    """cv2 imports, and one distribution owns it: a second overwrites the files of the first."""
    installed = [name for name in OPENCV if _version(name) != "(version unknown)"]
    one = "pip install opencv-python-headless"
    again = f"pip uninstall -y {' '.join(installed)}, then {one}" if installed else one
    try:
        cv2 = importlib.import_module("cv2")
    except Exception as error:
        # The packages that are not headless want libGL, which servers do not have.
        return [Finding(FAIL, "cv2", f"cannot be imported: {_one_line(error)}", again)]
    if len(installed) > 1:
        detail = f"{cv2.__version__}, installed twice: {' and '.join(installed)} own the same files"
        return [Finding(WARN, "cv2", detail, again)]
    return [Finding(OK, "cv2", f"{cv2.__version__} ({' '.join(installed) or 'not from pip'})")]


def check_detectron2() -> List[Finding]:
    try:
        compat.require_detectron2()
    except D2SSLError as error:
        detail, _, fix = str(error).removeprefix("detectron2: ").partition("; ")
        return [Finding(FAIL, "detectron2", detail, fix)]
    import detectron2

    where = os.path.dirname(detectron2.__file__)
    build = "with compiled operators"
    if not compat.has_compiled_ops():
        build = "without compiled operators, which Mask R-CNN does not need"
    origin = "official or built by you"
    try:
        installed = importlib.metadata.distribution("detectron2")
        ours = "patched by d2ssl" in (installed.metadata["Summary"] or "")
        if ours and os.path.samefile(installed.locate_file("detectron2"), where):
            origin = "patched by tools/install_detectron2.py"
    except (importlib.metadata.PackageNotFoundError, OSError):
        pass  # a source tree on the path
    return [Finding(OK, "detectron2", f"{detectron2.__version__} in {where}"),
            Finding(NOTE, "", f"{origin}; {build}")]  # fmt: skip


def check_detector() -> List[Finding]:
    """One training step and one prediction of a tiny Mask R-CNN on the CPU."""
    try:
        compat.require_detectron2()
    except D2SSLError:
        return []  # reported by check_detectron2
    import torch
    from detectron2.utils.events import EventStorage

    with one_thread(), torch.random.fork_rng(devices=[]), EventStorage():
        torch.manual_seed(0)
        model, photo = _tiny_detector(), _tiny_photo()
        losses = model.train()([photo])
        sum(losses.values()).backward()
        with torch.no_grad():
            model.eval()([photo])
    wrong = [name for name, loss in losses.items() if not torch.isfinite(loss)]
    if wrong:
        return [Finding(FAIL, "Mask R-CNN", f"not finite: {', '.join(wrong)}",
                        "please report this with the lines above")]  # fmt: skip
    return [Finding(OK, "Mask R-CNN", "a tiny one builds, learns and predicts on the CPU")]


def _tiny_detector():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    stages, levels = ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5"]
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True, "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.OUT_FEATURES", stages,
        "MODEL.FPN.IN_FEATURES", stages, "MODEL.FPN.OUT_CHANNELS", 16,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES", levels + ["p6"],
        "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 1,
        "MODEL.ROI_HEADS.IN_FEATURES", levels,
        "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14,
    ])  # fmt: skip
    return build_model(cfg)


def _tiny_photo():
    """A detector's input: 64 x 64, one object with box, class and polygon."""
    import torch
    from detectron2.structures import Boxes, Instances, PolygonMasks

    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 48, 56]]))
    instances.gt_classes = torch.tensor([0])
    instances.gt_masks = PolygonMasks([[[8.0, 8, 48, 8, 48, 56, 8, 56]]])
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": 64, "width": 64}


def check_device() -> List[Finding]:
    """Where training would run, and whether bf16 is fast there."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        torch.ones(8, device="cuda").sum().item()  # fails where torch has no code for this GPU
        bf16 = compat.has_bf16("cuda")
        findings = [Finding(OK, "GPU", f"{', '.join(names)}; CUDA {torch.version.cuda}")]
    else:
        bf16 = bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})
        findings = [Finding(NOTE, "GPU", "none that torch can use: training runs on the CPU")]
    cpu = f"{os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"
    findings.append(Finding(NOTE, "CPU", cpu))
    if bf16:
        return findings + [Finding(OK, "bf16", "in hardware")]
    return findings + [
        Finding(WARN, "bf16", "no sign that this device has it in hardware; it may be slow",
                "set SSL.PRECISION fp32 and SOLVER.AMP.ENABLED False if fp32 proves faster")
    ]  # fmt: skip


def _cpu_flags() -> set:
    """What Linux says that the processor can do; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()
