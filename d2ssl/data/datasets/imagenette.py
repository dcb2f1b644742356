"""Imagenette, Imagewoof and ImageWang (https://github.com/fastai/imagenette)."""

import os

from d2ssl.data.datasets.folder import register_image_folder
from d2ssl.data.datasets.image_classes import register_image_classes

# The class folders carry ImageNet's WordNet ids.
TITLES = {
    # Imagenette
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
    # Imagewoof
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
}


def register_imagenette(name: str, root: str) -> None:
    """
    Register ``<name>_train`` and ``<name>_val``, and ``<name>_unsup`` without classes, which only
    ImageWang has.

    The classes are the folders of ``<root>/train`` in the order of their ids, so in ImageWang the
    val photos carry ten of the twenty. Nothing is read before a set is used.

    Args:
        name: how the sets' names begin.
        root: folder of the set, such as ``imagenette2-320``, with ``train/<id>/*.JPEG`` and
            ``val/<id>/*.JPEG``, and in ImageWang ``unsup/*.JPEG``.
    """
    register_image_classes(name, root, splits=("train", "val"), titles=TITLES)
    register_image_folder(f"{name}_unsup", os.path.join(root, "unsup"))
