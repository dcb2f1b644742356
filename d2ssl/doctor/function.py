"""Whether the network that a config describes computes what it did at the hand-off; if not, why."""

from typing import Dict, List, Tuple

import numpy as np
import torch

from d2ssl.config import PRETRAIN_PARTS, set_key
from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, show
from d2ssl.doctor.attempt import Attempt
from d2ssl.engine.weights_file import differing_keys, get, quoted, structure_of, tensors_of
from d2ssl.modeling.donors import COUNTER, some
from d2ssl.modeling.fingerprint import relative_difference
from d2ssl.modeling.trunk import pretrain_part_of

# Where networks agree: rounding of one device against another's (TF32: 0.0008) stays below, and
# the mildest mistake (a mean off by 0.4 of 255: 0.003) above. Measured on a ResNet-50.
TOLERANCE = 2e-3


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
        restored = Attempt.make(_with_values(cfg, wanted), path, record["probe"])
    levels = _comparable(tensors, record["fingerprint"], restored)
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


def _depends_on(value_name: str) -> Tuple[str, ...]:
    """The parts that a value of the fingerprint has passed through."""
    return PRETRAIN_PARTS[: 3 if value_name == "box_head" else 2 if value_name[0] == "p" else 1]


def _absent(attempt: Attempt) -> List[str]:
    """The tensors that the detector computes with and that the file did not fill."""
    names = attempt.report.missing + attempt.report.mismatched if attempt.report else []
    return [name for name in names if not name.endswith(COUNTER)]


def _comparable(names, recorded: Dict, attempt: Attempt) -> List[str]:
    """The recorded values that the file hands on, in the network's order.

    Args:
        names: of the tensors in the file.
        attempt: with the recorded conventions.
    """
    whole = set(map(pretrain_part_of, names)) - set(map(pretrain_part_of, _absent(attempt)))
    in_order = sorted(recorded, key=lambda value: (len(_depends_on(value)), value))
    return [value for value in in_order if whole.issuperset(_depends_on(value))]


def _percent(difference: float) -> str:
    return f"{100 * difference:.2g} %" if difference < 0.995 else f"{100 * difference:.0f} %"


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

    def effect(self, attempt: Attempt) -> str:
        """In words: the first level that differs, where the cause is to be looked for."""
        if attempt.failure:
            return f"the network cannot be run ({attempt.failure})"
        level, difference = next(iter(self.differences(attempt).items()))
        if np.isinf(difference):
            return f"{level} has another shape"
        return f"{level} differs by {_percent(difference)}"


def _with_values(cfg, values: Dict):
    """A copy of a config with some keys set."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in values.items():
        set_key(cfg, key, value)
    return cfg


def _setting(cfg, key: str, wanted) -> str:
    return f"{key} is {show(get(cfg, key))}, was {show(wanted)}"


def _incomplete(record: Dict, attempt: Attempt) -> List[Finding]:
    """Parts that were trained must be in the file, all of them."""
    findings = []
    for part in record.get("trained", []):
        absent = [name for name in _absent(attempt) if pretrain_part_of(name) == part]
        if absent:
            detail = f"was trained, but {len(absent)} of its tensors are not in the file: "
            fix = "the file is damaged or was edited; take the original"
            findings.append(Finding(FAIL, part, detail + some(absent), fix))
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
            _with_values(cfg, others), compare.path, compare.record["probe"]
        )  # fmt: skip
        if alone.failure or compare.differences(alone):
            effects[key] = compare.effect(alone)
    # Two keys that each do nothing while the other is right are to be blamed together.
    effects = effects or {key: "together with the others it matters" for key in wanted}
    findings = []
    for key, effect in effects.items():
        value = show(wanted[key])
        detail = f"is {show(get(cfg, key))}, the weights want {value}: {effect}"
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
