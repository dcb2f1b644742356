"""
Parts of a registered set by name, for label-efficiency studies.

``balloon_train@16`` is the first 16 entries of ``balloon_train``; ``balloon_train@16#seed3`` is a
random 16 of them. Of one seed the smaller choice lies in the larger, and in each the entries
keep the order of the whole set.
"""

import difflib
import re
from collections.abc import Iterable
from functools import partial

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets.catalog import decoder, listed, register_dataset
from d2ssl.errors import D2SSLError

_NAME = re.compile(r"(?P<base>.+)@(?P<count>[1-9]\d*)(#seed(?P<seed>\d{1,9}))?")


def ensure_registered(names: Iterable[str]) -> None:
    """
    Register those of the ``names`` that are parts of a registered set; nothing is read yet.

    Raises:
        D2SSLError: a name is neither registered nor part of a registered set. Using a part
            that is larger than its set raises it too.
    """
    for name in names:
        if name in DatasetCatalog.list():
            continue
        match = _NAME.fullmatch(name)
        base = match["base"] if match else name.rpartition("@")[0] or name
        if base not in DatasetCatalog.list():
            raise D2SSLError(f"data set {name!r}: not registered; {_advice(base, name)}")
        if not match:
            raise D2SSLError(
                f"data set {name!r}: cannot tell which part is meant; write {base}@16 or "
                f"{base}@16#seed3"
            )
        seed = None if match["seed"] is None else int(match["seed"])
        load = partial(_load_part, name, base, int(match["count"]), seed)
        register_dataset(name, load, decoder(base))
        _copy_metadata(base, name)


def choose(total: int, count: int, seed: int | None = None) -> list[int]:
    """
    Which ``count`` of ``total`` entries a part holds: sorted indices, the first ones without a
    seed. For one seed and total the choice grows with ``count``.
    """
    if seed is None:
        return list(range(count))
    # RandomState, since numpy promises that its streams never change.
    return sorted(np.random.RandomState(seed).permutation(total)[:count].tolist())


def _load_part(name: str, base: str, count: int, seed: int | None) -> list[dict]:
    dicts = listed(base)
    _copy_metadata(base, name)  # COCO's loader fills the metadata only now
    if count > len(dicts):
        raise D2SSLError(
            f"data set {name!r}: {base} has only {len(dicts)} entries; ask for no more"
        )
    return [dicts[i] for i in choose(len(dicts), count, seed)]


def _copy_metadata(base: str, name: str) -> None:
    # An annotation file describes the whole set: evaluators must make their own for the part.
    left_out = ("name", "json_file")
    metadata = MetadataCatalog.get(name)
    for key, value in MetadataCatalog.get(base).as_dict().items():
        if key not in left_out and not hasattr(metadata, key):
            metadata.set(**{key: value})


def _advice(base: str, name: str) -> str:
    nearest = difflib.get_close_matches(base, DatasetCatalog.list(), n=1, cutoff=0.5)
    if not nearest:
        return "register it first, see datasets/README.md"
    return f"did you mean {nearest[0] + name[len(base) :]!r}?"
