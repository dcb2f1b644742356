"""What all pretext methods share: a method's own file says only what is contrasted with what."""

import copy
from typing import Dict, List, Sequence, Tuple

import torch
from fvcore.common.registry import Registry
from torch import nn

from d2ssl.data.views import View
from d2ssl.errors import D2SSLError
from d2ssl.modeling.units import Comparison, Units, WholeImage

PRETEXT_REGISTRY = Registry("PRETEXT")
PRETEXT_REGISTRY.__doc__ = "Pretext methods, by the names that SSL.METHOD and SSL.METHODS take."


class PretextMethod(nn.Module):
    """Heads and a loss on views of photos that a trunk has encoded.

    A subclass is ``@configurable`` with ``from_config(cls, cfg, trunk)``, and turns the views into
    a dict of losses (:meth:`forward`). Momentum twins of its heads are made by :meth:`add_twin`;
    it sets ``uses_twin`` if it asks for the trunk's.

    Args:
        views: what the mapper draws of each photo.
        units: what is compared; decides what else the mapper must add (``needs``) and which parts
            of the trunk learn (``reaches``).

    Attributes:
        view_pairs: which views are compared, by index.
        embedding: the rows that were last compared, N x D, for the collapse meter; None where
            nothing can collapse.
        loss_range: least and largest value that the sum of the losses can take.
        needs_others: it learns only by telling a photo from others; from one alone, nothing.
    """

    kind: type = WholeImage  # of units
    view_pairs: Sequence[Tuple[int, int]] = ((0, 1),)
    uses_twin: bool = False
    needs_others: bool = False
    loss_range: Tuple[float, float]

    def __init__(self, *, views: Sequence[View], units: Units):
        super().__init__()
        self.views, self.units = list(views), units
        self.needs, self.reaches = units.needs, units.reaches
        self.embedding: torch.Tensor = None
        self._twins: Dict[str, str] = {}
        self.num_views = 1 + max(map(max, self.view_pairs), default=0)
        if self.num_views > len(self.views):
            raise D2SSLError(
                f"{type(self).__name__} needs {self.num_views} views of a photo and is given "
                f"{len(self.views)}"
            )

    @classmethod
    def from_config(cls, cfg, trunk) -> Dict:
        return {
            "views": cls.draws(cfg),
            "units": cls.kind.from_config(cfg, trunk),
            "hidden_dim": cfg.SSL.HEAD.HIDDEN_DIM,
            "out_dim": cfg.SSL.HEAD.OUT_DIM,
        }

    @classmethod
    def draws(cls, cfg) -> List[View]:
        """The views of a photo; here two crops, drawn alike."""
        return [view_from_cfg(cfg, cfg.SSL.INPUT.VIEW_SIZE, crop=True, blur_p=0.5)] * 2

    @classmethod
    def queue_cost(cls, cfg) -> int:
        """Similarities of one photo with one photo of a queue; 0 for a method without one."""
        return 0

    def forward(self, views) -> Dict[str, torch.Tensor]:
        """
        Args:
            views: a :class:`~d2ssl.modeling.pretext_model.ViewBatch` for each of ``self.views``.
        """
        raise NotImplementedError

    def encodings(self, views) -> List:
        """Every :class:`~d2ssl.modeling.pretext_model.Encoding` by the trunk that learns that the
        losses are taken on: what its norms will see."""
        return [view.online for view in views]

    def pictures(self, views) -> List[Tuple[str, torch.Tensor]]:
        """What to look at of the views: captions, and for each N x 3 x S x S uint8 in the config's
        colour order. Only a method that makes pictures has any."""
        return []

    def add_twin(self, name: str) -> None:
        """Give ``self.<name>`` a momentum twin ``self.<name>_twin`` without gradients."""
        twin = copy.deepcopy(getattr(self, name)).requires_grad_(False)
        setattr(self, f"{name}_twin", twin)
        self._twins[name] = f"{name}_twin"

    def twins(self) -> List[Tuple[nn.Module, nn.Module]]:
        """Pairs (head that learns, its momentum twin)."""
        return [(getattr(self, a), getattr(self, b)) for a, b in self._twins.items()]

    def compare(self, a, b) -> Comparison:
        """Which rows of two views are the same, and which different: N x R x R bool each."""
        return self.units.compare(a, b)

    def online_rows(self, view) -> torch.Tensor:
        """Projected rows of a view, with gradient: N x R x D."""
        return apply_head(self.projector, self.units.rows(view.online, view))

    @torch.no_grad()
    def momentum_rows(self, view) -> torch.Tensor:
        """The same by the momentum twins, without gradient."""
        return apply_head(self.projector_twin, self.units.rows(view.momentum, view))


def apply_head(head: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A head for vectors on every row of every photo: N x R x C -> N x R x D."""
    return head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


def view_from_cfg(cfg, size: int, crop: bool, blur_p: float, **changes) -> View:
    """A view as ``cfg.SSL.INPUT`` wants it; solarizing and cut-outs are for cropped views only."""
    options = cfg.SSL.INPUT
    fields = dict(
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
    return View(**{**fields, **changes})
