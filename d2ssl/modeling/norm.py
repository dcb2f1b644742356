"""BatchNorm, frozen and unfrozen, without changing what the network computes.

Detectron2's detectors freeze BatchNorm; pretraining needs it alive. The way there and back:

    calibrate     before pretraining: batch statistics replace the stored ones, function kept
    synchronize   with several processes: statistics are shared
    recalibrate   before the hand-off: stored statistics follow the trained convolutions
    freeze, fold  BatchNorm -> FrozenBatchNorm2d, or into its convolution: function kept
"""

from typing import Callable, Collection, Iterable, List, Optional

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2ssl.errors import D2SSLError


def _replace(module: nn.Module, cls: type, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace each submodule of type ``cls`` by ``make(it)``, in place; returns the module."""
    if isinstance(module, cls):
        return make(module)
    for name, child in module.named_children():
        new = _replace(child, cls, make)
        if new is not child:
            setattr(module, name, new)
    return module


def unfreeze(module: nn.Module) -> nn.Module:
    """FrozenBatchNorm2d -> BatchNorm2d with the same values, and every parameter trainable.

    The eval function is unchanged; in training mode batch statistics take over, see
    :func:`calibrate`. Call it before the optimizer is built. (Detectron2's own conversion, absent
    from v0.6, leaves ``num_batches_tracked`` None and the convolutions that ``FREEZE_AT`` froze
    without gradient.)
    """

    def make(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(frozen.num_features, eps=frozen.eps)
        norm.to(frozen.weight.device)
        state = {k: v for k, v in frozen.state_dict().items() if k != "num_batches_tracked"}
        norm.load_state_dict(state, strict=False)
        return norm

    module = _replace(module, FrozenBatchNorm2d, make)
    return module.requires_grad_(True)


def freeze(module: nn.Module) -> nn.Module:
    """BatchNorm2d -> FrozenBatchNorm2d with the same values; the eval function is unchanged."""
    return FrozenBatchNorm2d.convert_frozen_batchnorm(module)


def fold(module: nn.Module) -> nn.Module:
    """Fold each BatchNorm that follows a Detectron2 ``Conv2d`` into it, which gains a bias.

    w' = w * g / sqrt(v + eps),  b' = (b - m) * g / sqrt(v + eps) + beta. Only where nothing stands
    between the two, as in the FPN's lateral and output convolutions. In place.
    """
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, Conv2d) and isinstance(norm, _BatchNorm):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias,
                norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
            )  # fmt: skip
            conv.norm = None
    return module


class GlooSyncBatchNorm(_BatchNorm):
    """BatchNorm over all processes of a CPU group, where ``nn.SyncBatchNorm`` needs CUDA.

    Statistics are computed in fp32 and in two passes, as bf16 would lose the variance. Every
    process must hold equally many values. Input N x C or N x C x H x W.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        world = comm.get_world_size()
        if world == 1 or not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        centered = x.float()
        mean = differentiable_all_reduce(centered.mean(axes)) / world
        centered = centered - mean.view(shape)
        var = differentiable_all_reduce(centered.square().mean(axes)) / world

        with torch.no_grad():
            count = x.numel() // x.shape[1] * world
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        out = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def synchronize(model: nn.Module) -> nn.Module:
    """Share batch statistics between the processes of the run; nothing to do for a single one."""
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def make(norm: _BatchNorm) -> GlooSyncBatchNorm:
        sync = GlooSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
        sync.weight, sync.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(sync, name, buffer)
        return sync.train(norm.training)

    return _replace(model, _BatchNorm, make)


class _InputMoments:
    """Mean and variance per channel of a norm's input, merged over batches (Chan et al. 1979)."""

    def __init__(self, channels: int):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)  # sum of squared deviations

    def __call__(self, norm: nn.Module, inputs) -> None:
        """A forward pre-hook."""
        x = inputs[0].detach().float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        var, mean = torch.var_mean(x, axes, correction=0)
        var, mean = var.double().cpu(), mean.double().cpu()
        count = x.numel() // x.shape[1]
        total = self.count + count
        delta = mean - self.mean
        self.m2 += var * count + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def var(self) -> torch.Tensor:
        return self.m2 / self.count


@torch.no_grad()
def calibrate(
    model: nn.Module, run: Callable, batches: Iterable, only: Optional[Collection[str]] = None
) -> List[str]:
    """Let each BatchNorm switch to batch statistics without changing what the network computes.

    One pass in eval mode, that is with the stored statistics (m, v), measures the mean m' and
    variance v' of each norm's input; then the layer is rewritten in place:

        w' = w sqrt(v' + eps) / sqrt(v + eps)      mean' = m'
        b' = b + w (m' - m) / sqrt(v + eps)        var'  = v'

    The eval function stays, and so does the function in training mode, as far as a batch's
    statistics resemble (m', v'). Measuring all norms in one pass is what makes that true: were
    each norm rewritten before the next is measured, its batch noise would drift on.

    Args:
        run: called as ``run(batch)``; must pass the batch through the model.
        batches: the user's images, as training will see them.
        only: names of parameters that were loaded. A norm at random initialisation has no
            function worth keeping, and starts better as it is.
    Returns:
        the names of the norms rewritten.
    """
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.affine and (only is None or f"{name}.bias" in only)
    }
    norms = list(found.values())
    moments = [_InputMoments(norm.num_features) for norm in norms]
    handles = [n.register_forward_pre_hook(m) for n, m in zip(norms, moments)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            run(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()

    for norm, moment in zip(norms, moments):
        if not moment.count:
            raise RuntimeError("calibrate: run(batch) did not pass through every norm")
        weight, bias, mean, var = (
            t.double().cpu() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        old_std, new_std = (var + norm.eps).sqrt(), (moment.var + norm.eps).sqrt()
        norm.bias.copy_(bias + weight * (moment.mean - mean) / old_std)
        norm.weight.copy_(weight * new_std / old_std)
        norm.running_mean.copy_(moment.mean)
        norm.running_var.copy_(moment.var)
    return list(found)


@torch.no_grad()
def recalibrate(model: nn.Module, run: Callable, batches: list) -> None:
    """Recompute the stored statistics from what training mode sees (fvcore's PreciseBN).

    This changes the eval function on purpose: towards the one that was trained.
    """
    training = model.training
    model.train()
    runner = _Runner(model, run)
    update_bn_stats(runner, batches, num_iters=len(batches))
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_var.clamp_(min=0)  # E[x^2] - E[x]^2 in fp32 may fall below
    model.train(training)


class _Runner(nn.Module):
    """``run`` as a module's forward, the shape in which fvcore wants it."""

    def __init__(self, model: nn.Module, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, batch):
        return self.run(batch)


def refuse_uncalibrated(model: nn.Module) -> None:
    """Refuse frozen norms at mean 0 and variance 1, which normalise nothing.

    That is what a network from random weights has under Detectron2's default config: activations
    grow from layer to layer, and no training can repair it. Raises :class:`D2SSLError`.
    """
    for name, norm in model.named_modules():
        if not isinstance(norm, FrozenBatchNorm2d):
            continue
        identity = norm.running_mean.eq(0).all() and (norm.running_var + norm.eps).eq(1).all()
        if identity and norm.weight.eq(1).all() and norm.bias.eq(0).all():
            raise D2SSLError(
                f"{name}: a frozen norm with mean 0 and variance 1 under random weights; set "
                "MODEL.WEIGHTS, or SSL.FINETUNE.CALIBRATE_NORMS always, or MODEL.RESNETS.NORM GN"
            )
