"""
Parts of a registered set by name, for label-efficiency studies.

``balloon_train@16`` is the first 16 entries of ``balloon_train``; ``balloon_train@16#seed3`` is a
random 16 of them, and where a set has several classes a stratified one. Of one seed the smaller
choice lies in the larger, and in each the entries keep the order of the whole set.
``balloon_train@-13`` and ``balloon_train@-13#seed3`` are the last 13 of the same orders: what is
left of the 61 entries when the first 48 are taken. A part has parts, too:
``balloon_train@48@16#seed3``.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets.catalog import decoded, decoder, listed, register_dataset
from d2ssl.data.sampling import classes_of
from d2ssl.errors import D2SSLError

_NAME = re.compile(r"(?P<base>.+)@(?P<count>-?[1-9]\d*)(#seed(?P<seed>\d{1,9}))?")

KNOWN = {"category_id", "annotations", "classes"}  # keys that tell a photo's classes

# Classes of each photo where finding them takes decoding: by the set's decoder and file names.
_DECODED: dict[tuple, list[set[int]]] = {}


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
        if match and _NAME.fullmatch(base):
            ensure_registered([base])
        if base not in DatasetCatalog.list():
            raise D2SSLError(f"data set {name!r}: not registered; {_advice(base, name)}")
        if not match:
            raise D2SSLError(
                f"data set {name!r}: cannot tell which part is meant; write {base}@16 or "
                f"{base}@16#seed3, and {base}@-16 or {base}@-16#seed3 for the last ones"
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


def stratify(classes: Sequence[set[int]], count: int, seed: int) -> list[int]:
    """
    As :func:`choose` with a seed, in the classes' proportions as far as possible.

    Photos are added one by one: while a class has none yet, a photo of the rarest such class, and
    then one of the class that lacks most against its share of the set. This is the rule of
    iterative stratification (Sechidis et al. 2011), but for a single part that grows; they draw
    for subsets of known sizes. Which photo of the class it is, seed and chance decide: a search
    for the best one would make the parts of different seeds alike. Photos without any class are a
    class of their own, apart from coming early. Where all photos have the same classes, the
    choice is that of :func:`choose`.

    Args:
        classes: of each photo, see :func:`~d2ssl.data.sampling.classes_of`.
    """
    draw = np.random.RandomState(seed)
    order = draw.permutation(len(classes))
    columns = draw.permutation(sorted(set().union(*classes)))  # chance decides between equals
    has = np.array([[c in classes[i] for c in columns] for i in order], dtype=np.int64)
    has = np.hstack([has, has.sum(1, keepdims=True) == 0])  # NxC+1; the last: without a class
    total, left = has.sum(0), has.sum(0)
    free, chosen = np.ones(len(has), bool), []
    for size in range(1, count + 1):
        absent = (left == total) & (total > 0)
        absent[-1] = False
        if absent.any():
            wanted = np.where(absent, -total, -total.max() - 1).argmax()
        else:
            lack = total * size - (total - left) * len(has)  # in 1 / len(has) photos: exact
            wanted = np.where(left > 0, lack, lack.min() - 1).argmax()
        first = (free & (has[:, wanted] == 1)).argmax()
        free[first] = False
        left -= has[first]
        chosen.append(int(order[first]))
    return sorted(chosen)


def _load_part(name: str, base: str, count: int, seed: int | None) -> list[dict]:
    dicts = listed(base)
    _copy_metadata(base, name)  # COCO's loader fills the metadata only now
    if abs(count) > len(dicts):
        raise D2SSLError(
            f"data set {name!r}: {base} has only {len(dicts)} entries; ask for no more"
        )
    first = count if count > 0 else len(dicts) + count
    if seed is None or not _has_several_classes(base):
        chosen = choose(len(dicts), first, seed)
    else:
        chosen = stratify(_classes(base, dicts), first, seed)
    if count < 0:  # the last ones are what the first leave
        chosen = sorted(set(range(len(dicts))) - set(chosen))
    return [dicts[i] for i in chosen]


def _has_several_classes(base: str) -> bool:
    metadata = MetadataCatalog.get(base)
    return len(metadata.get("thing_classes") or metadata.get("classes") or ()) > 1


def _classes(base: str, dicts: list[dict]) -> list[set[int]]:
    """Classes of each photo. Where only decoding tells, all photos are decoded, once a process."""
    decode = decoder(base)
    if decode is None or all(KNOWN & d.keys() for d in dicts):
        return [classes_of(d) for d in dicts]
    key = (decode, *(d["file_name"] for d in dicts))
    if key not in _DECODED:
        _DECODED[key] = [classes_of(d) for d in decoded(base, dicts)]
    return _DECODED[key]


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
