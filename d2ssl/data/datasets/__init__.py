"""Data sets, registered in Detectron2's catalogs; datasets/README.md lists their layouts."""

import os

from detectron2.data import DatasetCatalog

from d2ssl.data.datasets.balloon import register_balloon
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.cifar10 import register_cifar10
from d2ssl.data.datasets.cityscapes import register_cityscapes
from d2ssl.data.datasets.coco import register_coco
from d2ssl.data.datasets.folder import register_image_folder
from d2ssl.data.datasets.groceries import register_freiburg_groceries, register_grocery_store
from d2ssl.data.datasets.image_classes import register_image_classes
from d2ssl.data.datasets.imagenette import register_imagenette
from d2ssl.data.datasets.labelme import register_labelme
from d2ssl.data.datasets.mask_folder import register_mask_folder, register_pennfudan
from d2ssl.data.datasets.open_images import register_open_images
from d2ssl.data.datasets.subset import ensure_registered
from d2ssl.data.datasets.via import load_via_json, register_via
from d2ssl.data.datasets.voc import register_voc

__all__ = [
    "ensure_registered",
    "load_via_json",
    "register_balloon",
    "register_builtin",
    "register_cifar10",
    "register_cityscapes",
    "register_coco",
    "register_dataset",
    "register_freiburg_groceries",
    "register_grocery_store",
    "register_image_classes",
    "register_image_folder",
    "register_imagenette",
    "register_labelme",
    "register_mask_folder",
    "register_open_images",
    "register_pennfudan",
    "register_via",
    "register_voc",
]

# How the sets' names begin -> their folder under $DETECTRON2_DATASETS, and what registers them.
BUILTIN = {
    "balloon": ("balloon", register_balloon),
    "balloon_demo": ("balloon_demo", register_balloon),
    "pennfudan": ("PennFudanPed", register_pennfudan),
    "voc": ("VOC2012", register_voc),
    "cityscapes": ("cityscapes", register_cityscapes),
    "open_images": ("open_images", register_open_images),
    "cifar10": ("cifar-10-batches-py", register_cifar10),
    "imagenette": ("imagenette2", register_imagenette),
    "imagewoof": ("imagewoof2", register_imagenette),
    "imagewang": ("imagewang", register_imagenette),
    "freiburg": ("freiburg_groceries_dataset", register_freiburg_groceries),
    "grocery_store": (os.path.join("GroceryStoreDataset", "dataset"), register_grocery_store),
}


def register_builtin() -> None:
    """
    Register the published sets under ``$DETECTRON2_DATASETS``, ``datasets`` where that is unset.

    Called on import. A family is left to the user who registered its ``_train`` before.
    """
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    taken = set(DatasetCatalog.list())
    for name, (folder, register) in BUILTIN.items():
        if not any(other.startswith(f"{name}_train") for other in taken):
            register(name, os.path.join(root, folder))


register_builtin()
