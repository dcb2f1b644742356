import logging
import os
import pickle
import tempfile
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from d2ssl.data.photos import PhotoStore, map_photos, photo_size, read_photo, shrink
from d2ssl.errors import D2SSLError


def gradient(height, width):
    """A smooth picture whose four corners all differ."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 128 + 0 * x], axis=-1).astype(np.uint8)


# What each EXIF orientation says the viewer must do with the stored rows.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation(tmp_path, orientation, suffix):
    file = str(tmp_path / f"photo.{suffix}")
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(gradient(20, 30)).save(file, exif=exif, quality=100, subsampling=0)
    expected = UPRIGHT[orientation](gradient(20, 30))
    photo = read_photo(file)
    assert photo_size(file) == photo.shape[:2] == expected.shape[:2]
    assert np.abs(photo.astype(int) - expected).max() <= (0 if suffix == "png" else 6)


def test_grey_palette_and_one_bit_become_rgb(tmp_path):
    grey = gradient(8, 12)[..., 0]
    pictures = {
        "L": (Image.fromarray(grey), grey),
        "P": (Image.fromarray(grey).convert("P"), grey),
        "1": (Image.fromarray(grey > 100), 255 * (grey > 100)),
    }
    for mode, (picture, expected) in pictures.items():
        assert picture.mode == mode
        picture.save(tmp_path / f"{mode}.png")
        photo = read_photo(str(tmp_path / f"{mode}.png"))
        assert photo.dtype == np.uint8
        assert (photo == expected[..., None]).all() and photo.shape == (8, 12, 3)


def test_transparency_is_dropped_not_blended(tmp_path):
    rgb = gradient(8, 12)
    alpha = np.full((8, 12, 1), 3, np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "a.png")
    assert (read_photo(str(tmp_path / "a.png")) == rgb).all()


def test_cmyk(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # no red light
    cyan.save(tmp_path / "a.jpg", quality=100)
    photo = read_photo(str(tmp_path / "a.jpg")).astype(int)
    assert np.abs(photo - [0, 255, 255]).max() < 12


def test_deep_greyscale_is_refused_and_deep_colour_scaled(tmp_path):
    deep = (np.arange(96, dtype=np.uint16) * 600).reshape(8, 12)
    cv2.imwrite(str(tmp_path / "grey.png"), deep)
    cv2.imwrite(str(tmp_path / "colour.png"), np.stack([deep] * 3, axis=2))
    for read in (read_photo, photo_size):
        with pytest.raises(D2SSLError, match="grey.png.*8 bits"):
            read(str(tmp_path / "grey.png"))
    assert (read_photo(str(tmp_path / "colour.png")) == (deep >> 8)[..., None]).all()


def test_tiff_that_would_be_turned_twice_is_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(gradient(8, 12)).save(tmp_path / "turned.tif", exif=exif)
    Image.fromarray(gradient(8, 12)).save(tmp_path / "plain.tif")
    with pytest.raises(D2SSLError, match="turned.tif.*rotate twice"):
        read_photo(str(tmp_path / "turned.tif"))
    assert (read_photo(str(tmp_path / "plain.tif")) == gradient(8, 12)).all()


def test_bad_files_are_named(tmp_path):
    with pytest.raises(D2SSLError, match="gone.jpg: no such photo"):
        read_photo(str(tmp_path / "gone.jpg"))
    (tmp_path / "text.jpg").write_text("hello")
    for read in (read_photo, photo_size):
        with pytest.raises(D2SSLError, match="text.jpg: cannot be read .not a picture"):
            read(str(tmp_path / "text.jpg"))
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(D2SSLError, match="empty.jpg"):
        photo_size(str(tmp_path / "empty.jpg"))


def test_photo_too_large_for_pil(tmp_path, monkeypatch):
    Image.fromarray(gradient(20, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # it refuses twice as many
    with pytest.raises(D2SSLError, match="a.png: cannot be read .*600 .*; scale it down or cut"):
        photo_size(str(tmp_path / "a.png"))


def test_png_that_is_turned_by_what_follows_the_picture(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(gradient(20, 30)).save(tmp_path / "a.png", exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    end = content.index(b"IEND") - 4
    moved = content[:start] + content[stop:end] + content[start:stop] + content[end:]
    (tmp_path / "a.png").write_bytes(moved)
    with pytest.raises(D2SSLError, match="a.png: cannot be read .its rotation .*save it again"):
        read_photo(str(tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_file(tmp_path, suffix):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    assert photo_size(str(file)) == (64, 64)  # the header is whole
    with pytest.raises(D2SSLError, match=f"cut.{suffix}: cannot be read"):
        read_photo(str(file))


@pytest.fixture
def files(tmp_path):
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for name, shape in zip(names, [(40, 60), (60, 40), (10, 12)]):
        Image.fromarray(gradient(*shape)).save(name)
    return names


def test_store_scales_down_but_never_up(files):
    store = PhotoStore(short_side=20)
    store.preload(files)
    assert [store.get(f).shape for f in files] == [(20, 30, 3), (30, 20, 3), (10, 12, 3)]
    # Half the size by area averaging is the mean of each 2x2 block.
    blocks = gradient(40, 60).reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(store.get(files[0]) - blocks).max() <= 0.5
    assert (store.get(files[2]) == gradient(10, 12)).all()


def test_store_decodes_once(files):
    store = PhotoStore(short_side=20)
    store.preload(files[:2])
    first = store.get(files[0])
    for file in files:
        os.remove(file)
    assert store.get(files[0]) is first and len(store) == 2
    assert (pickle.loads(pickle.dumps(store)).get(files[1]) == store.get(files[1])).all()
    with pytest.raises(D2SSLError, match="2.png: no such photo"):
        store.get(files[2])


def test_photos_of_the_store_are_read_only(files):
    store = PhotoStore(short_side=20)
    store.preload(files)
    with pytest.raises(ValueError, match="read-only"):
        store.get(files[0])[:] = 0


def test_store_keeps_to_its_budget(files, caplog):
    everything = PhotoStore(short_side=20)
    everything.preload(files)
    assert everything.num_bytes == (20 * 30 + 30 * 20 + 10 * 12) * 3
    store = PhotoStore(short_side=20, max_bytes=2200)  # room for the first and the last
    with caplog.at_level(logging.WARNING):
        store.preload(files)
    assert [f in store for f in files] == [True, False, True] and store.num_bytes == 2160
    assert [r.getMessage()[:10] for r in caplog.records] == ["1 of 3 pho"]
    assert (store.get(files[1]) == everything.get(files[1])).all()
    os.remove(files[1])
    with pytest.raises(D2SSLError):
        store.get(files[1])


def test_preload_names_the_bad_photo(files, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(D2SSLError, match="bad.jpg"):
        PhotoStore(short_side=20).preload([*files, str(tmp_path / "bad.jpg")])


def test_shrink_averages_areas_and_never_enlarges():
    small = shrink(gradient(40, 60), 30)
    blocks = gradient(40, 60).reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert small.shape == (20, 30, 3) and np.abs(small - blocks).max() <= 0.5
    assert (shrink(gradient(40, 60), 100) == gradient(40, 60)).all()
    assert shrink(gradient(1, 200), 20).shape == (1, 20, 3)


def name_and_process(file):
    return file, os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_photo_is_mapped_in_order_in_the_stated_processes(num_workers):
    files = [f"{i}.jpg" for i in range(20)]
    names, processes = zip(*map_photos(name_and_process, files, "names", num_workers))
    assert list(names) == files
    assert (os.getpid() in processes) == (num_workers == 0)
    assert list(map_photos(name_and_process, [], "names", num_workers)) == []


def count_up(folder):
    """A file for each photo that was begun."""
    tempfile.mkstemp(dir=folder)


def test_workers_do_not_run_far_ahead(tmp_path):
    """Whoever takes the results slowly must not find all of them in memory."""
    results = map_photos(count_up, [str(tmp_path)] * 2000, "ahead", num_workers=1)
    next(results)
    time.sleep(1)
    assert len(os.listdir(tmp_path)) <= 6 * 16  # chunks of 16: four that wait, one in work
    assert sum(1 for _ in results) == 1999 and len(os.listdir(tmp_path)) == 2000
