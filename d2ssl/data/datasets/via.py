"""
Photos annotated with the VGG Image Annotator (VIA) 1.x or 2.x.

What happens to imperfect annotations. Refused, with the file and the fix: a missing or damaged
JSON, a missing or unreadable photo, a path that leaves the folder, a photo listed twice, a shape
or class that is not known, and a region that lies off its photo, wholly or by more than a slip of
the hand (the photo was then resized or rotated after it was annotated). Mended, with one warning
a kind that counts the cases: a region that leaves the photo a little is clipped, one that
encloses no area is dropped. Kept, with a warning: photos without regions, and outlines that
cross themselves, whose doubly enclosed parts are holes in the mask (even-odd rule).
"""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import BoxMode

from d2ssl.data.datasets.files import Notes, locate, read_json
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

# A point may lie this far off the photo: in pixels, or as a part of the photo's longer side.
_SLIP_PIXELS = 5
_SLIP_PART = 0.01


def load_via_json(
    json_file: str, image_root: str, classes: Sequence[str] = ("balloon",)
) -> list[dict]:
    """
    Read a VIA annotation file into Detectron2's standard dicts.

    Only the photos' headers are read. Polygon points are moved by half a pixel, to the centre of
    the pixel that was clicked, and boxes are taken from the points as they were clicked; both
    as in Detectron2's own Balloon tutorial.

    Args:
        json_file: VIA's ``via_region_data.json`` or a VIA 2 project file.
        image_root: folder of the photos.
        classes: class names; a region's category_id is the place of its class here. With a
            single class, regions need no attribute.

    Returns:
        One dict a photo in the file's order, image_id counting from 0; boxes XYXY_ABS in
        pixels.

    Raises:
        D2SSLError: see the head of this module.
    """
    entries = _read_entries(json_file)
    files = locate(image_root, [entry["filename"] for entry in entries.values()], json_file)
    notes = Notes(json_file)
    dicts = []
    for image_id, (key, file) in enumerate(zip(entries, files)):
        height, width = photo_size(file)
        record = {
            "file_name": file,
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": [],
        }
        regions = entries[key].get("regions")
        if not isinstance(regions, (dict, list)):
            raise D2SSLError(f"{json_file}: {key!r} has no regions; export it from VIA again")
        numbered = regions.items() if isinstance(regions, dict) else enumerate(regions)
        for number, region in numbered:
            where = f"{entries[key]['filename']}, region {number}"
            try:
                annotation = _read_region(region, height, width, classes, notes, where)
            except D2SSLError as error:
                hint = _rotation_hint(region, file, height, width)
                raise D2SSLError(f"{json_file}: {where}: {error}{hint}") from None
            if annotation is not None:
                record["annotations"].append(annotation)
        if not regions:
            notes.add("photos have no region and are kept without annotation", file)
        dicts.append(record)
    notes.log()
    return dicts


def _read_entries(json_file: str) -> dict[str, dict]:
    """VIA's own mapping: key of a photo -> its entry."""
    content = read_json(json_file)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)  # a VIA 2 project file
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        raise D2SSLError(f"{json_file}: is COCO's format, not VIA's; use register_coco")
    if not isinstance(content, dict) or not content:
        raise D2SSLError(f"{json_file}: holds no photos in VIA's format; export it from VIA again")
    for key, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise D2SSLError(
                f"{json_file}: {key!r} is not an entry of VIA 1 or 2; export it from there as JSON"
            )
    return content


def _read_region(
    region: dict, height: int, width: int, classes: Sequence[str], notes: Notes, where: str
) -> dict | None:
    """Detectron2's annotation dict, or None where the region encloses nothing."""
    if not isinstance(region, dict):
        raise D2SSLError("is not a region of VIA 1 or 2; export the file again")
    points = _outline(region.get("shape_attributes"))
    category_id = _category(region.get("region_attributes"), classes)
    if _encloses_nothing(points):
        notes.add("regions enclose no area and are dropped", where)
        return None
    # VIA draws a circle or an ellipse outwards from its centre, so that it may well leave.
    slip_only = region["shape_attributes"]["name"] not in ("circle", "ellipse")
    clipped = _clip(points, height, width, slip_only)
    if clipped is not points:
        notes.add("regions leave their photo a little and are clipped", where)
        if _encloses_nothing(clipped):
            raise D2SSLError(f"has no area on the photo of {width}x{height}; correct it in VIA")
    if crosses_itself(clipped):
        notes.add("outlines cross themselves; parts enclosed twice become holes", where)
    return {
        "bbox": [*clipped.min(axis=0).tolist(), *clipped.max(axis=0).tolist()],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": category_id,
        "segmentation": [(clipped + 0.5).ravel().tolist()],
        "iscrowd": 0,
    }


def _outline(shape: dict | None) -> np.ndarray:
    """The outline of one of VIA's shapes: Nx2, float64, each row x, y in clicked pixels."""
    if not isinstance(shape, dict):
        raise D2SSLError("has no shape_attributes; export the file from VIA again")
    name = shape.get("name")
    try:
        if name == "polygon":
            points = np.stack([shape["all_points_x"], shape["all_points_y"]], axis=1)
        elif name == "rect":
            x, y, w, h = (shape[key] for key in ("x", "y", "width", "height"))
            points = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        elif name == "circle":
            points = _ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])
        elif name == "ellipse":
            theta = shape.get("theta", 0.0)
            points = _ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], theta)
        else:
            raise D2SSLError(
                f"is a {name!r}, which has no area; draw a polygon, rect, circle or ellipse"
            )
    except D2SSLError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise D2SSLError(
            f"its {name} is damaged ({type(error).__name__}: {error}); draw it again"
        ) from error
    if points.ndim != 2 or points.dtype.kind not in "iuf" or not np.isfinite(points).all():
        raise D2SSLError(f"its {name} has coordinates that are not numbers; draw it again")
    return points.astype(np.float64)


def _ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x, y = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = np.cos(theta), np.sin(theta)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], axis=1)


def _category(attributes: dict | None, classes: Sequence[str]) -> int:
    """The class that a region's attributes name; no attribute is needed for a single class."""
    if not isinstance(attributes, (dict, type(None))):
        raise D2SSLError("its region_attributes are damaged; export the file from VIA again")
    given = {key: value for key, value in (attributes or {}).items() if value not in ("", None)}
    if not given and len(classes) == 1:
        return 0
    named = [value for value in given.values() if value in classes]
    if len(named) != 1:
        raise D2SSLError(
            f"region_attributes {given} name {len(named)} known classes; name one of {[*classes]}"
        )
    return list(classes).index(named[0])


def _clip(points: np.ndarray, height: int, width: int, slip_only: bool) -> np.ndarray:
    """
    The part of the outline on the photo (Sutherland and Hodgman 1974); the same array if all.

    Raises:
        D2SSLError: the outline lies wholly off the photo, or, where ``slip_only``, leaves it by
            more than a slip of the hand.
    """
    size = np.array([width, height])
    low, high = points.min(axis=0), points.max(axis=0)
    if (low >= 0).all() and (high <= size).all():  # VIA lets one click at the very edge
        return points
    if (high <= 0).any() or (low >= size).any():
        raise D2SSLError(f"lies wholly off the photo of {width}x{height}; correct it in VIA")
    excess = max((-low).max(), (high - size).max())
    if slip_only and excess > max(_SLIP_PIXELS, _SLIP_PART * size.max()):
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


def _rotation_hint(region: dict, file: str, height: int, width: int) -> str:
    """What to add to an error where the points would fit the photo without its EXIF rotation."""
    try:
        high = _outline(region["shape_attributes"]).max(axis=0)
    except (KeyError, TypeError, ValueError):  # D2SSLError is a ValueError
        return ""
    if height == width or (high <= (width, height)).all() or (high > (height, width)).any():
        return ""
    return f" (the points would fit a photo of {height}x{width}: is {file} rotated by EXIF?)"


def _encloses_nothing(points: np.ndarray) -> bool:
    """Fewer than three points, or all in a line; one pixel of area is the least."""
    if len(points) < 3:
        return True
    return cv2.contourArea(cv2.convexHull(points.astype(np.float32))) < 1.0


def crosses_itself(points: np.ndarray) -> bool:
    """Whether two edges cut each other in their interiors (touching does not count)."""
    start, end = points, np.roll(points, -1, axis=0)

    def side(p: np.ndarray) -> np.ndarray:  # NxN, on which side of edge i the point p[j] is
        edge, to = (end - start)[:, None], p[None] - start[:, None]
        return np.sign(edge[..., 0] * to[..., 1] - edge[..., 1] * to[..., 0])

    apart = side(start) * side(end) < 0  # edge j's ends lie on both sides of edge i
    return bool((apart & apart.T).any())
