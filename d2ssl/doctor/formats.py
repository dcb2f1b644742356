"""Files without a fingerprint: what they say that they want, or hints at it."""

import re
from typing import Dict, List, Tuple

import numpy as np

from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, show
from d2ssl.engine.weights_file import (
    TORCHVISION,
    conventions_in,
    differing_keys,
    get,
    other_conventions,
    quoted,
    structure_of,
    tensors_of,
)

_CAFFE = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
}
_RESNEXT = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}

_SAME = Finding(OK, "config", "says the same")


def usual_conventions(content: Dict) -> Tuple[str, Dict]:
    """(why one may think so, config keys) of a file's likely conventions; ("", {}) if unknown."""
    tensors = tensors_of(content)
    author = str(content.get("__author__", ""))
    grouped = structure_of(tensors).get("MODEL.RESNETS.NUM_GROUPS", 1) > 1
    caffe_names = any(re.match(r"res2_0_branch2a_w|res_conv1_bn", n) for n in tensors)
    if any(n.startswith("module.encoder_q.") for n in tensors):
        return 'names like "module.encoder_q." are those of MoCo and its kin', TORCHVISION
    if any(re.search(r"(^|\.)layer1\.0\.conv1\.", n) for n in tensors):
        return 'names like "layer1.0.conv1" are those of torchvision', TORCHVISION
    if re.search(r"torchvision|moco|densecl|pixpro|soco", author, re.IGNORECASE):
        return f'the author field says "{author}"', TORCHVISION
    if caffe_names or re.search(r"MSRA|Detectron2 Model Zoo|Caffe2", author):
        why = "Caffe2 names" if caffe_names else f'the author field says "{author}"'
        if grouped:
            return f"{why}; it is a ResNeXt", _RESNEXT
        return why, _CAFFE
    return "", {}


def describe_format(content: Dict, cfg) -> List[Finding]:
    """What a file without fingerprint wants, and where the config says otherwise."""
    tensors = tensors_of(content)
    findings = []
    found = next((n for n in tensors if re.search(r"(^|\.)(layer1|4)\.0\.conv1\.weight$", n)), "")
    if found:
        detail = f"Detectron2 does not know names like {found}"
        fix = "convert the file with tools/convert_weights.py"
        findings.append(Finding(FAIL, "names", detail, fix))
    said = conventions_in(content)
    findings += _compare_with_said(said, cfg) if said else _compare_with_usual(content, cfg)
    return findings + _describe_norms(tensors, cfg)


def _compare_with_said(said: Dict, cfg) -> List[Finding]:
    """What d2ssl wrote into the file of a detector that it trained."""
    findings = [
        Finding(NOTE, "made with", _listed({k: v for k, v in said.items() if k in TORCHVISION}))
    ]
    for key, value in other_conventions(cfg, said).items():
        detail = f"is {show(get(cfg, key))}, the weights were made with {show(value)}"
        findings.append(Finding(FAIL, key, detail, f"set {key} {quoted(value)}"))
    return findings if len(findings) > 1 else [*findings, _SAME]


def _compare_with_usual(content: Dict, cfg) -> List[Finding]:
    """Hints at what a file wants that does not say so."""
    why, wanted = usual_conventions(content)
    if not why:
        detail = "nothing in the file says which colour order, mean, std and stride it wants"
        fix = "use those of the config that it was trained with"
        return [Finding(WARN, "conventions", detail, fix)]
    findings = [Finding(NOTE, "likely", f"{_listed(wanted)} ({why})")]
    for key, value in differing_keys(cfg, wanted).items():
        if key == "MODEL.PIXEL_MEAN" and np.allclose(get(cfg, key), value, atol=1.0):
            continue
        detail = f"is {show(get(cfg, key))}; such files usually want {show(value)}"
        fix = f"set {key} {quoted(value)}, unless you know better"
        findings.append(Finding(WARN, key, detail, fix))
    return findings if len(findings) > 1 else [*findings, _SAME]


def _listed(values: Dict) -> str:
    return "; ".join(f"{key} {show(value)}" for key, value in values.items())


def _describe_norms(tensors: Dict, cfg) -> List[Finding]:
    """What the statistics in a file say: folded away, random, or real."""
    norms = [n for n in tensors if re.search(r"(norm|bn)\d?[._](weight|s)$", n)]
    means = [t for n, t in tensors.items() if n.endswith("running_mean")]
    variances = [t for n, t in tensors.items() if n.endswith("running_var")]
    norm = cfg.MODEL.RESNETS.NORM
    if norms and not means:
        detail = "no running statistics in the file: they are folded into scale and bias"
        if norm == "FrozenBN":
            return [Finding(NOTE, "norms", f"{detail}; right for FrozenBN, wrong for training BN")]
        fix = "set MODEL.RESNETS.NORM FrozenBN"
        return [Finding(WARN, "norms", f"{detail}, but MODEL.RESNETS.NORM is {show(norm)}", fix)]
    if means and all((m == 0).all() for m in means) and all(
        ((v - 1).abs() < 1e-4).all() for v in variances
    ):  # fmt: skip
        detail = "all statistics are mean 0 and variance 1: they were never measured"
        fix = "SSL.FINETUNE.CALIBRATE_NORMS always measures them on your photos"
        return [Finding(WARN, "norms", detail, fix)]
    return []
