"""What all dataset modules share: the catalog entry and a fingerprint of its content."""

import hashlib
import json
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog


def register_dataset(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    """
    Put ``load`` into Detectron2's catalog under ``name``, replacing an earlier entry.

    Nothing is read before somebody asks for the set.

    Args:
        name: what DATASETS.TRAIN and the like will call the set.
        load: returns Detectron2's standard dataset dicts.
        metadata: goes to MetadataCatalog.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():  # a set's metadata cannot be changed, only replaced
            MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def fingerprint(dicts: list[dict]) -> str:
    """
    A short hash of what the annotations say; it changes as soon as a label is corrected.

    Returns:
        16 hexadecimal digits over file names, ids, sizes and annotations, in their order.
    """
    keys = ("file_name", "image_id", "height", "width", "annotations")
    content = [{key: entry.get(key) for key in keys} for entry in dicts]
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Numpy numbers and arrays, and the bytes of a run-length mask, for JSON."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
