import itertools
import random

import numpy as np
import pytest
import torch

from d2ssl.data.loader import StreamLoader, photo_at, random_state
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


def test_every_photo_once_an_epoch_and_orders_differ():
    epochs = [[photo_at(e * 7 + i, 7, seed=0) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_resume_continues_exactly():
    assert batches(6)[4:] == batches(2, start=4)


def test_workers_do_not_matter():
    assert batches(5) == batches(5, num_workers=2)


def test_processes_share_a_batch(monkeypatch):
    whole = batches(4, batch_size=6)
    parts = []
    monkeypatch.setattr("d2ssl.data.loader.comm.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("d2ssl.data.loader.comm.get_rank", lambda rank=rank: rank)
        parts.append(batches(4, batch_size=6))
    assert [a + b for a, b in zip(*parts)] == whole


def test_a_photo_is_drawn_anew_each_time_and_seeds_differ():
    seen = [x["draws"] for batch in batches(20) for x in batch]
    assert len(set(seen)) == len(seen)
    assert batches(2, seed=6) != batches(2)


def test_a_batch_may_exceed_the_set():
    (batch,) = batches(1, batch_size=20)
    counts = np.bincount([x["photo"] for x in batch])
    assert len(batch) == 20 and counts.min() >= 2


def test_random_state_is_restored():
    np.random.seed(0)
    expected = np.random.RandomState(0).rand(2).tolist()
    got = [np.random.rand()]
    with random_state(1, 2):
        np.random.rand(100)
    assert got + [np.random.rand()] == expected


def test_bad_input(monkeypatch):
    with pytest.raises(D2SSLError, match="no photo"):
        StreamLoader([], draw, batch_size=2, seed=0)
    monkeypatch.setattr("d2ssl.data.loader.comm.get_world_size", lambda: 2)
    with pytest.raises(D2SSLError, match="multiple of 2"):
        StreamLoader(DICTS, draw, batch_size=3, seed=0)
