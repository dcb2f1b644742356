"""Optimizer and learning-rate schedule, each part of the network with its own factor."""

import logging
import math
from types import SimpleNamespace
from typing import Callable, Dict, Iterable, List, Tuple

import torch
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from lightly.utils.lars import LARS
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from d2ssl.compat import one_pass_adamw
from d2ssl.errors import D2SSLError

logger = logging.getLogger("d2ssl")

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(solver, name: str, parts: Dict[str, Iterable[Tuple[nn.Module, str]]]):
    """SGD, LARS or AdamW with two parameter groups a part, of which one is for norms.

    Args:
        solver: a SOLVER node.
        name: ``SGD``, ``LARS`` (weight decay and trust ratio spare biases and norms, as in SoCo
            and BYOL) or ``AdamW``.
        parts: part name -> list of (module, parameter name in it). Each group remembers its part
            under the key ``part``.
    """
    groups: List[dict] = []
    for part, parameters in parts.items():
        decayed, spared = [], []
        for module, leaf in parameters:
            parameter = getattr(module, leaf)
            if not parameter.requires_grad:
                continue
            is_norm = isinstance(module, NORMS) or (name == "LARS" and parameter.dim() == 1)
            (spared if is_norm else decayed).append(parameter)
        groups.append({"params": decayed, "weight_decay": solver.WEIGHT_DECAY, "part": part})
        groups.append({"params": spared, "weight_decay": solver.WEIGHT_DECAY_NORM, "part": part})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise D2SSLError("no parameter is left to train; unfreeze a part")

    lr, momentum = solver.BASE_LR, solver.MOMENTUM
    if name == "SGD":
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=solver.NESTEROV, foreach=True
        )
    elif name == "LARS":
        optimizer = LARS(groups, lr=lr, momentum=momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, **one_pass_adamw())
    # Of a config, Detectron2's clipping reads nothing but SOLVER.
    return maybe_add_gradient_clipping(SimpleNamespace(SOLVER=solver), optimizer)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved state, each tensor laid out as its weight is now: channels_last or not, as the
    precision wants it, which need not be that of the saved run.

    Raises:
        ValueError: it is another kind of optimizer's, or of other weights.
    """
    wanted, saved = {*optimizer.param_groups[0]}, {*state["param_groups"][0]}
    optimizer.load_state_dict(state)  # fills in options that an older PyTorch did not have
    if not saved <= wanted <= {*optimizer.param_groups[0]}:
        raise ValueError("made with another OPTIMIZER")
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def named_leaves(model: nn.Module):
    """(full name, module, leaf name) of every parameter, each once."""
    seen = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf


def main_schedule(solver, floor: float) -> Callable[[int], float]:
    """Iteration -> multiple of BASE_LR: warmup, then ``WarmupCosineLR`` (down to ``floor``) or
    ``WarmupMultiStepLR``. It depends on the iteration alone."""
    steps, name = solver.MAX_ITER, solver.LR_SCHEDULER_NAME
    if name == "WarmupCosineLR":
        after = CosineParamScheduler(1.0, floor)
    elif name == "WarmupMultiStepLR":
        milestones = [s for s in solver.STEPS if s < steps]
        values = [solver.GAMMA**k for k in range(len(milestones) + 1)]
        after = MultiStepParamScheduler(values, milestones=milestones, num_updates=steps)
    else:
        raise D2SSLError(
            f"SOLVER.LR_SCHEDULER_NAME {name}: choose WarmupCosineLR or WarmupMultiStepLR"
        )
    if solver.WARMUP_ITERS > steps / 2:
        logger.warning(
            "WARMUP_ITERS %d of MAX_ITER %d: more than half of the run has a low lr; lower "
            "SOLVER.WARMUP_ITERS (SSL.SOLVER.WARMUP_ITERS while pretraining)",
            solver.WARMUP_ITERS, steps
        )  # fmt: skip
    whole = WarmupParamScheduler(
        after, solver.WARMUP_FACTOR, min(solver.WARMUP_ITERS / steps, 1.0), solver.WARMUP_METHOD
    )
    return lambda iteration: whole(min(iteration / steps, 1.0))


def loaded_rise(iteration: int, max_iter: int, start: float) -> float:
    """Multiple of BASE_LR for parameters that came with the weights: from ``start`` by cosine to 1.

    The lower of this and the main schedule counts, so they start carefully and join it where the
    two meet.
    """
    return start + (1 - start) * (1 - math.cos(math.pi * min(iteration / max_iter, 1.0))) / 2
