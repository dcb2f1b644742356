"""Data sets, registered in Detectron2's catalogs; datasets/README.md lists their layouts."""

import os

from detectron2.data import DatasetCatalog

from d2ssl.data.datasets.balloon import register_balloon
from d2ssl.data.datasets.catalog import fingerprint, register_dataset
from d2ssl.data.datasets.folder import load_image_folder, register_image_folder
from d2ssl.data.datasets.subset import ensure_registered
from d2ssl.data.datasets.via import load_via_json

__all__ = [
    "ensure_registered",
    "fingerprint",
    "load_image_folder",
    "load_via_json",
    "register_balloon",
    "register_builtin",
    "register_dataset",
    "register_image_folder",
]


def register_builtin() -> None:
    """
    Register the built-in sets under ``$DETECTRON2_DATASETS``, ``datasets`` where that is unset.

    Called on import. A name that the user registered before is left to the user.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    for name in ("balloon", "balloon_demo"):
        if f"{name}_train" not in DatasetCatalog.list():
            register_balloon(name, os.path.join(root, name))


register_builtin()
