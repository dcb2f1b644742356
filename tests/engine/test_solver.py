import copy
import itertools
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler
from torch import nn

from d2ssl.engine.solver import (
    build_optimizer,
    load_optimizer,
    loaded_rise,
    main_schedule,
    named_leaves,
)
from d2ssl.errors import D2SSLError


def solver(**kwargs):
    cfg = get_cfg()
    for key, value in {"MAX_ITER": 100, "WARMUP_ITERS": 10, "STEPS": (60, 80), **kwargs}.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_schedule_is_detectron2s(name):
    cfg = solver(LR_SCHEDULER_NAME=name, BASE_LR=1.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    ours = main_schedule(cfg.SOLVER, floor=0.0)
    for iteration in range(100):
        assert ours(iteration) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), (
            iteration
        )
        optimizer.step()
        scheduler.step()


def test_cosine_has_a_floor():
    schedule = main_schedule(solver(LR_SCHEDULER_NAME="WarmupCosineLR", WARMUP_ITERS=0).SOLVER, 0.1)
    assert schedule(0) == pytest.approx(1) and schedule(50) == pytest.approx(0.55)
    assert schedule(100) == pytest.approx(0.1)


def test_rise_of_loaded_weights():
    assert loaded_rise(0, 100, 0.1) == pytest.approx(0.1)
    assert loaded_rise(50, 100, 0.1) == pytest.approx(0.55)
    assert loaded_rise(100, 100, 0.1) == pytest.approx(1)
    assert all(loaded_rise(i, 100, 1.0) == 1 for i in range(100))
    expected = 0.1 + 0.9 * (1 - math.cos(math.pi * 0.3)) / 2
    assert loaded_rise(30, 100, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["SGD", "LARS", "AdamW"])
def test_groups(name):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    net[2].weight.requires_grad_(False)
    cfg = solver(BASE_LR=0.1, WEIGHT_DECAY=0.01, WEIGHT_DECAY_NORM=0.0)
    leaves = [(module, leaf) for _, module, leaf in named_leaves(net)]
    optimizer = build_optimizer(cfg.SOLVER, name, {"all": leaves})
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == {p for p in net.parameters() if p.requires_grad}
    assert decay[net[0].weight] == 0.01 and decay[net[1].weight] == decay[net[1].bias] == 0
    assert decay[net[0].bias] == (0 if name == "LARS" else 0.01)
    assert all(g["part"] == "all" for g in optimizer.param_groups)


def test_gradients_are_clipped():
    layer = nn.Linear(1, 1, bias=False)
    cfg = solver(BASE_LR=1.0, WEIGHT_DECAY=0.0, MOMENTUM=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "norm", 0.5
    optimizer = build_optimizer(cfg.SOLVER, "SGD", {"a": [(layer, "weight")]})
    before = layer.weight.item()
    layer.weight.grad = torch.full((1, 1), 100.0)
    optimizer.step()
    assert before - layer.weight.item() == pytest.approx(0.5, rel=1e-4)


def test_bad_schedule_and_nothing_to_train():
    with pytest.raises(D2SSLError, match="choose WarmupCosineLR or WarmupMultiStepLR"):
        main_schedule(solver(LR_SCHEDULER_NAME="Linear").SOLVER, 0.0)
    layer = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(D2SSLError, match="no parameter"):
        build_optimizer(solver().SOLVER, "SGD", {"a": [(layer, "weight")]})


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_state_of_another_memory_format(name):
    """A run in bf16 (channels_last) that goes on in fp32 takes the step that any layout takes."""
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 8, 3, 3), torch.randn(2, 4, 8, 3, 3)

    def step(weight, gradient, layout, state=None):
        module = nn.Conv2d(8, 4, 3, bias=False)
        module.weight.data = weight.clone(memory_format=layout)
        node = solver(BASE_LR=0.1).SOLVER
        optimizer = build_optimizer(node, name, {"P": [(module, "weight")]})
        if state:
            load_optimizer(optimizer, state)
        module.weight.grad = gradient.clone(memory_format=layout)
        optimizer.step()
        return module.weight.detach(), copy.deepcopy(optimizer.state_dict())

    results = []
    for first in (torch.channels_last, torch.contiguous_format):
        weight, state = step(start, gradients[0], first)
        results.append(step(weight, gradients[1], torch.contiguous_format, state)[0])
    assert torch.allclose(*results, atol=1e-6)


def test_the_state_of_another_optimizer_is_refused():
    """AdamW's would load into SGD, and be missed at the first step; LARS's would even do one."""
    module = nn.Conv2d(3, 4, 1)

    def make(name):
        node = solver(BASE_LR=0.1).SOLVER
        return build_optimizer(node, name, {"P": [(module, "weight")]})

    names = "SGD", "LARS", "AdamW"
    for saved, resumed in itertools.product(names, names):
        state = copy.deepcopy(make(saved).state_dict())
        if saved == resumed:
            load_optimizer(make(resumed), state)
        else:
            with pytest.raises(ValueError, match="made with another OPTIMIZER"):
                load_optimizer(make(resumed), state)


def test_a_warmup_that_takes_most_of_the_run_is_said(caplog):
    main_schedule(solver(WARMUP_ITERS=50).SOLVER, 0.0)
    assert not caplog.messages
    main_schedule(solver(WARMUP_ITERS=51).SOLVER, 0.0)
    assert "WARMUP_ITERS 51 of MAX_ITER 100" in caplog.text
