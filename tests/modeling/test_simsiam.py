import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import PLAIN, maps_of, numbers, photo_rows, through, unit


def outputs(model, batch):
    """Predictions and projections of both views, N x D each."""
    z = [through(model.method.projector, photo_rows(maps_of(model, batch, v))) for v in (0, 1)]
    return [through(model.method.predictor, rows)[:, 0] for rows in z], [r[:, 0] for r in z]


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Eq. 2 over all photos; a photo's copy is nothing special where there are no negatives."""
    model, batch = model_and_batch("SimSiam")
    batch[3]["index"] = batch[0]["index"]
    p, z = (list(map(unit, rows)) for rows in outputs(model, batch))
    expected = sum(-np.mean([p[v][n] @ z[1 - v][n] for n in range(4)]) / 2 for v in (0, 1))
    assert model(batch)["loss_v1_v2"].item() == pytest.approx(expected, abs=1e-4)


def test_the_gradient_stops_at_the_key(model_and_batch):
    """Algorithm 1: all gradients are those of a loss whose targets are numbers."""
    model, batch = model_and_batch("SimSiam")
    (p1, p2), (z1, z2) = outputs(model, batch)
    t1, t2 = (torch.tensor(numbers(z)).float() for z in (z1, z2))
    stopped = -(F.cosine_similarity(p1, t2) + F.cosine_similarity(p2, t1)).mean() / 2
    flowing = -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2
    weights = [model.method.projector.layers[0].weight, model.trunk.backbone.fpn_output4.weight]
    expected = torch.autograd.grad(stopped, weights, retain_graph=True)
    other = torch.autograd.grad(flowing, weights)
    model(batch)["loss_v1_v2"].backward()
    for weight, wanted, unwanted in zip(weights, expected, other):
        scale = wanted.abs().max()
        assert (weight.grad - wanted).abs().max() < 1e-3 * scale
        assert (weight.grad - unwanted).abs().max() > 0.1 * scale


def test_the_predictor_is_a_bottleneck(model_and_batch):
    """Sec. 3: the hidden width is a quarter of the output's."""
    model, _ = model_and_batch("SimSiam", "SSL.HEAD.OUT_DIM", "24")
    shapes = [tuple(p.shape) for p in model.method.predictor.parameters() if p.dim() == 2]
    assert shapes == [(6, 24), (24, 6)]


def test_learns(train):
    assert_learns(*train("SimSiam", *PLAIN), fall=0.1)
