"""
Photos annotated with the VGG Image Annotator (VIA) 1.x or 2.x.

Refused, with the file and the fix: a missing or damaged JSON, a missing or unreadable photo, a
path that leaves the folder, a photo listed twice, and a shape or class that is not known. Photos
without regions are kept, with a warning. For outlines that are not quite right see
:mod:`d2ssl.data.datasets.outlines`.
"""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from d2ssl.data.datasets.catalog import class_names, register_dataset
from d2ssl.data.datasets.files import Notes, locate, read_json, require_folder
from d2ssl.data.datasets.outlines import (
    as_points,
    ellipse,
    on_photo,
    outline_annotation,
    rectangle,
)
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

ANNOTATIONS = "via_region_data.json"
ONE_CLASS = ("object",)  # of regions that nobody has named
_FEW = 12  # values that a message lists


def register_via(
    name: str,
    root: str,
    json_file: str = ANNOTATIONS,
    images: str = "",
    classes: Sequence[str] | None = None,
    attribute: str | None = None,
    how: str = "check the path",
) -> None:
    """
    Register photos annotated with VIA as ``name``; nothing is read before the set is used.

    Args:
        root: folder of the set.
        json_file: the annotations, below ``root``.
        images: folder of the photos, below ``root``; default: that of the annotations.
        classes, attribute: see :func:`load_via_json`.
        how: what to do where ``root`` is missing, for the message.
    """
    file = os.path.join(root, json_file)
    image_root = os.path.join(root, images) if images else os.path.dirname(file)
    load = partial(_load, root, how, file, image_root, classes, attribute)
    thing_classes = class_names(ONE_CLASS if classes is None else classes)
    register_dataset(name, load, thing_classes=thing_classes, evaluator_type="coco")


def _load(root: str, how: str, file: str, *arguments) -> list[dict]:
    require_folder(root, how)
    others = sorted(name for name in os.listdir(root) if name.lower().endswith(".json"))
    if not os.path.exists(file) and others:  # VIA calls its files by the project and the date
        raise D2SSLError(
            f"{file}: no such file; in that folder there is {', '.join(others[:_FEW])}: "
            f"json_file={others[0]!r}?"
        )
    return load_via_json(file, *arguments)


def load_via_json(
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None = None,
    attribute: str | None = None,
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
            single class, regions need no attribute. Default: the one class "object", where no
            region has an attribute.
        attribute: of the regions, that names the class as text, in a list or by a box that is
            ticked; default: any whose value is a class.

    Returns:
        One dict a photo in the file's order, image_id counting from 0; boxes XYXY_ABS in
        pixels.

    Raises:
        D2SSLError: see the heads of this module and of :mod:`~d2ssl.data.datasets.outlines`.
    """
    entries = _read_entries(json_file)
    files = locate(image_root, [name for name, _ in entries], json_file)
    if classes is None:
        _require_no_attribute(entries, attribute, json_file)
        classes = ONE_CLASS
    notes = Notes(json_file)
    dicts = []
    for image_id, ((name, regions), file) in enumerate(zip(entries, files)):
        height, width = photo_size(file)
        record = {"file_name": file, "image_id": image_id, "height": height, "width": width}
        annotations = []
        for number, region in regions.items():
            where = f"{name}, region {number}"
            try:
                annotation = _read_region(region, record, classes, attribute, notes, where)
            except D2SSLError as error:
                raise D2SSLError(f"{json_file}: {where}: {error}") from None
            if annotation is not None:
                annotations.append(annotation)
        if not regions:
            notes.add("photos have no region and are kept without annotation", file)
        dicts.append({**record, "annotations": annotations})
    notes.log()
    return dicts


def _read_entries(json_file: str) -> list[tuple[str, dict]]:
    """File name and numbered regions of each photo."""
    content = read_json(json_file)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)  # a VIA 2 project file
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        raise D2SSLError(f"{json_file}: is COCO's format, not VIA's; use register_coco")
    if not isinstance(content, dict) or not content:
        raise D2SSLError(f"{json_file}: holds no photos in VIA's format; export it from VIA again")
    entries = []
    for key, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise D2SSLError(
                f"{json_file}: {key!r} is not an entry of VIA 1 or 2; export it from there as JSON"
            )
        regions = entry.get("regions")
        if isinstance(regions, list):  # VIA 2
            regions = dict(enumerate(regions))
        if not isinstance(regions, dict):
            raise D2SSLError(f"{json_file}: {key!r} has no regions; export it from VIA again")
        entries.append((entry["filename"], regions))
    return entries


def _read_region(
    region: dict,
    record: dict,
    classes: Sequence[str],
    attribute: str | None,
    notes: Notes,
    where: str,
) -> dict | None:
    """Detectron2's annotation dict, or None where the region encloses nothing."""
    category_id = _category(_named(region, attribute), classes)
    points = _outline(region.get("shape_attributes"))
    may_leave = region["shape_attributes"]["name"] in ("circle", "ellipse")
    outline = on_photo(points, record, notes, where, may_leave)
    return None if outline is None else outline_annotation([outline], category_id, shift=0.5)


def _outline(shape: dict | None) -> np.ndarray:
    """The outline of one of VIA's shapes: Nx2, float64, each row x, y in clicked pixels."""
    if not isinstance(shape, dict):
        raise D2SSLError("has no shape_attributes; export the file from VIA again")
    name = shape.get("name")
    try:
        if name == "polygon":
            return as_points(np.stack([shape["all_points_x"], shape["all_points_y"]], axis=1))
        if name == "rect":
            x, y, w, h = (shape[key] for key in ("x", "y", "width", "height"))
            return rectangle((x, y), (x + w, y + h))
        if name == "circle":
            return ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])
        if name == "ellipse":
            theta = shape.get("theta", 0.0)
            return ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], theta)
    except D2SSLError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise D2SSLError(
            f"its {name} is damaged ({type(error).__name__}: {error}); draw it again"
        ) from error
    raise D2SSLError(f"is a {name!r}, which has no area; draw a polygon, rect, circle or ellipse")


def _named(region: dict, attribute: str | None) -> dict[str, list[str]]:
    """The values of a region's attributes, or of the one that counts; empty ones left out."""
    if not isinstance(region, dict):
        raise D2SSLError("is not a region of VIA 1 or 2; export the file again")
    attributes = region.get("region_attributes") or {}
    if not isinstance(attributes, dict):
        raise D2SSLError("its region_attributes are damaged; export the file from VIA again")
    named = {}
    for key, value in attributes.items():
        if isinstance(value, dict):  # check boxes: {"cat": true}
            values = [option for option, ticked in value.items() if ticked]
        else:
            values = [] if value in ("", None) else [str(value)]
        if values and attribute in (None, key):
            named[key] = values
    return named


def _category(named: dict[str, list[str]], classes: Sequence[str]) -> int:
    """The class that a region's attributes name; no attribute is needed for a single class."""
    if not named and len(classes) == 1:
        return 0
    known = [value for values in named.values() for value in values if value in classes]
    if len(known) != 1:
        raise D2SSLError(
            f"region_attributes {named} name {len(known)} known classes; name one of {[*classes]}"
        )
    return list(classes).index(known[0])


def _require_no_attribute(
    entries: list[tuple[str, dict]], attribute: str | None, json_file: str
) -> None:
    """
    Raises:
        D2SSLError: regions have attributes, so that their classes must be given.
    """
    found: dict[str, dict[str, None]] = {}  # attribute -> its values, a set that keeps the order
    for name, regions in entries:
        for number, region in regions.items():
            try:
                named = _named(region, attribute)
            except D2SSLError as error:
                raise D2SSLError(f"{json_file}: {name}, region {number}: {error}") from None
            for key, values in named.items():
                found.setdefault(key, {}).update(dict.fromkeys(values))
    if found:
        texts = []
        for key, values in found.items():
            more = ", ..." if len(values) > _FEW else ""
            texts.append(f"{key} is {', '.join([*values][:_FEW])}{more}")
        raise D2SSLError(
            f"{json_file}: regions have attributes ({'; '.join(texts)}); say which of these values "
            "are the classes, in their order: classes=[...]"
        )
