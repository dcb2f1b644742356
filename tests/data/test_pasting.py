"""Pasting, against pictures and masks written out by hand and SciPy's Gaussian."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from d2ssl.data.pasting import paste


def masks_of(*rows):
    """One mask a string, its rows parted by spaces, # inside."""
    return np.array([[[c == "#" for c in row] for row in mask.split()] for mask in rows])


def test_what_is_covered_belongs_to_what_is_pasted():
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    source = image + 100
    masks = masks_of("##.. ##.. ....", "...# ...# ...#", ".... .... ##..")
    pasted = masks_of(".##. .##. ....", ".... .... ...#")
    before = [x.copy() for x in (image, masks, source, pasted)]
    out, found, kept = paste(image, masks, source, pasted, feather=0)
    covered = masks_of(".##. .##. ...#")[0]
    assert (out == image + 100 * covered[..., None]).all() and out.dtype == np.uint8
    left = masks_of("#... #... ....", "...# ...# ....", ".... .... ##..")
    assert found.dtype == bool and (found == np.concatenate([left, pasted])).all()
    assert kept.tolist() == [0, 1, 2]
    assert all((x == y).all() for x, y in zip((image, masks, source, pasted), before))


def test_an_object_that_is_hidden_is_dropped():
    """Of 20 pixels each: 3 visible, 2, none, all; and one that is not in the picture."""
    masks, pasted = np.zeros((5, 5, 30), bool), np.zeros((1, 5, 30), bool)
    masks[0, 0, :20] = masks[1, 1, :20] = masks[2, 2, :20] = masks[3, 3, :20] = True
    pasted[0, 0, 3:] = pasted[0, 1, 2:] = pasted[0, 2] = True
    image = np.zeros((5, 30, 3), np.uint8)
    _, found, kept = paste(image, masks, image, pasted)
    assert kept.tolist() == [0, 3]
    assert found.sum((1, 2)).tolist() == [3, 20, pasted.sum()]


@pytest.mark.parametrize("feather", [1.0, 2.0])
def test_an_edge_is_feathered_and_its_mask_exact(feather):
    image, source = np.full((40, 60, 3), 20, np.uint8), np.full((40, 60, 3), 220, np.uint8)
    pasted = np.zeros((2, 40, 60), bool)
    pasted[0, 10:30, 12:30] = pasted[1, 10:30, 30:] = True  # side by side, and up to the border
    masks = np.ones((1, 40, 60), bool)
    out, found, _ = paste(image, masks, source, pasted, feather)
    hard = paste(image, masks, source, pasted, 0)
    assert (found == hard[1]).all()
    share = gaussian_filter(pasted.any(0).astype(float), feather, mode="mirror")
    expected = 20 + 200 * share[..., None]
    assert np.abs(out - expected).max() < 200 * 0.02  # of 8 bits, and the Gaussian's ends
    assert (out[20, 11] > 40).all() and (out[20, 12] < 200).all()  # a slope
    assert (out[20, 30] == 220).all() and (out[20, -1] == 220).all() and (out[20, 0] == 20).all()
    edge = out[20, :20, 0] > 120
    assert edge.tolist() == found[1, 20, :20].tolist()  # a mask is where its photo prevails


def test_views_of_a_flipped_photo_and_read_only_arrays():
    rng = np.random.default_rng(0)
    image, source = rng.integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    masks, pasted = np.zeros((2, 1, 30, 40), bool)
    masks[0, :9], pasted[0, 5:20, 5:20] = True, True
    expected = paste(image, masks, source, pasted)
    flipped = [np.ascontiguousarray(x[:, ::-1])[:, ::-1] for x in (image, source)]
    for x in (*flipped, masks, pasted):
        x.flags.writeable = False
    found = paste(flipped[0], masks, flipped[1], pasted)
    assert all((a == b).all() for a, b in zip(expected, found))


def test_nothing_to_paste_and_nothing_to_paste_over():
    image = np.full((4, 5, 3), 9, np.uint8)
    some, none = np.ones((1, 4, 5), bool), np.zeros((0, 4, 5), bool)
    out, found, kept = paste(image, some, image + 1, none)
    assert (out == image).all() and (found == some).all() and kept.tolist() == [0]
    out, found, kept = paste(image, none, image + 1, some)
    assert (out == 10).all() and (found == some).all() and kept.tolist() == []
