import numpy as np
import pytest
import torch

from d2ssl.losses.pixels import masked_l1_loss


def reference(prediction, target, mask):
    """Value by value, in float64."""
    photos = []
    for p, t, m in zip(prediction, target, mask):
        inside = [abs(p[c, y, x] - t[c, y, x]) for c in range(len(p)) for y, x in np.argwhere(m[0])]
        photos.append(sum(inside) / len(inside) if inside else 0.0)
    return sum(photos) / len(photos)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    mask = rng.random((4, 1, 5, 6)) < np.array([0.2, 0.9, 0, 1])[:, None, None, None]
    return rng.normal(size=(4, 3, 5, 6)), rng.normal(size=(4, 3, 5, 6)), mask


def test_equals_a_plain_loop(pictures):
    loss = masked_l1_loss(*map(torch.tensor, pictures))
    assert loss.item() == pytest.approx(reference(*pictures), rel=1e-6)


def test_extremes(pictures):
    _, target, mask = map(torch.tensor, pictures)
    filled = masked_l1_loss(torch.where(mask, target, 100.0), target, mask)
    assert filled == 0  # what is wrong lies outside
    # Three of four photos have a mask. The value is in the target's unit.
    assert masked_l1_loss(target + 2, target, mask).item() == pytest.approx(2 * 3 / 4)
    assert masked_l1_loss(10 * target - 20, 10 * target, mask).item() == pytest.approx(20 * 3 / 4)
    shuffled = masked_l1_loss(target.flip(-1), target, mask)
    assert shuffled > 0.5


def test_nothing_outside_the_mask_gets_a_gradient(pictures):
    prediction, target, mask = map(torch.tensor, pictures)
    outside = ~mask.expand_as(target)
    target[outside] = float("nan")
    prediction.requires_grad_()
    loss = masked_l1_loss(prediction, target, mask)
    loss.backward()
    assert loss.isfinite() and prediction.grad[outside].abs().sum() == 0
    # The derivative of an absolute value is its sign; photo 3 has 3 x 5 x 6 values, of 4 photos.
    sign = (prediction[3] - target[3]).sign() / (3 * 5 * 6 * 4)
    torch.testing.assert_close(prediction.grad[3], sign.detach(), rtol=1e-5, atol=0)


def test_no_mask_at_all_is_zero(pictures):
    prediction, target, mask = map(torch.tensor, pictures)
    prediction.requires_grad_()
    loss = masked_l1_loss(prediction, target, mask & False)
    loss.backward()
    assert loss == 0 and prediction.grad.abs().sum() == 0


def test_fp32_inside_autocast(pictures):
    prediction, target, mask = map(torch.tensor, pictures)
    prediction = prediction.bfloat16()
    exact = masked_l1_loss(prediction.float(), target, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_l1_loss(prediction, target, mask)
    assert loss.dtype == torch.float32 and loss == exact
