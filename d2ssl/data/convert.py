"""A registered set as one JSON file in COCO's instances format (https://cocodataset.org)."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from d2ssl import __version__
from d2ssl.atomic import atomic_open
from d2ssl.data.datasets.catalog import Decode, decoder, listed
from d2ssl.data.datasets.files import Notes, require_folder
from d2ssl.data.datasets.subset import ensure_registered
from d2ssl.data.masks import annotation_mask, encode, mask_annotation, run_length
from d2ssl.data.photos import map_photos, photo_size
from d2ssl.errors import D2SSLError


class Converted(NamedTuple):
    """What a file holds, and the folder that its file names start from."""

    image_root: str
    images: int
    annotations: int
    polygons: int
    rles: int


def convert_to_coco(
    name: str,
    output: str,
    image_root: str = "",
    rle: bool = False,
    num_workers: int | None = None,
) -> Converted:
    """
    Write a registered set to a JSON file, photo by photo, with a progress bar.

    The photos are decoded and converted in several processes and written as they come, so that no
    more than a few photos' masks are in memory. The file appears complete or not at all; one that
    was there is replaced.

    Image ids are kept, so that predictions on the set fit the file; where they are not whole
    numbers, or not unique, the images are counted from 0 and keep theirs as ``original_id``.
    Categories are counted from 1, or have the ids that the set came with. Numbers are not rounded.

    Args:
        name: of the set, or of a part of it such as ``balloon_train@16``.
        output: the JSON file.
        image_root: folder that the file names are to start from; default: the deepest one that
            all photos lie in.
        rle: write all masks as RLE. Otherwise polygons stay polygons, and other masks become
            polygons where :func:`~d2ssl.data.masks.mask_annotation` would make them; crowds are
            always RLE.
        num_workers: processes; default: as many as there are cores, none for few photos.

    Raises:
        D2SSLError: a set that is unknown, empty or without instances, a photo that is missing or
            lies outside ``image_root``, an annotation that cannot be right, or a file that cannot
            be written.
    """
    ensure_registered([name])
    require_folder(os.path.dirname(output) or ".", f"make it to write {output} there")
    if os.path.isdir(output):
        raise D2SSLError(f"{output}: is a folder; name a file in it")
    dicts = listed(name)
    categories = _categories(name, dicts)
    notes = Notes(name)
    files, image_root = _file_names(name, dicts, image_root)
    ids = _image_ids(dicts, notes)
    images = [{**i, "file_name": file} for i, file in zip(ids, files)]
    convert = partial(
        _convert_photo, decode=decoder(name), category_ids=[c["id"] for c in categories], rle=rle
    )
    photos = map_photos(convert, list(zip(images, dicts)), name, num_workers)
    try:
        counts = _write(output, name, categories, photos, notes)
    except OSError as error:
        raise D2SSLError(f"{output}: cannot be written ({error})") from error
    notes.log()
    numbers = (counts[key] for key in ("images", "annotations", "polygons", "rles"))
    return Converted(image_root, *numbers)


def _write(output: str, name: str, categories: list[dict], photos, notes: Notes) -> Counter:
    info = {
        "description": f"Instances of {name} in COCO's format",
        "dataset": name,
        "d2ssl_version": __version__,
    }
    counts = Counter(images=0, annotations=0)
    # Images come last in the file: until then they wait in another one.
    with atomic_open(output) as file, tempfile.TemporaryFile("w+") as images:
        file.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n')
        file.write('"annotations": [')
        for image, annotations, found, empty in photos:
            images.write(",\n"[counts["images"] == 0 :] + image)
            counts["images"] += 1
            for annotation in annotations:
                separator = ",\n"[counts["annotations"] == 0 :]
                counts["annotations"] += 1
                # The running number is known only here, the rest was made in another process.
                file.write(f'{separator}{{"id": {counts["annotations"]}, {annotation[1:]}')
            counts.update(found)
            for where in empty:
                notes.add("masks are empty and are left out", where)
        file.write('\n],\n"images": [')
        images.seek(0)
        shutil.copyfileobj(images, file)
        file.write("\n]}\n")
    return counts


def _categories(name: str, dicts: Sequence[dict]) -> list[dict]:
    """COCO's categories in the order of the classes. Call it when the set was listed: COCO's own
    loader fills the metadata only then."""
    if not dicts:
        raise D2SSLError(f"{name}: the data set is empty")
    if "category_id" in dicts[0]:
        raise D2SSLError(
            f"{name}: is a classification set, with one class a photo and no instances to "
            "convert; name a detection set"
        )
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if not classes:
        if "sem_seg_file_name" in dicts[0]:
            raise D2SSLError(
                f"{name}: is a semantic set, with a class a pixel and no instances to convert; "
                "name a detection set"
            )
        raise D2SSLError(f"{name}: has no classes; register it with thing_classes=[...]")
    places = metadata.get("thing_dataset_id_to_contiguous_id")
    if places is None:
        ids = range(1, len(classes) + 1)
    elif sorted(places.values()) == list(range(len(classes))):
        ids = sorted(places, key=places.get)
    else:
        raise D2SSLError(
            f"{name}: thing_dataset_id_to_contiguous_id does not give each of the {len(classes)} "
            "thing_classes one id; correct the metadata"
        )
    return [{"id": int(i), "name": label} for i, label in zip(ids, classes)]


def _file_names(name: str, dicts: Sequence[dict], image_root: str) -> tuple[list[str], str]:
    """(file names from the root, the root)."""
    try:
        files = [os.path.abspath(entry["file_name"]) for entry in dicts]
    except (KeyError, TypeError) as error:
        raise D2SSLError(f"{name}: an image has no file; give each dict its file_name") from error
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise D2SSLError(
            f"{name}: {len(missing)} of {len(files)} photos are missing, the first is "
            f"{missing[0]}; restore them"
        )
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    root = os.path.abspath(image_root) if image_root else common
    if os.path.commonpath([common, root]) != root:
        raise D2SSLError(f"{image_root}: does not hold all photos of {name}, but {common} does")
    return [os.path.relpath(file, root) for file in files], root


def _image_ids(dicts: Sequence[dict], notes: Notes) -> list[dict]:
    """The ids of an image: COCO's, and where that is another, the one in the set."""
    ids = [entry.get("image_id") for entry in dicts]
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids)
    if whole and len(set(ids)) == len(ids):
        return [{"id": int(i)} for i in ids]
    given = [i for i in ids if i is not None]  # those without are counted by Detectron2 too
    for i in given:
        notes.add("image ids became numbers from 0, and stand beside them as original_id", i)
    return [
        {"id": n} if i is None else {"id": n, "original_id": i if whole else str(i)}
        for n, i in enumerate(ids)
    ]


def _convert_photo(
    photo: tuple[dict, dict], decode: Decode | None, category_ids: Sequence[int], rle: bool
) -> tuple[str, list[str], Counter, list[str]]:
    """
    (JSON of the image, JSON of each annotation without its id, how many masks of which kind,
    where there were empty ones) of an image's entry, its size left out, and its dict as listed.
    """
    image, entry = photo
    if decode is not None:
        entry = decode(entry)
    if "height" in entry and "width" in entry:
        size = int(entry["height"]), int(entry["width"])
    else:
        size = photo_size(entry["file_name"])
    annotations, found, empty = [], Counter(), []
    for number, annotation in enumerate(entry.get("annotations") or ()):
        where = f"{entry['file_name']}, annotation {number}"
        try:
            converted = coco_annotation(annotation, *size, category_ids, rle)
            if converted is None:
                empty.append(where)
                continue
            converted = {"image_id": image["id"], **converted}
            annotations.append(json.dumps(converted, allow_nan=False))
        except D2SSLError as error:
            raise D2SSLError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise D2SSLError(
                f"{where}: is damaged ({type(error).__name__}: {error}); correct it"
            ) from error
        if "segmentation" in converted:
            found["polygons" if isinstance(converted["segmentation"], list) else "rles"] += 1
    height, width = size
    return json.dumps({**image, "height": height, "width": width}), annotations, found, empty


def coco_annotation(
    annotation: dict, height: int, width: int, category_ids: Sequence[int], rle: bool = False
) -> dict | None:
    """
    COCO's entry of one of Detectron2's annotation dicts, without the ids of entry and image; None
    where its mask is empty.

    Args:
        height, width: of the photo.
        category_ids: COCO's id of each class.
        rle: see :func:`convert_to_coco`.

    Raises:
        D2SSLError: a class that is not there, a rotated or relative box, or a mask that is damaged
            or of another size.
    """
    place, mode = annotation["category_id"], annotation["bbox_mode"]
    if not 0 <= place < len(category_ids):
        raise D2SSLError(f"category_id {place}, but the set has {len(category_ids)} classes")
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise D2SSLError(f"a box in {BoxMode(mode).name}; give XYXY_ABS or XYWH_ABS")
    box = np.array(annotation["bbox"], np.float64).reshape(1, 4)
    ((*corner, box_width, box_height),) = BoxMode.convert(box, mode, BoxMode.XYWH_ABS).tolist()
    converted = {
        "category_id": category_ids[place],
        "bbox": [*corner, box_width, box_height],
        "area": box_width * box_height,
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    segmentation = annotation.get("segmentation")
    if segmentation is not None and len(segmentation):  # [] stands for "not annotated" in COCO
        as_rle = bool(rle or converted["iscrowd"])
        converted["area"], shape = _coco_shape(segmentation, height, width, as_rle)
        if converted["area"] == 0:
            return None
        converted["segmentation"] = shape if isinstance(shape, list) else _as_json(shape)
    if "keypoints" in annotation:
        # Detectron2 places a point at the centre of a pixel, COCO counts pixels.
        points = np.array(annotation["keypoints"], np.float64).reshape(-1, 3) - (0.5, 0.5, 0)
        converted["keypoints"] = points.ravel().tolist()
        converted["num_keypoints"] = int(np.count_nonzero(points[:, 2]))
    return converted


def _coco_shape(
    segmentation: list | dict | np.ndarray, height: int, width: int, as_rle: bool
) -> tuple[int, list | dict]:
    """(area in pixels, polygons or RLE) of polygons, an RLE, or a mask (HxW)."""
    if isinstance(segmentation, list):  # drawn as RLE, which is never decoded
        polygons = [np.array(p, np.float64).tolist() for p in segmentation]
        polygons = [p for p in polygons if len(p) >= 6]  # shorter ones enclose nothing
        if not polygons:
            return 0, []
        runs = run_length(polygons, height, width)
        return int(coco_mask.area(runs)), runs if as_rle else polygons
    runs = encode(segmentation) if isinstance(segmentation, np.ndarray) else segmentation
    mask = annotation_mask({"segmentation": runs}, height, width)
    drawn = None if as_rle else mask_annotation(mask, category_id=0)
    return int(mask.sum()), encode(mask) if drawn is None else drawn["segmentation"]


def _as_json(runs: dict) -> dict:
    """An RLE of :func:`~d2ssl.data.masks.encode` as COCO's files have it."""
    return {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}
