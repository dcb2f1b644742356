"""Five-line hooks, one job each.

Detectron2 keeps one state per hook class, so each stateful hook here is a class of its own; what
the iteration alone decides has no state at all. All of them stand before the checkpointer, so
that what it saves is what a resumed run continues from.
"""

import logging
import math
from typing import Callable, Dict, List

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from lightly.utils.debug import std_of_l2_normalized
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2ssl.modeling.methods import PretextMethod

logger = logging.getLogger("d2ssl")

COLLAPSED = 0.1  # a spread of embeddings below it is warned about


class LearningRate(HookBase):
    """Set each parameter group's lr from the iteration alone.

    In place of a torch scheduler, whose state Detectron2 v0.6 does not save under current PyTorch:
    a resumed run would start its warmup anew.
    """

    def __init__(self, optimizer, base_lr: float, multiple: Callable[[str, int], float]):
        self.optimizer, self.base_lr, self.multiple = optimizer, base_lr, multiple

    def before_step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * self.multiple(group["part"], self.trainer.iter)

    def after_step(self):
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)


class SeedEachIteration(HookBase):
    """What the network draws (Detectron2 samples anchors and proposals) follows from the
    iteration, so that a resumed run draws the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        key = (self.seed, 2, self.trainer.iter, comm.get_rank())  # 2: apart from the loader's keys
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class MoveTwins(HookBase):
    """Momentum encoder: moves after each step, its momentum rising to 1 by cosine (BYOL)."""

    def __init__(self, model, momentum: float):
        self.model, self.momentum = model, momentum

    def after_step(self):
        momentum = cosine_schedule(self.trainer.iter, self.trainer.max_iter, self.momentum, 1.0)
        self.model.move_twins(momentum)
        self.trainer.storage.put_scalar("momentum", momentum, smoothing_hint=False)


class CollapseMeter(HookBase):
    """Spread of the normalised embeddings, as a share of what a uniform sphere has.

    Near 1: healthy; near 0: every photo gets the same embedding (SimSiam, sec. 4.1). Of several
    methods at once, the lowest.
    """

    def __init__(self, model, period: int = 20):
        self.methods = [m for m in model.modules() if isinstance(m, PretextMethod)]
        self.period = period

    def after_step(self):
        step = self.trainer.iter + 1
        if step % self.period and step != self.trainer.max_iter:
            return
        # Not by name: a method may be there on its own and as a part of another.
        spreads = [(spread(m.embedding), type(m).__name__) for m in self.methods
                   if m.embedding is not None and len(m.embedding) > 1]  # fmt: skip
        if not spreads:
            return
        lowest, name = min(spreads)
        self.trainer.storage.put_scalar("embedding_spread", lowest, smoothing_hint=False)
        if lowest < COLLAPSED:
            logger.warning(
                "The embeddings of %s are collapsing (spread %.3f, healthy is near 1): lower "
                "SSL.SOLVER.BASE_LR or raise SSL.SOLVER.IMS_PER_BATCH.", name, lowest
            )  # fmt: skip


def spread(rows: torch.Tensor) -> float:
    """Standard deviation of N x D normalised rows times sqrt(D): 1 on a uniform sphere, 0 where
    all are the same."""
    return float(std_of_l2_normalized(rows.float())) * math.sqrt(rows.shape[1])


class Unfreeze(HookBase):
    """Parameters without gradient until an iteration; stateless, so a resume needs no care."""

    def __init__(self, parameters: List[nn.Parameter], iteration: int):
        self.parameters, self.iteration = parameters, iteration

    def before_train(self):
        self._set(self.trainer.start_iter)

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self._set(self.iteration)

    def _set(self, iteration: int) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(iteration >= self.iteration)


class AveragedWeights(HookBase):
    """Exponential moving average of the weights, for evaluation and as the result.

    The decay warms up, min(decay, (1 + i) / (10 + i)), or a short run would average its start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average: Dict[str, torch.Tensor] = {}

    def before_train(self):
        values = self.model.state_dict()
        if not self.average:
            self.average = {k: v.detach().clone() for k, v in values.items()}
        # The same tensors all the time: listed once, and moved together.
        moved = [k for k, v in values.items() if v.is_floating_point()]
        self._moved = [self.average[k] for k in moved], [values[k] for k in moved]
        self._copied = [
            (self.average[k], v) for k, v in values.items() if not v.is_floating_point()
        ]

    @torch.no_grad()
    def after_step(self):
        i = self.trainer.iter
        decay = min(self.decay, (1 + i) / (10 + i))
        torch._foreach_lerp_(*self._moved, 1 - decay)
        for average, value in self._copied:
            average.copy_(value)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the average; call it again to change back."""
        for name, value in self.model.state_dict().items():
            kept = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = {k: v.to(self.model.device) for k, v in state["average"].items()}


class ValidationLoss(HookBase):
    """The training losses on photos that are not trained on, every ``period`` iterations; of the
    weights as they are, not of their average."""

    def __init__(self, period: int, model: nn.Module, batches: List[list], seed: int):
        self.period, self.model, self.batches, self.seed = period, model, batches, seed

    def after_step(self):
        if (self.trainer.iter + 1) % self.period == 0:
            for name, value in self._losses().items():
                self.trainer.storage.put_scalar(f"val_{name}", value, smoothing_hint=False)

    @torch.no_grad()
    def _losses(self) -> Dict[str, float]:
        # Detectron2 gives losses in training mode only; its norms must not follow these photos.
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        totals: Dict[str, List[float]] = {}
        # Its own storage: the heads log scalars.
        with torch.random.fork_rng(devices=[]), EventStorage(0):
            torch.manual_seed(self.seed)  # the same anchors are sampled each time
            for batch in self.batches:
                losses = self.model(batch)
                losses["total_loss"] = sum(losses.values())
                for name, value in losses.items():
                    totals.setdefault(name, []).append(float(value))
        for norm in norms:
            norm.train()
        return {name: float(np.mean(values)) for name, values in totals.items()}


class KeepBest(HookBase):
    """Save ``model_best`` by AP on a dev set, which the caller names and which is not the test set.

    Each AP is logged, as ``dev/segm/AP`` and ``dev/bbox/AP``. Unlike Detectron2 v0.6's
    ``BestCheckpointer`` it remembers the best on resume.
    """

    def __init__(self, period: int, evaluate: Callable, save: Callable, metric: str):
        self.period, self.evaluate, self.save, self.metric = period, evaluate, save, metric
        self.best = -math.inf

    def after_step(self):
        step = self.trainer.iter + 1
        if (self.period <= 0 or step % self.period) and step != self.trainer.max_iter:
            return
        scores = {self.metric: -math.inf, **self.evaluate()}
        for name, value in scores.items():
            if name.endswith("/AP"):
                self.trainer.storage.put_scalar(f"dev/{name}", value, smoothing_hint=False)
        if scores[self.metric] > self.best:
            self.best = scores[self.metric]
            self.save("model_best")

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]
