"""BYOL (Grill et al., NeurIPS 2020): predict what a momentum encoder makes of another view."""

from detectron2.config import configurable
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

from d2ssl.losses.cosine import matched_cosine_loss
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod, apply_head, view_from_cfg


@PRETEXT_REGISTRY.register()
class BYOL(PretextMethod):
    """Rows of each view predict the momentum encoder's rows of the other; no negatives.

    Sec. 3.1, eq. 2; the two views differ in blur and solarization (table 6).
    """

    uses_twin = True

    @configurable
    def __init__(self, *, hidden_dim, out_dim, **kwargs):
        super().__init__(**kwargs)
        self.projector = BYOLProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.predictor = BYOLPredictionHead(out_dim, hidden_dim, out_dim)
        self.add_twin("projector")
        most = 4.0 * len(self.view_pairs)
        self.loss_range = (-most, most)

    @classmethod
    def draws(cls, cfg):
        size = cfg.SSL.INPUT.VIEW_SIZE
        return [
            view_from_cfg(cfg, size, crop=True, blur_p=1.0, solarize_p=0.0),
            view_from_cfg(cfg, size, crop=True, blur_p=0.1),
        ]

    def forward(self, views):
        views = views[: self.num_views]
        rows = [self.online_rows(view) for view in views]  # N x R x D each
        queries = [self.predict(z, view) for z, view in zip(rows, views)]
        keys = self.keys(views, rows)
        self.embedding = rows[-1].detach().flatten(0, 1)
        losses = {}
        for a, b in self.view_pairs:
            same, different = self.compare(views[a], views[b])
            there = self.contrast(queries[a], keys[b], same, different)
            back = self.contrast(queries[b], keys[a], same.mT, different.mT)
            losses[f"loss_v{a + 1}_v{b + 1}"] = there + back
        return losses

    def predict(self, rows, view):
        """What the other view's rows should be: N x R x D."""
        return apply_head(self.predictor, rows)

    def keys(self, views, rows):
        """The targets of each view: N x R x D each."""
        return [self.momentum_rows(view) for view in views]

    def contrast(self, query, key, same, different):
        """The loss of N x R x D rows with the other view's, and N x R x R masks."""
        return matched_cosine_loss(query, key, same)
