"""What all dataset modules share: the catalog entry, masks read when wanted, a hash of labels."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.photos import map_photos
from d2ssl.errors import D2SSLError

Decode = Callable[[dict], dict]

# What is behind a name in Detectron2's catalog, where the masks are read apart from the list.
_PARTS: dict[str, tuple[Callable[[], list[dict]], Decode]] = {}


def register_dataset(
    name: str, load: Callable[[], list[dict]], decode: Decode | None = None, **metadata: Any
) -> None:
    """
    Put a set into Detectron2's catalog under ``name``, replacing an earlier entry.

    Nothing is read before somebody asks for the set.

    Args:
        name: what DATASETS.TRAIN and the like will call the set.
        load: returns Detectron2's standard dataset dicts; where ``decode`` is given, quickly and
            without what that adds.
        decode: completes one of these dicts by what takes long, such as reading its mask files.
            Must be picklable: it runs in several processes, for the photos that are used.
        metadata: goes to MetadataCatalog.
    """
    parts = [other for other in DatasetCatalog.list() if other.startswith(f"{name}@")]
    for old in (name, *parts):  # parts are of the set as it was
        _PARTS.pop(old, None)
        if old in DatasetCatalog.list():
            DatasetCatalog.remove(old)
            if old in MetadataCatalog.list():  # metadata cannot be changed, only replaced
                MetadataCatalog.remove(old)
    if decode is None:
        DatasetCatalog.register(name, load)
    else:
        _PARTS[name] = load, decode
        DatasetCatalog.register(name, partial(_load_all, name))
    MetadataCatalog.get(name).set(**metadata)


def set_metadata(name: str, **values: Any) -> None:
    """Say what is known of a set only when it was listed, also where it was listed before."""
    metadata = MetadataCatalog.get(name)
    for key, value in values.items():
        if hasattr(metadata, key):
            delattr(metadata, key)  # Detectron2 refuses another value
        metadata.set(**{key: value})


def class_names(classes: Sequence[str]) -> list[str]:
    """
    Names of classes as a list.

    Raises:
        D2SSLError: a single string, or a name that is there twice.
    """
    if isinstance(classes, str):
        raise D2SSLError(f"classes is {classes!r}; give a list of names, [{classes!r}]")
    if len(set(classes)) < len(classes):
        raise D2SSLError(f"classes {[*classes]} has a name twice; name each class once")
    return [*classes]


def _load_all(name: str) -> list[dict]:
    return list(decoded(name, listed(name)))


def listed(name: str) -> list[dict]:
    """The dicts of a registered set, without what is left to :func:`decoded`."""
    return _PARTS[name][0]() if name in _PARTS else DatasetCatalog.get(name)


def decoded(name: str, dicts: Sequence[dict], num_workers: int | None = None) -> Iterator[dict]:
    """
    Dicts of :func:`listed` one after another, complete, with a progress bar where that takes time.

    Args:
        dicts: all or some of those that the set lists.
        num_workers: see :func:`~d2ssl.data.photos.map_photos`.
    """
    if name not in _PARTS:
        return iter(dicts)
    return map_photos(decoder(name), dicts, name, num_workers)


def decoder(name: str) -> Decode | None:
    """What completes a dict of a registered set; None where they are complete as listed."""
    return _PARTS[name][1] if name in _PARTS else None


def content_hash(dicts: list[dict]) -> str:
    """
    A short hash of what the annotations say; it changes as soon as a label is corrected.

    Returns:
        16 hexadecimal digits over file names, ids, sizes and annotations, in their order.
    """
    truth = ("annotations", "category_id", "coarse_category_id", "sem_seg_file_name")
    keys = ("file_name", "image_id", "height", "width", *truth)
    content = [{key: entry.get(key) for key in keys} for entry in dicts]
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays, and the bytes of a run-length mask, for JSON."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
