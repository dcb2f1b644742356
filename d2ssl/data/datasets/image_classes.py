"""Photos sorted into a folder a class, the layout of ImageNet and of torchvision's ImageFolder."""

import os
from collections.abc import Mapping, Sequence
from functools import partial

from torchvision.datasets.folder import find_classes, make_dataset

from d2ssl.data.datasets.catalog import class_names, register_dataset, set_metadata
from d2ssl.data.datasets.files import Notes, require_folder
from d2ssl.data.datasets.folder import SUFFIXES
from d2ssl.data.photos import add_size
from d2ssl.errors import D2SSLError


def register_image_classes(
    name: str,
    root: str,
    classes: Sequence[str] | None = None,
    splits: Sequence[str] = ("train", "val", "test"),
    titles: Mapping[str, str] | None = None,
) -> None:
    """
    Register ``<name>_<split>`` for each split; nothing is read before a set is used.

    Args:
        name: how the sets' names begin.
        root: folder of the set; the photos lie in ``<root>/<split>/<class>/`` and its sub-folders.
        classes: names of the class folders; a photo's ``category_id`` is its class's position
            here. None: the folders of the first split, sorted, for all splits; the sets' metadata
            ``classes`` is then known once a set was used.
        splits: names of the splits' folders. Empty: the photos lie in ``<root>/<class>/``, and the
            one set is called ``name``.
        titles: what to call the class of a folder whose name is a code, where ``classes`` is None.
    """
    sets = {f"{name}_{split}": os.path.join(root, split) for split in splits}
    sets = sets or {name: os.fspath(root)}
    first = next(iter(sets.values()))
    for each, folder in sets.items():
        if classes is None:
            register_dataset(each, partial(_load_set, each, folder, first, titles or {}), add_size)
        else:
            load = partial(load_image_classes, folder, classes)
            register_dataset(each, load, add_size, classes=class_names(classes))


def load_image_classes(folder: str, classes: Sequence[str]) -> list[dict]:
    """
    The photos under ``<folder>/<class>/``, hidden ones left out.

    Returns:
        Dicts with ``file_name``, ``image_id`` and ``category_id``, sorted by class folder and
        path, without sizes. A class without a folder is simply not there; one with an empty folder
        is warned of.

    Raises:
        D2SSLError: there is no such folder, no photo in it, or a folder of another class.
    """
    present = class_folders(folder)
    unknown = [each for each in present if each not in classes]
    if unknown:
        raise D2SSLError(
            f"{folder}: {unknown[0]} is none of the {len(classes)} classes; rename or remove the "
            "folder, or name it among the classes"
        )
    category_ids = {each: i for i, each in enumerate(classes)}
    photos = make_dataset(folder, category_ids, is_valid_file=_photo_in(folder), allow_empty=True)
    if not photos:
        raise D2SSLError(
            f"{folder}: no photo in its class folders; put files with {', '.join(SUFFIXES)} there"
        )
    notes = Notes(folder)
    for each in sorted(set(present) - {classes[category_id] for _, category_id in photos}):
        notes.add("class folders hold no photo", each)
    notes.log()
    return [
        {"file_name": file, "image_id": i, "category_id": category_id}
        for i, (file, category_id) in enumerate(photos)
    ]


def class_folders(folder: str) -> list[str]:
    """
    Names of the folders in ``folder``, sorted, hidden ones left out.

    Raises:
        D2SSLError: there is no such folder, or none in it.
    """
    require_folder(folder, "put the photos there, in a folder a class")
    try:
        names = [each for each in find_classes(folder)[0] if not each.startswith(".")]
    except FileNotFoundError:  # what torchvision says to an empty folder
        names = []
    if not names:
        raise D2SSLError(f"{folder}: no class folder in it; put each class's photos into a folder")
    return names


def _load_set(name: str, folder: str, first: str, titles: Mapping[str, str]) -> list[dict]:
    classes = class_folders(first)
    set_metadata(name, classes=[titles.get(each, each) for each in classes])
    return load_image_classes(folder, classes)


def _photo_in(folder: str):
    """Whether a path in ``folder`` is a photo; what is hidden above ``folder`` does not matter."""

    def is_photo(path: str) -> bool:
        return path.lower().endswith(SUFFIXES) and f"{os.sep}." not in path[len(folder) :]

    return is_photo
