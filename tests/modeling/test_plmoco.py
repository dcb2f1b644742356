import itertools

import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns
from tests.modeling.test_moco import moco_loss
from tests.modeling.written_out import (
    GRID,
    PLAIN,
    WAYS,
    cell_pairs,
    cell_rows,
    info_nce,
    maps_of,
    mean_of,
    out_of_sight,
    rows_to_be_sent,
    through,
    unit,
)

KEYS = ["SSL.QUEUE.KEYS_PER_PHOTO", "4"]


def plmoco_loss(model, method, batch, queue, size, temperature, sent):
    """A cell, the one nearest to it, and as negatives what lies elsewhere in the photo and the
    queue's cells of other photos; ``queue``, a list of (photo, key), is moved on by the rows that
    are ``sent``."""
    query, key = (
        [unit(through(head, cell_rows(maps_of(model, batch, v, twin)))) for v in (0, 1)]
        for head, twin in ((method.projector, False), (method.projector_twin, True))
    )
    photos = [item["index"] for item in batch]
    new = [(p, k[r]) for p, k in zip(photos, key[1]) for r in sent]
    queue[:] = [*queue, *new][-len(sent) * size :]
    losses = []
    for way, n in itertools.product(WAYS, range(len(batch))):
        q, k, item = query[way[0]][n], key[way[1]][n], batch[n]
        others = [old for photo, old in queue if photo != item["index"]]
        same, apart = cell_pairs(item, nearest=True, views=way)
        losses.append(mean_of([
            info_nce(q[i], k[same[i]], [*k[apart[i]], *others], temperature)
            for i in range(52) if same[i].any()
        ]))  # fmt: skip
    return np.mean(losses)


def test_loss_equals_the_definition_written_out(model_and_batch):
    """Two batches; one photo is there twice, and one photo's views have no place in common."""
    model, first = model_and_batch("PLMoCo", *GRID, *KEYS, "SSL.QUEUE.SIZE", "6")
    first[3]["index"] = first[0]["index"]
    second = [*first[1:], out_of_sight(first[0])]
    queue = []
    for batch in (first, second):
        expected = plmoco_loss(model, model.method, batch, queue, 6, 0.2, rows_to_be_sent(52, 4))
        assert model(batch)["loss_contrast"].item() == pytest.approx(expected, abs=1e-4)


def test_rows_of_all_places_enter_the_queue_each_as_often(model_and_batch):
    model, batch = model_and_batch("PLMoCo", *GRID, *KEYS)
    view = model.see(batch)[1]
    rows = torch.arange(52.0).expand(4, 52)[..., None]
    sent = [model.method.enqueued(rows, view) for _ in range(1000)]
    assert all(present.all() for _, present in sent)
    sent = torch.stack([keys[..., 0] for keys, _ in sent]).long()  # times x photos x 4
    assert all(len(set(keys)) == 4 for keys in sent[:, 0].tolist())
    counts = sent[:, 0].flatten().bincount(minlength=52)
    assert len(counts) == 52 and 40 < counts.min() and counts.max() < 120  # 77 each


def test_only_the_nearest_is_positive(model_and_batch):
    model, batch = model_and_batch("PLMoCo", *GRID)
    near = [cell_pairs(item) for item in batch]
    same, _ = model.method.compare(*model.see(batch))
    assert same.sum(2).max() == 1 and max(s.sum(1).max() for s, _ in near) > 1
    assert (same.any(2).numpy() == [s.any(1) for s, _ in near]).all()


def test_plus_is_the_mean_of_both(model_and_batch):
    model, batch = model_and_batch("PLMoCoPlus", *GRID, "SSL.QUEUE.KEYS_PER_PHOTO", "52")
    whole, cells = model.method.methods
    expected = [
        moco_loss(model, whole, batch, [], size=4, temperature=0.2) / 2,
        plmoco_loss(model, cells, batch, [], 4, 0.2, range(52)) / 2,
    ]
    assert [v.item() for v in model(batch).values()] == pytest.approx(expected, abs=1e-4)


def test_learns(train):
    assert_learns(*train("PLMoCo", *GRID, *PLAIN), fall=0.3)
