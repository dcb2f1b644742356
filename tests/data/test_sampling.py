import functools
import math

import numpy as np
import pytest

from d2ssl.config import load_cfg
from d2ssl.data.sampling import (
    ClassBalancedOrder,
    RepeatFactorOrder,
    batches_of_one_shape,
    build_order,
    classes_of,
    evenly,
    interleaved,
    photo_at,
    repeat_factors,
)

# 12 photos: class 0 in nine, class 1 in three, class 2 in one; one photo without any.
CLASSES = [{0}, {0}, {0}, {0}, {0}, {0}, {0, 1}, {0, 1}, {1}, {2}, set(), {0}]
FREQUENCY = {0: 9, 1: 3, 2: 1}
ORDERS = [
    RepeatFactorOrder(repeat_factors(CLASSES, 0.5), seed=3),
    ClassBalancedOrder(CLASSES, seed=3),
]


def as_dict(classes):
    return {"annotations": [{"category_id": c} for c in classes]}


def counts(order, positions):
    return np.bincount([order(p) for p in positions], minlength=len(CLASSES))


def test_every_photo_once_an_epoch_and_orders_differ():
    epochs = [[photo_at(e * 7 + i, 7, seed=0) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_plain_order_never_changes():
    cfg = load_cfg(opts=["SSL.ENABLED", "False", "SEED", "5"])
    order = build_order(cfg, [as_dict({i}) for i in range(7)])
    expected = [1, 4, 2, 3, 6, 5, 0, 4, 2, 0, 6, 5, 3, 1, 0, 4, 5, 3, 1, 2, 6]
    assert [order(p) for p in range(21)] == expected


def test_classes_of_a_photo():
    assert classes_of({"category_id": 3}) == {3}
    crowd = {"category_id": 5, "iscrowd": 1}
    assert classes_of({"annotations": [*as_dict({1, 2})["annotations"], crowd]}) == {1, 2}
    assert classes_of({}) == classes_of({"annotations": []}) == set()


def test_repeat_factors_follow_the_formula():
    expected = [
        max([max(1, math.sqrt(0.5 / (FREQUENCY[c] / 12))) for c in own], default=1)
        for own in CLASSES
    ]
    np.testing.assert_allclose(repeat_factors(CLASSES, 0.5), expected, rtol=1e-6)
    assert expected[9] == math.sqrt(6) and expected[6] == math.sqrt(2) and expected[10] == 1


def test_epochs_repeat_photos_by_their_factors():
    factors = np.array([1, 1.25, 2, 3.5])
    order = RepeatFactorOrder(factors, seed=0)
    stream = [order(p) for p in range(4000)]
    seen = np.bincount(stream) / (4000 / factors.sum())
    # Of some 516 epochs; the standard deviation of a mean of coins is at most 0.022.
    np.testing.assert_allclose(seen, factors, atol=0.08)
    epochs = [stream[a:b] for a, b in zip(order._starts, order._starts[1:]) if b <= 4000]
    each = np.array([np.bincount(epoch, minlength=4) for epoch in epochs])
    assert {tuple(row[[0, 2]]) for row in each} == {(1, 2)}
    assert set(each[:, 1]) == {1, 2} and set(each[:, 3]) == {3, 4}
    assert 0.4 < np.mean((each[:, 1] == 2) == (each[:, 3] == 4)) < 0.6  # each has its own coin
    assert len({tuple(epoch) for epoch in epochs}) > 0.8 * len(epochs)


def test_without_repeats_the_order_is_the_plain_one():
    order = RepeatFactorOrder(np.ones(7), seed=5)
    assert [order(p) for p in range(50)] == [photo_at(p, 7, 5) for p in range(50)]


def test_classes_are_balanced_exactly():
    order = ClassBalancedOrder(CLASSES, seed=1)
    # Four classes, with that of the photo without any, of 9, 3, 1 and 1 photos: all begin anew
    # after 4 x 9 positions.
    stream = [order(p) for p in range(36)]
    for block in np.reshape(stream, (9, 4)):
        own = [CLASSES[i] for i in block]
        assert sum(0 in c for c in own) >= 1 and sum(1 in c for c in own) >= 1
        assert sum(2 in c for c in own) == sum(not c for c in own) == 1
    expected = [
        36 * (sum(1 / (4 * FREQUENCY[c]) for c in own) if own else 1 / 4) for own in CLASSES
    ]
    assert counts(order, range(36)).tolist() == expected
    assert [order(p) for p in range(36, 72)] != stream
    assert [ClassBalancedOrder(CLASSES, seed=2)(p) for p in range(36)] != stream


@pytest.mark.parametrize("share", [0.5, 0.25, 0.7])
def test_two_orders_interleaved(share):
    first = functools.partial(photo_at, num_photos=3, seed=0)
    second = functools.partial(photo_at, num_photos=5, seed=0)
    order = interleaved(first, second, 3, share)
    found = [order(p) for p in range(60)]
    own, others = [i for i in found if i < 3], [i - 3 for i in found if i >= 3]
    assert len(own) == pytest.approx(60 * share, abs=1)
    assert own == [first(p) for p in range(len(own))]  # each in its own order, none left out
    assert others == [second(p) for p in range(len(others))]
    for start in range(0, 50, 7):  # and any stretch has the share
        assert sum(i < 3 for i in found[start : start + 10]) == pytest.approx(10 * share, abs=1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_position_does_not_depend_on_those_read_before(order):
    positions = np.random.default_rng(0).permutation(200).tolist()
    forward = [order(p) for p in range(200)]
    anew = type(order)(getattr(order, "factors", CLASSES), order.seed)
    assert [anew(p) for p in positions] == [forward[p] for p in positions]


@pytest.mark.parametrize(
    "sampler, kind",
    [("RepeatFactorTrainingSampler", RepeatFactorOrder),
     ("ClassBalancedSampler", ClassBalancedOrder)],
)  # fmt: skip
def test_the_config_chooses(sampler, kind):
    opts = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", "0.5"]
    cfg = load_cfg(opts=["SSL.ENABLED", "False", "SEED", "3", *opts])
    order = build_order(cfg, [as_dict(c) for c in CLASSES])
    (same,) = [o for o in ORDERS if isinstance(o, kind)]
    assert [order(p) for p in range(60)] == [same(p) for p in range(60)]


def shapes(*landscape):
    return [{"width": 3 if wide else 2, "height": 2 if wide else 3} for wide in landscape]


def is_wide(photo):
    return photo["width"] > photo["height"]


def test_a_batch_has_one_shape_and_no_photo_is_shown_less():
    dicts = shapes(1, 0, 1, 1, 0, 1, 0, 1, 1)
    plain = functools.partial(photo_at, num_photos=9, seed=3)
    order = batches_of_one_shape(plain, dicts, 3)
    shown = np.array([order(p) for p in range(9 * 40)]).reshape(-1, 3)
    wide = np.array([is_wide(d) for d in dicts])[shown]
    assert (wide.all(1) | ~wide.any(1)).all()
    assert wide.any() and not wide.all()
    # At most two of each shape wait at any time.
    assert np.bincount(shown.ravel()).min() >= 40 - 1
    assert np.bincount(shown.ravel()).max() <= 40 + 1
    # Of each shape the photos come in the plain order.
    before = [i for i in map(plain, range(9 * 40)) if is_wide(dicts[i])]
    after = [i for i in shown.ravel() if is_wide(dicts[i])]
    assert after == before[: len(after)]


@pytest.mark.parametrize("landscape", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 1), (1, 1, 0, 0, 0)])
def test_a_shape_with_fewer_photos_than_a_batch_changes_nothing(landscape):
    plain = functools.partial(photo_at, num_photos=len(landscape), seed=0)
    assert batches_of_one_shape(plain, shapes(*landscape), 3) is plain


def test_evenly():
    assert evenly("abcdefgh", 4) == list("aceg") and evenly("abc", 5) == list("abc")
    assert len(evenly(range(65), 64)) == 64
