"""
CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), from its python pickles or class folders.

Detectron2 reads photos from files, so the pictures of the pickles are written once, as PNG, into
the cache.
"""

import hashlib
import os
import pickle
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from d2ssl.atomic import atomic_folder
from d2ssl.data.cache import default_cache_dir
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.datasets.files import require_folder
from d2ssl.data.datasets.image_classes import load_image_classes
from d2ssl.data.photos import add_size, map_photos
from d2ssl.errors import D2SSLError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
META = "batches.meta"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
SHAPE = (3, 32, 32)  # of a picture: red, green and blue, row by row


def register_cifar10(name: str, root: str) -> None:
    """
    Register ``<name>_train`` and ``<name>_test``; nothing is read before a set is used.

    Args:
        name: how the sets' names begin.
        root: either the published ``cifar-10-batches-py`` with ``data_batch_1`` to ``5``,
            ``test_batch`` and ``batches.meta``, or a folder with ``train/<class>/`` and
            ``test/<class>/``. The pickles are read without running what they may hold.
    """
    for split in BATCHES:
        load = partial(_load, root, split)
        register_dataset(f"{name}_{split}", load, add_size, classes=[*CLASSES])


def _load(root: str, split: str) -> list[dict]:
    folder = os.path.join(root, split)
    pickles = (META, *BATCHES["train"], *BATCHES["test"])
    if any(os.path.isfile(os.path.join(root, file)) for file in pickles):
        folder = _unpacked([os.path.join(root, file) for file in (META, *BATCHES[split])], split)
    require_folder(folder, f"is {root} the one with {META}, or with train/ and test/?")
    return load_image_classes(folder, CLASSES)


def _unpacked(paths: list[str], split: str) -> str:
    """
    The cache's folder with the pictures of a split in class folders, made if it is not there.

    Args:
        paths: of batches.meta and of the split's batches.
    """
    contents = [_content(path) for path in paths]
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    target = os.path.join(default_cache_dir(), "cifar10", digest.hexdigest()[:16])
    if os.path.isdir(target):
        return target
    names = _unpickled(paths[0], contents[0]).get("label_names")
    if not isinstance(names, list) or [*map(_text, names)] != [*CLASSES]:
        raise D2SSLError(f"{paths[0]}: its classes are not CIFAR-10's; is it another set?")
    batches = [_batch(path, content) for path, content in zip(paths[1:], contents[1:])]
    numbered = enumerate(pair for pictures, labels in batches for pair in zip(pictures, labels))
    rows = [(f"{CLASSES[label]}/{i:05d}.png", picture) for i, (picture, label) in numbered]
    with atomic_folder(target, "set D2SSL_CACHE to a folder with room") as folder:
        for each in CLASSES:
            os.mkdir(os.path.join(folder, each))
        for _ in map_photos(partial(_write, folder), rows, f"CIFAR-10 {split}", num_workers=0):
            pass
    return target


def _write(folder: str, row: tuple[str, np.ndarray]) -> None:
    file, picture = row  # 3x32x32
    Image.fromarray(picture.transpose(1, 2, 0)).save(os.path.join(folder, file))


def _batch(path: str, content: bytes) -> tuple[np.ndarray, list[int]]:
    """
    Returns:
        Nx3x32x32 pictures, uint8, and their N labels.
    """
    batch = _unpickled(path, content)
    data, labels = batch.get("data"), batch.get("labels")
    size = int(np.prod(SHAPE))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (size,):
        raise D2SSLError(
            f"{path}: its data is no N x {size} array of bytes; get the published file"
        )
    if not isinstance(labels, list) or len(labels) != len(data):
        raise D2SSLError(f"{path}: has not one label a picture; get the published file")
    wrong = [each for each in labels if not (isinstance(each, int) and 0 <= each < len(CLASSES))]
    if wrong:
        raise D2SSLError(f"{path}: has the label {wrong[0]!r}, not 0 to 9; is it another set?")
    return data.reshape(-1, *SHAPE), labels


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such file; unpack the published archive again") from error
    except OSError as error:
        raise D2SSLError(f"{path}: cannot be read ({error.strerror})") from error


def _unpickled(path: str, content: bytes) -> dict:
    """
    What a pickle of CIFAR-10 holds, its keys as str also where Python 2 wrote bytes.

    Raises:
        D2SSLError: damaged, no dict, or made of more than arrays, numbers and text.
    """
    try:
        found = _Unpickler(BytesIO(content), encoding="bytes").load()
    except D2SSLError as error:
        raise D2SSLError(f"{path}: {error}") from error
    except Exception as error:  # on damaged files pickle raises nearly anything
        raise D2SSLError(
            f"{path}: is no whole pickle ({type(error).__name__}: {error}); get it again"
        ) from error
    if not isinstance(found, dict):
        raise D2SSLError(f"{path}: holds a {type(found).__name__}, no dict; is it another set?")
    return {_text(key): value for key, value in found.items()}


def _text(value):
    return value.decode("latin1") if isinstance(value, bytes) else value


class _Unpickler(pickle.Unpickler):
    """Knows nothing but what arrays and bytes are made of: a pickle may call what it can name."""

    _reconstruct = np.empty(0).__reduce__()[0]
    known = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # since numpy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): str.encode,  # bytes, where Python 3 wrote for Python 2
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.known:
            raise D2SSLError(
                f"asks for {module}.{name}, which could run anything; get the published file"
            )
        return self.known[module, name]
