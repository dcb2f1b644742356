"""Which photos of a set show the same picture, whatever their format, quality and size."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import imagehash
import numpy as np
from PIL import Image

from d2ssl.data.photos import read_photo, shrink
from d2ssl.errors import D2SSLError

# Copies at half the size or in JPEG of quality 30 stay well below these; two photos of one shelf,
# the most alike that were seen, are above.
HASH_BITS = 4  # of 64
THUMBNAIL_DIFFERENCE = 4.0  # of 255, mean over pixels and colours
ASPECT_DIFFERENCE = 0.03  # of w/h, relative; two sides of a small copy are rounded
THUMBNAIL = 16  # px a side


@dataclass(frozen=True)
class Look:
    """What is kept of a photo that was decoded."""

    size: tuple[int, int] | None = None  # height, width as read_photo returns it; None: unreadable
    problem: str = ""  # why it is
    hash: int = 0  # perceptual, 64 bits
    thumbnail: np.ndarray | None = None  # THUMBNAIL x THUMBNAIL x 3 uint8 RGB
    picture: np.ndarray | None = None  # the photo scaled down, where it is to be shown


def look(file: str, shown: frozenset[str] = frozenset(), side: int = 480) -> Look:
    """Decode a photo whole; where it is among the ``shown``, keep it with a long side of ``side``
    px."""
    try:
        photo = read_photo(file)
    except D2SSLError as error:
        return Look(problem=str(error))
    small = shrink(photo, 256)
    bits = imagehash.phash(Image.fromarray(small)).hash
    return Look(
        size=photo.shape[:2],
        hash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        thumbnail=cv2.resize(small, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA),
        picture=shrink(photo, side) if file in shown else None,
    )


def find_copies(looks: Sequence[Look]) -> list[list[int]]:
    """
    Groups of photos that are copies of one picture; unreadable ones are in none.

    Perceptual hashes that differ by HASH_BITS bits or less make candidates, proportions and
    thumbnails decide. Not every pair is compared: of HASH_BITS + 1 parts of two such hashes at
    least one is equal, and equal parts are found by sorting.

    Returns:
        two or more indices each, ascending.
    """
    readable = np.flatnonzero([one.size is not None for one in looks])
    photos = _Photos([looks[i] for i in readable])
    edges = np.linspace(0, 64, HASH_BITS + 2).astype(int).tolist()
    for low, high in zip(edges, edges[1:]):
        part = photos.hashes >> np.uint64(low) & np.uint64(2 ** (high - low) - 1)
        for rows in _equal(part):
            photos.compare(rows[~photos.settled[rows]])
    groups = defaultdict(list)
    for row, i in enumerate(readable.tolist()):
        groups[photos.first(row)].append(i)
    return sorted(group for group in groups.values() if len(group) > 1)


def _equal(values: np.ndarray) -> list[np.ndarray]:
    """Indices of values that are equal, ascending, for each value that is there twice or more."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    return [rows for rows in np.split(order, ends) if len(rows) > 1]


class _Photos:
    """Readable photos, and which of them were found to be copies."""

    def __init__(self, looks: Sequence[Look]):
        count = len(looks)
        self.hashes = np.array([one.hash for one in looks], dtype=np.uint64)
        thumbnails = np.array([one.thumbnail for one in looks], dtype=np.int16)
        self.thumbnails = thumbnails.reshape(count, 3 * THUMBNAIL**2)
        self.aspects = np.log([one.size[1] / one.size[0] for one in looks])
        self.earlier = list(range(count))  # an earlier photo of the same group, or itself
        # A copy with the very same hash: who is like it is like the other one, too.
        self.settled = np.zeros(count, dtype=bool)

    def first(self, row: int) -> int:
        while self.earlier[row] != row:
            row = self.earlier[row]
        return row

    def compare(self, rows: np.ndarray) -> None:
        """Each of these photos with those behind it."""
        for n, row in enumerate(rows[:-1].tolist()):
            if self.settled[row]:
                continue
            others = rows[n + 1 :]
            differing = np.unpackbits((self.hashes[others] ^ self.hashes[row]).view(np.uint8))
            others = others[differing.reshape(-1, 64).sum(1) <= HASH_BITS]
            aspect = np.abs(self.aspects[others] - self.aspects[row])
            others = others[aspect <= ASPECT_DIFFERENCE]
            away = np.abs(self.thumbnails[others] - self.thumbnails[row]).mean(1)
            for other in others[away <= THUMBNAIL_DIFFERENCE].tolist():
                a, b = sorted((self.first(row), self.first(other)))
                self.earlier[b] = a
                self.settled[other] = self.hashes[other] == self.hashes[row]
