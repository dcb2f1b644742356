"""Regions of a photo, found without labels: what the cells of a view are grouped by.

A region map is h x w uint8 and spans the whole photo, whatever its own size: labels 0 to R-1. Where
it may come from is named by one string:

- ``superpixels``: segments of Felzenszwalb & Huttenlocher (IJCV 2004), the masks of DetCon (Henaff
  et al., "Efficient Visual Pretraining with Contrastive Detection", ICCV 2021), the smallest merged
  until R are left;
- ``kmeans``: k-means of colour and place, in the distance of SLIC (Achanta et al., PAMI 2012);
- ``grid``: rectangles of equal size, which know nothing of the photo (DetCon's simplest masks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np

from d2ssl.data.photos import map_photos, shrink
from d2ssl.data.selective_search import Regions, segments

LONG_SIDE = 128  # of a region map, in px: a view of 512 px has as many cells on P2


def attach_regions(
    dataset_dicts: list[dict],
    source: str,
    num: int,
    read_photo: Callable[[str], np.ndarray],
    num_workers: int = 2,
) -> list[dict]:
    """Copies of the dataset dicts with ``regions``, a region map of at most ``num`` labels.

    The same photo always gets the same map.

    Args:
        dataset_dicts: Detectron2's standard dicts (file_name, height, width).
        source: one of ``config.REGION_SOURCES``.
        num: 1 to 256.
        read_photo: path -> HxWx3 uint8 RGB. Must be picklable if ``num_workers`` > 0.
        num_workers: processes; 0: this one.

    Raises:
        D2SSLError: what ``read_photo`` raises.
    """
    if source == "grid":
        maps = [grid_regions(d["height"], d["width"], num) for d in dataset_dicts]
    else:
        find = {"superpixels": superpixels, "kmeans": kmeans_regions}[source]
        find = partial(_regions_of, read_photo=read_photo, find=find, num=num)
        maps = map_photos(find, [d["file_name"] for d in dataset_dicts], source, num_workers)
    return [{**d, "regions": regions} for d, regions in zip(dataset_dicts, maps)]


def _regions_of(file: str, read_photo: Callable, find: Callable, num: int) -> np.ndarray:
    return find(shrink(read_photo(file), LONG_SIDE), num)


def grid_regions(height: int, width: int, num: int) -> np.ndarray:
    """At most ``num`` equal rectangles, about square in a height x width photo; a pixel each."""
    rows = min(num, max(1, round(np.sqrt(num * height / width))))
    columns = num // rows
    return np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)


def superpixels(image: np.ndarray, num: int) -> np.ndarray:
    """At most ``num`` connected regions of an HxWx3 uint8 RGB image: HxW uint8.

    The smallest of Felzenszwalb's segments joins its most similar neighbour, in colour, texture,
    size and fill, until ``num`` are left.
    """
    labels = segments(image)
    regions = Regions(image, labels)
    region_of = np.arange(regions.count)  # for each segment
    while regions.alive.sum() > num:
        alive = np.flatnonzero(regions.alive)
        smallest = alive[regions.size[alive].argmin()]
        others = sorted(regions.neighbours[smallest])
        nearest = others[regions.similarity(smallest, others).argmax()]
        merged = (region_of == smallest) | (region_of == nearest)
        region_of[merged] = regions.merge(smallest, nearest)
    return _renumbered(region_of[labels])


def kmeans_regions(image: np.ndarray, num: int, compactness: float = 20.0) -> np.ndarray:
    """At most ``num`` clusters of the pixels of an HxWx3 uint8 RGB image: HxW uint8.

    They begin as a grid, so that nothing is random, and may be of several parts. ``compactness``:
    a step as wide as a grid cell counts as much as this many units of CIE Lab.
    """
    height, width = image.shape[:2]
    grid = cv2.resize(
        grid_regions(height, width, num), (width, height), interpolation=cv2.INTER_NEAREST
    )
    start = _renumbered(grid)
    if not start.any():  # OpenCV refuses to cluster a single pixel
        return start
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    place = np.indices((height, width)) * compactness / np.sqrt(height * width / num)
    pixels = np.dstack([lab, *place]).astype(np.float32).reshape(-1, 5)
    stop = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 20, 0.1)
    labels = start.astype(np.int32).reshape(-1, 1)
    _, labels, _ = cv2.kmeans(
        pixels, int(start.max()) + 1, labels, stop, 1, cv2.KMEANS_USE_INITIAL_LABELS
    )
    return labels.reshape(height, width).astype(np.uint8)


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """The same map with labels 0 to R-1, none left out, as uint8."""
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint8)


def regions_in_view(
    regions: np.ndarray, window: np.ndarray, photo_shape: Sequence[int], cells: int
) -> np.ndarray:
    """The label at each cell's centre, cells x cells int64.

    Args:
        regions: h x w region map.
        window: of the view in the photo, see :func:`d2ssl.data.views.window_of`.
        photo_shape: (height, width, ...) of the photo that the window is in pixels of.
    """
    left, top, right, bottom = window
    steps = (np.arange(cells) + 0.5) / cells
    rows = (top + (bottom - top) * steps) * regions.shape[0] / photo_shape[0]
    columns = (left + (right - left) * steps) * regions.shape[1] / photo_shape[1]
    return regions[np.ix_(rows.astype(int), columns.astype(int))].astype(np.int64)
