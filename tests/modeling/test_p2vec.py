from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2ssl.modeling.methods.p2vec import Surroundings
from tests.modeling.conftest import assert_learns
from tests.modeling.test_rlmoco import part_twins, pictures, seen_again, unit_rows
from tests.modeling.test_units import centres_and_diagonals

TEMPERATURE, RADIUS, SIDES = 0.2, 0.7, {"p2": 14, "p3": 8, "p4": 4, "p5": 2}


def cells(pyramid, levels=tuple(SIDES)):
    """Each level's map, averaged down to at most 14 x 14: N x C x H x W float64 each."""
    maps = []
    for level in levels:
        full = pyramid[level].detach().double().numpy()
        size, side = full.shape[2], SIDES[level]
        spans = [slice(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
        maps.append(
            np.stack([[full[:, :, y, x].mean((2, 3)) for x in spans] for y in spans]).transpose(
                2, 3, 0, 1
            )
        )
    return maps


def as_rows(maps):
    """N x R x C, row by row."""
    return np.concatenate([m.reshape(*m.shape[:2], -1).transpose(0, 2, 1) for m in maps], axis=1)


def surroundings(maps):
    """The mean over each cell's up to eight neighbours, one by one."""
    means = [np.zeros_like(m) for m in maps]
    for m, mean in zip(maps, means):
        side = m.shape[2]
        for y in range(side):
            for x in range(side):
                around = [
                    m[:, :, v, u]
                    for v in (y - 1, y, y + 1)
                    for u in (x - 1, x, x + 1)
                    if (v, u) != (y, x) and 0 <= v < side and 0 <= u < side
                ]
                mean[:, :, y, x] = np.mean(around, axis=0)
    return means


def matches(window_a, window_b, levels=tuple(SIDES)):
    """For each cell of a view, which cells of the other are at its place and which are not: two
    R x R; some are neither."""
    sides = [SIDES[level] for level in levels]
    here, there = (centres_and_diagonals(w, sides) for w in (window_a, window_b))
    share = np.array([
        [np.hypot(x - u, y - v) / max(d, e) if i == j else np.inf for j, u, v, e in there]
        for i, x, y, d in here
    ])  # fmt: skip
    return share < RADIUS, share > 1


def test_loss_equals_the_definition_written_out(model_and_batch):
    """Both directions, one cell at a time; the photo that is there twice changes nothing, as words
    of other photos are in no cell's vocabulary."""
    model, batch = model_and_batch("P2Vec")
    part_twins(model)
    batch[3] = seen_again(batch[1])
    method = model.method
    loss = model(batch)["loss_v1_v2"].item()
    queries, keys = [], []
    for v in (0, 1):
        with torch.no_grad():
            online = model.trunk(pictures(model, batch, v))
            momentum = model.trunk_twin(pictures(model, batch, v))
        head = torch.nn.Sequential(method.projector, method.predictor)
        queries.append(unit_rows(head, as_rows(surroundings(cells(online)))))
        keys.append(unit_rows(method.projector_twin, as_rows(cells(momentum))))

    expected = 0.0
    for query, key, a, b in ((queries[0], keys[1], 0, 1), (queries[1], keys[0], 1, 0)):
        for n, item in enumerate(batch):
            same, different = matches(item["windows"][a], item["windows"][b])
            rows = []
            for i in np.flatnonzero(same.any(1)):
                odds = np.exp(key[n] @ query[n, i] / TEMPERATURE)
                vocabulary = odds[same[i]].sum() + odds[different[i]].sum()
                rows.append(np.mean([-np.log(p / vocabulary) for p in odds[same[i]]]))
            expected += np.mean(rows) / len(batch)
    assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_holds_the_neighbours_and_not_the_cell(dtype):
    units = Surroundings({"p3": 1}, grid=14, radius=0.7)

    def context(cells):
        encoding = SimpleNamespace(pyramid={"p3": cells.view(1, 1, 4, 4).to(dtype)})
        return units.context(encoding).float().flatten()

    slopes = torch.autograd.functional.jacobian(context, torch.randn(16)).view(4, 4, 4, 4)
    tolerance = dict(atol=1e-6 if dtype is torch.float32 else 1e-3, rtol=0.01)
    for y in range(4):
        for x in range(4):
            around = torch.zeros(4, 4)
            around[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 1
            around[y, x] = 0
            torch.testing.assert_close(slopes[y, x], around / around.sum(), **tolerance)
            assert slopes[y, x, y, x].abs() < tolerance["atol"]
    alone = torch.zeros(16)
    alone[5] = 1000.3  # nor by what rounding leaves of it
    assert context(alone)[5] == 0


def test_a_lone_cell_has_no_context(model_and_batch):
    """P5 of a view of 32 px has one cell: nothing is around it, and nothing becomes NaN."""
    model, batch = model_and_batch("P2Vec", "SSL.INPUT.VIEW_SIZE", "32", "SSL.LEVELS", "['p5']")
    views = model.see(batch)
    assert model.method.units.context(views[0].online).abs().max() == 0
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(0, abs=1e-6)  # a vocabulary of one


def test_learns(train):
    assert_learns(*train("P2Vec"), fall=0.5)
