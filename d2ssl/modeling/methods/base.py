"""What all pretext methods share: a method's own file says only what is contrasted with what."""

import copy
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from torch import nn

from d2ssl.data.views import View
from d2ssl.errors import D2SSLError
from d2ssl.modeling.trunk import Trunk


class PretextMethod(nn.Module):
    """A Detectron2 meta-architecture that trains a :class:`Trunk` on views of unlabelled photos.

    A subclass declares its views (:meth:`views`), which of them show the same boxes
    (:attr:`view_pairs`), its momentum twins (:meth:`add_twin`), and turns a batch into a dict of
    losses (:meth:`forward`). Around it, the trainer loads weights into ``trunk``, starts the
    twins from it, moves them each step, sets schedules, precision and norms, and hands ``trunk``
    off. ``embedding`` holds the last N x D embedding, for the collapse meter.
    """

    trains: Tuple[str, ...] = ("bottom_up", "fpn", "box_head")  # parts that its loss reaches
    view_pairs: Tuple[Tuple[int, int], ...] = ()  # views that share boxes, by index
    loss_range: Tuple[float, float]  # of the sum of the losses

    @configurable
    def __init__(self, *, trunk: Trunk, pixel_mean: Sequence[float], pixel_std: Sequence[float]):
        super().__init__()
        self.trunk = trunk
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.embedding: torch.Tensor = None
        self._twins: Dict[str, str] = {}

    @classmethod
    def from_config(cls, cfg):
        trunk = Trunk(**Trunk.from_config(cfg, view_size=cfg.SSL.INPUT.VIEW_SIZE))
        trunk.train_only([part for part in cfg.SSL.TRAIN if part in cls.trains])
        return {
            "trunk": trunk,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @classmethod
    def views(cls, cfg) -> List[View]:
        """The views that the mapper draws of each photo."""
        raise NotImplementedError

    def forward(self, batched_inputs: List[dict]) -> Dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: one dict a photo, as :class:`~d2ssl.data.mapper.PretextMapper` makes
                them: ``views``, a list of 3 x H x W uint8 images in the config's colour order;
                ``pairs``, one dict for each of ``view_pairs`` with ``boxes`` (two K x 4 tensors in
                pixels of the two views) and ``ids`` (K, -1 where the views share nothing);
                ``image_id``, the photo's index in its data set.
        """
        raise NotImplementedError

    def add_twin(self, name: str) -> None:
        """Give ``self.<name>`` a momentum twin ``self.<name>_twin`` without gradients."""
        twin = copy.deepcopy(getattr(self, name)).requires_grad_(False)
        setattr(self, f"{name}_twin", twin)
        self._twins[name] = f"{name}_twin"

    def twins(self) -> List[Tuple[nn.Module, nn.Module]]:
        """Pairs (module that learns, its momentum twin)."""
        return [(getattr(self, a), getattr(self, b)) for a, b in self._twins.items()]

    @torch.no_grad()
    def reset_twins(self) -> None:
        """Start each twin as a copy, after weights were loaded."""
        for online, twin in self.twins():
            twin.load_state_dict(online.state_dict())

    @torch.no_grad()
    def move_twins(self, momentum: float) -> None:
        """twin = momentum * twin + (1 - momentum) * online, parameters only (MoCo, eq. 2).

        Norm statistics are the twin's own: it runs in training mode.
        """
        for online, twin in self.twins():
            for p, q in zip(online.parameters(), twin.parameters()):
                if p.requires_grad:
                    q.lerp_(p, 1 - momentum)

    def stack_view(self, batched_inputs: List[dict], index: int) -> torch.Tensor:
        """View ``index`` of every photo, normalised as the detector does: N x 3 x H x W."""
        images = torch.stack([x["views"][index] for x in batched_inputs])
        images = images.to(self.pixel_mean.device, non_blocking=True)
        images = images.contiguous(memory_format=torch.channels_last)
        return (images - self.pixel_mean) / self.pixel_std

    def parameter_parts(self) -> Dict[str, List[nn.Module]]:
        """Everything that learns, by the names under ``SSL.SOLVER.LR_FACTOR``."""
        parts = {name.upper(): modules for name, modules in self.trunk.parts().items()}
        others = [m for name, m in self.named_children() if name != "trunk"]
        return {**parts, "HEADS": others}


def view_from_cfg(cfg, size: int, crop: bool, blur_p: float) -> View:
    """A view as ``cfg.SSL.INPUT`` wants it; solarizing and cut-outs are for cropped views only."""
    options = cfg.SSL.INPUT
    return View(
        size=size,
        crop_scale=tuple(options.CROP_SCALE) if crop else None,
        flip=options.FLIP,
        jitter=tuple(options.COLOR_JITTER),
        jitter_p=options.COLOR_JITTER_PROB,
        gray=options.GRAY_PROB,
        blur_p=blur_p,
        solarize_p=options.SOLARIZE_PROB if crop else 0.0,
        plane_shift=options.PLANE_SHIFT,
        cutout_p=options.CUTOUT_PROB if crop else 0.0,
    )


def require_two_photos(batch_size: int) -> None:
    """Heads with BatchNorm need two rows or more; raises :class:`D2SSLError`."""
    if batch_size < 2:
        raise D2SSLError(
            f"SSL.SOLVER.IMS_PER_BATCH gives {batch_size} photo per process; batch statistics "
            "need 2 or more"
        )
