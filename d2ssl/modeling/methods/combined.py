"""Several pretext methods at once, on shared views and one trunk."""

from typing import Sequence, Tuple

from detectron2.config import configurable
from torch import nn

from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod


class Combined(PretextMethod):
    """A weighted sum of methods; each view goes through the trunk once for all of them.

    They share the views of the member that draws most. ``SSL.METHODS`` names members and weights;
    a subclass may fix them in ``members``.
    """

    members: Sequence[Tuple[str, float]] = ()

    @configurable
    def __init__(self, *, methods: Sequence[PretextMethod], weights: Sequence[float]):
        nn.Module.__init__(self)
        self.embedding = None  # each member has its own, and its own twins
        self.methods, self.weights = nn.ModuleList(methods), list(weights)
        self.views = max((m.views for m in methods), key=len)
        self.view_pairs = tuple(dict.fromkeys(p for m in methods for p in m.view_pairs))
        self.needs = frozenset().union(*(m.needs for m in methods))
        self.reaches = tuple(dict.fromkeys(p for m in methods for p in m.reaches))
        self.uses_twin = any(m.uses_twin for m in methods)
        bounds = [[w * x for x in m.loss_range] for m, w in zip(methods, weights)]
        self.loss_range = tuple(map(sum, zip(*bounds)))

    @classmethod
    def queue_cost(cls, cfg):
        members = cls.members or cfg.SSL.METHODS
        return sum(PRETEXT_REGISTRY.get(name).queue_cost(cfg) for name, _ in members)

    @classmethod
    def from_config(cls, cfg, trunk):
        members = cls.members or cfg.SSL.METHODS
        names = [name for name, _ in members]
        if len(set(names)) < len(names) or any(weight <= 0 for _, weight in members):
            raise D2SSLError(
                f"SSL.METHODS {cfg.SSL.METHODS}: name each method once, with a weight above 0"
            )
        methods = [PRETEXT_REGISTRY.get(name)(cfg, trunk) for name, _ in members]
        return {"methods": methods, "weights": [float(weight) for _, weight in members]}

    def forward(self, views):
        losses = {}
        for method, weight in zip(self.methods, self.weights):
            name = type(method).__name__.lower()
            for part, loss in method(views).items():
                losses[f"loss_{name}_{part.removeprefix('loss_')}"] = weight * loss
        return losses

    def encodings(self, views):
        return [encoding for method in self.methods for encoding in method.encodings(views)]

    def pictures(self, views):
        # By caption: the original is shown once.
        return list({name: x for m in self.methods for name, x in m.pictures(views)}.items())

    def twins(self):
        return []
