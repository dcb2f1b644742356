"""The Balloon set (https://github.com/matterport/Mask_RCNN/releases/tag/v2.1) and its like."""

import os
from collections.abc import Sequence
from functools import partial

from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.folder import load_image_folder
from d2ssl.data.datasets.via import load_via_json
from d2ssl.errors import D2SSLError

ANNOTATIONS = "via_region_data.json"


def register_balloon(name: str, root: str, classes: Sequence[str] = ("balloon",)) -> None:
    """
    Register ``<name>_train``, ``<name>_val`` and ``<name>_unlabeled`` (each photo of the train
    folder, its annotation file not read).

    Nothing is read before a set is used; calling again with another root moves all three.

    Args:
        name: how the sets' names begin.
        root: folder of the set; the photos and ``via_region_data.json`` lie in ``<root>/train``
            and ``<root>/val``.
        classes: see :func:`load_via_json`.
    """
    for split in ("train", "val"):
        load = partial(_load_split, root, split, classes)
        register_dataset(f"{name}_{split}", load, thing_classes=[*classes], evaluator_type="coco")
    load = partial(_load_unlabeled, root)
    register_dataset(f"{name}_unlabeled", load, thing_classes=[*classes])


def _load_split(folder: str, split: str, classes: Sequence[str]) -> list[dict]:
    _check_present(folder, split)
    image_root = os.path.join(folder, split)
    return load_via_json(os.path.join(image_root, ANNOTATIONS), image_root, classes)


def _load_unlabeled(folder: str) -> list[dict]:
    _check_present(folder, "train")
    return load_image_folder(os.path.join(folder, "train"))


def _check_present(folder: str, split: str) -> None:
    if os.path.isdir(os.path.join(folder, split)):
        return
    maker = {"balloon": "prepare_balloon.py", "balloon_demo": "make_balloon_demo.py"}
    script = maker.get(os.path.basename(folder))
    how = f"run datasets/{script}, or " if script else ""
    raise D2SSLError(
        f"{os.path.join(folder, split)}: no such folder; {how}set DETECTRON2_DATASETS to the "
        f"folder that holds {os.path.basename(folder)}/"
    )
