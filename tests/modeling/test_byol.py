import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import PLAIN, maps_of, photo_rows, through, unit


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Eq. 2 without its constant, for each photo and both directions; a photo's copy is nothing
    special where there are no negatives."""
    model, batch = model_and_batch("BYOL")
    batch[3]["index"] = batch[0]["index"]
    with torch.no_grad():  # so that twin and trunk differ
        model.trunk_twin.backbone.fpn_output3.weight.mul_(-1)
        model.method.projector_twin.layers[0].weight.mul_(2)[::2] *= -1
    method, p, z = model.method, [], []
    for v in (0, 1):
        rows = through(method.projector, photo_rows(maps_of(model, batch, v)))
        p.append(unit(through(method.predictor, rows))[:, 0])
        z.append(unit(through(method.projector_twin, photo_rows(maps_of(model, batch, v, True)))))
    expected = sum(-2 * np.mean([p[v][n] @ z[1 - v][n, 0] for n in range(4)]) for v in (0, 1))
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(expected, abs=1e-4)


def test_no_gradient_flows_into_the_twin(model_and_batch):
    """Not even if its parameters asked for one."""
    model, batch = model_and_batch("BYOL")
    twins = [q for _, twin in model.twins() for q in twin.requires_grad_(True).parameters()]
    model(batch)["loss_v1_v2"].backward()
    assert twins and all(q.grad is None for q in twins)
    assert all(p.grad.abs().sum() > 0 for p in model.method.predictor.parameters())


def test_the_views_differ_in_blur_and_solarization(model_and_batch):
    """Table 6."""
    model, _ = model_and_batch("BYOL")
    assert [(view.blur_p, view.solarize_p) for view in model.method.views] == [(1, 0), (0.1, 0.2)]


def test_learns(train):
    assert_learns(*train("BYOL", *PLAIN), fall=0.8)
