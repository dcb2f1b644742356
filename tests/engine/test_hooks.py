import math
import types

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2ssl.engine.hooks import CollapseMeter, KeepBest, MoveTwins, SeedEachIteration, ValidationLoss
from d2ssl.modeling.methods.base import PretextMethod
from d2ssl.modeling.pretext_model import PretextModel


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


def test_twins_move_by_one_minus_momentum():
    class Method(PretextMethod):
        uses_twin = True

        def __init__(self):
            nn.Module.__init__(self)
            self._twins = {}
            self.head = nn.Linear(2, 2)
            self.add_twin("head")

    trunk, method = nn.Linear(2, 2), Method()
    trunk.bias.requires_grad_(False)  # a part that does not learn
    model = PretextModel(trunk=trunk, method=method, pixel_mean=[0.0], pixel_std=[1.0])
    learning = {trunk.weight: model.trunk_twin.weight, method.head.weight: method.head_twin.weight}
    starts = [twin.clone() for twin in learning.values()]
    with torch.no_grad():
        for parameter in (*learning, trunk.bias):
            parameter += 1
    bias = model.trunk_twin.bias.clone()
    model.move_twins(0.9)
    for twin, start in zip(learning.values(), starts):
        torch.testing.assert_close(twin, start + 0.1)
        assert not twin.requires_grad
    assert torch.equal(model.trunk_twin.bias, bias)
    model.reset_twins()
    assert all(torch.equal(twin, online) for online, twin in learning.items())


class Watched(PretextMethod):
    """A method that has just compared these rows."""

    def __init__(self, embedding):
        nn.Module.__init__(self)
        self.embedding = embedding


class WatchedToo(Watched):
    pass


HEALTHY = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
NARROW = torch.ones(64) + HEALTHY  # half its variance is left
COLLAPSED = torch.ones(64) + 0.01 * HEALTHY


def measured(storage, *methods, iteration=0):
    hook = CollapseMeter(nn.ModuleList(methods), period=1)
    hook.trainer = trainer_at(iteration, storage=storage)
    hook.after_step()
    return storage.latest()["embedding_spread"][0] if methods else None


@pytest.mark.parametrize("collapsed", [False, True])
def test_collapse_meter(storage, collapsed, caplog):
    spread = measured(storage, Watched(COLLAPSED if collapsed else HEALTHY))
    assert (spread < 0.05) if collapsed else spread == pytest.approx(1, abs=0.05)
    assert ("The embeddings of Watched are collapsing" in caplog.text) is collapsed


@pytest.mark.parametrize(
    "rows, other, spread",
    [
        (HEALTHY, NARROW, 0.71),
        (NARROW, HEALTHY, 0.71),
        (None, HEALTHY, 1),  # it compares nothing
        (HEALTHY, HEALTHY[:1], 1),  # one row has no spread
    ],
)
def test_collapse_meter_of_several_methods_shows_the_lowest(storage, rows, other, spread, caplog):
    methods = Watched(rows), WatchedToo(other)
    assert measured(storage, *methods) == pytest.approx(spread, abs=0.05)
    assert not caplog.text


@pytest.mark.parametrize(
    "methods, name",
    [
        ((Watched(HEALTHY), WatchedToo(COLLAPSED)), "WatchedToo"),
        ((Watched(COLLAPSED), WatchedToo(HEALTHY)), "Watched"),
        # Alone, and as a part of another method.
        ((Watched(COLLAPSED), Watched(HEALTHY)), "Watched"),
    ],
)
def test_collapse_meter_names_the_method_that_collapses(storage, methods, name, caplog):
    assert measured(storage, *methods) < 0.05
    assert f"The embeddings of {name} are collapsing" in caplog.text


def test_collapse_meter_without_embeddings_says_nothing(storage):
    hook = CollapseMeter(nn.ModuleList([Watched(None)]), period=1)
    hook.trainer = trainer_at(0, storage=storage)
    hook.after_step()
    assert "embedding_spread" not in storage.latest()


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


@pytest.mark.parametrize("metric", ["segm/AP", "bbox/AP"])
def test_keep_best_logs_every_ap(storage, metric):
    scores, saved = {"segm/AP": 30.0, "bbox/AP": 40.0, "segm/AP50": 50.0}, []
    hook = KeepBest(10, lambda: scores, saved.append, metric)
    hook.trainer = trainer_at(9, storage=storage)
    hook.after_step()
    logged = {name: value for name, (value, _) in storage.latest().items()}
    assert logged == {"dev/segm/AP": 30.0, "dev/bbox/AP": 40.0}
    assert hook.best == scores[metric] and saved == ["model_best"]


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
