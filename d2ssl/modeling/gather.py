"""Rows of all processes."""

import torch
from lightly.utils import dist


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """M x ... of this process -> (processes * M) x ..., in order of rank; gradients flow back."""
    if dist.world_size() == 1:
        return rows
    return torch.cat(dist.gather(rows.contiguous()))
