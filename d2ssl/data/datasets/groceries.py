"""Photos of groceries with one class each: Freiburg Groceries and the Grocery Store Dataset."""

import os
import re
from functools import partial

from d2ssl.data.datasets.catalog import register_dataset, set_metadata
from d2ssl.data.datasets.files import locate, read_csv, read_lines, require_folder
from d2ssl.data.datasets.folder import register_image_folder
from d2ssl.data.photos import add_size
from d2ssl.errors import D2SSLError

FREIBURG_CLASSES = (  # in the order of the published labels
    *("CANDY", "JUICE", "VINEGAR", "OIL", "CHOCOLATE", "PASTA", "RICE", "MILK", "SPICES", "HONEY"),
    *("JAM", "NUTS", "CHIPS", "SODA", "COFFEE", "BEANS", "TEA", "CORN", "CEREAL", "CAKE", "SUGAR"),
    *("WATER", "FLOUR", "TOMATO_SAUCE", "FISH"),
)
FREIBURG_SPLITS = 5  # each with its own train and test list; the test lists share no photo

# Columns of the Grocery Store's classes.csv: a fine class and the coarse one that it belongs to.
_FINE = ("Class Name (str)", "Class ID (int)")
_COARSE = ("Coarse Class Name (str)", "Coarse Class ID (int)")


def register_freiburg_groceries(name: str, root: str) -> None:
    """
    Register Freiburg Groceries (https://github.com/PhilJd/freiburg_groceries_dataset):
    ``<name>_train0`` and ``<name>_test0`` to ``4``, and ``<name>_unlabeled``, all photos.

    The published train lists name each class's photos again and again up to 297, to balance the
    classes; here each photo counts once. Nothing is read before a set is used.

    Args:
        name: how the sets' names begin.
        root: folder with ``images/<CLASS>/*.png`` and ``splits/{train,test}{0..4}.txt``.
    """
    for split in (f"{part}{i}" for i in range(FREIBURG_SPLITS) for part in ("train", "test")):
        load = partial(_load_freiburg, root, split)
        register_dataset(f"{name}_{split}", load, add_size, classes=[*FREIBURG_CLASSES])
    register_image_folder(f"{name}_unlabeled", os.path.join(root, "images"))


def register_grocery_store(name: str, root: str) -> None:
    """
    Register the Grocery Store Dataset (https://github.com/marcusklasson/GroceryStoreDataset):
    ``<name>_train``, ``<name>_val`` and ``<name>_test``.

    ``category_id`` is a photo's fine class ("Royal-Gala"), ``coarse_category_id`` the coarse one
    ("Apple"). Nothing is read before a set is used; the metadata ``classes`` and
    ``coarse_classes`` are known from then on.

    Args:
        name: how the sets' names begin.
        root: folder with ``classes.csv`` and, for the sets that are used, ``train.txt``,
            ``val.txt`` or ``test.txt``; in the published repository ``dataset/``.
    """
    for split in ("train", "val", "test"):
        load = partial(_load_store, f"{name}_{split}", root, split)
        register_dataset(f"{name}_{split}", load, add_size)


def _load_freiburg(root: str, split: str) -> list[dict]:
    images = os.path.join(root, "images")
    require_folder(images, "unpack the published photos there")
    source = os.path.join(root, "splits", f"{split}.txt")
    labels = {}
    for line in read_lines(source):
        match = re.fullmatch(r"((\w+)/.+) (\d+)", line)
        if not match or match[2] not in FREIBURG_CLASSES:
            raise D2SSLError(f"{source}: {line!r} is not 'CLASS/PHOTO.png LABEL'; get it again")
        label = FREIBURG_CLASSES.index(match[2])
        if int(match[3]) != label:
            raise D2SSLError(
                f"{source}: {line!r} should have the label {label}; get the published lists"
            )
        labels[match[1]] = {"category_id": label}
    return _entries(images, [*labels.items()], source)


def _load_store(name: str, root: str, split: str) -> list[dict]:
    require_folder(root, "get the set, or correct the path")
    classes, coarse_classes, parents = _store_classes(os.path.join(root, "classes.csv"))
    source = os.path.join(root, f"{split}.txt")
    rows = []
    for line in read_lines(source):
        match = re.fullmatch(r"(.+), *(\d+), *(\d+)", line)
        if not match:
            raise D2SSLError(
                f"{source}: {line!r} is not 'path, fine id, coarse id'; get the file again"
            )
        fine, coarse = int(match[2]), int(match[3])
        if parents.get(fine) != coarse:
            raise D2SSLError(
                f"{source}: {line!r} has ids that classes.csv does not have together; get both "
                "files again"
            )
        rows.append((match[1], {"category_id": fine, "coarse_category_id": coarse}))
    set_metadata(name, classes=classes, coarse_classes=coarse_classes)
    return _entries(root, rows, source)


def _store_classes(path: str) -> tuple[list[str], list[str], dict[int, int]]:
    """Names of the fine and of the coarse classes by id, and each fine id's coarse one."""
    fine_names, coarse_names, parents = {}, {}, {}
    for row in read_csv(path, (*_FINE, *_COARSE)):
        (fine_name, fine), (coarse_name, coarse) = ([row[c] for c in x] for x in (_FINE, _COARSE))
        if not (fine.isdecimal() and coarse.isdecimal()):
            raise D2SSLError(f"{path}: {fine_name} has an id that is no number; get it again")
        fine, coarse = int(fine), int(coarse)
        if fine in parents or coarse_names.setdefault(coarse, coarse_name) != coarse_name:
            raise D2SSLError(f"{path}: {fine_name} has an id of another class; get it again")
        fine_names[fine], parents[fine] = fine_name, coarse
    for names in (fine_names, coarse_names):
        if sorted(names) != [*range(len(names))]:
            raise D2SSLError(f"{path}: lacks some ids from 0 to {max(names)}; get it again")
    classes, coarse_classes = (
        [names[i] for i in sorted(names)] for names in (fine_names, coarse_names)
    )
    return classes, coarse_classes, parents


def _entries(folder: str, rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """Dicts of the photos of a list, from (path in ``folder``, its ids)."""
    if not rows:
        raise D2SSLError(f"{source}: names no photo; get the file again")
    files = locate(folder, [name for name, _ in rows], source)
    return [
        {"file_name": file, "image_id": i, **ids}
        for i, (file, (_, ids)) in enumerate(zip(files, rows))
    ]
