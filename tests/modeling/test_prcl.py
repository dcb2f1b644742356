import numpy as np
import pytest
import torch

from d2ssl.engine.hooks import spread
from tests.modeling.conftest import assert_learns
from tests.modeling.test_p2vec import as_rows, cells, matches
from tests.modeling.test_rlmoco import part_twins, pictures, seen_again, unit_rows


def test_loss_equals_the_definition_written_out(model_and_batch):
    """Both directions: every pair of a photo's differences, one by one."""
    model, batch = model_and_batch("PRCL", "SSL.LEVELS", "['p3', 'p4']")
    part_twins(model)
    batch[3] = seen_again(batch[1])
    method = model.method
    loss = model(batch)["loss_v1_v2"].item()
    queries, keys = [], []
    for v in (0, 1):
        with torch.no_grad():
            online = model.trunk(pictures(model, batch, v))
            momentum = model.trunk_twin(pictures(model, batch, v))
        queries.append(unit_rows(method.projector, as_rows(cells(online, ("p3", "p4")))))
        keys.append(unit_rows(method.projector_twin, as_rows(cells(momentum, ("p3", "p4")))))

    expected = 0.0
    for query, key, a, b in ((queries[0], keys[1], 0, 1), (queries[1], keys[0], 1, 0)):
        for n, item in enumerate(batch):
            same, _ = matches(item["windows"][a], item["windows"][b], ("p3", "p4"))
            rows = [(query[n, i], key[n, same[i]].mean(0)) for i in np.flatnonzero(same.any(1))]
            cosines = [
                (q - p) @ (k - t) / max(np.linalg.norm(q - p) * np.linalg.norm(k - t), 1e-9)
                for i, (q, k) in enumerate(rows)
                for j, (p, t) in enumerate(rows)
                if i != j  # two with the same match differ in no direction, and count 0
            ]
            expected -= np.mean(cosines) / len(batch)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_collapse_gains_nothing_and_the_meter_sees_it(model_and_batch):
    model, batch = model_and_batch("PRCL")
    for head, value in ((model.method.projector, 1.0), (model.method.projector_twin, -1.0)):
        torch.nn.init.zeros_(head.layers[-1].weight)
        torch.nn.init.constant_(head.layers[-1].bias, value)
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(0, abs=1e-2)
    assert spread(model.method.embedding) == pytest.approx(0, abs=1e-4)


def test_learns(train):
    assert_learns(*train("PRCL"), fall=0.15)
