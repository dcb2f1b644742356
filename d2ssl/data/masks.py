"""Masks between pictures of instance ids, polygons and run-length codes (RLE).

Coordinates are those of COCO: pixel (x, y) covers [x, x + 1) x [y, y + 1), and a polygon fills the
pixels whose centres it encloses.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from detectron2.structures import BoxMode
from PIL import Image
from scipy.ndimage import find_objects
from skimage.measure import find_contours

from d2ssl.atomic import atomic_open
from d2ssl.data.cache import default_cache_dir
from d2ssl.errors import D2SSLError

LEAST_IOU = 0.98  # of a polygon with the mask that it stands for
FARTHEST = 100_000  # pixels that a polygon's point may be away from the photo's corner
TOLERANCE = 0.5  # pixels that a simplified outline may move, about


def read_label_image(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """
    A picture whose values are ids: palette indices and not their colours, 8 or 16 bits.

    Args:
        size: (height, width) of the photo that it belongs to, where there is one.

    Returns:
        HxW, integer or bool.

    Raises:
        D2SSLError: missing, unreadable, a picture in colours, or of another size.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such mask; check the path or restore the file") from error
    except Exception as error:  # on damaged files PIL raises nearly anything
        raise D2SSLError(f"{path}: cannot be read as a mask ({error}); restore the file") from error
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise D2SSLError(
            f"{path}: is a picture of mode {mode}; a mask has one channel of whole numbers or a "
            "palette"
        )
    if size is not None and values.shape != tuple(size):
        raise D2SSLError(
            f"{path}: is {values.shape[1]}x{values.shape[0]}, its photo {size[1]}x{size[0]}; was "
            "one of them resized or rotated?"
        )
    return values


def grey_label_file(path: str, labels: dict[int, int], size: tuple[int, int]) -> str:
    """
    A copy of a picture of class ids, in the cache, that Detectron2 reads as it is meant.

    Stock Detectron2 turns such a file into grey when it trains, and with it the ids of a palette
    into the brightness of their colours. The copy is grey, and is made once; anew where the file,
    its photo's size or ``labels`` have changed.

    Args:
        path: of the picture, see :func:`read_label_image`.
        labels: id in the picture -> id in the copy, 0..255.
        size: (height, width) of the photo.

    Returns:
        Path of an 8-bit PNG.

    Raises:
        D2SSLError: as :func:`read_label_image`, an id that ``labels`` does not have, or a cache
            that cannot be written.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        raise D2SSLError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
    parts = os.path.abspath(path), state.st_mtime_ns, state.st_size, labels, tuple(size)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    stem = os.path.splitext(os.path.basename(path))[0]
    folder = os.path.join(default_cache_dir(), "labels")
    copy = os.path.join(folder, f"{stem}-{key}.png")
    if os.path.exists(copy):
        return copy
    ids = read_label_image(path, size)
    grey = np.empty(ids.shape, np.uint8)
    for value in np.unique(ids).tolist():
        if value not in labels:
            raise D2SSLError(f"{path}: holds {value}, which is no class; correct the picture")
        grey[ids == value] = labels[value]
    try:
        os.makedirs(folder, exist_ok=True)
        with atomic_open(copy, "wb") as file:
            Image.fromarray(grey).save(file, "PNG")
    except OSError as error:
        raise D2SSLError(
            f"{copy}: cannot be written ({error.strerror}); set D2SSL_CACHE to another folder"
        ) from error
    return copy


def label_image_annotations(
    ids: np.ndarray, classify: Callable[[int], tuple[int, int] | None]
) -> list[dict]:
    """
    An annotation for each instance of a picture of ids.

    Args:
        ids: HxW, whole numbers; pixels of one value are one instance.
        classify: (category_id, iscrowd) of an id; None: no object, such as background.

    Returns:
        Detectron2's annotation dicts in the order of the ids, see :func:`mask_annotation`.
    """
    values, places = range(2**16), ids
    if ids.dtype.kind == "i" or ids.dtype.itemsize > 2:  # there may be large or negative ids
        values = np.unique(ids).tolist()
        places = np.searchsorted(values, ids)
    # All ids are found in one pass (which leaves out 0), and each is looked at only where it lies.
    boxes = find_objects(places.astype(np.int32) + 1)
    found = []
    for place, (value, box) in enumerate(zip(values, boxes)):
        kind = None if box is None else classify(value)
        if kind is not None:
            found.append(_annotation(places[box] == place, box, ids.shape, *kind))
    return found


def mask_annotation(mask: np.ndarray, category_id: int, iscrowd: int = 0) -> dict | None:
    """
    Detectron2's annotation dict of a mask; None where it is empty.

    Polygons where there is no hole, as they are small and quick to read; RLE for holes, for crowds
    (as in COCO), and for what polygons would not reproduce with an IoU of LEAST_IOU.

    Args:
        mask: HxW, true or not zero inside.
    """
    mask = np.asarray(mask, dtype=bool)
    boxes = find_objects(mask.view(np.uint8))
    if not boxes:
        return None
    return _annotation(mask[boxes[0]], boxes[0], mask.shape, category_id, iscrowd)


def _annotation(
    inside: np.ndarray,
    box: tuple[slice, slice],
    size: tuple[int, int],
    category_id: int,
    iscrowd: int,
) -> dict:
    """Of the mask ``inside``, which touches all sides of its ``box`` in a photo of ``size``."""
    rows, columns = box
    segmentation = None if iscrowd else _polygons(inside, columns.start, rows.start)
    if segmentation is None:
        mask = np.zeros(size, dtype=bool)
        mask[box] = inside
        segmentation = encode(mask)
    return {
        "bbox": [float(x) for x in (columns.start, rows.start, columns.stop, rows.stop)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_id,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
    }


def annotation_mask(annotation: dict, height: int, width: int) -> np.ndarray:
    """
    The mask of an annotation dict, from polygons or RLE (compressed or not): HxW bool.

    Raises:
        D2SSLError: it has neither, a damaged one, or an RLE of another size.
    """
    segmentation = annotation.get("segmentation")
    if not isinstance(segmentation, (list, dict)) or not segmentation:
        raise D2SSLError("an annotation without a mask; give its segmentation")
    rle = run_length(segmentation, height, width)
    with _damage_in_one_line():
        mask = coco_mask.decode(rle)
        # Of an RLE that is too short, pycocotools leaves the rest of the mask to chance.
        if mask.sum() != coco_mask.area(rle):
            raise ValueError("RLE cut short")
    return mask.astype(bool)


def run_length(segmentation: list | dict, height: int, width: int) -> dict:
    """
    Polygons or any RLE as COCO's compressed RLE, which is not decoded.

    Raises:
        D2SSLError: a damaged one, or an RLE of another size.
    """
    with _damage_in_one_line():
        if isinstance(segmentation, list):
            for polygon in segmentation:
                if len(polygon) < 6 or len(polygon) % 2:
                    raise ValueError("a polygon needs x and y of three points or more")
                # pycocotools takes memory for each pixel that an edge crosses, for NaN without end.
                if not all(abs(x) < FARTHEST for x in polygon):
                    raise ValueError(f"a polygon with points {FARTHEST} pixels away")
            return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        size, counts = [*segmentation["size"]], segmentation["counts"]
        if size != [height, width]:
            raise D2SSLError(
                f"a mask of {size[1]}x{size[0]} on a photo of {width}x{height}; scale it"
            )
        if not isinstance(counts, list):
            return segmentation
        if sum(counts) != height * width:
            raise ValueError(f"runs of {sum(counts)} pixels in all, of {height * width}")
        return coco_mask.frPyObjects(segmentation, height, width)


@contextlib.contextmanager
def _damage_in_one_line():
    try:
        yield
    except D2SSLError:
        raise
    except Exception as error:  # pycocotools raises nearly anything
        raise D2SSLError(
            f"a damaged mask ({type(error).__name__}: {error}); export it again"
        ) from error


def encode(mask: np.ndarray) -> dict:
    """HxW -> COCO's compressed RLE, ``counts`` as bytes."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two HxW masks; 1 where both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _polygons(mask: np.ndarray, left: int, top: int) -> list[list[float]] | None:
    """Outlines of a mask that touches all sides of its array; None where they would not do."""
    height, width = mask.shape
    padded = np.pad(mask, 1)
    if cv2.connectedComponents((~padded).astype(np.uint8), connectivity=8)[0] > 2:
        return None  # a hole: background that is not connected to the outside
    # Marching squares: all centres of the mask's pixels lie inside, all others outside. Vertices
    # are (row, column) between pixel centres, and the padding moved them by a pixel.
    exact = [c[:-1, ::-1] - 0.5 for c in find_contours(padded.astype(np.uint8), 0.5)]
    for tolerance in (TOLERANCE, 0.0):
        outlines = [_simplified(outline, tolerance) for outline in exact]
        polygons = [outline.ravel().tolist() for outline in outlines]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        if iou(coco_mask.decode(rle).astype(bool), mask) >= LEAST_IOU:
            return [(outline + (left, top)).ravel().tolist() for outline in outlines]
    return None


def _simplified(outline: np.ndarray, tolerance: float) -> np.ndarray:
    points = cv2.approxPolyDP(outline.astype(np.float32)[:, None], tolerance, True)[:, 0]
    return (points if len(points) >= 3 else outline).astype(np.float64)
