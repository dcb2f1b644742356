import copy
import functools
import itertools
import random

import numpy as np
import pytest
import torch

from d2ssl.data.loader import StreamLoader, random_state
from d2ssl.data.sampling import (
    ClassBalancedOrder,
    GroupedOrder,
    RepeatFactorOrder,
    photo_at,
    repeat_factors,
)
from d2ssl.errors import D2SSLError


def draw(dataset_dict):
    """A mapper that draws from all three random states."""
    return {
        "photo": dataset_dict["id"],
        "draws": (random.random(), float(np.random.rand()), float(torch.rand(1))),
    }


DICTS = [{"id": i} for i in range(7)]


def batches(count, start=0, **kwargs):
    loader = StreamLoader(DICTS, draw, **{"batch_size": 3, "seed": 5, **kwargs})
    loader.start_iter = start
    return list(itertools.islice(loader, count))


# Photo 0 alone has the class 1, and photo 6 none.
CLASSES = [{1}, {0}, {0}, {0}, {0}, {0}, set()]
ORDERS = [
    None,
    RepeatFactorOrder(repeat_factors(CLASSES, 0.5), 5),
    ClassBalancedOrder(CLASSES, 5),
    GroupedOrder(functools.partial(photo_at, num_photos=7, seed=5), [0, 0, 0, 0, 1, 1, 1], 3),
]
names = ["plain", "repeated", "balanced", "grouped"]
each_order = pytest.mark.parametrize("order", ORDERS, ids=names)


@each_order
def test_resume_continues_exactly(order):
    anew = copy.deepcopy(order)  # what a new process knows
    assert batches(9, order=order)[7:] == batches(2, start=7, order=anew)


@each_order
def test_workers_do_not_matter(order):
    assert batches(7, order=order) == batches(7, num_workers=2, order=copy.deepcopy(order))


@each_order
def test_processes_share_a_batch(monkeypatch, order):
    whole = batches(4, batch_size=6, order=order)
    parts = []
    monkeypatch.setattr("d2ssl.data.loader.comm.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("d2ssl.data.loader.comm.get_rank", lambda rank=rank: rank)
        parts.append(batches(4, batch_size=6, order=order))
    assert [a + b for a, b in zip(*parts)] == whole


def test_an_order_decides_the_photos():
    plain, repeated, balanced, _ = (
        np.bincount([x["photo"] for batch in batches(14, order=o) for x in batch]) for o in ORDERS
    )
    assert plain.tolist() == [6] * 7
    assert repeated[0] > 8 and balanced[[0, 6]].tolist() == [14, 14]


def test_batches_of_one_shape():
    shapes = [{"id": i, "width": 3 - i % 2, "height": 2} for i in range(8)]  # odd ones are square
    loader = StreamLoader(shapes, draw, batch_size=2, seed=5, one_shape=True)
    batches = iter(loader)
    assert all(len({x["photo"] % 2 for x in next(batches)}) == 1 for _ in range(8))
    loader.switch_to(shapes[::-1])  # now even ones come first
    next(batches)
    assert all(len({x["photo"] % 2 for x in next(batches)}) == 1 for _ in range(8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_photos_are_switched_at_the_next_batch(num_workers):
    loader = StreamLoader(DICTS, draw, batch_size=3, seed=5, num_workers=num_workers)
    others, order = [{"id": i} for i in range(100, 104)], lambda position: position % 4
    reading = iter(loader)
    before = [next(reading) for _ in range(4)]
    loader.switch_to(others, order)
    after = [next(reading) for _ in range(3)]
    assert before == batches(4)
    found = [row["photo"] for batch in after for row in batch]
    assert found == [100 + position % 4 for position in range(12, 21)]
    # A run that is resumed behind the switch draws the same.
    resumed = StreamLoader(others, draw, batch_size=3, seed=5, order=order)
    resumed.start_iter = 5
    assert list(itertools.islice(resumed, 2)) == after[1:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_mapper_from_an_iteration_on(num_workers):
    def later(photo):
        return {**draw(photo), "later": True}

    kwargs = {"num_workers": num_workers, "later": (4, later)}
    found = batches(7, **kwargs)
    assert [["later" in row for row in batch] for batch in found] == [[False] * 3] * 4 + [
        [True] * 3
    ] * 3
    assert found[5:] == batches(2, start=5, **kwargs)
    plain = [{k: v for k, v in row.items() if k != "later"} for batch in found for row in batch]
    assert plain == [row for batch in batches(7) for row in batch]  # the same draws
    loader = StreamLoader(DICTS, draw, batch_size=3, seed=5, later=(4, later))
    loader.switch_to(DICTS[:2])
    loader.start_iter = 3
    assert ["later" in batch[0] for batch in itertools.islice(loader, 2)] == [False, True]


def test_a_photo_is_drawn_anew_each_time_and_seeds_differ():
    seen = [x["draws"] for batch in batches(20) for x in batch]
    assert len(set(seen)) == len(seen)
    assert batches(2, seed=6) != batches(2)


def test_a_batch_may_exceed_the_set():
    (batch,) = batches(1, batch_size=20)
    counts = np.bincount([x["photo"] for x in batch])
    assert len(batch) == 20 and counts.min() >= 2


def test_random_state_is_restored():
    def state():
        return random.getstate(), np.random.get_state()[1:3], torch.get_rng_state()

    before = state()
    with random_state(1, 2):
        draw({"id": 0})
    after = state()
    assert before[0] == after[0] and torch.equal(before[2], after[2])
    np.testing.assert_equal(after[1], before[1])


def test_bad_input(monkeypatch):
    with pytest.raises(D2SSLError, match="no photo"):
        StreamLoader([], draw, batch_size=2, seed=0)
    monkeypatch.setattr("d2ssl.data.loader.comm.get_world_size", lambda: 2)
    with pytest.raises(D2SSLError, match="multiple of 2"):
        StreamLoader(DICTS, draw, batch_size=3, seed=0)
