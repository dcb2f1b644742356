"""Keys of earlier batches, as negatives (MoCo, He et al., CVPR 2020, sec. 3.2)."""

import torch
from torch import nn

from d2ssl.modeling.gather import gather_rows


class KeyQueue(nn.Module):
    """The newest ``size`` keys, each with the photo that it came from.

    It starts empty rather than with noise, is saved with the model, and holds the same in every
    process. With few photos it meets copies of the photo that asks: these are no negatives.

    Args:
        size: number of keys.
        dim: their length.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("photos", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: torch.Tensor, photos: torch.Tensor) -> None:
        """Add the keys of all processes in place of the oldest.

        Args:
            keys: M x D.
            photos: M, index of each key's photo; -1 marks a key that nobody is to meet.
        """
        size = len(self.keys)
        keys, photos = gather_rows(keys.float())[-size:], gather_rows(photos)[-size:]
        places = (self.place + torch.arange(len(keys), device=keys.device)) % size
        self.keys[places], self.photos[places] = keys, photos
        self.place.copy_((self.place + len(keys)) % size)

    def others(self, photos: torch.Tensor) -> torch.Tensor:
        """N photos -> N x size bool: which keys are of another photo."""
        return (self.photos >= 0) & (self.photos != photos[:, None])
