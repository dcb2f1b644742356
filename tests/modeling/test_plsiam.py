import numpy as np
import pytest

from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import (
    GRID,
    PLAIN,
    cell_pairs,
    cell_rows,
    maps_of,
    mean_of,
    out_of_sight,
    through,
    unit,
)


def test_loss_equals_the_definition_written_out(model_and_batch):
    """SimSiam on PLMoCo's pairs, both directions; one photo's views have no place in common."""
    model, batch = model_and_batch("PLSiam", *GRID)
    batch[3] = out_of_sight(batch[3])
    z = [through(model.method.projector, cell_rows(maps_of(model, batch, v))) for v in (0, 1)]
    p = [unit(through(model.method.predictor, rows)) for rows in z]
    z = list(map(unit, z))
    expected = 0.0
    for n, item in enumerate(batch):
        pairs = np.argwhere(cell_pairs(item, nearest=True)[0])
        there = mean_of([p[0][n, i] @ z[1][n, j] for i, j in pairs])
        back = mean_of([p[1][n, j] @ z[0][n, i] for i, j in pairs])
        expected -= (there + back) / 2 / len(batch)
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(expected, abs=1e-4)


def test_views_without_a_common_place_teach_nothing(model_and_batch):
    model, batch = model_and_batch("PLSiam", *GRID)
    loss = model([out_of_sight(item) for item in batch])["loss_v1_v2"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_learns(train):
    assert_learns(*train("PLSiam", *GRID, *PLAIN), fall=0.1)
