"""What a result follows from besides the config: photos, labels, weights.

Where they are the same as before, an earlier result is still the answer.
"""

import functools
import hashlib
import os
from typing import Dict, Iterable, List

from detectron2.data import MetadataCatalog

from d2ssl.data.build import load_dicts, load_photos
from d2ssl.data.datasets.catalog import content_hash


def contents(names: Iterable[str], labels: bool = True) -> Dict[str, str]:
    """Of each data set a short hash of its photos' names and sizes, in pixels and in bytes, and,
    where ``labels`` count, of these, with the names of their classes; not of the folder in which
    it lies, which may be another on another machine."""
    load = load_dicts if labels else load_photos
    found = {name: content_hash([_anywhere(row) for row in load([name])]) for name in names}
    if labels:  # names say which of a detector's predictors are kept
        for name in found:  # after loading, as COCO's loader knows them only then
            classes = MetadataCatalog.get(name).get("thing_classes", [])
            found[name] = " ".join([found[name], *classes])
    return found


def _anywhere(row: dict) -> dict:
    file = row["file_name"]
    return {**row, "file_name": [os.path.basename(file), os.path.getsize(file)]}


def pretraining_inputs(cfg) -> List[object]:
    """What pretraining follows from besides the config and its weights: the photos, and labels or a
    file where proposals are made of these."""
    source = cfg.SSL.PROPOSALS.SOURCE
    labels = source == "annotations"
    return [list(contents(cfg.SSL.DATASETS, labels).values()), file_hash(source)]


def file_hash(path: str) -> str:
    """A hash of what is in a file; the path itself where there is none, as of the model zoo's."""
    return _digest(path, os.stat(path).st_mtime_ns) if os.path.isfile(path) else path


@functools.lru_cache
def _digest(path: str, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
