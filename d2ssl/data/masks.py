"""Masks between pictures of instance ids, polygons and run-length codes (RLE).

Coordinates are those of COCO: pixel (x, y) covers [x, x + 1) x [y, y + 1), and a polygon fills the
pixels whose centres it encloses.
"""

from collections.abc import Callable

import cv2
import numpy as np
import pycocotools.mask as coco_mask
from detectron2.structures import BoxMode
from PIL import Image
from skimage.measure import find_contours

from d2ssl.errors import D2SSLError

LEAST_IOU = 0.98  # of a polygon with the mask that it stands for
TOLERANCE = 0.5  # pixels that a simplified outline may move, about


def read_label_image(path: str) -> np.ndarray:
    """
    A picture whose values are ids: palette indices and not their colours, 8 or 16 bits.

    Returns:
        HxW, integer or bool.

    Raises:
        D2SSLError: missing, unreadable, or a picture in colours.
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
    return values


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
    found = []
    for value in np.unique(ids).tolist():
        kind = classify(value)
        if kind is not None:
            found.append(mask_annotation(ids == value, *kind))
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
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return None
    (top, bottom), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    polygons = None if iscrowd else _polygons(mask[top : bottom + 1, left : right + 1], left, top)
    return {
        "bbox": [float(x) for x in (left, top, right + 1, bottom + 1)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_id,
        "segmentation": encode(mask) if polygons is None else polygons,
        "iscrowd": iscrowd,
    }


def annotation_mask(annotation: dict, height: int, width: int) -> np.ndarray:
    """
    The mask of an annotation dict, from polygons or RLE (compressed or not): HxW bool.

    Raises:
        D2SSLError: it has neither, or an RLE of another size.
    """
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, *rle["size"])
        if list(rle["size"]) != [height, width]:
            raise D2SSLError(
                f"a mask of {rle['size'][1]}x{rle['size'][0]} on a photo of {width}x{height}; "
                "scale it"
            )
    else:
        raise D2SSLError("an annotation without a mask; give its segmentation")
    return coco_mask.decode(rle).astype(bool)


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
