import math
import types

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2ssl.engine.hooks import CollapseMeter, KeepBest, MoveTwins, SeedEachIteration, ValidationLoss


def trainer_at(iteration, max_iter=100, storage=None):
    return types.SimpleNamespace(iter=iteration, max_iter=max_iter, storage=storage, start_iter=0)


@pytest.fixture
def storage():
    with EventStorage(0) as storage:
        yield storage


def test_momentum_rises_to_one_by_cosine(storage):
    seen = []
    hook = MoveTwins(types.SimpleNamespace(move_twins=seen.append), 0.99)
    for i in (0, 25, 99):
        hook.trainer = trainer_at(i, storage=storage)
        hook.after_step()
    expected = [1 - 0.01 * (math.cos(math.pi * i / 99) + 1) / 2 for i in (0, 25, 99)]
    assert seen == pytest.approx(expected, abs=1e-9)


def test_twin_moves_by_one_minus_momentum():
    from d2ssl.modeling.methods.base import PretextMethod

    class Method(PretextMethod):
        def __init__(self):
            nn.Module.__init__(self)
            self._twins = {}
            self.head = nn.Linear(2, 2)
            self.add_twin("head")

    method = Method()
    start = method.head_twin.weight.clone()
    with torch.no_grad():
        method.head.weight += 1
    method.move_twins(0.9)
    torch.testing.assert_close(method.head_twin.weight, start + 0.1)
    assert not method.head_twin.weight.requires_grad
    method.reset_twins()
    assert torch.equal(method.head_twin.weight, method.head.weight)


@pytest.mark.parametrize("collapsed", [False, True])
def test_collapse_meter(storage, collapsed, caplog):
    torch.manual_seed(0)
    z = torch.randn(512, 64)
    if collapsed:
        z = torch.ones(64) + 0.01 * z
    hook = CollapseMeter(types.SimpleNamespace(embedding=z), period=1)
    hook.trainer = trainer_at(0, storage=storage)
    hook.after_step()
    spread = storage.latest()["embedding_spread"][0]
    assert (spread < 0.05) if collapsed else spread == pytest.approx(1, abs=0.05)
    assert ("collapsing" in caplog.text) is collapsed


def test_seeds_follow_from_the_iteration():
    hook, draws = SeedEachIteration(7), []
    for i in (3, 4, 3):
        hook.trainer = trainer_at(i)
        hook.before_step()
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[2] != draws[1]


def test_keep_best_remembers_across_a_resume(storage):
    scores, saved = iter([30.0, 20.0, 25.0, 31.0]), []

    def hook():
        hook = KeepBest(10, lambda: {"segm/AP": next(scores)}, saved.append, "segm/AP")
        hook.trainer = trainer_at(9, storage=storage)
        return hook

    first = hook()
    first.after_step()
    first.after_step()
    second = hook()
    second.load_state_dict(first.state_dict())
    second.after_step()  # 25: better than nothing, worse than the 30 before the resume
    assert saved == ["model_best"]
    second.after_step()
    assert saved == ["model_best"] * 2


def test_validation_loss_changes_nothing(storage):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, batch):
            assert self.training  # Detectron2 gives losses in training mode only
            return {
                "loss_a": self.norm(batch).square().mean() + torch.rand(()),
                "loss_b": batch.sum(),
            }

    model = Detector().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hook = ValidationLoss(5, model, [torch.ones(1, 2, 2, 2), 3 * torch.ones(1, 2, 2, 2)], seed=0)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    values = []
    for i in (4, 9):
        hook.trainer = trainer_at(i, storage=storage)
        hook.after_step()
        values.append(storage.latest()["val_loss_a"][0])
    assert storage.latest()["val_loss_b"][0] == pytest.approx((8 + 24) / 2)
    assert values[0] == values[1]  # the same draws each time
    assert torch.equal(torch.rand(2), expected)  # the run's own draws go on
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.norm.training
