"""A plain folder of photos without any annotation."""

import os
from functools import partial

from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def register_image_folder(name: str, folder: str) -> None:
    """Register all photos under ``folder`` as ``name``; nothing is read before it is used."""
    register_dataset(name, partial(load_image_folder, folder))


def load_image_folder(folder: str) -> list[dict]:
    """
    All photos under a folder and its sub-folders, hidden ones left out.

    Returns:
        Detectron2's standard dicts without annotations, sorted by path, image_id counting
        from 0. Only the photos' headers are read.

    Raises:
        D2SSLError: there is no such folder, no photo in it, or a photo cannot be read.
    """
    if not os.path.isdir(folder):
        raise D2SSLError(f"{folder}: no such folder; check the path")
    files = []
    for parent, children, names in os.walk(folder):
        children[:] = [child for child in children if not child.startswith(".")]
        photos = (n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith("."))
        files += [os.path.join(parent, photo) for photo in photos]
    if not files:
        raise D2SSLError(f"{folder}: no photo in it; put files with {', '.join(SUFFIXES)} there")
    dicts = []
    for image_id, file in enumerate(sorted(files)):
        height, width = photo_size(file)
        dicts.append({"file_name": file, "image_id": image_id, "height": height, "width": width})
    return dicts
