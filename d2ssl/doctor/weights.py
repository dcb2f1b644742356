"""What a file of weights loads into a detector, and whether that computes what it should.

Names and shapes that fit prove little: colour order, mean, std, stride and norms are in no tensor.
A hand-off of d2ssl carries a fingerprint of what its network computes, and the conventions that it
was taken under, so for it the question has an answer. A detector that d2ssl trained carries the
conventions alone. For other files there are only hints.
"""

import os
import re
from dataclasses import replace
from typing import Dict, List, Tuple

from d2ssl.config import load_cfg
from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, one_thread, show
from d2ssl.doctor.attempt import Attempt
from d2ssl.doctor.formats import describe_format
from d2ssl.doctor.function import compare_function
from d2ssl.engine.environment import in_words
from d2ssl.engine.weights_file import quoted, read
from d2ssl.errors import D2SSLError
from d2ssl.modeling.donors import COUNTER, some
from d2ssl.modeling.trunk import FINETUNE_PARTS, part_of


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

    def said(key):
        value = record.get(key, "(not recorded)")
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    versions = in_words(record.get("versions", {}))
    if "donor" in record:
        donor = record["donor"]
        facts = {
            "method": f"{said('method')}, {donor['names']}'s names under {quoted(donor['prefix'])}",
            "donor wants": "; ".join(f"{k} {show(v)}" for k, v in donor["wants"].items()),
            "function": said("checked"),
            "laid under": record["onto"] or "no detector's weights",
            "versions": versions,
        }
        return [Finding(NOTE, name, detail) for name, detail in facts.items()]
    facts = {
        "method": f"{said('method')}, {said('iterations')} iterations of "
        f"{said('photos_per_iteration')} photos, seed {said('seed')}",
        "photos": f"{said('num_photos')} of {said('datasets')}",
        "trained": f"{said('trained')}; started from "
        + said("initial_weights").replace("random", "random weights"),
        "versions": versions or "(not recorded)",
    }
    return [Finding(NOTE, name, detail) for name, detail in facts.items()]


# ---- what loads


def module_of(name: str) -> str:
    """Where a tensor of the detector belongs, finer than :func:`part_of`: predictors apart."""
    if name.startswith("roi_heads.box_predictor."):
        return "box predictor"
    if name.startswith("roi_heads.mask_head.predictor."):
        return "mask predictor"
    return part_of(name).lower().replace("_", " ")


def _some(names: List[str]) -> str:
    return some([name.removeprefix("backbone.bottom_up.") for name in names])


# Tensors that a ResNet-FPN's function depends on; "stem.fc" is an ImageNet classifier.
_NETWORK = re.compile(r"\b(stem\.conv1|res[2-5]|fpn_\w+|box_head)\.")
_STATISTICS = (".running_mean", ".running_var")
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
            if not name.endswith(COUNTER):
                empty = dict(loaded=[], missing=[], mismatched=[])
                modules.setdefault(module_of(name), empty)[kind].append(name)
    order = [part.lower().replace("_", " ") for part in FINETUNE_PARTS]
    findings = [
        _describe_module(module, **modules[module])
        for module in sorted(modules, key=lambda m: order.index(m) if m in order else len(order))
    ]
    unused = [n for n in report.unused if not n.endswith(COUNTER)]
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
