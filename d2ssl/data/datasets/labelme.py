"""
Photos annotated with LabelMe, one JSON file each.

Polygons, rectangles, circles and the masks of LabelMe 5 are read; shapes of one label and one
``group_id`` are one instance. The photo is read from its file, also where the JSON holds a copy.
LabelMe's coordinates are continuous, as COCO's: nothing is moved by half a pixel.

Refused, with the file and the fix: a missing or damaged JSON or photo, a photo of another size
than the JSON states, and a shape or label that is not known. Photos without shapes are kept, with
a warning. For outlines that are not quite right see :mod:`d2ssl.data.datasets.outlines`.
"""

import base64
import io
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image

from d2ssl.data.datasets.catalog import class_names, register_dataset, set_metadata
from d2ssl.data.datasets.files import Notes, locate, read_json, require_folder
from d2ssl.data.datasets.outlines import (
    as_points,
    check_size,
    ellipse,
    on_photo,
    outline_annotation,
    rectangle,
)
from d2ssl.data.masks import annotation_mask, encode, mask_annotation
from d2ssl.errors import D2SSLError

NO_CLASS = ("__ignore__", "_background_")  # labels that LabelMe's own converters treat apart


def register_labelme(
    name: str, root: str, images: str = "", classes: Sequence[str] | None = None
) -> None:
    """
    Register a folder of LabelMe's JSON files as ``name``; nothing is read before it is used.

    Args:
        root: folder of the JSON files.
        images: folder of the photos, below ``root``, where they are no longer where the JSON
            files say; the last part of each ``imagePath`` then counts.
        classes: the labels, in this order; another label is an error, except for NO_CLASS, whose
            shapes are left out. Default: the labels found, sorted.
    """
    known = {} if classes is None else {"thing_classes": class_names(classes)}
    load = partial(_load, name, root, images, classes)
    register_dataset(name, load, evaluator_type="coco", **known)


def _load(name: str, root: str, images: str, classes: Sequence[str] | None) -> list[dict]:
    require_folder(root, "check the path")
    sources = sorted(f for f in os.listdir(root) if f.endswith(".json") and f[0] != ".")
    contents = [_read(os.path.join(root, source)) for source in sources]
    if classes is None:
        found = {shape["label"] for content in contents for shape in content["shapes"]}
        classes = sorted(found.difference(NO_CLASS))
    if not contents or not classes:
        raise D2SSLError(
            f"{root}: has {len(sources)} JSON files and no labelled shape; is it the right folder?"
        )
    photos = [content["imagePath"].replace("\\", "/") for content in contents]
    if images:
        photos = [os.path.basename(photo) for photo in photos]
    files = locate(os.path.join(root, images) if images else root, photos, root)
    notes = Notes(root)
    dicts = []
    for source, content, file in zip(sources, contents, files):
        try:
            height, width = check_size(file, content.get("imageHeight"), content.get("imageWidth"))
            record = {"file_name": file, "image_id": len(dicts), "height": height, "width": width}
            annotations = _annotations(source, content["shapes"], classes, record, notes)
        except D2SSLError as error:
            raise D2SSLError(f"{os.path.join(root, source)}: {error}") from None
        if not content["shapes"]:
            notes.add("photos have no shape and are kept without annotation", file)
        dicts.append({**record, "annotations": annotations})
    notes.log()
    # The metadata know the classes only now; parts of the set copy them later.
    set_metadata(name, thing_classes=[*classes])
    return dicts


def _read(source: str) -> dict:
    """What LabelMe wrote, without the copy of the photo."""
    content = read_json(source)
    if not (
        isinstance(content, dict)
        and isinstance(content.get("imagePath"), str)
        and isinstance(content.get("shapes"), list)
    ):
        raise D2SSLError(f"{source}: has no imagePath and shapes; is it LabelMe's? Move it away")
    for number, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise D2SSLError(f"{source}: shape {number} has no label; give it one in LabelMe")
    content.pop("imageData", None)
    return content


def _annotations(
    source: str, shapes: list[dict], classes: Sequence[str], record: dict, notes: Notes
) -> list[dict]:
    """An annotation dict for each instance, in the order of their first shapes."""
    instances: dict[tuple, list[np.ndarray | dict]] = {}
    for number, shape in enumerate(shapes):
        label, group = shape["label"], shape.get("group_id")
        if label in NO_CLASS and label not in classes:
            continue
        where = f"shape {number} ({label})"
        try:
            if label not in classes:
                raise D2SSLError(f"its label is no class; give it one of {[*classes]}")
            part = _part(shape, record, notes, f"{source}, {where}")
        except D2SSLError as error:
            raise D2SSLError(f"{where}: {error}") from None
        if part is not None:
            key = (label, number, None) if group is None else (label, None, str(group))
            instances.setdefault(key, []).append(part)
    return [
        _annotation(parts, list(classes).index(label), record)
        for (label, *_), parts in instances.items()
    ]


def _part(shape: dict, record: dict, notes: Notes, where: str) -> np.ndarray | dict | None:
    """A shape's outline, Nx2 float64, or the RLE of its mask; None where it encloses nothing."""
    kind = shape.get("shape_type") or "polygon"  # the first versions had no other
    points = as_points(shape.get("points"))
    if kind == "mask":
        return _mask(shape, points, record, notes, where)
    if kind in ("polygon", "oriented_rectangle"):
        outline = points
    elif kind == "rectangle" and len(points) > 1:
        outline = rectangle(points.min(axis=0), points.max(axis=0))
    elif kind == "circle" and len(points) == 2:
        radius = np.hypot(*(points[1] - points[0]))
        outline = ellipse(*points[0], radius, radius)
    elif kind in ("rectangle", "circle"):
        raise D2SSLError(f"is a {kind} of {len(points)} points; draw it again")
    else:
        raise D2SSLError(
            f"is a {kind!r}, which has no area; draw a polygon, rectangle, circle or mask"
        )
    return on_photo(outline, record, notes, where, may_leave=kind == "circle")


def _mask(shape: dict, points: np.ndarray, record: dict, notes: Notes, where: str) -> dict | None:
    """RLE of LabelMe 5's mask, a PNG for the pixels from one corner to the other, inclusive."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as image:
            patch = np.asarray(image).astype(bool)
        (left, top), (right, bottom) = points.round().astype(int).tolist()
    except Exception as error:  # on damaged pictures PIL raises nearly anything
        raise D2SSLError(f"its mask is damaged ({error}); draw it again") from error
    # Other tools have the second corner outside, or round it.
    if (
        patch.ndim != 2
        or np.abs(patch.shape - np.array([bottom - top, right - left]) - 1).max() > 1
    ):
        raise D2SSLError(
            f"its mask is an array of {patch.shape} for a box of {right - left}x{bottom - top}; "
            "draw it again"
        )
    bottom, right = top + patch.shape[0], left + patch.shape[1]
    if on_photo(rectangle((left, top), (right, bottom)), record, notes, where) is None:
        return None
    mask = np.zeros((record["height"], record["width"]), dtype=bool)
    x, y = max(left, 0), max(top, 0)
    on_mask = mask[y:bottom, x:right]  # ends at the photo's edge
    on_mask[:] = patch[y - top :, x - left :][: on_mask.shape[0], : on_mask.shape[1]]
    if not mask.any():
        notes.add("masks are empty and are dropped", where)
        return None
    return encode(mask)


def _annotation(parts: list[np.ndarray | dict], category_id: int, record: dict) -> dict:
    """Detectron2's annotation dict of an instance of outlines, RLEs or both."""
    outlines = [part for part in parts if isinstance(part, np.ndarray)]
    drawn = [outline_annotation(outlines, category_id)] if outlines else []
    drawn += [{"segmentation": part} for part in parts if isinstance(part, dict)]
    if len(drawn) == 1 and outlines:
        return drawn[0]
    masks = [annotation_mask(one, record["height"], record["width"]) for one in drawn]
    return mask_annotation(np.logical_or.reduce(masks), category_id)
