"""Box retrieval: a box must find itself in another view, among the boxes of all photos.

Pairs of views of each held-out photo are drawn once, from a fixed seed, and so are the boxes that
both show; every network is asked about the same ones. A network that tells things apart whatever
their place, size and colours in the view finds many; one that maps everything to the same vector
finds as many as chance would.
"""

import copy
import math
import os
import statistics
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Boxes
from torch.nn.functional import normalize
from torchvision.ops import nms, roi_align

from d2ssl.data.build import load_dicts, load_photos, with_proposals
from d2ssl.data.loader import random_state
from d2ssl.data.mapper import to_tensor
from d2ssl.data.photos import PhotoStore
from d2ssl.data.sampling import evenly
from d2ssl.data.views import View, draw_view, paired_boxes, photo_side
from d2ssl.errors import D2SSLError
from d2ssl.modeling import norm
from d2ssl.modeling.trunk import Trunk

# How the two views differ, whatever the methods trained on. Colours are always shifted and often
# lost: by its mean colour alone, a random network would find many a box.
AUGMENTATION = {
    "crop_scale": (0.5, 1.0),
    "flip": 0.5,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "jitter_p": 1.0,
    "gray": 0.2,
    "blur_p": 0.5,
    "solarize_p": 0.0,
}
MAX_PHOTOS = 200  # held-out photos, spread evenly over the set
DRAWS = 4  # pairs of views of each photo; top-1 is their mean, as of few photos one would be noise
MAX_BOXES = 8  # of one photo
MAX_IOU = 0.5  # of two boxes of one photo, in either view: different boxes show different things
MIN_SIDE = 1 / 8  # of a box, as a share of the view's side
MIN_VISIBLE = 0.5  # share of a box that each view must show
SEED = 0  # of the views, not of the networks
BATCH = 32
TIE = 1e-12  # below the rounding of a sum in float64

Pair = Tuple[torch.Tensor, torch.Tensor]


def top1(query: torch.Tensor, key: torch.Tensor) -> float:
    """Share of rows of ``query`` that are more similar to their own row of ``key`` than to others.

    Similarity is the cosine, in float64. A tie is no hit, so equal vectors find nothing.

    Args:
        query, key: N x D, row i of both from the same box.
    """
    similarity = normalize(query.double(), dim=1) @ normalize(key.double(), dim=1).T  # N x N
    own = similarity.diagonal().clone()
    others = similarity.fill_diagonal_(-math.inf).amax(1)
    return float((own > others + TIE).double().mean())


def different_boxes(boxes_a: torch.Tensor, boxes_b: torch.Tensor) -> torch.Tensor:
    """Indices of up to MAX_BOXES boxes, first come first kept, no two with more than MAX_IOU.

    Args:
        boxes_a, boxes_b: N x 4 XYXY, the same boxes in two views.
    """
    first_is_best = -torch.arange(len(boxes_a), dtype=torch.float32)
    kept = nms(boxes_a, first_is_best, MAX_IOU)
    kept = kept[nms(boxes_b[kept], first_is_best[kept], MAX_IOU)]
    return kept[:MAX_BOXES]


class _Draw:
    """A pair of views of each of N photos: ``views``, a tensor N x 3 x S x S for each of the two,
    and ``boxes``, for each of the two a list of N tensors K_i x 4."""

    def __init__(self, *drawn: Tuple[Pair, Pair]):
        images, boxes = zip(*drawn)
        self.views = [torch.stack(side) for side in zip(*images)]
        self.boxes = [list(side) for side in zip(*boxes)]
        self.num_boxes = sum(map(len, self.boxes[0]))


class BoxRetrieval:
    """The task, to be set to any number of trunks: ``BoxRetrieval(cfg, names)(trunk)``.

    Args:
        cfg: the user's config. Views have side ``SSL.INPUT.VIEW_SIZE``, boxes come from
            ``SSL.PROPOSALS``, norm statistics from ``SSL.DATASETS``.
        heldout: names of the data sets whose photos are compared.

    Raises:
        D2SSLError: no photo, fewer than two boxes, or a photo that is also trained on.
    """

    def __init__(self, cfg, heldout: Sequence[str], augmentation=None):
        if not heldout:
            raise D2SSLError("no held-out photos; name a data set in --heldout or DATASETS.TEST")
        self.heldout = list(heldout)
        self._cfg = cfg
        self._view = View(cfg.SSL.INPUT.VIEW_SIZE, **(augmentation or AUGMENTATION))
        self._store = PhotoStore(photo_side([self._view]))

        training = load_photos(cfg.SSL.DATASETS)
        load = load_dicts if cfg.SSL.PROPOSALS.SOURCE == "annotations" else load_photos
        photos = with_proposals(cfg, evenly(load(heldout), MAX_PHOTOS))
        _refuse_trained_on(photos, training)
        self._store.preload(photo["file_name"] for photo in photos)
        self.draws = [
            _Draw(*(self._draw(photo, draw, i) for i, photo in enumerate(photos)))
            for draw in range(DRAWS)
        ]
        self.num_photos = len(photos)
        counts = [draw.num_boxes for draw in self.draws]
        if min(counts) < 2:
            raise D2SSLError(
                f"{', '.join(heldout)}: {min(counts)} boxes of all photos are seen in two views; "
                "give more photos, or other SSL.PROPOSALS"
            )
        self.num_boxes = statistics.fmean(counts)  # among which one is to be found
        self.chance = statistics.fmean(1 / count for count in counts)
        training = evenly(training, cfg.SSL.CALIBRATION_PHOTOS)
        self._training = torch.stack([self._draw(d, 0, i)[0][0] for i, d in enumerate(training)])

    def _draw(self, photo: dict, *key: int) -> Tuple[Pair, Pair]:
        """Two views (3 x S x S uint8) and K x 4 boxes in each; K is 0 without proposals."""
        size, image = self._view.size, self._store.get(photo["file_name"])
        proposals = photo.get("proposal_boxes", np.zeros((0, 4)))
        # The photo in memory is a scaled copy of the one that the boxes were found on.
        scale = np.divide(image.shape[1::-1], (photo["width"], photo["height"]))
        with random_state(SEED, 3, *key):  # 3: apart from the keys of training
            (image_a, to_a), (image_b, to_b) = (draw_view(self._view, image) for _ in range(2))
            *boxes, ids = paired_boxes(
                proposals * np.tile(scale, 2),
                to_a,
                to_b,
                size,
                size,
                k=max(1, len(proposals)),
                min_size=MIN_SIDE * size,
                jitter=0.0,
                min_visible=MIN_VISIBLE,
            )
        # Each proposal that both views show stands there once, then they repeat; where none is
        # shown, the row is no proposal.
        count = len(np.unique(ids)) if 0 <= ids[0] < len(proposals) else 0
        a, b = (torch.from_numpy(x[:count]) for x in boxes)
        kept = different_boxes(a, b)
        images = tuple(to_tensor(x, self._cfg.INPUT.FORMAT) for x in (image_a, image_b))
        return images, (a[kept], b[kept])

    @torch.no_grad()
    def __call__(self, trunk: Trunk) -> Dict[str, float]:
        """Top-1, 0 to 1: ``fpn``, boxes as the detector pools them from the pyramid, and ``res5``,
        from the last stage of the ResNet, for what a method leaves of the FPN untrained.

        The trunk is not changed. Its norms get statistics measured on views of the training
        photos, as those of its training may lag behind, and an untrained one has none.
        """
        trunk = copy.deepcopy(trunk)
        batches = self._training.tensor_split(math.ceil(len(self._training) / BATCH))
        norm.recalibrate(trunk.backbone, lambda x: trunk(self._normalised(trunk, x)), list(batches))
        trunk.eval()
        found = []
        for draw in self.draws:
            a, b = (self._features(trunk, *side) for side in zip(draw.views, draw.boxes))
            found.append({name: top1(a[name], b[name]) for name in a})
        return {name: statistics.fmean(top1s[name] for top1s in found) for name in found[0]}

    def _normalised(self, trunk: Trunk, images: torch.Tensor) -> torch.Tensor:
        device = next(trunk.parameters()).device
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (self._cfg.MODEL.PIXEL_MEAN, self._cfg.MODEL.PIXEL_STD)
        )
        return (images.to(device) - mean) / std

    def _features(self, trunk: Trunk, images, boxes) -> Dict[str, torch.Tensor]:
        """Feature of each box, the mean of its bins: {"fpn": K x 256, "res5": K x 2048}."""
        pooler = trunk.roi_heads.box_pooler
        stride = trunk.backbone.bottom_up.output_shape()["res5"].stride
        rows: Dict[str, list] = {"fpn": [], "res5": []}
        for first in range(0, len(images), BATCH):
            x = self._normalised(trunk, images[first : first + BATCH])
            shown = [b.to(x.device) for b in boxes[first : first + BATCH]]
            maps, size = trunk(x), pooler.output_size
            pooled = {
                "fpn": pooler([maps[p] for p in trunk.box_in_features], [Boxes(b) for b in shown]),
                "res5": roi_align(maps["res5"], shown, size, 1 / stride, aligned=True),
            }
            for name, bins in pooled.items():
                rows[name].append(bins.mean((2, 3)).cpu())
        return {name: torch.cat(parts) for name, parts in rows.items()}


def _refuse_trained_on(heldout: List[dict], training: List[dict]) -> None:
    seen = {os.path.realpath(d["file_name"]) for d in training}
    both = [d["file_name"] for d in heldout if os.path.realpath(d["file_name"]) in seen]
    if both:
        raise D2SSLError(
            f"{len(both)} of {len(heldout)} held-out photos are also in SSL.DATASETS, such as "
            f"{both[0]}; name other photos in --heldout or DATASETS.TEST"
        )
