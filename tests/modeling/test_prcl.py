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
            differences = [
                query[n, i] - key[n, same[i]].mean(0) for i in np.flatnonzero(same.any(1))
            ]
            cosines = [
                d @ e / np.linalg.norm(d) / np.linalg.norm(e)
                for i, d in enumerate(differences)
                for j, e in enumerate(differences)
                if i != j
            ]
            expected -= np.mean(cosines) / len(batch)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_constants_meet_the_loss_and_the_collapse_meter_sees_it(model_and_batch):
    """The loss alone does not keep embeddings apart, so somebody has to watch."""
    model, batch = model_and_batch("PRCL")
    for head, value in ((model.method.projector, 1.0), (model.method.projector_twin, -1.0)):
        torch.nn.init.zeros_(head.layers[-1].weight)
        torch.nn.init.constant_(head.layers[-1].bias, value)
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(-2, abs=1e-4)
    assert spread(model.method.embedding) == pytest.approx(0, abs=1e-4)


def test_learns(train):
    assert_learns(*train("PRCL"), fall=0.6, spread=0.2)
