"""SoCo: Selective Object COntrastive learning (Wei et al., NeurIPS 2021)."""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead

from d2ssl.losses.cosine import matched_cosine_loss
from d2ssl.modeling.methods.base import PretextMethod, view_from_cfg


@META_ARCH_REGISTRY.register()
class SoCo(PretextMethod):
    """The same object in two views gets the same box feature (BYOL on boxes, no negatives).

    Sec. 3: a whole-photo view V1, a cropped V2 and a small cropped V3; K proposals that both
    views of a pair (V1, V2), (V1, V3) show. Each box is pooled from the pyramid level that the
    detector's own pooler gives it, so an object is matched across levels as its size differs
    between views; bottom-up, FPN and box head all learn.
    """

    view_pairs = ((0, 1), (0, 2))
    loss_range = (-8.0, 8.0)

    @configurable
    def __init__(self, *, hidden_dim: int, out_dim: int, **kwargs):
        super().__init__(**kwargs)
        self.projector = BYOLProjectionHead(self.trunk.box_dim, hidden_dim, out_dim)
        self.predictor = BYOLPredictionHead(out_dim, hidden_dim, out_dim)
        self.add_twin("trunk")
        self.add_twin("projector")

    @classmethod
    def from_config(cls, cfg):
        head = cfg.SSL.HEAD
        return {
            **super().from_config(cfg),
            "hidden_dim": head.HIDDEN_DIM,
            "out_dim": head.OUT_DIM,
        }

    @classmethod
    def views(cls, cfg):
        size, small = cfg.SSL.INPUT.VIEW_SIZE, cfg.SSL.INPUT.SMALL_VIEW_SIZE
        return [
            view_from_cfg(cfg, size, crop=False, blur_p=1.0),
            view_from_cfg(cfg, size, crop=True, blur_p=0.1),
            view_from_cfg(cfg, small, crop=True, blur_p=0.1),
        ]

    def forward(self, batched_inputs):
        pairs = self.view_pairs
        queries, keys = [{} for _ in pairs], [{} for _ in pairs]
        for view in range(3):
            images = self.stack_view(batched_inputs, view)
            shown = [i for i, pair in enumerate(pairs) if view in pair]  # pairs with this view
            boxes = [
                torch.cat([x["pairs"][i]["boxes"][pairs[i].index(view)] for i in shown]).to(
                    images.device
                )
                for x in batched_inputs
            ]  # N x (len(shown) K x 4)
            z = self.projector(self.trunk.box_features(self.trunk(images), boxes))
            self._split(queries, self.predictor(z), shown, view, len(boxes))
            with torch.no_grad():
                twin = self.trunk_twin
                z_twin = self.projector_twin(twin.box_features(twin(images), boxes))
            self._split(keys, z_twin, shown, view, len(boxes))
        self.embedding = z.detach()

        losses = {}
        for i, (a, b) in enumerate(pairs):
            ids = torch.stack([x["pairs"][i]["ids"] for x in batched_inputs]).to(z.device)  # N x K
            match = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]  # N x K x K
            losses[f"loss_v{a + 1}_v{b + 1}"] = matched_cosine_loss(
                queries[i][a], keys[i][b], match
            ) + matched_cosine_loss(queries[i][b], keys[i][a], match)
        return losses

    @staticmethod
    def _split(out, rows, shown, view, batch_size) -> None:
        """Rows of all boxes of a view -> ``out[pair][view]``, N x K x D."""
        rows = rows.view(batch_size, len(shown), -1, rows.shape[-1])
        for j, i in enumerate(shown):
            out[i][view] = rows[:, j]
