"""How large the same objects appear in a photo, in fine-tuning, and in the views of pretraining.

The size of an object is sqrt(area of its box) in pixels, as in the pyramid's own rule.
"""

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes

from d2ssl.data.views import View

LEVELS = (2, 3, 4, 5)  # of the pyramid that Mask R-CNN pools boxes from
CANONICAL_SIZE = 224  # an object of this size is pooled from level 4 (Lin et al., CVPR 2017)


def finetune_scale(sizes: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """
    N factors from pixels of photos to pixels of what a detector is tested on.

    Args:
        sizes: N x 2 height, width of the photos.
        min_size, max_size: INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST; 0: photos are not scaled.
    """
    if not min_size:
        return np.ones(len(sizes))
    shape = T.ResizeShortestEdge.get_output_shape
    scaled = [shape(int(h), int(w), min_size, max_size) for h, w in sizes]
    return np.sqrt(np.reshape(scaled, (-1, 2)).prod(1) / sizes.prod(1))


def view_scales(view: View, sizes: np.ndarray, draws: int = 16) -> np.ndarray:
    """
    Factors from pixels of photos to pixels of a view of them, N x ``draws``.

    Args:
        sizes: N x 2 height, width.
        draws: crops of each photo, whose shares of it are spread evenly as they are drawn.
    """
    low, high = view.crop_scale or (1.0, 1.0)
    shares = low + (high - low) * (np.arange(draws) + 0.5) / draws
    return view.size / np.sqrt(sizes.prod(1)[:, None] * shares)


def fpn_levels(objects: np.ndarray, canonical_size: int = CANONICAL_SIZE) -> np.ndarray:
    """The level, 2 to 5, that Detectron2 pools each of N objects of these sizes from."""
    sides = torch.as_tensor(np.ravel(objects), dtype=torch.float32)
    boxes = Boxes(torch.stack([torch.zeros_like(sides)] * 2 + [sides] * 2, dim=1))
    levels = assign_boxes_to_levels([boxes], LEVELS[0], LEVELS[-1], canonical_size, 4)
    return levels.numpy() + LEVELS[0]
