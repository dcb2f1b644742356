"""The network that pretraining trains: a trunk, its momentum twin, and what a method adds."""

import copy
import functools
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods import build_method
from d2ssl.modeling.methods.base import PretextMethod
from d2ssl.modeling.trunk import Trunk


class Encoding:
    """What a trunk makes of images; computed when first asked for, and once.

    Args:
        learns: whether gradients flow; not through a momentum twin.
        fpn: whether the maps of the FPN are asked for.
    """

    def __init__(self, trunk: Trunk, images: torch.Tensor, learns: bool, fpn: bool = True):
        self.trunk, self.images, self.learns, self.fpn = trunk, images, learns, fpn

    @functools.cached_property
    def pyramid(self) -> Dict[str, torch.Tensor]:
        """{"res2": N x C x H/4 x W/4, ..., "p2": N x 256 x H/4 x W/4, ...}."""
        with torch.set_grad_enabled(self.learns):
            return self.trunk(self.images, self.fpn)

    def box_features(self, boxes: torch.Tensor) -> torch.Tensor:
        """N x R x 4 boxes (XYXY in pixels of the view) -> N x R x box head's width."""
        with torch.set_grad_enabled(self.learns):
            return self.trunk.box_features(self.pyramid, list(boxes)).unflatten(0, boxes.shape[:2])


class ViewBatch:
    """One view of every photo of a batch: its images, where they lie, and what trunks see in them.

    Attributes:
        pixels: N x 3 x S x S uint8, in the config's colour order.
        photos: N, index of each photo in its data set; a batch may hold a photo twice.
        windows: N x 4, where the view's left, top, right and bottom edges lie in the photo, in its
            pixels; left is greater than right where the view is flipped.
        boxes, box_ids: N x R x 4 in pixels of the view, and N x R; equal ids in two views are the
            same proposal, -1 is none. None where no method needs boxes.
        regions: N x S/4 x S/4, label of each cell of P2; None where no method needs them.
        holes: N x 1 x S x S bool, what is to be filled in; None where no method needs them.
    """

    def __init__(self, model: "PretextModel", batched_inputs: List[dict], index: int):
        self.model = model
        # Not what holds when a method first asks: another may need the gradient of the same.
        self._learns = torch.is_grad_enabled()
        device = model.pixel_mean.device

        def stack(rows) -> torch.Tensor:
            return torch.stack(list(rows)).to(device, non_blocking=True)

        def stacked(name: str) -> Optional[torch.Tensor]:
            if name not in batched_inputs[0]:
                return None
            return stack(x[name][index] for x in batched_inputs)

        self.pixels, self.windows = stacked("views"), stacked("windows")
        self.regions, self.holes = stacked("regions"), stacked("holes")
        self.photos = torch.tensor([x["index"] for x in batched_inputs], device=device)
        self.boxes = self.box_ids = None
        shown = [
            (number, pair.index(index))
            for number, pair in enumerate(model.method.view_pairs)
            if batched_inputs[0].get("pairs") and index in pair
        ]  # pairs that share boxes with this view, and its place in them
        if shown:
            pairs = [x["pairs"] for x in batched_inputs]
            self.boxes = stack(torch.cat([p[i]["boxes"][side] for i, side in shown]) for p in pairs)
            # Boxes are drawn for each pair anew: an id counts within its pair only.
            self.box_ids = stack(
                torch.cat([_in_pair(p[i]["ids"], i) for i, _ in shown]) for p in pairs
            )

    @property
    def images(self) -> torch.Tensor:
        """N x 3 x S x S, normalised as the detector does."""
        return self.online.images

    @functools.cached_property
    def online(self) -> Encoding:
        """By the trunk that learns."""
        return self.encode(self.pixels)

    @functools.cached_property
    def momentum(self) -> Encoding:
        """By its momentum twin."""
        return self._encoding(self.model.trunk_twin, self.images, learns=False)

    def encode(self, pixels: torch.Tensor) -> Encoding:
        """Another picture, N x 3 x S x S in 0..255, through the trunk that learns."""
        return self._encoding(self.model.trunk, self.model.normalize(pixels), self._learns)

    def _encoding(self, trunk: Trunk, images: torch.Tensor, learns: bool) -> Encoding:
        return Encoding(trunk, images, learns, fpn="fpn" in self.model.method.reaches)


def _in_pair(ids: torch.Tensor, pair: int) -> torch.Tensor:
    return torch.where(ids < 0, -1, ids + (pair << 32))


@META_ARCH_REGISTRY.register()
class PretextModel(nn.Module):
    """A Detectron2 meta-architecture that trains a :class:`Trunk` on views of unlabelled photos.

    What is contrasted with what is up to its ``method``. The trainer loads weights into ``trunk``,
    starts the twins from what learns, moves them each step, sets schedules, precision and norms,
    and hands ``trunk`` off.
    """

    @configurable
    def __init__(
        self,
        *,
        trunk: Trunk,
        method: PretextMethod,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        self.trunk, self.method = trunk, method
        if method.uses_twin:
            self.trunk_twin = copy.deepcopy(trunk).requires_grad_(False)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        trunk = Trunk(**Trunk.from_config(cfg, view_size=cfg.SSL.INPUT.VIEW_SIZE))
        method = build_method(cfg, trunk)
        trained = [part for part in cfg.SSL.TRAIN if part in method.reaches]
        if not trained:
            raise D2SSLError(
                f"SSL.TRAIN {', '.join(cfg.SSL.TRAIN)}: {type(method).__name__} trains "
                f"{', '.join(method.reaches)} only; name one of them"
            )
        trunk.train_only(trained)
        return {
            "trunk": trunk,
            "method": method,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: List[dict]) -> Dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: one dict a photo, as :class:`~d2ssl.data.mapper.PretextMapper` and the
                loader make them.
        Returns:
            the method's losses, by name.
        """
        return self.method(self.see(batched_inputs))

    def see(self, batched_inputs: List[dict]) -> List[ViewBatch]:
        """The views of a batch, each encoded when a method first asks for it."""
        count = len(batched_inputs[0]["views"])
        return [ViewBatch(self, batched_inputs, index) for index in range(count)]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """0..255 -> what the detector's own normalisation makes of it, channels last."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return (pixels - self.pixel_mean) / self.pixel_std

    def twins(self) -> List[Tuple[nn.Module, nn.Module]]:
        """Pairs (module that learns, its momentum twin)."""
        pairs = [(self.trunk, self.trunk_twin)] if self.method.uses_twin else []
        for module in self.method.modules():
            if isinstance(module, PretextMethod):
                pairs += module.twins()
        return pairs

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
        pairs = [
            (q, p)
            for online, twin in self.twins()
            for p, q in zip(online.parameters(), twin.parameters())
            if p.requires_grad
        ]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - momentum)

    def parameter_parts(self) -> Dict[str, List[nn.Module]]:
        """Everything that learns, by the names under ``SSL.SOLVER.LR_FACTOR``."""
        parts = {name.upper(): modules for name, modules in self.trunk.parts().items()}
        return {**parts, "HEADS": [self.method]}
