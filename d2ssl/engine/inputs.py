"""What a result follows from besides the config: photos, labels, weights.

Where they are the same as before, an earlier result is still the answer.
"""

import functools
import hashlib
import os
from typing import Dict, Iterable

from d2ssl.data.build import load_dicts, load_photos
from d2ssl.data.datasets import fingerprint


def contents(names: Iterable[str], labels: bool = True) -> Dict[str, str]:
    """Of each data set a short hash of its photos' names and sizes and, where ``labels`` count, of
    these; not of the folder in which it lies, which may be another on another machine."""
    load = load_dicts if labels else load_photos
    return {name: fingerprint([_anywhere(row) for row in load([name])]) for name in names}


def _anywhere(row: dict) -> dict:
    return {**row, "file_name": os.path.basename(row["file_name"])}


def weights_in(path: str) -> str:
    """A hash of a file of weights; its name where there is no such file, as of the model zoo's."""
    return _digest(path, os.stat(path).st_mtime_ns) if os.path.isfile(path) else path


@functools.lru_cache
def _digest(path: str, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
