import itertools

import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns
from tests.modeling.test_moco import moco_loss
from tests.modeling.written_out import (
    GRID,
    LEVEL,
    PLAIN,
    WAYS,
    cell_rows,
    info_nce,
    maps_of,
    numbers,
    through,
    unit,
)


def dense_loss(model, method, batch, queue, size, temperature):
    """Eq. 3 and 4: a cell's positive is the cell of its level whose feature before the head is most
    alike, its negatives are mean keys of other photos; ``queue``, (photo, key), is moved on."""
    cells = {twin: [cell_rows(maps_of(model, batch, v, twin)) for v in (0, 1)]
             for twin in (False, True)}  # fmt: skip
    query = [unit(through(method.projector, rows)) for rows in cells[False]]
    key = [through(method.projector_twin, rows) for rows in cells[True]]
    means = [unit(numbers(key[1])[:, LEVEL == level].mean(1)) for level in range(4)]
    queue[:] = [
        *queue, *((item["index"], m[n]) for n, item in enumerate(batch) for m in means)
    ][-4 * size :]  # fmt: skip
    losses = []
    for (a, b), (n, item) in itertools.product(WAYS, enumerate(batch)):
        likeness = unit(cells[False][a])[n] @ unit(cells[True][b])[n].T
        best = np.where(LEVEL[:, None] == LEVEL, likeness, -np.inf).argmax(1)
        others = [old for photo, old in queue if photo != item["index"]]
        losses += [info_nce(query[a][n, i], unit(key[b])[n, best[i]], others, temperature)
                   for i in range(52)]  # fmt: skip
    return np.mean(losses)


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Both halves (eq. 5) over two batches; one photo is there twice."""
    model, first = model_and_batch("DenseCL", *GRID, "SSL.QUEUE.SIZE", "6")
    first[3]["index"] = first[0]["index"]
    second = [{**item, "views": item["views"][::-1]} for item in first[::-1]]
    whole, dense = model.method.methods
    with torch.no_grad():  # so that twin and trunk differ, and mean keys are no mean directions
        model.trunk_twin.backbone.fpn_output3.weight.mul_(-1)
        dense.projector_twin.layers[0].weight.mul_(5)
    seen, means = [], []
    for batch in (first, second):
        expected = {
            "loss_moco_contrast": moco_loss(model, whole, batch, seen, 6, 0.2) / 2,
            "loss_densemoco_contrast": dense_loss(model, dense, batch, means, 6, 0.2) / 2,
        }
        losses = {name: loss.item() for name, loss in model(batch).items()}
        assert losses == pytest.approx(expected, abs=1e-4)
    assert len(dense.queue.keys) == 24  # one mean a level of six photos
    held = sorted(map(tuple, dense.queue.keys.double().numpy()))
    np.testing.assert_allclose(held, sorted(tuple(key) for _, key in means), atol=1e-4)


def test_cells_of_the_same_picture_find_themselves(model_and_batch):
    """By features, wherever the windows say that they lie."""
    model, batch = model_and_batch("DenseCL", *GRID)
    dense = model.method.methods[1]
    a, b = model.see([{**x, "views": [x["views"][0]] * 2} for x in batch])
    same, different = dense.compare(a, b)
    assert (same == torch.eye(52, dtype=torch.bool)).all() and not different.any()


def test_learns(train):
    assert_learns(*train("DenseCL", *GRID, *PLAIN), fall=0.3)
