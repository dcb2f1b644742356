"""Views of a photo: what is drawn, and where a box of the photo lies in each view.

Every view is made by Detectron2 transforms, so that boxes, masks and points follow the pixels.
Coordinates are continuous, as Detectron2's: a photo of width W reaches from x = 0 to x = W, and a
box is XYXY. All randomness of a view is drawn from ``np.random``, which the loader seeds per item;
that of its holes from ``random``, which it seeds as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from lightly.models.utils import random_block_mask_image

from d2ssl.data import photometric

HOLE_GRID = 32  # holes are made of a view's 1/32 parts, which are whole pixels at any view size


class RandomResizedCrop(T.Augmentation):
    """A crop of random area and aspect ratio, resized to size x size px.

    Its area is U(scale) of the photo's, w/h log-uniform in ``ratio`` (Szegedy et al., CVPR 2015).
    A crop that does not fit is drawn anew, up to ten times; then it is the largest that keeps to
    ``ratio``, as most are of a panorama. Where it lies is random in either case.
    """

    def __init__(self, size: int, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        return resized_crop(*self._draw(height, width), height, width, self.size)

    def _draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = np.random.uniform(*self.scale) * height * width
            aspect = np.exp(np.random.uniform(*np.log(self.ratio)))
            w, h = int(round(np.sqrt(area * aspect))), int(round(np.sqrt(area / aspect)))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = max(1, min(width, round(height * self.ratio[1])))
            h = max(1, min(height, round(width / self.ratio[0])))
        x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
        return int(x), int(y), w, h


def resized_crop(x, y, w, h, height: int, width: int, size: int) -> T.TransformList:
    """A window of a height x width photo, at size x size px."""
    return T.TransformList(
        [
            T.CropTransform(x, y, w, h, width, height),
            # Bilinear over the area that one new pixel covers: no aliasing when it shrinks.
            T.ResizeTransform(h, w, size, size),
        ]
    )


class ResizeTo(T.Augmentation):
    """The whole photo at size x size px; its aspect ratio is not kept."""

    def __init__(self, size: int):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        return T.ResizeTransform(*image.shape[:2], self.size, self.size)


@dataclass(frozen=True)
class View:
    """What one view of a photo is. The defaults are those of SoCo's cropped views.

    size: side in px, a multiple of 32. crop_scale: range of the crop's share of the photo's area;
    None: the whole photo. ratio: range of the crop's w/h. flip: probability. jitter: strength of
    brightness, contrast, saturation and hue, applied with probability jitter_p. gray, blur_p,
    solarize_p: probabilities. plane_shift: each colour plane moves by up to this x 255; 0: off.
    cutout_p: probability per matched box, see :func:`cut_out`; :func:`draw_view` knows no boxes and
    leaves it to its caller. of: index of an earlier view; this one then shows the same window of
    the photo at its own size, with a flip and colours of its own, and crop_scale and ratio say
    nothing.
    """

    size: int
    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray: float = 0.2
    blur_p: float = 0.1
    solarize_p: float = 0.2
    plane_shift: float = 0.0
    cutout_p: float = 0.0
    of: int | None = None

    @functools.cache  # augmentations hold no state, and building them for each photo costs time
    def geometric(self) -> list[T.Augmentation]:
        """What moves pixels."""
        if self.crop_scale is None:
            window = ResizeTo(self.size)
        else:
            window = RandomResizedCrop(self.size, self.crop_scale, self.ratio)
        return [window, T.RandomFlip(self.flip)]

    @functools.cache
    def photometric(self) -> list[T.Augmentation]:
        """What changes them in place; for RGB images."""
        return [
            T.RandomApply(photometric.ColorJitter(*self.jitter), self.jitter_p),
            T.RandomApply(T.ColorTransform(photometric.grayscale), self.gray),
            T.RandomApply(photometric.PlaneShift(self.plane_shift), float(self.plane_shift > 0)),
            T.RandomApply(photometric.RandomBlur(), self.blur_p),
            T.RandomApply(T.ColorTransform(photometric.solarize), self.solarize_p),
        ]


def photo_side(views: Sequence[View]) -> int:
    """Short side in px of a photo whose smallest square crop is still not enlarged for a view."""
    shares = []  # of the photo's area that a view shows, at least
    for view in views:
        least = 1.0 if view.crop_scale is None else min(view.crop_scale)
        shares.append(least if view.of is None else shares[view.of])
    return math.ceil(max(view.size / math.sqrt(share) for view, share in zip(views, shares)))


def draw_views(
    views: Sequence[View], photo: np.ndarray
) -> list[tuple[np.ndarray, T.TransformList]]:
    """What :func:`draw_view` gives for each of a photo's views, in order."""
    drawn = []
    for view in views:
        window = None
        if view.of is not None:
            corners = window_of(drawn[view.of][1], views[view.of].size).reshape(2, 2)
            (x1, y1), (x2, y2) = np.sort(corners, axis=0).round().astype(int).tolist()
            window = resized_crop(x1, y1, x2 - x1, y2 - y1, *photo.shape[:2], view.size)
        drawn.append(draw_view(view, photo, window))
    return drawn


def draw_view(
    view: View, photo: np.ndarray, window: T.Transform | None = None
) -> tuple[np.ndarray, T.TransformList]:
    """Draw one view of a photo.

    Args:
        photo: HxWx3 uint8, RGB.
        window: photo -> view before its flip; None: drawn as the view says.

    Returns:
        image (size x size x 3 uint8, RGB, contiguous) and the geometric transforms, photo -> view.
    """
    drawn = T.AugInput(photo)
    drawn_window, flip = view.geometric()
    transforms = drawn.apply_augmentations([window or drawn_window, flip])
    drawn.image = np.ascontiguousarray(drawn.image)  # a flip only reverses the strides
    drawn.apply_augmentations(view.photometric())
    return np.ascontiguousarray(drawn.image), transforms


def apply_boxes(transforms: T.Transform, boxes: np.ndarray) -> np.ndarray:
    """Where Nx4 boxes of the photo lie in the view, as float64; not clipped to it.

    Same as ``transforms.apply_box``, but fast: two corners do where nothing is rotated.
    """
    corners = apply_points(transforms, np.asarray(boxes).reshape(-1, 2)).reshape(-1, 2, 2)
    return np.sort(corners, axis=1).reshape(-1, 4)  # a flip exchanges left and right


def apply_points(transforms: T.Transform, points: np.ndarray) -> np.ndarray:
    """Where Nx2 (x, y) points of the photo lie in the view, as float64.

    With ``transforms.inverse()``: where points of the view lie in the photo.
    """
    # A float copy: Detectron2's transforms work in place, and would round integer coordinates.
    return transforms.apply_coords(np.array(points, dtype=np.float64).reshape(-1, 2))


def window_of(transforms: T.Transform, size: int) -> np.ndarray:
    """What a size x size view shows: the x of its left edge, y of its top, x of its right and y of
    its bottom edge, 4 float64 in pixels of the photo.

    In a flipped view left > right. Nothing is rotated, so the centre of cell (i, j) of a map with
    h x w cells lies at x = left + (right - left) (j + 0.5) / w and
    y = top + (bottom - top) (i + 0.5) / h.
    """
    return apply_points(transforms.inverse(), [[0, 0], [size, size]]).reshape(4)


def clip(boxes: np.ndarray, size: int) -> np.ndarray:
    """The part of each Nx4 box that lies inside a size x size view; it may be empty."""
    return boxes.clip(0, size)


def visible_fraction(boxes: np.ndarray, size: int) -> np.ndarray:
    """N shares, 0 to 1, of the area of Nx4 boxes that lie inside a size x size view."""
    return _sides(clip(boxes, size)).prod(1) / _sides(boxes).prod(1).clip(1e-9)


def _sides(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2:] - boxes[:, :2]  # N x 2


def paired_boxes(
    proposals: np.ndarray,
    transforms_a: T.Transform,
    transforms_b: T.Transform,
    size_a: int,
    size_b: int,
    k: int = 4,
    min_size: float = 16.0,
    jitter: float = 0.1,
    jitter_p: float = 0.5,
    min_visible: float = 0.5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K boxes that two views of one photo share (SoCo, Wei et al., NeurIPS 2021).

    A proposal takes part if, clipped to each view, it has sides of at least ``min_size`` px there
    and at least ``min_visible`` of its area. At one half, both views show most of the same object;
    SoCo takes any overlap, and so also pairs the two far ends of one object.

    Args:
        proposals: Nx4 XYXY in pixels of the photo that the views were drawn from.
        transforms_a, transforms_b: photo -> view, from :func:`draw_view`.
        size_a, size_b: sides of the views in px.
        k: proposals are chosen without replacement, and repeated if there are fewer.
        jitter, jitter_p: with this probability a box of view a is shifted by up to this share of
            its sides and stretched by up to this share.

    Returns:
        boxes_a, boxes_b: Kx4 float32 XYXY in pixels of each view, row i matching row i; and ids:
        K int64, the row in ``proposals``. Where no proposal takes part, the box is what both views
        show of the photo, and ids are N. Where that too is smaller than ``min_size``, the boxes
        are the whole views and ids are -1: no match, to be masked in the loss.
    """
    moved = apply_boxes(transforms_a, proposals), apply_boxes(transforms_b, proposals)
    boxes_a, boxes_b = clip(moved[0], size_a), clip(moved[1], size_b)
    shared = np.ones(len(boxes_a), dtype=bool)
    for whole, part, size in ((moved[0], boxes_a, size_a), (moved[1], boxes_b, size_b)):
        shared &= _sides(part).min(1) >= min_size
        shared &= visible_fraction(whole, size) >= min_visible
    ids = np.random.permutation(np.flatnonzero(shared))[:k]
    if len(ids) == 0:
        return _shared_window(transforms_a, transforms_b, size_a, size_b, k, min_size, len(shared))
    ids = np.resize(ids, k).astype(np.int64)  # repeats them in turn
    boxes_a = clip(_jitter(boxes_a[ids], jitter, jitter_p), size_a)
    return boxes_a.astype(np.float32), boxes_b[ids].astype(np.float32), ids


def _jitter(boxes: np.ndarray, amount: float, p: float) -> np.ndarray:
    sides = _sides(boxes)
    moved = np.random.uniform(size=(len(boxes), 1)) < p
    corner = boxes[:, :2] + moved * np.random.uniform(-amount, amount, sides.shape) * sides
    sides = sides * (1 + moved * np.random.uniform(-amount, amount, sides.shape))
    return np.concatenate([corner, corner + sides], axis=1)


def _shared_window(transforms_a, transforms_b, size_a, size_b, k, min_size, free_id):
    views = [(transforms_a, size_a), (transforms_b, size_b)]
    corners = np.sort([window_of(*view).reshape(2, 2) for view in views], axis=1)
    low, high = corners[:, 0].max(0), corners[:, 1].min(0)
    boxes = [clip(apply_boxes(t, [*low, *high]), size) for t, size in views]
    if not ((low < high).all() and all(_sides(box).min() >= min_size for box in boxes)):
        boxes, free_id = [np.array([[0, 0, size, size]]) for _, size in views], -1
    boxes = [np.repeat(box, k, axis=0).astype(np.float32) for box in boxes]
    return (*boxes, np.full(k, free_id, dtype=np.int64))


def cut_out(image: np.ndarray, boxes: np.ndarray, fill, p: float = 0.5) -> np.ndarray:
    """Cover, with probability p for each box, a square part of it (SoCo's cutout).

    The square has U(0.1, 0.3) of the box's area and a centre uniform in the box; it may reach out
    of a narrow box, never out of the image.

    Args:
        image: HxWx3. It is not changed.
        boxes: Nx4 XYXY in pixels of the image.
        fill: value of the 3 planes; the pixel mean becomes 0 after normalisation.
    """
    image, fill = image.copy(), np.rint(fill)
    for x1, y1, x2, y2 in boxes:
        if np.random.uniform() < p:
            half = np.sqrt(np.random.uniform(0.1, 0.3) * (x2 - x1) * (y2 - y1)) / 2
            x, y = np.random.uniform(x1, x2), np.random.uniform(y1, y2)
            left, top = max(0, round(x - half)), max(0, round(y - half))
            image[top : max(0, round(y + half)), left : max(0, round(x + half))] = fill
    return image


def draw_holes(size: int, share: float, largest: float) -> torch.Tensor:
    """Squares at random places of a view, to be filled in (Pathak et al., "Context Encoders",
    CVPR 2016, sec. 3.3: random blocks).

    Args:
        size: side of the view in px, a multiple of 32.
        share: of the view's area that the squares cover together, at most; they may overlap. Not
            much is missing (0.249 of 0.25 with squares of a quarter) but where few places are left
            to find: 0.91 of 1, or 0.56 of 0.9 with the smallest squares.
        largest: side of the largest square as a share of the view's side; the others have at least
            half of it, but for those that fill what is left of ``share``.

    Returns:
        1 x size x size bool, True inside a hole.
    """
    side = max(1, int(min(largest, math.sqrt(share)) * HOLE_GRID))  # one alone is not too much
    holes = random_block_mask_image(
        (HOLE_GRID, HOLE_GRID),
        num_masks=round(share * HOLE_GRID**2),
        min_num_masks_per_block=max(1, side // 2) ** 2,
        max_num_masks_per_block=side**2,
        min_block_aspect_ratio=1.0,
    )
    scale = size // HOLE_GRID
    return holes.repeat_interleave(scale, 0).repeat_interleave(scale, 1)[None]
