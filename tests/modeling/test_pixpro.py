import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import (
    GRID,
    LEVEL,
    cell_pairs,
    cell_rows,
    maps_of,
    mean_of,
    numbers,
    out_of_sight,
    through,
    unit,
)


def propagated(method, rows):
    """Eq. 2 and 3 cell by cell: N x R x D -> N x R x D."""
    alike, values = unit(rows), unit(through(method.transform, rows))
    out = np.zeros_like(values)
    for n in range(len(rows)):
        for i in range(52):
            for j in np.flatnonzero(LEVEL == LEVEL[i]):
                out[n, i] += max(alike[n, i] @ alike[n, j], 0) ** 2 * values[n, j]
    return out


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Eq. 4 in both directions, all pairs within the radius; one photo's views have no place in
    common, and its copy is nothing special."""
    model, batch = model_and_batch("PixPro", *GRID)
    batch[3] = {**out_of_sight(batch[3]), "index": batch[0]["index"]}
    with torch.no_grad():  # so that twin and trunk differ
        model.trunk_twin.backbone.fpn_output3.weight.mul_(-1)
    method, y, x = model.method, [], []
    for v in (0, 1):
        rows = through(method.projector, cell_rows(maps_of(model, batch, v)))
        y.append(unit(propagated(method, rows)))
        x.append(unit(through(method.projector_twin, cell_rows(maps_of(model, batch, v, True)))))
    expected = 0.0
    for n, item in enumerate(batch):
        pairs = np.argwhere(cell_pairs(item)[0])
        there = mean_of([y[0][n, i] @ x[1][n, j] for i, j in pairs])
        back = mean_of([y[1][n, j] @ x[0][n, i] for i, j in pairs])
        expected -= 2 * (there + back) / len(batch)
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_unlike_all_others_keeps_its_own_transform(model_and_batch, dtype):
    """And cells that are all alike get the sum of all, of their level only."""
    model, batch = model_and_batch("PixPro", *GRID)
    view, method = model.see(batch)[0], model.method
    rows = 3 * torch.eye(16).repeat(4, 1)[:52].expand(4, 52, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        own = method.predict(rows, view)
        shared = method.predict(torch.ones_like(rows), view)
    np.testing.assert_allclose(numbers(own), unit(through(method.transform, rows.float())),
                               atol=1e-5)  # fmt: skip
    lengths = np.linalg.norm(numbers(shared), axis=2)
    np.testing.assert_allclose(lengths, np.tile(np.repeat([16, 4], [48, 4]), (4, 1)), rtol=1e-4)


def test_learns(train):
    assert_learns(*train("PixPro", *GRID, "SSL.SOLVER.BASE_LR", "0.02"), fall=0.7, spread=0.2)
