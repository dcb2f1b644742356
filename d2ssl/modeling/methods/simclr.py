"""SimCLR (Chen et al., ICML 2020): a photo is known among the others of its batch."""

import torch
from detectron2.config import configurable
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.utils.dist import eye_rank

from d2ssl.losses.contrastive import cosines, info_nce_bound, info_nce_loss
from d2ssl.modeling.gather import gather_rows
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod


@PRETEXT_REGISTRY.register()
class SimCLR(PretextMethod):
    """Rows of both views against each other and against all rows of the batch, no twin, no queue.

    Eq. 1 and algorithm 1. Another copy of the same photo in the batch is no negative.
    """

    needs_others = True

    @configurable
    def __init__(self, *, hidden_dim, out_dim, temperature: float, batch_rows: int, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.projector = SimCLRProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.loss_range = (0.0, info_nce_bound(batch_rows, temperature))

    @classmethod
    def from_config(cls, cfg, trunk):
        rows = 2 * cls.kind.count(cfg) * cfg.SOLVER.IMS_PER_BATCH
        return {
            **super().from_config(cfg, trunk),
            "temperature": cfg.SSL.TEMPERATURE,
            "batch_rows": rows,
        }

    def forward(self, views):
        a, b = views[:2]
        rows = torch.cat([self.online_rows(a), self.online_rows(b)], dim=1)  # N x 2R x D
        self.embedding = rows.detach().flatten(0, 1)
        same, different = self._compare_both(a, b)  # N x 2R x 2R
        present = torch.cat([self.units.present(v).expand(len(rows), same.shape[1] // 2)
                             for v in (a, b)], dim=1)  # N x 2R  # fmt: skip

        keys, photos = gather_rows(rows.float()), gather_rows(a.photos)  # P x 2R x D, P
        own = eye_rank(len(rows)).to(rows.device)[:, None, :, None]  # N x 1 x P x 1
        other = (a.photos[:, None] != photos)[:, None, :, None] & gather_rows(present)
        positive = own & same[:, :, None]  # N x 2R x P x 2R
        negative = other | own & different[:, :, None]
        similarity = cosines(rows, keys.flatten(0, 1))  # N x 2R x (P * 2R)
        loss = info_nce_loss(similarity, positive.flatten(2), negative.flatten(2), self.temperature)
        return {"loss_contrast": loss}

    def _compare_both(self, a, b):
        """Rows of both views with rows of both views; within one view none are the same."""
        same, different = self.compare(a, b)
        none = torch.zeros_like(same)
        same = torch.cat([torch.cat([none, same], 2), torch.cat([same.mT, none], 2)], 1)
        within = [self.compare(v, v)[1] for v in (a, b)]
        different = torch.cat(
            [torch.cat([within[0], different], 2), torch.cat([different.mT, within[1]], 2)], 1
        )
        return same, different
