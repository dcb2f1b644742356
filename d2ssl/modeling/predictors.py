"""A detector's last layers, of which each row belongs to a class, for another list of classes."""

import re
from collections.abc import Mapping, Sequence

import torch
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from d2ssl.errors import D2SSLError

# The number is there in a cascade. Standard deviations as Detectron2 initialises these layers.
_LAYER = re.compile(
    r"(box_predictor(\.\d+)?\.(?P<box>cls_score|bbox_pred)|mask_head\.(?P<mask>predictor))"
    r"\.(?P<leaf>weight|bias)$"
)
_STD = {"cls_score": 0.01, "bbox_pred": 0.001, "predictor": 0.001}


def class_names(given: str | Sequence[str]) -> list[str]:
    """``SSL.FINETUNE.WEIGHTS_CLASSES`` as names; those of COCO are Detectron2's."""
    return _get_builtin_metadata("coco")["thing_classes"] if given == "coco" else [*given]


def predictors_in(state_dict: Mapping) -> list[str]:
    """Names of the tensors of the box and mask predictors."""
    return [name for name in state_dict if _LAYER.search(name)]


def fit_predictors(
    state_dict: Mapping, old_classes: Sequence[str], new_classes: Sequence[str]
) -> dict[str, torch.Tensor]:
    """
    Box and mask predictors for other classes: rows of classes that both lists name are kept, and
    the background's; all others are initialised as Detectron2 does (normal, bias 0).

    What is there once for all classes (class-agnostic boxes or masks) is left as it is. With a
    single old class such rows look like that class's, and are taken for them.

    Args:
        state_dict: of a detector, or part of one; tensors or arrays by Detectron2's names.
        old_classes: that the rows stand for, in their order.
        new_classes: that they shall stand for.

    Returns:
        new tensors by name, for what has rows by class; empty without predictors.

    Raises:
        D2SSLError: ``old_classes`` are not as many as the box predictor has.
    """
    count, old = len(old_classes), {name: i for i, name in enumerate(old_classes)}
    origin = [old.get(name) for name in new_classes]  # the row that each new one comes from
    fitted = {}
    for name in predictors_in(state_dict):
        match, value = _LAYER.search(name), torch.as_tensor(state_dict[name])
        layer = match["box"] or match["mask"]
        rows = {"cls_score": count + 1, "bbox_pred": 4 * count, "predictor": count}[layer]
        if layer == "cls_score" and len(value) != rows:
            raise D2SSLError(
                f"{count} classes are named, but the weights' box predictor has "
                f"{len(value) - 1}; name all in their order with SSL.FINETUNE.WEIGHTS_CLASSES"
            )
        if len(value) != rows:  # the same for all classes
            continue
        per_class = 4 if layer == "bbox_pred" else 1
        kept = value.unflatten(0, (-1, per_class))  # classes x rows x ...
        background = [count] if layer == "cls_score" else []  # Detectron2's last row
        new = torch.zeros(len(origin) + len(background), *kept.shape[1:], dtype=value.dtype)
        if match["leaf"] == "weight":
            new.normal_(std=_STD[layer])
        for row, i in enumerate([*origin, *background]):
            if i is not None:
                new[row] = kept[i]
        fitted[name] = new.flatten(0, 1)
    return fitted


def describe_fit(old_classes: Sequence[str], new_classes: Sequence[str]) -> str:
    """What :func:`fit_predictors` keeps, in words."""
    kept = [name for name in new_classes if name in old_classes]
    shown = f" ({', '.join([*kept[:3], *['...'][: len(kept) > 3]])})" if kept else ""
    return (
        f"{len(kept)} of {len(new_classes)} classes kept by name{shown}, "
        f"{len(new_classes) - len(kept)} re-initialised"
    )
