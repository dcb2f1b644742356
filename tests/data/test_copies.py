"""Copies of a picture are found whatever their format and size, and nothing else is."""

import numpy as np
import pytest
from PIL import Image

from d2ssl.data.copies import HASH_BITS, Look, find_copies, look


def picture(seed, size=(128, 96)):
    """A smooth one, unlike those of other seeds."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.BICUBIC)


def test_copies_across_formats_and_sizes(tmp_path):
    files = []

    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        files.append(str(tmp_path / name))

    for seed in range(10):
        save(picture(seed), f"{seed}.png")
    save(picture(3), "jpeg.jpg", quality=40)
    save(picture(3).resize((64, 48), Image.LANCZOS), "half.webp", quality=80)
    save(picture(7, (1280, 960)), "large.jpg")
    turned = picture(5).rotate(90, expand=True)
    exif = turned.getexif()
    exif[274] = 6  # to be rotated by 270 degrees to stand upright
    save(turned, "turned.jpg", exif=exif, quality=95)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    files.append(str(tmp_path / "broken.jpg"))
    looks = [look(file) for file in files]
    assert looks[12].size == (960, 1280) and looks[13].size == (96, 128)
    assert looks[14].size is None and "cannot be read" in looks[14].problem
    assert find_copies(looks) == [[3, 10, 11], [5, 13], [7, 12]]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.FLIP_LEFT_RIGHT),
        lambda image: image.crop((0, 0, 96, 72)),
        lambda image: image.resize((96, 128)),
        lambda image: Image.merge("RGB", image.split()[::-1]),
    ],
)
def test_another_picture_of_the_same_is_no_copy(tmp_path, change):
    picture(0).save(tmp_path / "a.png")
    change(picture(0)).save(tmp_path / "b.png")
    assert find_copies([look(str(tmp_path / name)) for name in ("a.png", "b.png")]) == []


def test_plain_pictures_differ_by_their_colour(tmp_path):
    """Their perceptual hashes are all the same."""
    for i, color in enumerate(("white", "red", "black", "red")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{i}.png")
    looks = [look(str(tmp_path / f"{i}.png")) for i in range(4)]
    assert looks[0].hash == looks[1].hash
    assert find_copies(looks) == [[1, 3]]


def seen(hash, shade):
    return Look(size=(10, 10), hash=int(hash), thumbnail=np.full((16, 16, 3), shade, np.uint8))


def test_any_bits_of_a_hash_may_differ_but_not_too_many():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 400, dtype=np.uint64)
    looks, expected = [], []
    for i, value in enumerate(hashes):
        bits = rng.permutation(64)[: HASH_BITS + (i % 2)]
        copy = value ^ np.uint64(sum(1 << int(bit) for bit in bits))
        looks += [seen(value, 50), seen(copy, 52)]
        expected += [[2 * i, 2 * i + 1]] if i % 2 == 0 else []
    assert find_copies(looks) == expected


def test_many_copies_are_one_group_found_soon():
    """4000 copies have 8 million pairs: each is compared with the first alone."""
    looks = [seen(12345, 100)] * 4000
    assert find_copies(looks) == [list(range(4000))]
    assert find_copies([]) == []


def test_the_picture_is_kept_where_it_is_shown(tmp_path):
    picture(0).save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    assert look(file, frozenset([file]), side=64).picture.shape == (48, 64, 3)
    assert look(file, frozenset(["b.png"])).picture is None


def test_real_photos_are_no_copies_of_each_other(shared):
    files = sorted((shared / "data" / "grocery_store").rglob("*.jpg"))[:40]
    if not files:
        pytest.skip("no groceries")
    assert find_copies([look(str(file)) for file in files]) == []
