"""What all dataset modules share: the catalog entry, masks read when wanted, a fingerprint."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.photos import map_photos

Decode = Callable[[dict], dict]

FEW = 32  # photos whose masks are read sooner than worker processes start

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
    _PARTS.pop(name, None)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():  # a set's metadata cannot be changed, only replaced
            MetadataCatalog.remove(name)
    if decode is None:
        DatasetCatalog.register(name, load)
    else:
        _PARTS[name] = load, decode
        DatasetCatalog.register(name, partial(_load_all, name))
    MetadataCatalog.get(name).set(**metadata)


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
        num_workers: processes; default: as many as there are cores, none for few photos.
    """
    if name not in _PARTS:
        return iter(dicts)
    if num_workers is None:
        num_workers = (os.cpu_count() or 1) if len(dicts) > FEW else 0
    return map_photos(decoder(name), dicts, name, num_workers)


def decoder(name: str) -> Decode | None:
    """What completes a dict of a registered set; None where they are complete as listed."""
    return _PARTS[name][1] if name in _PARTS else None


def fingerprint(dicts: list[dict]) -> str:
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
