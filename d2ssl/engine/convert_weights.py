"""A ResNet that was trained elsewhere, laid under a Detectron2 detector.

The detector's config stays: where the donor wants other colours or another std, its first
convolution is rewritten, which is exact. What would not be exact is refused. Then the donor's own
network and the detector's must compute the same on a picture: that names and shapes fit proves
nothing.
"""

import os
from collections import Counter
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.modeling import build_model
from torch import nn
from torchvision.transforms.functional import normalize

from d2ssl.config import BATCH_NORMS
from d2ssl.engine.checkpoint import MatchReport, conventions_of
from d2ssl.engine.environment import versions
from d2ssl.engine.handoff import CONVENTIONS, methods_of
from d2ssl.engine.weights_file import (
    TORCHVISION,
    conventions_in,
    differing_keys,
    flat,
    get,
    quoted,
    read,
    structure_of,
    tensors_of,
)
from d2ssl.errors import D2SSLError
from d2ssl.modeling.donors import (
    COUNTER,
    Donor,
    find_donor,
    fold,
    networks_in,
    some,
    torchvision_features,
)
from d2ssl.modeling.fingerprint import probe_image, relative_difference

FORMAT, MEAN, STD = "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"
BOTTOM_UP = "backbone.bottom_up."


@torch.no_grad()
def convert_donor(
    path: str, cfg, onto: str = "", given: Optional[Dict] = None, prefix: Optional[str] = None
) -> Tuple[Dict, str]:
    """Weights for the detector of a config, with a donor's ResNet under it.

    Args:
        path: the donor: a file of torchvision, MoCo and its kin, lightly, or Detectron2.
        cfg: of the detector, on the CPU.
        onto: a file of a detector's weights, whose FPN, RPN and heads are kept.
        given: what the donor wants, where :func:`conventions` would take it for something else.
        prefix: of the donor's names, dicts within the file included; None: find it.
    Returns:
        what to save: ``model``, tensors by stock names, and ``d2ssl``, as in a hand-off, with a
        fingerprint of res2..res5; and an account in words.
    Raises:
        D2SSLError: the detector would not compute what the donor does, and why.
    """
    content = read(path)
    said = conventions_in(content)
    record = content.pop("d2ssl", None) or {}
    try:
        donor = find_donor(read_tensors(content), prefix)
        wanted = conventions(donor, said, cfg, given or {})
        _refuse_misfit(donor, cfg, wanted)
        detector, state = _build(cfg), donor.state
        name, std = "stem.conv1.weight", _in_order_of(cfg, wanted, STD)
        state[name] = fold(state[name], wanted[FORMAT] != get(cfg, FORMAT), std, get(cfg, STD))
        _load(detector.backbone.bottom_up, state)
        probe, reference = _reference(donor, record, wanted)
        values = _bottom_up_values(detector, cfg, probe)
        checked = _check(values, reference)
    except D2SSLError as error:
        raise D2SSLError(f"{path}: {error}") from error

    everything, above = detector.state_dict(), read(onto) if onto else {}
    kept = _above_bottom_up(tensors_of(above), everything, onto) if onto else {}
    model = {**kept, **{BOTTOM_UP + name: value for name, value in state.items()}}
    made = {
        "method": f"donor {os.path.basename(path)}",
        "after": methods_of(record),
        "donor": {"names": donor.layout, "prefix": donor.prefix, "wants": wanted},
        "checked": checked,
        "onto": os.path.basename(onto),
        "trained": ["bottom_up"],
        "versions": versions(),
        "config": {k: get(cfg, k) for k in CONVENTIONS if "FPN" not in k and "ROI" not in k},
        "probe": probe,
        "fingerprint": values,
    }
    result = {"model": {n: model[n].clone() for n in everything if n in model}, "d2ssl": made}
    if above.get("thing_classes"):
        result["thing_classes"] = list(above["thing_classes"])
    missing = [n for n in everything if n not in model and not n.endswith(COUNTER)]
    report = MatchReport("for the detector", loaded=[*result["model"]], missing=missing)
    return result, "\n".join([f"{path}: {_account(donor, cfg, wanted)}", checked, str(report)])


def read_tensors(content: Dict) -> Dict[str, torch.Tensor]:
    """By their path in a file, or by Detectron2's names where they are Caffe2's."""
    if "res2_0_branch2a_w" not in tensors_of(content):
        return dict(flat(content))
    blobs = {n: v for n, v in tensors_of(content).items() if not n.endswith("_momentum")}
    return convert_c2_detectron_names(blobs)[0]


# ---- conventions


def conventions(donor: Donor, said: Dict, cfg, given: Dict) -> Dict:
    """The config keys that the donor wants: FORMAT, MEAN, STD and STRIDE.

    They are ``given``, or ``said`` in a file of d2ssl's; else they are torchvision's, but for a
    file in Detectron2's format, which can be for any: then the config's own.
    """
    of_cfg = conventions_of(cfg)
    usual = of_cfg if donor.layout == "Detectron2" else TORCHVISION
    usual = {**usual, **said}
    wanted = {key: usual[key] for key in of_cfg}
    if given.get(FORMAT, wanted[FORMAT]) != wanted[FORMAT]:
        wanted.update({key: wanted[key][::-1] for key in (MEAN, STD)})
    return {**wanted, **given}


def _in_order_of(cfg, wanted: Dict, key: str) -> List[float]:
    """A mean or std of the donor, in the config's order of colours."""
    return wanted[key][:: 1 if wanted[FORMAT] == get(cfg, FORMAT) else -1]


def _refuse_misfit(donor: Donor, cfg, wanted: Dict) -> None:
    """Whatever no rewriting of weights can mend."""

    def require(fits: bool, otherwise: str, keys: Dict) -> None:
        if not fits:
            fix = " ".join(f"{key} {quoted(value)}" for key, value in keys.items())
            raise D2SSLError(f"{otherwise}; set {fix}")

    if not any(name.endswith("running_var") for name in donor.tensors):
        raise D2SSLError(
            "no running statistics of batch norms: they were folded, or the norms are others "
            "(GroupNorm); take a file that has them"
        )
    other = differing_keys(cfg, structure_of(donor.state))
    require(not other, "another ResNet than the config's", other)
    norm = cfg.MODEL.RESNETS.NORM
    what = f"has batch norms, and MODEL.RESNETS.NORM is {quoted(norm)}"
    require(norm in BATCH_NORMS, what, {"MODEL.RESNETS.NORM": "FrozenBN"})
    mean = [round(value, 4) for value in _in_order_of(cfg, wanted, MEAN)]
    same = max(abs(a - b) for a, b in zip(mean, get(cfg, MEAN))) <= 0.01
    what = f"wants another mean than {MEAN} {get(cfg, MEAN)}, which cannot be folded exactly"
    require(same, what, {MEAN: mean})
    same = wanted[STRIDE] == get(cfg, STRIDE) or cfg.MODEL.RESNETS.DEPTH < 50  # no 1x1 there
    what = f"strides in another convolution than {STRIDE} {get(cfg, STRIDE)} says"
    require(same, what, {STRIDE: wanted[STRIDE]})


# ---- the detector, and what both networks compute


def _build(cfg) -> nn.Module:
    try:
        detector = build_model(cfg).eval()
    except Exception as error:  # a config can make any part of Detectron2 fail
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise D2SSLError(f"the config's detector cannot be built: {reason}") from error
    if not isinstance(getattr(detector.backbone, "bottom_up", None), nn.Module):
        raise D2SSLError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has no feature pyramid to lay it under;"
            " use build_resnet_fpn_backbone"
        )
    return detector


def _load(bottom_up: nn.Module, state: Dict) -> None:
    wanted = {n: v for n, v in bottom_up.state_dict().items() if not n.endswith(COUNTER)}
    for what, names in (
        ("lacks", [n for n in wanted if n not in state]),
        ("has more than the config's ResNet", [n for n in state if n not in wanted]),
        (
            "is of another shape",
            [n for n in state if n in wanted and state[n].shape != wanted[n].shape],
        ),
    ):
        if names:
            raise D2SSLError(
                f"{what}: {some(names)}; take a plain ResNet, or a config for this one"
            )
    bottom_up.load_state_dict(state, strict=False)


def _reference(donor: Donor, record: Dict, wanted: Dict) -> Tuple[torch.Tensor, Dict]:
    """A picture, 3 x H x W uint8 RGB, and what the donor itself computes on it; {}: unknown."""
    if donor.layout == "Detectron2":
        return record.get("probe", probe_image()), record.get("fingerprint", {})
    probe = probe_image()
    image = probe.flip(0) if wanted[FORMAT] == "BGR" else probe
    images = normalize(image.float(), wanted[MEAN], wanted[STD])[None]
    return probe, torchvision_features(donor.tensors, images)


def _bottom_up_values(detector: nn.Module, cfg, probe: torch.Tensor) -> Dict[str, torch.Tensor]:
    """res2..res5 as the detector computes them, from its own preprocessing on."""
    image = probe.flip(0) if get(cfg, FORMAT) == "BGR" else probe
    images = detector.preprocess_image([{"image": image.float()}]).tensor
    return {name: value.clone() for name, value in detector.backbone.bottom_up(images).items()}


def _check(values: Dict, reference: Dict) -> str:
    """In words, by how much the detector's values differ from the donor's own."""
    names = [name for name in values if name in reference]
    if not names:
        return (
            "not checked: a Detectron2 file does not say what it computes; tools/doctor.py says "
            "what such files usually want"
        )
    differences = {name: relative_difference(values[name], reference[name]) for name in names}
    for name, difference in differences.items():
        if not difference < 1e-3:
            raise D2SSLError(
                f"would compute something else under this config, {name} differs by "
                f"{difference:.2g}; its colours, std or strides are not what they are taken for"
            )
    return f"checked: {names[0]}..{names[-1]} equal to {max(differences.values()):.1g}"


def _above_bottom_up(tensors: Dict, everything: Dict, onto: str) -> Dict[str, torch.Tensor]:
    """FPN, RPN and heads of a detector's file; predictors may be for other classes."""
    kept = {n: v for n, v in tensors.items() if n in everything and not n.startswith(BOTTOM_UP)}
    if not kept:
        raise D2SSLError(f"{onto}: no FPN, RPN or head in it; name a Detectron2 detector's weights")
    for name, value in kept.items():
        if value.shape != everything[name].shape and "predictor" not in name:
            raise D2SSLError(
                f"{onto}: {name} is {_size(value)}, the config's {_size(everything[name])}; take "
                "the config of that detector, and a donor that fits it"
            )
    return kept


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _account(donor: Donor, cfg, wanted: Dict) -> str:
    """What was taken, left, and folded."""
    twins = networks_in(donor.unused)
    unused = Counter(
        next((t for t in twins if t and n.startswith(t)), n.rpartition(".")[0] or n)
        for n in donor.unused
    )
    folded = [f"{key} {wanted[key]} to {get(cfg, key)}"
              for key in (FORMAT, STD) if wanted[key] != get(cfg, key)]  # fmt: skip
    return (
        f"ResNet-{cfg.MODEL.RESNETS.DEPTH}, {donor.layout}'s names under {quoted(donor.prefix)}, "
        f"{len(donor.tensors)} tensors taken\n"
        f"not used: {some([f'{n} of {name}' for name, n in unused.items()]) or 'nothing'}\n"
        f"folded into the first convolution: {', '.join(folded) or 'nothing'}"
    )
