"""Batches decided by (seed, iteration, slot) alone.

Detectron2's ``TrainingSampler`` restarts its stream on resume, and its augmentations depend on the
number of workers. Here position ``iteration * batch + slot`` of an endless stream decides the photo
and its random state, so that a resumed run continues exactly, any number of workers or processes
gives the same batches, and a batch may exceed the data set. As in stock, one photo can meet itself
in a batch that straddles two passes (13 % of them at 61 photos and batch 16): losses mask it by its
index.
"""

import contextlib
import functools
import math
import random
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from d2ssl.data.sampling import Order, batches_of_one_shape, photo_at
from d2ssl.errors import D2SSLError


@contextlib.contextmanager
def random_state(*key: int):
    """Seed ``random``, NumPy and torch (CPU) from a key of non-negative integers, and restore."""
    words = np.random.SeedSequence(key).generate_state(4)
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.random.default_generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


class PhotoStream(Dataset):
    """Position in the stream -> what ``mapper`` makes of that photo, under its own random state.

    Args:
        later: (position, mapper): from there on another mapper.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[dict],
        mapper: Callable,
        seed: int,
        order: Optional[Order] = None,
        later: Optional[Tuple[int, Callable]] = None,
    ):
        if not dataset_dicts:
            raise D2SSLError("the data set has no photo to train on")
        self.dicts, self.mapper, self.seed = dataset_dicts, mapper, seed
        self.order = order or functools.partial(photo_at, num_photos=len(dataset_dicts), seed=seed)
        self.switches_at, self.later_mapper = later or (math.inf, mapper)

    def __getitem__(self, position: int) -> dict:
        index = self.order(position)
        mapper = self.mapper if position < self.switches_at else self.later_mapper
        with random_state(self.seed, 1, position):  # 1: apart from the permutations' states
            return {**mapper(self.dicts[index]), "index": index, "position": position}


class _Positions:
    """The batches of stream positions that this process sees, from an iteration on."""

    def __init__(self, batch_size: int, start: int):
        self.batch_size, self.start = batch_size, start

    def __iter__(self):
        local = self.batch_size // comm.get_world_size()
        first = comm.get_rank() * local
        iteration = self.start
        while True:
            base = iteration * self.batch_size + first
            yield list(range(base, base + local))
            iteration += 1


def require_shares(batch_size: int) -> None:
    """
    Raises:
        D2SSLError: a batch that the processes cannot share evenly.
    """
    world = comm.get_world_size()
    if batch_size < world or batch_size % world:
        raise D2SSLError(
            f"IMS_PER_BATCH {batch_size} cannot be shared by {world} processes; "
            f"use a multiple of {world}"
        )


class StreamLoader:
    """Endless iterable of batches (lists of the mapper's dicts).

    Set ``start_iter`` before the first batch is taken; a resumed trainer does.

    Args:
        batch_size: photos a step, over all processes.
        order: which photo stands where; default: one permutation after another.
        one_shape: no batch has both landscape and portrait photos.
        later: (iteration, mapper): from there on another mapper.
    """

    def __init__(
        self,
        dataset_dicts,
        mapper,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        order: Optional[Order] = None,
        one_shape: bool = False,
        later: Optional[Tuple[int, Callable]] = None,
    ):
        require_shares(batch_size)
        self.mapper, self.seed, self.one_shape = mapper, seed, one_shape
        self.batch_size, self.num_workers = batch_size, num_workers
        self.later = later and (later[0] * batch_size, later[1])
        self.start_iter = 0
        self.switch_to(dataset_dicts, order)

    def switch_to(self, dataset_dicts: Sequence[dict], order: Optional[Order] = None) -> None:
        """Read these photos in this order, from the next batch on."""
        self.stream = PhotoStream(dataset_dicts, self.mapper, self.seed, order, self.later)
        if self.one_shape:
            grouped = batches_of_one_shape(self.stream.order, dataset_dicts, self.batch_size)
            self.stream.order = grouped

    def __iter__(self):
        # A generator: nothing is read, and no worker forked, before the first batch is asked for.
        iteration = self.start_iter
        while True:
            stream = self.stream
            for batch in self._batches(iteration):
                yield batch
                iteration += 1
                if self.stream is not stream:
                    break

    def _batches(self, start: int) -> DataLoader:
        return DataLoader(
            self.stream,
            batch_sampler=_Positions(self.batch_size, start),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            # Forked workers share the decoded photos; others would each get a copy.
            multiprocessing_context="fork" if self.num_workers else None,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else a worker's start would draw from the global state
        )


def _as_list(batch: List[dict]) -> List[dict]:
    return batch


def _one_thread(worker_id: int) -> None:
    import cv2

    cv2.setNumThreads(0)
