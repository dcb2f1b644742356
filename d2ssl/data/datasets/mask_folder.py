"""
A folder of photos and one of masks, a PNG for each photo whose values are its instances.

What happens to imperfect sets. Refused: a mask without a photo, two photos that would share a
mask, a mask that cannot be read or has another size than its photo. Kept, with one warning that
counts them: photos without a mask file, as photos that show no object.
"""

import os
from collections.abc import Sequence
from functools import partial

from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.files import Notes, require_folder
from d2ssl.data.datasets.folder import SUFFIXES
from d2ssl.data.masks import label_image_annotations, read_label_image
from d2ssl.data.photos import add_size
from d2ssl.errors import D2SSLError


def register_mask_folder(
    name: str,
    root: str,
    images: str = "images",
    masks: str = "masks",
    mask_suffix: str = "",
    classes: Sequence[str] = ("object",),
) -> None:
    """
    Register the photos of ``<root>/<images>`` with their masks as ``name``.

    The mask of ``cat.jpg`` is ``<root>/<masks>/cat<mask_suffix>.png``. Its value 0 is background,
    and each other value is an instance. Nothing is read before the set is used.

    Args:
        name: of the set.
        root: folder of the set.
        images, masks: folders in ``root``, not looked into deeper; two different ones.
        mask_suffix: what a mask's name has behind that of its photo.
        classes: name of the one class; numbers of instances do not tell several apart.

    Raises:
        D2SSLError: not exactly one class. Using the set raises it as the head of this module says.
    """
    if len(classes) != 1 or isinstance(classes, str):
        raise D2SSLError(
            f"{name}: classes is {classes!r}, but masks of instance numbers tell no classes apart; "
            "give a list of one name, and write several classes as COCO or VOC"
        )
    load = partial(_list, root, images, masks, mask_suffix)
    decode = partial(_add_instances, os.path.join(root, masks), mask_suffix)
    register_dataset(name, load, decode, thing_classes=[*classes], evaluator_type="coco")


def register_pennfudan(name: str, root: str) -> None:
    """
    Register Penn-Fudan Pedestrians (https://www.cis.upenn.edu/~jshi/ped_html/).

    ``<name>_train``, ``<name>_val`` and ``<name>_unlabeled`` (the train photos without their
    masks). The publication has no split: of its 170 photos in the order of their names each fifth
    (the 5th, 10th and so on) is for validation, 34 of them.

    Args:
        name: how the sets' names begin.
        root: folder of the set, with ``PNGImages`` as published (or ``images``, of any kind of
            photo) and ``PedMasks``.
    """
    decode = partial(_add_instances, os.path.join(root, "PedMasks"), "_mask")
    for split in ("train", "val"):
        load = partial(_list_pennfudan, root, split)
        metadata = {"thing_classes": ["person"], "evaluator_type": "coco"}
        register_dataset(f"{name}_{split}", load, decode, **metadata)
    load = partial(_list_unlabeled, root)
    register_dataset(f"{name}_unlabeled", load, add_size, thing_classes=["person"])


def _list_pennfudan(root: str, split: str) -> list[dict]:
    require_folder(root, "unpack PennFudanPed.zip and give the folder PennFudanPed")
    published = os.path.isdir(os.path.join(root, "PNGImages"))
    dicts = _list(root, "PNGImages" if published else "images", "PedMasks", "_mask")
    chosen = [d for i, d in enumerate(dicts) if (i % 5 == 4) == (split == "val")]
    return [{**d, "image_id": image_id} for image_id, d in enumerate(chosen)]


def _list_unlabeled(root: str) -> list[dict]:
    return [{k: d[k] for k in ("file_name", "image_id")} for d in _list_pennfudan(root, "train")]


def _list(root: str, images: str, masks: str, mask_suffix: str) -> list[dict]:
    """Dicts without sizes; ``annotations`` is there, empty, only where there is no mask file."""
    images, masks = os.path.join(root, images), os.path.join(root, masks)
    photos = _files(images, SUFFIXES)
    if not photos:
        raise D2SSLError(f"{images}: no photo in it; put files with {', '.join(SUFFIXES)} there")
    by_mask = {}
    for photo in photos:
        mask = os.path.splitext(photo)[0] + mask_suffix + ".png"
        other = by_mask.setdefault(mask, photo)
        if other != photo:
            raise D2SSLError(f"{images}: {other} and {photo} share the mask {mask}; rename one")
    with_mask = set(_files(masks, (".png",)))
    lonely = sorted(with_mask - by_mask.keys())
    if lonely:
        raise D2SSLError(
            f"{masks}: {len(lonely)} of {len(with_mask)} masks have no photo in {images}, the "
            f"first is {lonely[0]}; the mask of cat.jpg is cat{mask_suffix}.png"
        )
    notes = Notes(masks)
    dicts = []
    for image_id, (mask, photo) in enumerate(by_mask.items()):
        record = {"file_name": os.path.join(images, photo), "image_id": image_id}
        if mask not in with_mask:
            record["annotations"] = []
            notes.add("photos have no mask and are kept without annotation", photo)
        dicts.append(record)
    notes.log()
    return dicts


def _files(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names of the files in a folder, hidden ones left out."""
    require_folder(folder, "check the path")
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if name.lower().endswith(suffixes))


def _add_instances(masks: str, mask_suffix: str, record: dict) -> dict:
    complete = add_size(record)
    if "annotations" not in record:
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        mask = os.path.join(masks, f"{stem}{mask_suffix}.png")
        ids = read_label_image(mask, (complete["height"], complete["width"]))
        complete["annotations"] = label_image_annotations(ids, _category)
    return complete


def _category(value: int) -> tuple[int, int] | None:
    return (0, 0) if value else None
