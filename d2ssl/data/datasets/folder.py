"""A plain folder of photos without any annotation."""

import os
from functools import partial
from typing import Any

from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.files import require_folder
from d2ssl.data.photos import add_size
from d2ssl.errors import D2SSLError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def register_image_folder(
    name: str, root: str, how: str = "check the path", **metadata: Any
) -> None:
    """
    Register all photos under a folder as ``name``; nothing is read before it is used.

    Args:
        name: of the set.
        root: the folder; its sub-folders count too, linked ones as well (each once); hidden ones
            and hidden files do not.
        how: what to do if there is no such folder, for the message.
        metadata: of the set.
    """
    register_dataset(name, partial(list_photos, root, how), add_size, **metadata)


def list_photos(folder: str, how: str = "check the path") -> list[dict]:
    """
    Dicts of all photos under a folder, without sizes, sorted by path, image_id counting from 0.

    Raises:
        D2SSLError: there is no such folder, or no photo in it.
    """
    require_folder(folder, how)
    files, seen = [], set()
    for parent, children, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # links may lead in a circle
            children.clear()
            continue
        seen.add(real)
        children[:] = sorted(child for child in children if not child.startswith("."))
        photos = (n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith("."))
        files += [os.path.join(parent, photo) for photo in photos]
    if not files:
        raise D2SSLError(f"{folder}: no photo in it; put files with {', '.join(SUFFIXES)} there")
    return [{"file_name": file, "image_id": i} for i, file in enumerate(sorted(files))]
