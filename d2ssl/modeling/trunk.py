"""The part of the detector that is pretrained: backbone with FPN, and box head."""

from typing import Dict, List

import torch
from detectron2.config import configurable
from detectron2.modeling import build_backbone
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from d2ssl.errors import D2SSLError
from d2ssl.modeling.norm import freeze

STAGES = ("STEM", "RES2", "RES3", "RES4", "RES5")
FINETUNE_PARTS = (*STAGES, "FPN", "RPN", "BOX_HEAD", "MASK_HEAD")


def part_of(parameter_name: str) -> str:
    """Which part of the detector a parameter belongs to: ``STEM``, ``RES2``.. ``MASK_HEAD``.

    Works on the names of a stock ``GeneralizedRCNN`` and so on a :class:`Trunk`'s too; ``OTHER``
    for anything else.
    """
    name = parameter_name
    stage = name.removeprefix("backbone.").removeprefix("bottom_up.").split(".")[0].upper()
    if name.startswith("backbone.") and stage in STAGES:  # without an FPN the backbone is a ResNet
        return stage
    if name.startswith("backbone.bottom_up."):
        return "OTHER"
    for prefix, part in (
        ("backbone.", "FPN"),
        ("proposal_generator.", "RPN"),
        ("roi_heads.box_", "BOX_HEAD"),
        ("roi_heads.mask_", "MASK_HEAD"),
    ):
        if name.startswith(prefix):
            return part
    return "OTHER"


def pretrain_part_of(parameter_name: str) -> str:
    """Which of ``config.PRETRAIN_PARTS`` a parameter belongs to; "" for none, as predictors do."""
    for prefix, part in (
        ("backbone.bottom_up.", "bottom_up"),
        ("backbone.fpn_", "fpn"),
        ("roi_heads.box_head.", "box_head"),
    ):
        if parameter_name.startswith(prefix):
            return part
    return ""


def canonical_size_in_views(cfg, canonical_size: int, view_size: int) -> int:
    """Size in px of a box that is pooled from P4 while pretraining, given that in fine-tuning."""
    return max(1, canonical_size * view_size // max(cfg.INPUT.MIN_SIZE_TRAIN))


class Trunk(nn.Module):
    """Backbone (ResNet + FPN) and box head, under the names that a stock detector gives them.

    So ``trunk.state_dict()`` is a part of the detector's, and weights go in and out unconverted.
    """

    @configurable
    def __init__(self, *, backbone, box_pooler, box_head, box_in_features: List[str]):
        super().__init__()
        self.backbone = backbone
        self.roi_heads = nn.Module()
        self.roi_heads.box_pooler = box_pooler
        self.roi_heads.box_head = box_head
        self.box_in_features = box_in_features

    @classmethod
    def from_config(cls, cfg, view_size: int = 0):
        """
        Args:
            view_size: side of the whole-photo view in pixels. Objects appear in it smaller than
                in fine-tuning, so the box size that the pooler sends to P4 shrinks alike, and an
                object trains the pyramid level that will see it later. 0: as in fine-tuning.
        """
        heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
        if cfg.MODEL.BACKBONE.NAME != "build_resnet_fpn_backbone" or heads is not StandardROIHeads:
            raise D2SSLError(
                f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} with MODEL.ROI_HEADS.NAME "
                f"{cfg.MODEL.ROI_HEADS.NAME}: pretraining needs build_resnet_fpn_backbone with "
                "StandardROIHeads, as in Detectron2's mask_rcnn_R_50_FPN configs"
            )
        backbone = build_backbone(cfg)
        heads = StandardROIHeads._init_box_head(cfg, backbone.output_shape())
        pooler = heads["box_pooler"]
        if view_size:
            pooler.canonical_box_size = canonical_size_in_views(
                cfg, pooler.canonical_box_size, view_size
            )
        return {
            "backbone": backbone,
            "box_pooler": pooler,
            "box_head": heads["box_head"],
            "box_in_features": heads["box_in_features"],
        }

    def forward(self, images: torch.Tensor, fpn: bool = True) -> Dict[str, torch.Tensor]:
        """N x 3 x H x W, normalised, sides multiples of 32 -> the maps of the FPN and of the stages
        under it, {"p2": N x 256 x H/4 x W/4, ..., "res5": N x 2048 x H/32 x W/32}.

        Args:
            fpn: False: only the stages.
        """
        if not fpn:
            return self.backbone.bottom_up(images)
        stages: Dict[str, torch.Tensor] = {}  # the FPN keeps them to itself
        bottom_up = self.backbone.bottom_up
        hook = bottom_up.register_forward_hook(lambda module, args, maps: stages.update(maps))
        try:
            return {**self.backbone(images), **stages}
        finally:
            hook.remove()

    def box_features(self, pyramid: Dict[str, torch.Tensor], boxes: List[torch.Tensor]):
        """Per image K_i x 4 boxes (x1, y1, x2, y2 in pixels) -> (sum K_i) x box_head's width."""
        features = [pyramid[name] for name in self.box_in_features]
        pooled = self.roi_heads.box_pooler(features, [Boxes(b) for b in boxes])
        return self.roi_heads.box_head(pooled)

    @property
    def box_dim(self) -> int:
        """Width of a box's feature vector, e.g. 1024."""
        return self.roi_heads.box_head.output_shape.channels

    def parts(self) -> Dict[str, List[nn.Module]]:
        """The modules of each part that ``SSL.TRAIN`` can name."""
        top_down = [m for name, m in self.backbone.named_children() if name != "bottom_up"]
        return {
            "bottom_up": [self.backbone.bottom_up],
            "fpn": top_down,
            "box_head": [self.roi_heads.box_head],
        }

    def train_only(self, parts) -> None:
        """Only these parts learn; the others keep their values.

        Their norms become frozen ones: a BatchNorm in training mode follows the batch even where
        nothing has a gradient.
        """
        for name, modules in self.parts().items():
            if name not in parts:
                for module in modules:
                    freeze(module).requires_grad_(False)
