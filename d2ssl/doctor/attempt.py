"""The network that a config describes, with a file's weights loaded and run."""

import re
from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from d2ssl.engine.checkpoint import Checkpointer, MatchReport
from d2ssl.errors import D2SSLError
from d2ssl.modeling.fingerprint import fingerprint
from d2ssl.modeling.norm import refuse_uncalibrated


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
