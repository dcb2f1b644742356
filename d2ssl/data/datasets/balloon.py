"""The Balloon set (https://github.com/matterport/Mask_RCNN/releases/tag/v2.1) and its like."""

import os
from collections.abc import Sequence

from d2ssl.data.datasets.folder import register_image_folder
from d2ssl.data.datasets.via import register_via

MAKERS = {"balloon": "prepare_balloon.py", "balloon_demo": "make_balloon_demo.py"}


def register_balloon(name: str, root: str, classes: Sequence[str] = ("balloon",)) -> None:
    """
    Register ``<name>_train``, ``<name>_val`` and ``<name>_unlabeled`` (each photo of the train
    folder, its annotation file not read).

    Nothing is read before a set is used; calling again with another root moves all three.

    Args:
        name: how the sets' names begin.
        root: folder of the set; the photos and ``via_region_data.json`` lie in ``<root>/train``
            and ``<root>/val``.
        classes: see :func:`~d2ssl.data.datasets.via.load_via_json`.
    """
    folder = os.path.basename(os.path.normpath(root))
    how = f"set DETECTRON2_DATASETS to the folder that holds {folder}/"
    if folder in MAKERS:
        how = f"run datasets/{MAKERS[folder]}, or {how}"
    for split in ("train", "val"):
        register_via(f"{name}_{split}", os.path.join(root, split), classes=classes, how=how)
    train = os.path.join(root, "train")
    register_image_folder(f"{name}_unlabeled", train, how, thing_classes=[*classes])
