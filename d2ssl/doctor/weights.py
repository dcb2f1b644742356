"""What a file of weights loads into a detector, and whether that computes what it should.

Names and shapes that fit prove little: colour order, mean, std, stride and norms are in no tensor.
A hand-off of d2ssl carries a fingerprint of what its network computes, and the conventions that it
was taken under, so for it the question has an answer. For other files there are only hints.
"""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from d2ssl.config import load_cfg
from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, one_thread
from d2ssl.engine.checkpoint import Checkpointer, MatchReport
from d2ssl.engine.weights_file import (
    TORCHVISION,
    differing_keys,
    get,
    quoted,
    read,
    structure_of,
    tensors_of,
)
from d2ssl.errors import D2SSLError
from d2ssl.modeling.fingerprint import fingerprint, relative_difference
from d2ssl.modeling.norm import refuse_uncalibrated
from d2ssl.modeling.trunk import FINETUNE_PARTS, part_of

# Where networks agree: rounding of one device against another's (TF32: 0.0008) stays below, and
# the mildest mistake above (a mean off by 0.4 of 255: 0.003). Measured on a ResNet-50.
TOLERANCE = 2e-3


@one_thread()
def check_weights(path: str, config_file: str = "", opts=()) -> List[Tuple[str, List[Finding]]]:
    """All that can be said about a file of weights, as (heading, findings).

    Args:
        path: a file that Detectron2 loads, or one that still has to be converted for it.
        config_file: of the detector that shall use the weights, with or without an SSL node;
            default: the ``stock.yaml`` beside the weights.
        opts: ``KEY VALUE`` overrides.
    Raises:
        D2SSLError: no such file, not a checkpoint, no config, or a config that is not one.
    """
    content = read(path)
    config_file = config_file or default_config(path)
    cfg = load_cfg(config_file, [*opts, "SSL.ENABLED", "False"])
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    record = content.get("d2ssl")
    probe = record["probe"] if _has_fingerprint(record) else None
    attempt = Attempt.make(cfg, path, probe)
    sections = [("Where the weights come from", describe_origin(content))]
    sections.append((f"What Detectron2 loads with {config_file}", describe_match(attempt)))
    if probe is None:
        sections.append(("What is known about such files", describe_format(content, cfg)))
    else:
        findings = compare_function(cfg, path, content, attempt)
        sections.append(("What the network computes, against the fingerprint", findings))
    return sections


# ---- the file


def default_config(path: str) -> str:
    """``stock.yaml`` beside the weights, as a hand-off writes it."""
    beside = os.path.join(os.path.dirname(path), "stock.yaml")
    if not os.path.isfile(beside):
        raise D2SSLError(f"{path}: there is no stock.yaml beside it; name one with --config-file")
    return beside


def _has_fingerprint(record) -> bool:
    return isinstance(record, dict) and {"fingerprint", "probe"} <= set(record)


def describe_origin(content: Dict) -> List[Finding]:
    """How a hand-off came about; or that the file does not say."""
    record = content.get("d2ssl")
    if not isinstance(record, dict):
        author = content.get("__author__")
        note = f', its author field says "{author}"' if author else ""
        return [Finding(NOTE, "origin", f"not a hand-off of d2ssl{note}")]

    def get(key):
        value = record.get(key, "(not recorded)")
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    versions = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
    if "donor" in record:
        donor = record["donor"]
        facts = {
            "method": f"{get('method')}, {donor['names']}'s names under {quoted(donor['prefix'])}",
            "donor wants": "; ".join(f"{k} {_show(v)}" for k, v in donor["wants"].items()),
            "function": get("checked"),
            "laid under": record["onto"] or "no detector's weights",
            "versions": versions,
        }
        return [Finding(NOTE, name, detail) for name, detail in facts.items()]
    facts = {
        "method": f"{get('method')}, {get('iterations')} iterations of "
        f"{get('photos_per_iteration')} photos, seed {get('seed')}",
        "photos": f"{get('num_photos')} of {get('datasets')}",
        "trained": f"{get('trained')}; started from "
        + get("initial_weights").replace("random", "random weights"),
        "versions": versions or "(not recorded)",
    }
    return [Finding(NOTE, name, detail) for name, detail in facts.items()]


# ---- the network that a config describes, with the file loaded


class _StockCheckpointer(Checkpointer):
    """Loads as stock Detectron2 does, without moving a convolution's bias into a norm."""

    def _load_model(self, checkpoint):
        self._incompatible = DetectionCheckpointer._load_model(self, checkpoint)
        return self._incompatible


@dataclass
class Attempt:
    """A detector built from a config with the weights loaded: what fitted, what it computes."""

    report: Optional[MatchReport] = None
    values: Dict[str, torch.Tensor] = field(default_factory=dict)
    failure: str = ""  # why the detector cannot be built or run, or the file not loaded
    failed_at: str = ""  # "build", "load" or "run"
    uncalibrated: str = ""  # the first norm that normalises nothing

    @classmethod
    def make(cls, cfg, path: str, probe: Optional[torch.Tensor]) -> "Attempt":
        attempt = cls(failed_at="build")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # what is not in the file should not differ between attempts
                model = build_model(cfg).eval()
            attempt.failed_at = "load"
            attempt.report = _StockCheckpointer(model).load_report(path)
            attempt.failed_at = "run"
            if probe is not None:
                attempt.values = _fingerprint(model, cfg, probe)
        except Exception as error:  # a config can make any part of Detectron2 fail
            lines = str(error).strip().splitlines() or [type(error).__name__]
            attempt.failure = re.sub(rf"^MODEL.WEIGHTS {re.escape(path)}[^:]*: ", "", lines[0])
            return attempt
        attempt.failed_at = ""
        try:
            refuse_uncalibrated(model)
        except D2SSLError as error:
            attempt.uncalibrated = str(error).partition(":")[0]
        return attempt


class _NoBoxHead(nn.Module):
    """Takes the place of a box head that a fingerprint cannot be compared with."""

    def box_pooler(self, features, boxes):
        return features[0]

    def box_head(self, pooled):
        return pooled


def _fingerprint(model: nn.Module, cfg, probe: torch.Tensor) -> Dict[str, torch.Tensor]:
    """As in the hand-off; without the box head where the detector has none or several."""
    if not hasattr(model.backbone, "bottom_up"):
        raise D2SSLError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has no feature pyramid; the weights "
            "are for build_resnet_fpn_backbone"
        )
    heads = getattr(model, "roi_heads", None)
    if isinstance(getattr(heads, "box_head", None), nn.Module) and not isinstance(
        heads.box_head,
        nn.ModuleList,  # a cascade's
    ):
        return fingerprint(model.backbone, heads, cfg, probe)
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [n for n in model.backbone.output_shape() if n[0] == "p"]
    values = fingerprint(model.backbone, _NoBoxHead(), cfg, probe)
    return {name: value for name, value in values.items() if name != "box_head"}


# ---- what loads


def module_of(name: str) -> str:
    """Where a tensor of the detector belongs, finer than :func:`part_of`: predictors apart."""
    if name.startswith("roi_heads.box_predictor."):
        return "box predictor"
    if name.startswith("roi_heads.mask_head.predictor."):
        return "mask predictor"
    return part_of(name).lower().replace("_", " ")


def _some(names: List[str]) -> str:
    names = [name.removeprefix("backbone.bottom_up.") for name in names]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# Tensors that a ResNet-FPN's function depends on; "stem.fc" is an ImageNet classifier.
_NETWORK = re.compile(r"\b(stem\.conv1|res[2-5]|fpn_\w+|box_head)\.")
_STATISTICS = (".running_mean", ".running_var")
_COUNTER = "num_batches_tracked"  # of steps; enters no computation
_FAILURE_FIX = {
    "build": "change the key of the config that asks for this",
    "load": "see below what kind of file this is",
    "run": "change the key of the config that asks for this",
}


def describe_match(attempt: Attempt) -> List[Finding]:
    """By module: what is loaded, missing, or skipped for its shape; and what is left over."""
    report = attempt.report
    if report is None:
        return [Finding(FAIL, "nothing", attempt.failure, _FAILURE_FIX[attempt.failed_at])]
    if not report.loaded:
        detail = f"not one of the file's {len(report.unused)} tensors: {_some(report.unused)}"
        return [Finding(FAIL, "nothing", detail, _FAILURE_FIX["load"])]
    modules: Dict[str, Dict[str, List[str]]] = {}
    for kind in ("loaded", "missing", "mismatched"):
        for name in getattr(report, kind):
            if not name.endswith(_COUNTER):
                empty = dict(loaded=[], missing=[], mismatched=[])
                modules.setdefault(module_of(name), empty)[kind].append(name)
    order = [part.lower().replace("_", " ") for part in FINETUNE_PARTS]
    findings = [
        _describe_module(module, **modules[module])
        for module in sorted(modules, key=lambda m: order.index(m) if m in order else len(order))
    ]
    unused = [n for n in report.unused if not n.endswith(_COUNTER)]
    of_network = [n for n in unused if _NETWORK.search(n)]
    if of_network:
        detail = f"{len(of_network)} tensors that belong in such a network: {_some(of_network)}"
        findings.append(Finding(WARN, "not used", detail))
    elif unused:
        findings.append(Finding(NOTE, "not used", f"{len(unused)}: {_some(unused)}"))
    if any(f.status == WARN for f in findings):  # one remedy for all of them, under the last
        last = max(i for i, f in enumerate(findings) if f.status == WARN)
        fix = "the file is not all there, or is for another network than the config's"
        findings[last] = replace(findings[last], fix=fix)
    if attempt.uncalibrated:
        detail = f"{attempt.uncalibrated} has mean 0 and variance 1 and normalises nothing"
        fix = "SSL.FINETUNE.CALIBRATE_NORMS always, or weights with their statistics"
        findings.append(Finding(WARN, "frozen norms", detail, fix))
    if attempt.failure:
        fix = _FAILURE_FIX[attempt.failed_at]
        findings.append(Finding(FAIL, "forward", attempt.failure, fix))
    return findings


def _describe_module(
    module: str, loaded: List[str], missing: List[str], mismatched: List[str]
) -> Finding:
    if not loaded and not mismatched:
        return Finding(NOTE, module, "not in the file: starts from random values")
    details = [f"{len(loaded)} loaded"] if loaded else []
    if mismatched:
        details.append(f"{len(mismatched)} skipped for their shape ({_some(mismatched)})")
    if missing and all(name.endswith(_STATISTICS) for name in missing):
        details.append(f"{len(missing)} statistics absent, taken for mean 0 and variance 1")
        return Finding(WARN if mismatched else NOTE, module, "; ".join(details))
    if missing:
        details.append(f"{len(missing)} missing ({_some(missing)})")
    detail = "; ".join(details)
    if not missing and not mismatched:
        return Finding(OK, module, detail)
    if module.endswith("predictor"):
        return Finding(NOTE, module, f"{detail}: for other classes")
    return Finding(WARN, module, detail)


# ---- what it computes


def with_values(cfg, values: Dict):
    """A copy of a config with some keys set."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        *path, last = key.split(".")
        node = cfg
        for name in path:
            node = node[name]
        node[last] = value
    return cfg


# What each value of the fingerprint depends on, by the start of the tensors' names.
_BODY = ("backbone.bottom_up.",)
_PYRAMID = (*_BODY, "backbone.fpn_")
_BOX_HEAD = (*_PYRAMID, "roi_heads.box_head.")


def _depends_on(value_name: str) -> Tuple[str, ...]:
    return _BOX_HEAD if value_name == "box_head" else _PYRAMID if value_name[0] == "p" else _BODY


def comparable(names, recorded: Dict, attempt: Attempt) -> List[str]:
    """The recorded values that the file hands on, in the network's order.

    Args:
        names: of the tensors in the file.
        attempt: with the recorded conventions.
    """
    absent = attempt.report.missing + attempt.report.mismatched if attempt.report else []
    absent = [n for n in absent if not n.endswith(_COUNTER)]
    return [
        value
        for value in sorted(recorded, key=lambda v: (len(_depends_on(v)), v))
        if all(any(n.startswith(prefix) for n in names) for prefix in _depends_on(value))
        and not any(n.startswith(_depends_on(value)) for n in absent)
    ]


def _percent(difference: float) -> str:
    return f"{100 * difference:.2g} %" if difference < 0.995 else f"{100 * difference:.0f} %"


def _show(value) -> str:
    return '""' if value == "" else str(value)


class _Comparison:
    """Attempts at reaching a recorded fingerprint."""

    def __init__(self, path: str, record: Dict, levels: List[str]):
        self.path, self.record, self.levels = path, record, levels

    def differences(self, attempt: Attempt) -> Dict[str, float]:
        """Level -> relative difference, of those levels that differ; infinite: not comparable."""
        nothing = torch.empty(0)
        all_levels = {
            name: relative_difference(
                attempt.values.get(name, nothing), self.record["fingerprint"][name]
            )
            for name in self.levels
        }
        return {name: d for name, d in all_levels.items() if not d <= TOLERANCE}

    def agrees(self, cfg) -> bool:
        attempt = Attempt.make(cfg, self.path, self.record["probe"])
        return not attempt.failure and not self.differences(attempt)

    def effect(self, attempt: Attempt) -> str:
        """In words: the first level that differs, where the cause is to be looked for."""
        if attempt.failure:
            return f"the network cannot be run ({attempt.failure})"
        level, difference = next(iter(self.differences(attempt).items()))
        if np.isinf(difference):
            return f"{level} has another shape"
        return f"{level} differs by {_percent(difference)}"


def compare_function(cfg, path: str, content: Dict, given: Attempt) -> List[Finding]:
    """Whether a config makes the weights compute what they did at the hand-off; if not, why.

    All recorded conventions that the config contradicts are set back together; if that restores
    the function, each of them is left out in turn, to see which ones it needs.

    Args:
        given: the attempt with ``cfg`` itself.
    """
    record, tensors = content["d2ssl"], tensors_of(content)
    # The conventions are recorded, and what they leave open is read off the shapes.
    wanted = differing_keys(cfg, {**structure_of(tensors), **record.get("config", {})})
    restored = given
    if wanted:
        restored = Attempt.make(with_values(cfg, wanted), path, record["probe"])
    levels = comparable(tensors, record["fingerprint"], restored)
    compare = _Comparison(path, record, levels)
    shown = [_setting(cfg, key, value) for key, value in wanted.items()]
    if restored.failure:
        return [Finding(
            FAIL, "the network", f"cannot be run even as recorded ({restored.failure}); the config "
            f"says otherwise than the weights in: {'; '.join(shown) or 'no recorded key'}",
            "use the stock.yaml that was written beside the weights",
        )]  # fmt: skip
    findings = _incomplete(record, restored)
    if not levels:
        return findings + [Finding(
            WARN, "fingerprint", "the file holds no part in full that could be compared",
            "compare where the weights come from with the config yourself",
        )]  # fmt: skip

    if not compare.differences(given) and not given.failure:
        findings.append(Finding(OK, "agrees", " ".join(levels)))
        if shown:
            detail = f"differs from the hand-off without effect on these: {'; '.join(shown)}"
            findings.append(Finding(NOTE, "config", detail))
    elif compare.differences(restored):
        findings += _tensors_differ(compare, restored, shown)
    else:
        findings += _culprits(cfg, wanted, compare, given)
    left_out = [name for name in record["fingerprint"] if name not in levels]
    if left_out:
        detail = f"{' '.join(left_out)}: the file does not hold all that these depend on"
        findings.append(Finding(NOTE, "not compared", detail))
    return findings


def _setting(cfg, key: str, wanted) -> str:
    return f"{key} is {_show(get(cfg, key))}, was {_show(wanted)}"


def _incomplete(record: Dict, attempt: Attempt) -> List[Finding]:
    """Parts that were trained must be in the file, all of them."""
    prefixes = dict(zip(("bottom_up", "fpn", "box_head"), (_BODY[-1], _PYRAMID[-1], _BOX_HEAD[-1])))
    findings = []
    for part in record.get("trained", []):
        prefix = prefixes.get(part, "?")
        absent = [n for n in attempt.report.missing + attempt.report.mismatched
                  if n.startswith(prefix) and not n.endswith(_COUNTER)]  # fmt: skip
        if absent:
            detail = f"was trained, but {len(absent)} of its tensors are not in the file: "
            fix = "the file is damaged or was edited; take the original"
            findings.append(Finding(FAIL, part, detail + _some(absent), fix))
    return findings


def _tensors_differ(compare: _Comparison, restored: Attempt, shown: List[str]) -> List[Finding]:
    differences = compare.differences(restored)
    first = next(iter(differences))
    before = compare.levels[: compare.levels.index(first)]
    where = f"{' '.join(before)} still agree; " if before else ""
    listed = ", ".join(f"{name} {_percent(d)}" for name, d in differences.items())
    detail = (
        "the tensors themselves differ from those that were fingerprinted: under every recorded "
        f"convention {listed} ({where}so look from {first} on)"
    )
    findings = [Finding(FAIL, "tensors", detail, "the file was edited; take the original")]
    if shown:
        findings.append(Finding(
            WARN, "config", f"differs from the hand-off as well: {'; '.join(shown)}",
            "set these back, unless they are meant",
        ))  # fmt: skip
    return findings


def _culprits(cfg, wanted: Dict, compare: _Comparison, given: Attempt) -> List[Finding]:
    """``wanted`` as a whole restores the function: which keys of it are needed for that?"""
    effects = {}
    for key in wanted:
        others = {k: v for k, v in wanted.items() if k != key}
        alone = given if len(wanted) == 1 else Attempt.make(
            with_values(cfg, others), compare.path, compare.record["probe"]
        )  # fmt: skip
        if alone.failure or compare.differences(alone):
            effects[key] = compare.effect(alone)
    # Two keys that each do nothing while the other is right are to be blamed together.
    effects = effects or {key: "together with the others it matters" for key in wanted}
    findings = []
    for key, effect in effects.items():
        value = _show(wanted[key])
        detail = f"is {_show(get(cfg, key))}, the weights want {value}: {effect}"
        if len(effects) == 1:
            detail += f"; with {value} all values agree"
        else:
            detail += " for this alone"
        findings.append(Finding(FAIL, key, detail, f"set {key} {quoted(wanted[key])}"))
    if len(effects) > 1:
        findings.append(Finding(NOTE, "together", "with all of these set, all values agree"))
    harmless = [_setting(cfg, k, v) for k, v in wanted.items() if k not in effects]
    if harmless:
        detail = f"differs from the hand-off without effect on these: {'; '.join(harmless)}"
        findings.append(Finding(NOTE, "config", detail))
    return findings


# ---- files without a fingerprint: hints, no facts

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
    """Hints on what a file without fingerprint wants, and where the config says otherwise."""
    tensors = tensors_of(content)
    findings = []
    found = next((n for n in tensors if re.search(r"(^|\.)(layer1|4)\.0\.conv1\.weight$", n)), "")
    if found:
        detail = f"Detectron2 does not know names like {found}"
        fix = "convert the file with tools/convert_weights.py"
        findings.append(Finding(FAIL, "names", detail, fix))
    why, wanted = usual_conventions(content)
    if not why:
        detail = "nothing in the file says which colour order, mean, std and stride it wants"
        fix = "use those of the config that it was trained with"
        findings.append(Finding(WARN, "conventions", detail, fix))
    else:
        usual = "; ".join(f"{key} {_show(value)}" for key, value in wanted.items())
        findings.append(Finding(NOTE, "likely", f"{usual} ({why})"))
        before = len(findings)
        for key, value in differing_keys(cfg, wanted).items():
            if key == "MODEL.PIXEL_MEAN" and np.allclose(get(cfg, key), value, atol=1.0):
                continue
            detail = f"is {_show(get(cfg, key))}; such files usually want {_show(value)}"
            fix = f"set {key} {quoted(value)}, unless you know better"
            findings.append(Finding(WARN, key, detail, fix))
        if len(findings) == before:
            findings.append(Finding(OK, "config", "says the same"))
    return findings + _describe_norms(tensors, cfg)


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
        return [Finding(WARN, "norms", f"{detail}, but MODEL.RESNETS.NORM is {_show(norm)}", fix)]
    if means and all((m == 0).all() for m in means) and all(
        ((v - 1).abs() < 1e-4).all() for v in variances
    ):  # fmt: skip
        detail = "all statistics are mean 0 and variance 1: they were never measured"
        fix = "SSL.FINETUNE.CALIBRATE_NORMS always measures them on your photos"
        return [Finding(WARN, "norms", detail, fix)]
    return []
