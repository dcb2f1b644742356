"""Reading photos as stock Detectron2 reads them, and keeping them decoded in memory."""

import logging
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Callable, Iterable, Iterator, Sequence

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from d2ssl.compat import available_cores
from d2ssl.errors import D2SSLError

logger = logging.getLogger(__name__)

_FEW = 32  # photos that are done sooner than worker processes start

_ORIENTATION = 274  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height

# PIL clips these to 0..255 when it converts to RGB: a 16-bit photo would come out white.
_DEEP_MODES = ("I", "F")


def read_photo(path: str) -> np.ndarray:
    """
    Decode a photo exactly as stock Detectron2 does at test time.

    EXIF rotation is applied, greyscale, palette and CMYK become RGB, transparency is dropped.

    Returns:
        np.ndarray: HxWx3, uint8, RGB.

    Raises:
        D2SSLError: missing, unreadable or truncated file, or one that Detectron2 would
            misread (more than 8 bits in one channel, a TIFF with an orientation tag, a PNG whose
            rotation is stated behind the picture).
    """
    size = photo_size(path)  # refuses what read_image would misread
    try:
        photo = read_image(str(path), "RGB")
        if photo.shape[:2] != size:
            raise ValueError("its rotation is stated behind the picture")
        return photo
    except Exception as error:  # on damaged files PIL raises nearly anything
        raise _unreadable(path, error) from error


def photo_size(path: str) -> tuple[int, int]:
    """
    Size of a photo as :func:`read_photo` will return it, from the file's header alone.

    Returns:
        (height, width) in pixels, after EXIF rotation.

    Raises:
        D2SSLError: as :func:`read_photo`, except for damage behind the header.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            mode, kind = image.mode, image.format
            orientation = _orientation(image)
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such photo; check the path or restore the file") from error
    except Exception as error:
        raise _unreadable(path, error) from error

    if mode.startswith(_DEEP_MODES):
        raise D2SSLError(
            f"{path}: has more than 8 bits a pixel (mode {mode}), which Detectron2 would clip to "
            "white; convert it to 8 bits"
        )
    if kind == "TIFF" and orientation not in (None, 1):
        # Recent PIL rotates TIFFs by itself, and Detectron2 would rotate them once more.
        raise D2SSLError(
            f"{path}: is a TIFF with an orientation tag, which Detectron2 would rotate twice; "
            "save it upright, as JPEG or PNG"
        )
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def add_size(entry: dict) -> dict:
    """A dataset dict with the height and width of its photo, from :func:`photo_size`."""
    height, width = photo_size(entry["file_name"])
    return {**entry, "height": height, "width": width}


def require_proportions(entry: dict, height: int, width: int) -> None:
    """Refuse a dataset dict whose size is not that of its photo, at any scale.

    Raises:
        D2SSLError: its boxes and masks would lie elsewhere on the photo.
    """
    said = entry["height"], entry["width"]
    if abs(height * said[1] - width * said[0]) > 2 * max(height, width, *said):  # rounding
        raise D2SSLError(
            f"{entry['file_name']}: the annotation says {said[1]} x {said[0]}, the photo has other "
            "proportions; correct the annotation, or the photo's EXIF orientation"
        )


def _orientation(image: Image.Image) -> int | None:
    try:
        # Not image.getexif(): for a PNG without EXIF that decodes the whole picture.
        return Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # a damaged EXIF block; Detectron2 ignores it too
        return None


def _unreadable(path: str, error: Exception) -> D2SSLError:
    reason, fix = str(error) or type(error).__name__, "save it again as JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "not a picture that PIL knows"
    if isinstance(error, Image.DecompressionBombError):
        fix = "scale it down or cut it into tiles"
    return D2SSLError(f"{path}: cannot be read ({reason}); {fix}")


def shrink(photo: np.ndarray, long_side: int) -> np.ndarray:
    """A copy whose long side is at most ``long_side`` px, by area averaging; never enlarged."""
    height, width = photo.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA)


def map_photos(
    function: Callable, photos: Sequence, title: str, num_workers: int | None = None
) -> Iterator:
    """
    ``function`` of each photo, in order and as it comes, with a progress bar.

    Args:
        function: takes one of ``photos``; must be picklable if ``num_workers`` > 0.
        photos: their paths, or whatever stands for them.
        title: of the progress bar.
        num_workers: processes; 0: this one; default: as many as there are cores, none for few
            photos. They are never more than some photos ahead of whoever takes the results.
    """
    bar = partial(tqdm, total=len(photos), desc=title, unit="photo", disable=None)
    if num_workers is None:
        num_workers = available_cores() if len(photos) > _FEW else 0
    if num_workers == 0 or len(photos) < 2:
        yield from bar(map(function, photos))
        return
    # OpenCV's own threads would compete with the processes, and do not survive a fork.
    with ProcessPoolExecutor(num_workers, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        size = min(16, max(1, len(photos) // (8 * num_workers)))
        chunks = (photos[i : i + size] for i in range(0, len(photos), size))
        yield from bar(_ahead(pool, function, chunks, most=4 * num_workers))


def _ahead(pool: ProcessPoolExecutor, function: Callable, chunks, most: int) -> Iterator:
    waiting: deque = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_each, function, chunk))
        if len(waiting) > most:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _each(function: Callable, chunk: Sequence) -> list:
    return [function(one) for one in chunk]


def scaled_size(height: int, width: int, short_side: float) -> tuple[int, int]:
    """(height, width) with a short side of at most ``short_side`` px; never enlarged."""
    scale = min(1.0, short_side / min(height, width))
    return round(height * scale), round(width * scale)


class PhotoStore:
    """
    Photos decoded and scaled down once, kept in memory as plain uint8 arrays.

    The short side becomes at most ``short_side`` pixels (area averaging, never enlarged), so a
    12-megapixel photo is not decoded at every step. :meth:`preload` before the DataLoader forks
    its workers: they then share the pages. A photo that was not preloaded, or that did not fit
    in the budget, is decoded and scaled at each :meth:`get`, with the same result.
    """

    def __init__(self, short_side: float, max_bytes: int = 4 * 2**30):
        """
        Args:
            short_side: largest length of a stored photo's shorter side, in pixels; may be infinite.
            max_bytes: memory that the stored photos may take together.
        """
        if short_side < 1:
            raise D2SSLError(f"PhotoStore: short_side is {short_side}; give at least 1 pixel")
        self.short_side = short_side
        self.max_bytes = max_bytes
        self._photos: dict[str, np.ndarray] = {}

    def preload(self, files: Iterable[str], num_threads: int = 2) -> dict[str, tuple[int, int]]:
        """
        Decode and keep ``files``, first come first kept until the budget is full.

        Returns:
            the size of each as it is, (height, width), but for those that are kept already.

        Raises:
            D2SSLError: see :func:`read_photo`.
        """
        new = [file for file in dict.fromkeys(files) if file not in self._photos]
        free = self.max_bytes - self.num_bytes
        sizes, kept = {file: photo_size(file) for file in new}, []
        for file in new:
            height, width = scaled_size(*sizes[file], self.short_side)
            if height * width * 3 <= free:
                free -= height * width * 3
                kept.append(file)
        with ThreadPoolExecutor(num_threads) as pool:
            photos = pool.map(self._load, kept)
            for file, photo in tqdm(
                zip(kept, photos), "photos", len(kept), unit="photo", disable=None
            ):
                self._photos[file] = photo
        if len(kept) < len(new):
            logger.warning(
                f"{len(new) - len(kept)} of {len(new)} photos do not fit in the "
                f"{self.max_bytes / 2**20:.0f} MiB for decoded photos and will be decoded at "
                "each use, which is slower"
            )
        return sizes

    def get(self, file: str) -> np.ndarray:
        """
        Returns:
            np.ndarray: HxWx3, uint8, RGB, read-only (it is shared: copy before writing).

        Raises:
            D2SSLError: see :func:`read_photo`.
        """
        photo = self._photos.get(file)
        return self._load(file) if photo is None else photo

    @property
    def num_bytes(self) -> int:
        """Memory taken by the stored photos."""
        return sum(photo.nbytes for photo in self._photos.values())

    def __len__(self) -> int:
        return len(self._photos)

    def __contains__(self, file: str) -> bool:
        return file in self._photos

    def _load(self, file: str) -> np.ndarray:
        photo = read_photo(file)
        height, width = scaled_size(*photo.shape[:2], self.short_side)
        if (height, width) != photo.shape[:2]:
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        photo = np.ascontiguousarray(photo)
        photo.flags.writeable = False
        return photo
