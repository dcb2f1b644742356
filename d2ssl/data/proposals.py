"""Class-agnostic boxes for object-level pretraining, attached to the dataset dicts.

Where a box may come from is named by one string: ``selective_search``, ``grid``, ``random``,
``annotations`` or the path of a COCO-format JSON file with boxes of the user's own making.
Boxes are Nx4 float32 XYXY in pixels of the photo, x2 and y2 behind the last pixel, throughout.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np

from d2ssl.atomic import atomic_open
from d2ssl.data.photos import map_photos
from d2ssl.data.selective_search import selective_search
from d2ssl.errors import D2SSLError

UNFILTERED = {"min_size": 0, "max_aspect": 1e9, "min_scale": 0, "max_scale": np.inf}
CACHE_VERSION = 1  # count up when selective_search changes its answer

logger = logging.getLogger(__name__)


def grid_boxes(height: int, width: int, scales: tuple[float, ...] = (0.25, 0.5)) -> np.ndarray:
    """Square windows that cover the photo, each overlapping the next by at least half.

    ``scales`` are window sides relative to sqrt(height*width). A side is cut to the photo's.
    """
    boxes = []
    for scale in scales:
        side = scale * np.sqrt(height * width)
        w, h = min(side, width), min(side, height)
        columns = int(np.ceil((width - w) / (w / 2))) + 1
        rows = int(np.ceil((height - h) / (h / 2))) + 1
        x, y = np.meshgrid(np.linspace(0, width - w, columns), np.linspace(0, height - h, rows))
        boxes.append(np.stack([x, y, x + w, y + h], axis=-1).reshape(-1, 4))
    return np.concatenate(boxes).astype(np.float32)


def random_boxes(
    height: int,
    width: int,
    n: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.1, 0.8),
    max_aspect: float = 3.0,
) -> np.ndarray:
    """Draw n boxes that lie inside the photo.

    sqrt(w*h)/sqrt(height*width) is log-uniform in ``scale``, w/h log-uniform in
    [1/max_aspect, max_aspect] (both before a side is cut to the photo's), and the place is uniform
    among those that keep the box inside.
    """
    size = np.exp(rng.uniform(*np.log(scale), n)) * np.sqrt(height * width)
    aspect = np.exp(rng.uniform(-np.log(max_aspect), np.log(max_aspect), n) / 2)
    w, h = np.minimum(size * aspect, width), np.minimum(size / aspect, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return np.stack([x, y, x + w, y + h], axis=1).astype(np.float32)


def annotation_boxes(dataset_dict: dict) -> np.ndarray:
    """Boxes of the annotations of a Detectron2 dataset dict; crowd regions are no objects."""
    from detectron2.structures import BoxMode  # imports torch, which workers do not need

    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in dataset_dict.get("annotations", [])
        if not annotation.get("iscrowd", 0)
    ]
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def filter_boxes(
    boxes: np.ndarray,
    height: int,
    width: int,
    min_size: float = 12.0,
    max_aspect: float = 3.0,
    min_scale: float = 0.05,
    max_scale: float = 0.8,
) -> np.ndarray:
    """Keep the boxes that may be objects; never leave a photo without any.

    SoCo's filter is ``min_size=26, max_aspect=3, min_scale=0.3, max_scale=0.8`` here. Its 0.3
    throws away each object that fills less than 9 % of the photo, and with it all that a set of
    small objects has to teach: of the objects in 61 photos of balloons it leaves a box with an IoU
    of 0.5 to one in five, the defaults to seven in eight.

    Args:
        boxes: Nx4 XYXY.
        height, width: of the photo.
        min_size: smallest w and smallest h, in px of a copy of the photo whose long side is 400 px,
            so that the same photo at another resolution keeps the same boxes.
        max_aspect: largest w/h and h/w.
        min_scale, max_scale: range of sqrt(w*h) / sqrt(height*width).

    Returns:
        Mx4 float32, M >= 1. Where no box passes, those that pass without the scale; where there is
        none, those that pass ``min_size`` alone; where there is none, the whole photo.
    """
    boxes = clip_boxes(boxes, height, width)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    large = np.minimum(w, h) * 400 / max(height, width) >= max(min_size, 1e-3)
    shaped = large & (np.maximum(w, h) <= max_aspect * np.minimum(w, h))
    scale = np.sqrt(w * h / (height * width))
    for keep in (shaped & (scale >= min_scale) & (scale <= max_scale), shaped, large):
        if keep.any():
            return boxes[keep]
    return np.array([[0, 0, width, height]], dtype=np.float32)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The part of each Nx4 box that lies inside 0..width, 0..height; it may be empty."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))


def attach_proposals(
    dataset_dicts: list[dict],
    source: str,
    read_photo: Callable[[str], np.ndarray],
    cache_dir: str | None = None,
    num_workers: int = 2,
    **filters: float,
) -> list[dict]:
    """Give each dataset dict Detectron2's standard proposal fields.

    Args:
        dataset_dicts: Detectron2's standard dicts (file_name, height, width).
        source: one of ``config.PROPOSAL_SOURCES``, or the path of a JSON file with COCO's
            ``images`` and ``annotations``; its images are matched by file name, and where they
            state another ``height`` and ``width`` than the photo's, in the same proportion, boxes
            are scaled.
        read_photo: path -> HxWx3 uint8 RGB. Must be picklable if ``num_workers`` > 0.
        cache_dir: selective search keeps its boxes here, one file per photo content, so a photo
            renamed or moved is not searched again and a changed one is. None: no cache.
        num_workers: processes for the selective search; 0: this one.
        **filters: the keys of :func:`filter_boxes`. Boxes that a person chose, annotations and
            JSON files, are clipped to the photo but not filtered.

    Returns:
        Copies of the dicts with ``proposal_boxes`` (Nx4 float32, N >= 1), ``proposal_bbox_mode``
        (XYXY_ABS) and ``proposal_objectness_logits`` (N zeros).

    Raises:
        D2SSLError: unreadable JSON file or one for photos of other proportions, no annotated box, a
            ``cache_dir`` that cannot be used, or what ``read_photo`` raises.
    """
    from detectron2.structures import BoxMode

    if source == "selective_search":
        found = _search_all(dataset_dicts, read_photo, cache_dir, num_workers)
    elif source == "grid":
        found = [grid_boxes(d["height"], d["width"]) for d in dataset_dicts]
    elif source == "random":
        found = [_random_of_photo(d) for d in dataset_dicts]
    elif source == "annotations":
        found = _annotated(dataset_dicts)
    else:
        found = _boxes_from_json(source, dataset_dicts)
    if source not in ("selective_search", "grid", "random"):
        filters = UNFILTERED
    attached = []
    for dataset_dict, boxes in zip(dataset_dicts, found):
        dataset_dict = copy.copy(dataset_dict)
        boxes = filter_boxes(boxes, dataset_dict["height"], dataset_dict["width"], **filters)
        dataset_dict["proposal_boxes"] = boxes
        dataset_dict["proposal_bbox_mode"] = BoxMode.XYXY_ABS
        dataset_dict["proposal_objectness_logits"] = np.zeros(len(boxes), dtype=np.float32)
        attached.append(dataset_dict)
    return attached


def _random_of_photo(dataset_dict: dict) -> np.ndarray:
    # Seeded by the name, so that every process and every run sees the same boxes.
    name = os.path.basename(dataset_dict["file_name"]).encode()
    rng = np.random.default_rng(zlib.crc32(name))
    return random_boxes(dataset_dict["height"], dataset_dict["width"], 64, rng)


def _annotated(dataset_dicts: list[dict]) -> list[np.ndarray]:
    found = [annotation_boxes(d) for d in dataset_dicts]
    bare = sum(len(boxes) == 0 for boxes in found)
    if bare == len(found) > 0:
        raise D2SSLError(
            f"proposals: none of {bare} photos has an annotated box; name labelled sets in "
            "SSL.DATASETS, or another SSL.PROPOSALS.SOURCE"
        )
    if bare:
        logger.warning(
            "%d of %d photos have no annotated box: each is taken as one box", bare, len(found)
        )
    return found


def _search_all(dataset_dicts, read_photo, cache_dir, num_workers) -> list[np.ndarray]:
    """Selective search of all photos, in order."""
    if cache_dir is not None:
        with _naming_the_cache(cache_dir):
            os.makedirs(cache_dir, exist_ok=True)
    search = partial(_search_one, read_photo=read_photo, cache_dir=cache_dir)
    files = [d["file_name"] for d in dataset_dicts]
    return list(map_photos(search, files, "selective search", num_workers))


def _search_one(file_name: str, read_photo: Callable, cache_dir: str | None) -> np.ndarray:
    if cache_dir is None:
        return selective_search(read_photo(file_name))
    try:
        with open(file_name, "rb") as photo:
            digest = hashlib.sha256(photo.read()).hexdigest()
    except OSError as error:
        raise D2SSLError(f"{file_name}: cannot be read ({error}); check the path") from error
    cached = os.path.join(cache_dir, f"selective_search{CACHE_VERSION}-{digest}.npy")
    boxes = _read_cached(cached)
    if boxes is None:
        boxes = selective_search(read_photo(file_name))
        with _naming_the_cache(cache_dir), atomic_open(cached, "wb") as file:
            np.save(file, boxes)
    return boxes


@contextlib.contextmanager
def _naming_the_cache(cache_dir: str):
    try:
        yield
    except OSError as error:
        raise D2SSLError(
            f"{cache_dir}: cannot be written ({error.strerror}); set SSL.PROPOSALS.CACHE_DIR or "
            "D2SSL_CACHE to another folder"
        ) from error


def _read_cached(path: str) -> np.ndarray | None:
    """The boxes in a cache file; None if there is none that can be read."""
    try:
        boxes = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: cannot be read (%s), computed again", path, error)
        return None
    return boxes if boxes.ndim == 2 and boxes.shape[1] == 4 and len(boxes) else None


def _boxes_from_json(path: str, dataset_dicts: list[dict]) -> list[np.ndarray]:
    """The boxes that a COCO-format file has for each photo, Nx4 XYXY, N may be 0."""
    try:
        with open(path) as file:
            content = json.load(file)
        boxes = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            boxes[annotation["image_id"]].append([x, y, x + w, y + h])
        by_name = {
            image["file_name"]: (boxes[image["id"]], _stated_size(image))
            for image in content["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise D2SSLError(
            f"{path}: not a COCO-format file of boxes ({type(error).__name__}: {error}); it needs "
            "'images' (id, file_name) and 'annotations' (image_id, bbox as x, y, w, h)"
        ) from error
    found = [_by_file_name(by_name, d["file_name"]) for d in dataset_dicts]
    missing = [d["file_name"] for d, entry in zip(dataset_dicts, found) if entry is None]
    if len(missing) == len(found) > 0:
        raise D2SSLError(f"{path}: names none of the photos, such as {missing[0]}; check file_name")
    if missing:
        logger.warning("%s: no entry for %d photos, e.g. %s", path, len(missing), missing[0])
    return [_on_photo(*(entry or ([], None)), d, path) for d, entry in zip(dataset_dicts, found)]


def _stated_size(image: dict) -> tuple[float, float] | None:
    """Height and width in an entry of COCO's images; None where it has not both."""
    height, width = image.get("height"), image.get("width")
    return (float(height), float(width)) if height and width else None


def _on_photo(boxes: list, size: tuple[float, float] | None, photo: dict, path: str) -> np.ndarray:
    """Boxes made on a copy of a photo, in pixels of the photo: Nx4."""
    actual = photo["height"], photo["width"]
    height, width = size or actual
    # A copy's sides are rounded to whole pixels, each by less than one.
    rounding = max(height + width, sum(actual))
    if abs(height * actual[1] - width * actual[0]) > rounding:
        raise D2SSLError(
            f"{path}: has boxes for {photo['file_name']} of {width:g}x{height:g}, but it is "
            f"{actual[1]}x{actual[0]}; make them on the photo as it is"
        )
    scale = np.array([actual[1] / width, actual[0] / height] * 2)
    return (np.array(boxes).reshape(-1, 4) * scale).astype(np.float32)


def _by_file_name(by_name: dict[str, tuple], file_name: str) -> tuple | None:
    """The entry whose name is the longest end of the path: "b/1.jpg" goes before "1.jpg"."""
    parts = file_name.replace("\\", "/").split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((by_name[end] for end in ends if end in by_name), None)
