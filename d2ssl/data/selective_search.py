"""Selective search: class-agnostic boxes of whatever looks like one thing in a photo.

Uijlings et al., "Selective Search for Object Recognition", IJCV 2013: cut the photo into small
segments (Felzenszwalb & Huttenlocher, IJCV 2004), merge the two most similar neighbours again and
again, and keep the bounding box of every region that ever existed. It needs no labels, no weights
and no ``cv2.ximgproc``.
"""

import heapq

import cv2
import numpy as np

from d2ssl.data.photos import shrink

COLOUR_BINS = 25
ORIENTATIONS = 8
MAGNITUDES = 10


def selective_search(
    image: np.ndarray,
    scale: float = 100.0,
    sigma: float = 0.9,
    min_segment: int = 100,
    long_side: int = 400,
) -> np.ndarray:
    """Find boxes around the segments of a photo and around all merged groups of them.

    Args:
        image: HxWx3 uint8, RGB.
        scale: Felzenszwalb's preference for large segments. SoCo's 300 swallows small objects, 100
            is in Uijlings' own range. It, ``sigma`` and ``min_segment`` are meant for a photo whose
            long side is 500 px and are scaled to the copy in use, by area or by length.
        sigma: blur in px before the segmentation.
        min_segment: area of the smallest segment in px.
        long_side: the search runs on a copy no larger than this, which bounds its time.

    Returns:
        Nx4 float32 XYXY in pixels of ``image``, no two equal, in no particular order. N is at
        least 1.
    """
    small = shrink(image, long_side)
    labels = segments(small, scale, sigma, min_segment)
    boxes = np.unique(_merge(small, labels), axis=0).astype(np.float32)
    (height, width), (small_h, small_w) = image.shape[:2], small.shape[:2]
    return boxes * np.array([width / small_w, height / small_h] * 2, dtype=np.float32)


def segments(
    image: np.ndarray, scale: float = 100.0, sigma: float = 0.9, min_segment: int = 100
) -> np.ndarray:
    """Felzenszwalb's segments of an HxWx3 uint8 RGB image: HxW int64, numbered from 0.

    The parameters are those of :func:`selective_search`, for a long side of 500 px.
    """
    from skimage.segmentation import felzenszwalb  # slow import, and not every run needs it

    length = max(image.shape[:2]) / 500
    return felzenszwalb(
        image,
        scale=scale * length**2,
        sigma=sigma * length,
        min_size=max(4, round(min_segment * length**2)),
    )


def _merge(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Boxes of all regions, first the R segments and then the M merged ones: (R+M)x4 XYXY."""
    regions = Regions(image, labels)
    heap = []
    for region, others in enumerate(regions.neighbours[: regions.count]):
        later = [other for other in others if other > region]
        heap += zip(-regions.similarity(region, later), [region] * len(later), later)
    heapq.heapify(heap)
    while heap:
        _, a, b = heapq.heappop(heap)
        if not (regions.alive[a] and regions.alive[b]):
            continue  # stale: one of them has been merged since the pair was pushed
        merged = regions.merge(a, b)
        others = list(regions.neighbours[merged])
        for score, other in zip(regions.similarity(merged, others), others):
            heapq.heappush(heap, (-score, other, merged))
    return regions.box[: regions.count]


class Regions:
    """Features of R segments and, row after row, of the regions merged from them.

    Args:
        image: HxWx3 uint8, RGB.
        labels: HxW integers, 0 to R-1, none left out.
    """

    def __init__(self, image: np.ndarray, labels: np.ndarray):
        self.count = count = int(labels.max()) + 1
        rows = 2 * count - 1  # each merge makes one row and there are at most R - 1 of them
        self.area = labels.size
        self.alive = np.arange(rows) < count
        self.size = np.zeros(rows)  # px
        self.size[:count] = np.bincount(labels.ravel(), minlength=count)
        self.box = np.zeros((rows, 4))
        self.box[:count] = _segment_boxes(labels, count)
        # Colour and texture side by side, each summing to 1: one intersection gives both terms.
        colours, textures = _colours(image, labels, count), _textures(image, labels, count)
        features = np.concatenate([colours, textures], axis=1)
        self.features = np.zeros((rows, features.shape[1]), dtype=np.float32)
        self.features[:count] = features
        self.neighbours = _neighbours(labels, rows)

    def similarity(self, region: int, others: list[int]) -> np.ndarray:
        """Colour + texture + size + fill of one region with each of the others, each in [0,1]."""
        if not others:
            return np.zeros(0)
        features = np.minimum(self.features[region], self.features[others]).sum(1)
        both = self.size[region] + self.size[others]
        top = np.minimum(self.box[region, :2], self.box[others, :2])
        bottom = np.maximum(self.box[region, 2:], self.box[others, 2:])
        gap = (bottom - top).prod(1) - both
        return features + (1 - both / self.area) + (1 - gap / self.area)

    def merge(self, a: int, b: int) -> int:
        """Replace two neighbours by their union; the number of its row."""
        new, self.count = self.count, self.count + 1
        self.alive[[a, b, new]] = False, False, True
        self.size[new] = self.size[a] + self.size[b]
        self.box[new, :2] = np.minimum(self.box[a, :2], self.box[b, :2])
        self.box[new, 2:] = np.maximum(self.box[a, 2:], self.box[b, 2:])
        weighted = self.size[a] * self.features[a] + self.size[b] * self.features[b]
        self.features[new] = weighted / self.size[new]
        self.neighbours[new] = (self.neighbours[a] | self.neighbours[b]) - {a, b}
        for other in self.neighbours[new]:
            self.neighbours[other] -= {a, b}
            self.neighbours[other].add(new)
        return new


def _segment_boxes(labels: np.ndarray, count: int) -> np.ndarray:
    """Rx4 XYXY; x2 and y2 lie behind the last pixel."""
    ys, xs = np.indices(labels.shape)
    boxes = np.empty((count, 4))
    boxes[:, :2], boxes[:, 2:] = np.inf, -np.inf
    flat = labels.ravel()
    for column, (values, reduce) in enumerate(
        [(xs, np.minimum), (ys, np.minimum), (xs + 1, np.maximum), (ys + 1, np.maximum)]
    ):
        reduce.at(boxes[:, column], flat, values.ravel())
    return boxes


def _neighbours(labels: np.ndarray, rows: int) -> list[set]:
    """For each region the set of regions that share a border with it (4-neighbourhood)."""
    pairs = np.concatenate(
        [
            np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()], 1),
            np.stack([labels[:-1].ravel(), labels[1:].ravel()], 1),
        ]
    )
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    neighbours = [set() for _ in range(rows)]
    for a, b in pairs.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    return neighbours


def _colours(image: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """HSV histogram of each segment, 25 bins a plane, the row sums to 1: RxD."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    return _histograms(hsv.astype(np.int64) * COLOUR_BINS // 256, labels, count, COLOUR_BINS)


def _textures(image: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Histogram of gradient direction x strength of each plane, the row sums to 1: RxD."""
    blurred = cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32)
    dx = cv2.Sobel(blurred, cv2.CV_32F, 1, 0, scale=1 / 8)
    dy = cv2.Sobel(blurred, cv2.CV_32F, 0, 1, scale=1 / 8)
    turn = (np.arctan2(dy, dx) / (2 * np.pi)) % 1.0
    direction = np.minimum((turn * ORIENTATIONS).astype(np.int64), ORIENTATIONS - 1)
    # Strength is at most 128 * sqrt(2); the root gives weak textures most of the bins.
    root = np.sqrt(np.hypot(dx, dy) / 182)
    strength = np.minimum((root * MAGNITUDES).astype(np.int64), MAGNITUDES - 1)
    bins = ORIENTATIONS * MAGNITUDES
    return _histograms(direction * MAGNITUDES + strength, labels, count, bins)


def _histograms(values: np.ndarray, labels: np.ndarray, count: int, bins: int) -> np.ndarray:
    """Histogram the HxWx3 bin numbers of each segment: Rx(3*bins), each row sums to 1."""
    planes = values.shape[2]
    index = (labels[..., None] * planes + np.arange(planes)) * bins + values
    counts = np.bincount(index.ravel(), minlength=count * planes * bins).reshape(count, -1)
    return counts / counts.sum(1, keepdims=True)
