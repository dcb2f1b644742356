"""
Cityscapes (https://www.cityscapes-dataset.com) with its fine annotations, as it is published.

Detectron2's own reader needs the package cityscapesscripts, and decodes all of the set before the
first photo is used.
"""

import os
from functools import partial

from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.files import locate, require_folder
from d2ssl.data.masks import grey_label_file, label_image_annotations, read_label_image
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

# id in the pictures -> name, of those that are scored; the place in this table is the trainId.
CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
THINGS = [i for i in CLASSES if i >= 24]
_IDS = range(34)  # all that there are; those without a name here are not scored
_IGNORED = 255
_TRAIN_IDS = {i: _IGNORED for i in _IDS} | {i: place for place, i in enumerate(CLASSES)}

_PHOTO, _INSTANCES, _LABELS = "_leftImg8bit.png", "_gtFine_instanceIds.png", "_gtFine_labelIds.png"


def register_cityscapes(name: str, root: str) -> None:
    """
    Register Cityscapes, for each of train and val.

    ``<name>_<split>`` has instances of the 8 classes of things; a group whose members were not
    told apart has iscrowd 1. ``<name>_sem_seg_<split>`` has the 19 classes that are scored, for
    semantic segmentation; the others are ignored.

    Args:
        name: how the sets' names begin.
        root: folder with ``leftImg8bit/<split>/<city>/<stem>_leftImg8bit.png`` and
            ``gtFine/<split>/<city>/<stem>_gtFine_{instanceIds,labelIds}.png``.
    """
    for split in ("train", "val"):
        register_dataset(
            f"{name}_{split}",
            partial(_list, root, split, _INSTANCES),
            partial(_add_instances, root),
            thing_classes=[CLASSES[i] for i in THINGS],
            evaluator_type="coco",
        )
        register_dataset(
            f"{name}_sem_seg_{split}",
            partial(_list, root, split, _LABELS),
            partial(_add_labels, root),
            stuff_classes=[*CLASSES.values()],
            ignore_label=_IGNORED,
            evaluator_type="sem_seg",
        )


def _list(root: str, split: str, kind: str) -> list[dict]:
    photos = os.path.join(root, "leftImg8bit", split)
    require_folder(photos, f"unpack leftImg8bit_trainvaltest.zip in {root}")
    require_folder(os.path.join(root, "gtFine", split), f"unpack gtFine_trainvaltest.zip in {root}")
    files = [
        os.path.join(photos, city, name)
        for city in sorted(os.listdir(photos))
        if os.path.isdir(os.path.join(photos, city))
        for name in sorted(os.listdir(os.path.join(photos, city)))
        if name.endswith(_PHOTO)
    ]
    if not files:
        raise D2SSLError(f"{photos}: no <city>/*{_PHOTO} in it; unpack the set again")
    masks = [os.path.relpath(_mask_file(root, kind, file), root) for file in files]
    locate(root, masks, photos, "mask")
    return [{"file_name": file, "image_id": i} for i, file in enumerate(files)]


def _mask_file(root: str, kind: str, photo: str) -> str:
    below = os.path.relpath(photo, os.path.join(root, "leftImg8bit"))
    return os.path.join(root, "gtFine", below.removesuffix(_PHOTO) + kind)


def _add_instances(root: str, record: dict) -> dict:
    height, width = photo_size(record["file_name"])
    file = _mask_file(root, _INSTANCES, record["file_name"])
    annotations = label_image_annotations(
        read_label_image(file, (height, width)), partial(_classify, file)
    )
    return {**record, "height": height, "width": width, "annotations": annotations}


def _classify(file: str, value: int) -> tuple[int, int] | None:
    # An instance is its class * 1000 + its number; a class alone is stuff, or a group of things.
    group = value < 1000
    kind = value if group else value // 1000
    if kind not in _IDS:
        raise D2SSLError(f"{file}: holds {value}, but classes are 0..{_IDS[-1]}; get it again")
    return (THINGS.index(kind), int(group)) if kind in THINGS else None


def _add_labels(root: str, record: dict) -> dict:
    height, width = photo_size(record["file_name"])
    source = _mask_file(root, _LABELS, record["file_name"])
    file = grey_label_file(source, _TRAIN_IDS, (height, width))
    return {**record, "height": height, "width": width, "sem_seg_file_name": file}
