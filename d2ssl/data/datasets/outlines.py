"""
Outlines drawn by hand, brought onto their photos.

What happens to imperfect ones. Refused: an outline that lies off its photo, wholly or by more than
a slip of the hand (the photo was then resized or rotated after it was annotated). Mended, with one
warning a kind that counts the cases: one that leaves the photo a little is clipped, one that
encloses no area is dropped. Kept, with a warning: one that crosses itself, whose doubly enclosed
parts are holes in the mask (even-odd rule).
"""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import BoxMode

from d2ssl.data.datasets.files import Notes
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

# A point may lie this far off the photo: in pixels, or as a part of the photo's longer side.
_SLIP_PIXELS = 5
_SLIP_PART = 0.01

_BLOCK = 64  # edges that are compared with all others at a time, which bounds the memory


def as_points(points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """
    Points as an annotation file gives them: Nx2, float64, each row x, y.

    Raises:
        D2SSLError: they are something else.
    """
    try:
        array = np.asarray(points)
    except ValueError as error:  # rows of different lengths
        raise D2SSLError("has points that are not pairs of numbers; draw it again") from error
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise D2SSLError("has points that are not pairs of numbers; draw it again")
    if not np.isfinite(array).all():
        raise D2SSLError("has coordinates that are not finite; draw it again")
    return array.astype(np.float64)


def rectangle(low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """The outline of an upright rectangle from its corners of least and largest x, y: 4x2."""
    (x1, y1), (x2, y2) = low, high
    return as_points([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> np.ndarray:
    """An outline of 36 points, 36x2; ``theta`` in radians turns the x axis towards y."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x, y = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = np.cos(theta), np.sin(theta)
    return as_points(np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1))


def on_photo(
    points: np.ndarray, record: dict, notes: Notes, where: str, may_leave: bool = False
) -> np.ndarray | None:
    """
    What of an outline lies on its photo.

    Args:
        points: Nx2, each row x, y.
        record: the photo's dict with ``file_name``, ``height`` and ``width``.
        notes: get what was mended.
        where: names the outline in them.
        may_leave: the shape is drawn from its centre, so that it may well leave the photo.

    Returns:
        Nx2 within 0..width and 0..height; None where the outline encloses nothing.

    Raises:
        D2SSLError: see the head of this module.
    """
    if _encloses_nothing(points):
        notes.add("outlines enclose no area and are dropped", where)
        return None
    height, width = record["height"], record["width"]
    try:
        clipped = clip(points, height, width, may_leave)
    except D2SSLError as error:
        hint = _rotation_hint(points.max(axis=0), record["file_name"], height, width)
        raise D2SSLError(f"{error}{hint}") from None
    if clipped is not points:
        notes.add("outlines leave their photo a little and are clipped", where)
        if _encloses_nothing(clipped):
            raise D2SSLError(f"has no area on the photo of {width}x{height}; correct it")
    if crosses_itself(clipped):
        notes.add("outlines cross themselves; parts enclosed twice become holes", where)
    return clipped


def outline_annotation(
    outlines: Sequence[np.ndarray], category_id: int, shift: float = 0.0
) -> dict:
    """
    Detectron2's annotation dict of an instance that is drawn as one or several outlines.

    Args:
        outlines: each Nx2; the box encloses their points.
        shift: added to the polygons' coordinates, and not to the box.
    """
    points = np.concatenate(outlines)
    return {
        "bbox": [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_id,
        "segmentation": [(outline + shift).ravel().tolist() for outline in outlines],
        "iscrowd": 0,
    }


def check_size(file: str, height: int | None, width: int | None) -> tuple[int, int]:
    """
    Size of a photo as it will be read: (height, width) in pixels.

    Args:
        height, width: that its labels state; None: they do not.

    Raises:
        D2SSLError: the photo is of another size, or see :func:`~d2ssl.data.photos.photo_size`.
    """
    actual = photo_size(file)
    stated = actual[0] if height is None else height, actual[1] if width is None else width
    if stated != actual:
        hint = _rotation_hint(stated[::-1], file, *actual)
        raise D2SSLError(
            f"{file} is {actual[1]}x{actual[0]}, but its labels are for {stated[1]}x{stated[0]}; "
            f"restore the photo that was annotated{hint}"
        )
    return actual


def clip(points: np.ndarray, height: int, width: int, may_leave: bool = False) -> np.ndarray:
    """
    The part of the outline on the photo (Sutherland and Hodgman 1974); the same array if all.

    Raises:
        D2SSLError: the outline lies wholly off the photo, or, unless it ``may_leave``, leaves it
            by more than a slip of the hand.
    """
    size = np.array([width, height])
    low, high = points.min(axis=0), points.max(axis=0)
    if (low >= 0).all() and (high <= size).all():  # tools let one click at the very edge
        return points
    if (high <= 0).any() or (low >= size).any():
        raise D2SSLError(f"lies wholly off the photo of {width}x{height}; correct it")
    excess = max((-low).max(), (high - size).max())
    if not may_leave and excess > max(_SLIP_PIXELS, _SLIP_PART * size.max()):
        raise D2SSLError(
            f"leaves the photo of {width}x{height} by {excess:.0f} pixels; was the photo resized "
            "or rotated since it was annotated?"
        )
    for axis in (0, 1):
        for sign, bound in ((1, 0.0), (-1, float(size[axis]))):
            inside = sign * (points[:, axis] - bound)  # >= 0 on the photo's side, length N
            kept = []
            for i in range(len(points)):
                if inside[i - 1] * inside[i] < 0:
                    part = inside[i - 1] / (inside[i - 1] - inside[i])
                    kept.append(points[i - 1] + part * (points[i] - points[i - 1]))
                if inside[i] >= 0:
                    kept.append(points[i])
            points = np.array(kept).reshape(-1, 2)
    return points.clip(0, size)  # the cut points carry rounding errors


def crosses_itself(points: np.ndarray) -> bool:
    """Whether two edges cut each other in their interiors (touching does not count)."""
    start, end = points, np.roll(points, -1, axis=0)
    for first in range(0, len(points), _BLOCK):
        block, rest = np.s_[first : first + _BLOCK, None], np.s_[first:]
        a, b, c, d = start[block], end[block], start[rest], end[rest]
        if (_apart(a, b, c, d) & _apart(c, d, a, b)).any():
            return True
    return False


def _apart(start: np.ndarray, end: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Whether the points p and q lie on both sides of the line through start and end."""
    edge = end - start
    to_p, to_q = (
        np.sign(edge[..., 0] * to[..., 1] - edge[..., 1] * to[..., 0])
        for to in (p - start, q - start)
    )
    return to_p * to_q < 0


def _encloses_nothing(points: np.ndarray) -> bool:
    """Fewer than three points, or all in a line; one pixel of area is the least."""
    if len(points) < 3:
        return True
    return cv2.contourArea(cv2.convexHull(points.astype(np.float32))) < 1.0


def _rotation_hint(extent: Sequence[float], file: str, height: int, width: int) -> str:
    """What to add to an error where x, y up to ``extent`` would fit the photo if it were turned."""
    x, y = extent
    if (x <= width and y <= height) or x > height or y > width:
        return ""
    return f" (that would fit a photo of {height}x{width}: is {file} rotated by EXIF?)"
