"""What every pretext method must pass; each method's file adds what it contrasts."""

import numpy as np
import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.data.build import build_pretrain_loader
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.modeling.trunk import pretrain_part_of


@pytest.fixture
def model_and_batch(tiny_cfg):
    """Callable: method name and overrides -> a model at random weights and a batch of 4 photos."""

    def make(name, *opts):
        cfg = pretrain_cfg(tiny_cfg("SSL.METHOD", name, "SSL.PRECISION", "fp32", *opts))
        torch.manual_seed(0)
        model = PretextModel(cfg).train()
        method = model.method
        loader = build_pretrain_loader(cfg, method.views, method.view_pairs, method.needs)
        return model, [loader.stream[i] for i in range(4)]

    return make


@pytest.fixture
def train(tiny_cfg):
    """Callable: method name and overrides -> a trainer after 30 small steps and its losses."""

    def run(name, *opts, steps=30):
        cfg = pretrain_cfg(
            tiny_cfg("SSL.METHOD", name, "SSL.SOLVER.MAX_ITER", str(steps),
                     "SSL.SOLVER.CHECKPOINT_PERIOD", "1000", *opts)
        )  # fmt: skip
        trainer = PretrainTrainer(cfg)
        losses, step = [], trainer.run_step
        trainer.learned = set()  # parameters that had a gradient in some step

        def run_step():
            step()
            losses.append(trainer.storage.latest()["total_loss"][0])
            trainer.learned |= {
                name
                for name, p in trainer.module.named_parameters()
                if p.grad is not None and p.grad.abs().sum() > 0
            }

        trainer.run_step = run_step
        trainer.train()
        return trainer, losses

    return run


def assert_learns(trainer, losses, fall, spread=0.3, unseen=()):
    """The loss falls by ``fall`` and keeps to its range, the embeddings stay apart, and exactly
    what the method says it trains gets gradients, but for names that contain one of ``unseen``."""
    model = trainer.module
    low, high = model.method.loss_range
    assert all(low <= loss <= high for loss in losses)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - fall
    if spread is not None:
        assert trainer.storage.latest()["embedding_spread"][0] > spread
    wanted = {name for name, _ in model.method.named_parameters(prefix="method")}
    for name, _ in model.trunk.named_parameters():
        if pretrain_part_of(name) in model.method.reaches:
            wanted.add(f"trunk.{name}")
    wanted = {n for n in wanted if "_twin" not in n and not any(u in n for u in unseen)}
    learned = {n for n in trainer.learned if not any(u in n for u in unseen)}
    assert learned == wanted
