"""Checkpoints that are whole or absent, and a plain account of what a file of weights loads."""

import contextlib
import os
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import nn

from d2ssl.atomic import atomic_open
from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.catalog import listed
from d2ssl.engine.weights_file import (
    TORCHVISION,
    conventions_in,
    get,
    other_conventions,
    settings,
)
from d2ssl.errors import D2SSLError
from d2ssl.modeling.predictors import class_names, describe_fit, fit_predictors, predictors_in
from d2ssl.modeling.trunk import part_of


class _AtomicPaths:
    """A path manager whose local writes are atomic."""

    def __init__(self, manager):
        self._manager = manager

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def open(self, path, mode="r", **kwargs):
        if "w" in mode and "://" not in path:
            return atomic_open(path, mode)
        return self._manager.open(path, mode, **kwargs)


@dataclass
class MatchReport:
    """What a file of weights did to a model, by state-dict name."""

    path: str
    loaded: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)  # in the model, not in the file
    unused: List[str] = field(default_factory=list)  # in the file, not in the model
    mismatched: List[str] = field(default_factory=list)  # in both, shapes differ
    predictors: str = ""  # what was done to those for other classes
    classes: List[str] = field(default_factory=list)  # that they are for now, where it is known
    conventions: Dict[str, object] = field(default_factory=dict)  # config keys, in files of d2ssl
    record: Dict[str, object] = field(default_factory=dict)  # of a hand-off on itself

    def by_part(self) -> Dict[str, Dict[str, int]]:
        """part -> counts of loaded, missing and mismatched tensors."""
        parts: Dict[str, Dict[str, int]] = {}
        for kind in ("loaded", "missing", "mismatched"):
            for name in getattr(self, kind):
                row = parts.setdefault(part_of(name), dict(loaded=0, missing=0, mismatched=0))
                row[kind] += 1
        return parts

    def __str__(self) -> str:
        if not self.loaded:
            return f"Weights: {self.path}"
        rows = [
            f"  {part:<10}" + "  ".join(f"{count:4d} {kind}" for kind, count in row.items())
            for part, row in self.by_part().items()
        ]
        unused = f"  {len(self.unused)} tensors of the file are not used" if self.unused else ""
        fitted = f"  predictors: {self.predictors}" if self.predictors else ""
        return "\n".join(filter(None, [f"Weights {self.path}:", *rows, unused, fitted]))


def _convolution_bias_to_norm(file: dict, model: dict) -> None:
    """A stock FPN's convolutions have a bias; with a norm behind them it becomes the norm's.

    Without this the bias would be dropped, and a pretrained FPN would compute something else.
    """
    for name in [n for n in file if n.endswith(".bias") and n not in model]:
        moved = f"{name[:-5]}.norm.bias"
        if moved in model and moved not in file:
            file[moved] = file.pop(name)


def _fit_predictors(checkpoint: dict, model: dict, classes, file_classes) -> Tuple[str, List[str]]:
    """Make predictors of the file ones for ``classes``, in place.

    Returns:
        what was done, in words, and the names of the classes that they are for then, if known.
    """
    file = checkpoint["model"]
    names = predictors_in(file)
    if not names:
        return "", []
    file_classes = [*(checkpoint.get("thing_classes") or file_classes)]
    if not classes or file_classes == [*classes]:
        return "", file_classes
    if not file_classes:
        if all(n not in model or file[n].shape == model[n].shape for n in names):
            return "", []
        hint = "SSL.FINETUNE.WEIGHTS_CLASSES can say which these are"
        return f"for other classes, none kept; {hint}", []
    fitted = fit_predictors(file, file_classes, classes)
    # A single class's rows can be the same for all classes, which only the model knows.
    fitted = {n: v for n, v in fitted.items() if n in model and v.shape == model[n].shape}
    file.update(fitted)
    return (describe_fit(file_classes, classes) if fitted else ""), [*classes]


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, writing atomically and reporting what it loaded.

    Args:
        classes: names of the model's classes, saved with it as ``thing_classes``.
        conventions: config keys that no tensor shows, saved with it, see
            :func:`refuse_other_conventions`.
    """

    def __init__(
        self, *args, classes: Sequence[str] = (), conventions: Optional[Dict] = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.path_manager = _AtomicPaths(self.path_manager)
        self._extra = {"thing_classes": [*classes]} if classes else {}
        if conventions:
            self._extra["conventions"] = conventions
        self._wanted = (), ()
        self._fit: Tuple[str, List[str]] = "", []
        self._incompatible = None
        self.conventions: Dict[str, object] = {}  # of the file loaded last
        self._record: Dict[str, object] = {}

    def _load_model(self, checkpoint):
        model = self.model.state_dict()
        _strip_prefix_if_present(checkpoint["model"], "module.")  # saved from several processes
        self._record = checkpoint.get("d2ssl", {})
        self.conventions = conventions_in(checkpoint)
        _convolution_bias_to_norm(checkpoint["model"], model)
        self._fit = _fit_predictors(checkpoint, model, *self._wanted)
        self._incompatible = super()._load_model(checkpoint)
        return self._incompatible

    @property
    def fits(self) -> bool:
        """Whether the file loaded last held all of the model, in the model's shapes."""
        found = self._incompatible
        return not (found.missing_keys or found.incorrect_shapes)

    def _convert_ndarray_to_tensor(self, state_dict):
        super()._convert_ndarray_to_tensor(state_dict)
        self._names = set(state_dict)  # the last call comes with the names as they are loaded

    def save(self, name: str, **kwargs) -> None:
        super().save(name, **self._extra, **kwargs)

    def save_weights(self, name: str) -> str:
        """Write ``<name>.pth`` with the model alone, not a state to resume from; its path."""
        path = os.path.join(self.save_dir, f"{name}.pth")
        if self.save_to_disk:
            with atomic_open(path, "wb") as file:
                torch.save({"model": self.model.state_dict(), **self._extra}, file)
        return path

    def _log_incompatible_keys(self, incompatible) -> None:
        """The match report says it better; the stock warning lists every name."""

    def load_report(
        self, path: str, classes: Sequence[str] = (), file_classes: Sequence[str] = ()
    ) -> MatchReport:
        """Load weights and say what they matched.

        Args:
            classes: of the model, that box and mask predictors are fitted to by name; none: these
                are loaded where their shapes are the same.
            file_classes: of the file, where it does not say itself.

        Raises:
            D2SSLError: no such file, not a checkpoint, or not one tensor of it fits.
        """
        self._wanted = classes, file_classes
        try:
            self.load(path, checkpointables=[])
        except Exception as error:  # what is no checkpoint can raise anything while it is unpickled
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise D2SSLError(f"MODEL.WEIGHTS {path} cannot be loaded: {reason}") from error
        # Not Detectron2's own list of missing names: a frozen norm makes up absent statistics and
        # says that it has loaded them.
        mismatched = [name for name, *_ in self._incompatible.incorrect_shapes]
        names = list(self.model.state_dict())
        report = MatchReport(
            path,
            loaded=[n for n in names if n in self._names and n not in mismatched],
            missing=[n for n in names if n not in self._names and n not in mismatched],
            unused=list(self._incompatible.unexpected_keys),
            mismatched=mismatched,
            predictors=self._fit[0],
            classes=self._fit[1],
            conventions=self.conventions,
            record=self._record,
        )
        if not report.loaded:
            raise D2SSLError(
                f"MODEL.WEIGHTS {path}: not one tensor fits this model; is it for another backbone?"
            )
        return report


def load_weights(
    model: nn.Module, path: str, classes: Sequence[str] = (), file_classes: Sequence[str] = ()
) -> MatchReport:
    """Load weights into a model; an empty path loads nothing and reports all as missing.

    ``classes`` and ``file_classes`` as in :meth:`Checkpointer.load_report`.
    """
    if not path:
        return MatchReport("none, all random", missing=list(model.state_dict()))
    return Checkpointer(model).load_report(path, classes, file_classes)


def conventions_of(cfg) -> Dict:
    """What :func:`refuse_other_conventions` compares, of a config, as plain values."""
    return {key: get(cfg, key) for key in TORCHVISION}


def refuse_other_conventions(cfg, report: MatchReport) -> None:
    """Weights that say what they were made under are not used under anything else.

    Colour order, mean, std and stride are in no tensor: all would load, and compute something else.

    Raises:
        D2SSLError: naming the keys that differ and their values.
    """
    differing = other_conventions(cfg, report.conventions)
    if differing:
        raise D2SSLError(
            f"MODEL.WEIGHTS {report.path} were made with {settings(differing)}; this config says "
            "otherwise, and they would load and compute something else: set it so (tools/doctor.py "
            "tells more)"
        )


def training_classes(cfg) -> List[str]:
    """Names of the detector's classes, those of the training set; none where it has no names, or
    where there is no such set: pretraining alone needs none."""
    for name in cfg.DATASETS.TRAIN:
        with contextlib.suppress(D2SSLError):
            ensure_registered([name])
            if not MetadataCatalog.get(name).get("thing_classes"):
                listed(name)  # COCO's loader and others know the classes only now
        names = MetadataCatalog.get(name).get("thing_classes") or []
        if len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            return list(names)
    return []


def fitting(cfg) -> Tuple[List[str], List[str]]:
    """``classes`` and ``file_classes`` of :func:`load_weights`, as ``SSL.FINETUNE`` wants them."""
    options = cfg.SSL.FINETUNE
    classes = training_classes(cfg) if options.FIT_PREDICTORS == "auto" else []
    return classes, class_names(options.WEIGHTS_CLASSES)
