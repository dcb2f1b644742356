import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from detectron2.data import transforms as T

from d2ssl.data import photometric as P


@pytest.fixture
def image():
    """Every hue, several strengths of it, and grey: 64x96x3 uint8."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
    image[:8] = image[:8, :, :1]
    return image


def torchvision(op, image, *args):
    return op(torch.from_numpy(image).permute(2, 0, 1), *args).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (P.brightness, F.adjust_brightness),
        (P.contrast, F.adjust_contrast),
        (P.saturation, F.adjust_saturation),
    ],
)
def test_factors_agree_with_torchvision(ours, theirs, factor, image):
    result = ours(image, factor)
    assert result.dtype == np.uint8
    expected = torchvision(theirs, image, factor)
    assert np.abs(result.astype(float) - expected).max() <= 1
    if factor == 1.0:
        assert (result == image).all()


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.5])
def test_hue_agrees_with_torchvision(turn, image):
    # 8-bit hue is coarse; PIL's own differs from torchvision's exact one by up to 14.
    result = P.hue(image, turn)
    error = np.abs(result.astype(float) - torchvision(F.adjust_hue, image, turn))
    assert result.dtype == np.uint8 and error.max() <= 8 and error.mean() < 1
    assert np.abs(result[:8].astype(float) - image[:8]).max() <= 1  # grey has no hue


def test_hue_turns_red_to_green_to_blue():
    red = np.full((2, 2, 3), (200, 0, 0), dtype=np.uint8)
    assert np.abs(P.hue(red, 1 / 3)[0, 0].astype(int) - (0, 200, 0)).max() <= 6
    assert np.abs(P.hue(red, -1 / 3)[0, 0].astype(int) - (0, 0, 200)).max() <= 6


def test_grayscale_and_solarize_agree_with_torchvision(image):
    gray = P.grayscale(image)
    assert (gray[..., 0] == gray[..., 1]).all() and (gray[..., 0] == gray[..., 2]).all()
    expected = torchvision(F.rgb_to_grayscale, image, 3)
    assert np.abs(gray.astype(float) - expected).max() <= 1
    assert (P.solarize(image) == torchvision(F.solarize, image, 128)).all()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_has_the_stated_sigma_and_keeps_the_mean(sigma):
    point = np.zeros((41, 41, 3), dtype=np.float32)  # in uint8 its tails would be rounded away
    point[20, 20] = 255
    blurred = P.gaussian_blur(point, sigma)[..., 0].astype(float) / 255
    offset = np.arange(41) - 20
    assert np.isclose(blurred.sum(), 1, atol=1e-3)
    if sigma >= 1:  # below, the samples of a Gaussian have not its variance
        assert np.isclose((blurred.sum(0) * offset**2).sum(), sigma**2, rtol=0.05)
    if sigma < 0.5:
        assert blurred[20, 20] > 0.9


def test_planes_move_each_on_its_own_and_stay_in_range(image):
    offsets = np.array([10.0, -30.0, 100.0])
    result = P.shift_planes(image, offsets)
    assert result.dtype == np.uint8
    assert np.abs(result - (image.astype(float) + offsets).clip(0, 255)).max() <= 0.01


def test_no_operation_changes_its_input(image):
    before = image.copy()
    for op in (
        lambda x: P.brightness(x, 1.3), lambda x: P.contrast(x, 1.3), lambda x: P.hue(x, 0.1),
        lambda x: P.saturation(x, 1.3), lambda x: P.gaussian_blur(x, 1.0), P.solarize, P.grayscale,
    ):  # fmt: skip
        assert not np.array_equal(op(image), before)
        assert np.array_equal(image, before)


def test_jitter_draws_within_its_range_in_all_orders(image):
    np.random.seed(0)
    jitter = P.ColorJitter(0.4, 0.3, 0.2, 0.1)
    orders, drawn = set(), {}
    for _ in range(400):
        ops = [t.op for t in jitter.get_transform(image)]
        orders.add(tuple(op.func for op in ops))
        for op in ops:
            drawn.setdefault(op.func, []).extend(op.keywords.values())
    assert len(orders) == 24
    for op, middle, x in [(P.brightness, 1, 0.4), (P.contrast, 1, 0.3), (P.saturation, 1, 0.2),
                          (P.hue, 0, 0.1)]:  # fmt: skip
        values = np.array(drawn[op])
        assert np.abs(values - middle).max() <= x
        assert values.min() < middle - 0.9 * x and values.max() > middle + 0.9 * x


def test_strength_zero_is_no_change(image):
    changed = T.AugInput(image)
    P.ColorJitter(0, 0, 0, 0)(changed)
    P.PlaneShift(0.0)(changed)
    assert np.abs(changed.image.astype(int) - image).max() <= 8  # 8-bit hue is coarse


def test_random_blur_and_plane_shift_draw_their_ranges(image):
    np.random.seed(0)
    sigmas = [P.RandomBlur(0.1, 2.0).get_transform(image).op.keywords["sigma"] for _ in range(200)]
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2.0
    shifts = [P.PlaneShift(0.2).get_transform(image).op.keywords for _ in range(200)]
    offsets = np.array([s["offsets"] for s in shifts])
    assert np.abs(offsets).max() <= 51 and np.abs(offsets).max(0).min() > 45
    assert np.abs(np.corrcoef(offsets.T)[0, 1]) < 0.3  # the planes do not move together


def test_coordinates_stay(image):
    transform = P.ColorJitter(0.4, 0.4, 0.4, 0.1).get_transform(image)
    boxes = np.array([[1.5, 2.5, 30.0, 40.0]])
    assert np.array_equal(transform.apply_box(boxes), boxes)
    assert np.array_equal(transform.apply_segmentation(np.eye(5)), np.eye(5))
