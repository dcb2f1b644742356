"""Losses are fp32, whatever autocast does around them."""

import functools

import torch


def in_fp32(loss):
    """Decorator: floating-point tensors come in as fp32 and autocast is off inside."""

    def cast(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if is_float else value

    @functools.wraps(loss)
    def wrapper(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return loss(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

    return wrapper
