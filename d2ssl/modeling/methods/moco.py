"""MoCo v2 (He et al., CVPR 2020; Chen et al., 2020): a queue of keys from a momentum encoder."""

import torch
from detectron2.config import configurable
from lightly.models.modules.heads import MoCoProjectionHead
from torch.nn import functional as F

from d2ssl.losses.contrastive import cosines, info_nce_bound, info_nce_loss
from d2ssl.modeling.gather import gather_rows
from d2ssl.modeling.methods.base import PRETEXT_REGISTRY, PretextMethod
from d2ssl.modeling.queue import KeyQueue


@PRETEXT_REGISTRY.register()
class MoCo(PretextMethod):
    """Rows of the first view against the momentum encoder's rows of the second, and a queue.

    He et al., eq. 1, with the head of v2. The batch's own keys enter the queue before the loss is
    taken: a photo never meets its own keys there, so for the others they are negatives from the
    first step on. Rows of the photo itself that surely show something else are negatives as well.

    Args:
        queue_photos: how many photos' keys the queue holds.
        keys_per_photo: rows of a photo that enter it, at most ``num_rows``.
        num_rows: rows of a photo.
        symmetric: the second view's rows are looked for in the first as well, and the loss is the
            mean of both ways. MoCo v2 goes one way; with few photos each view is worth using twice.
    """

    uses_twin = True
    needs_others = True

    @configurable
    def __init__(
        self, *, hidden_dim, out_dim, temperature: float, queue_photos: int, keys_per_photo: int,
        num_rows: int, symmetric: bool = True, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.temperature, self.keys_per_photo = temperature, keys_per_photo
        self.symmetric = symmetric
        self.projector = MoCoProjectionHead(self.units.dim, hidden_dim, out_dim)
        self.add_twin("projector")
        self.queue = KeyQueue(queue_photos * self.keys_per_photo, out_dim)
        self.loss_range = (0.0, info_nce_bound(num_rows + len(self.queue.keys), temperature))

    @classmethod
    def from_config(cls, cfg, trunk):
        return {
            **super().from_config(cfg, trunk),
            "temperature": cfg.SSL.TEMPERATURE,
            "queue_photos": cfg.SSL.QUEUE.SIZE,
            "keys_per_photo": cls.keys_of_a_photo(cfg),
            "num_rows": cls.kind.count(cfg),
            "symmetric": cfg.SSL.QUEUE.SYMMETRIC,
        }

    @classmethod
    def keys_of_a_photo(cls, cfg) -> int:
        """How many of its rows enter the queue."""
        return min(cfg.SSL.QUEUE.KEYS_PER_PHOTO, cls.kind.count(cfg))

    @classmethod
    def queue_cost(cls, cfg):
        ways = 2 if cfg.SSL.QUEUE.SYMMETRIC else 1
        return ways * cls.kind.count(cfg) * cls.keys_of_a_photo(cfg)

    def forward(self, views):
        a, b = views[:2]
        key = self.momentum_rows(b)  # N x R x D
        keys, present = self.enqueued(key, b)
        photos = torch.where(present, b.photos[:, None], -1)
        self.queue.push(F.normalize(keys.float(), dim=-1).flatten(0, 1), photos.flatten())
        loss = self._find(a, b, key)
        if self.symmetric:
            loss = (loss + self._find(b, a, self.momentum_rows(a))) / 2
        return {"loss_contrast": loss}

    def _find(self, a, b, key):
        """Rows of view ``a`` among the momentum encoder's rows of ``b`` and the queue."""
        query = self.online_rows(a)  # N x R x D
        self.embedding = query.detach().flatten(0, 1)
        same, different = self.compare(a, b)  # N x R x R
        others = self.queue.others(a.photos)[:, None].expand(-1, query.shape[1], -1)  # N x R x K
        similarity = torch.cat([cosines(query, key), cosines(query, self.queue.keys)], dim=2)
        positive = torch.cat([same, torch.zeros_like(others)], dim=2)
        negative = torch.cat([different, others], dim=2)
        return info_nce_loss(similarity, positive, negative, self.temperature)

    def enqueued(self, key, view):
        """What of a view's keys (N x R x D) enters the queue, N x keys_per_photo x D, and which of
        it is there, N x keys_per_photo bool: here rows drawn anew each time, so that negatives
        come from every place and level; the same of all photos, and in all processes."""
        drawn = torch.randperm(key.shape[1], device=key.device)[: self.keys_per_photo]
        chosen = gather_rows(drawn)[: len(drawn)]  # the first process's
        present = self.units.present(view).expand(key.shape[:2])
        return key[:, chosen], present[:, chosen]
