"""Which photo stands at a position of the endless stream that training reads.

Each order is a function of the position and the seed alone, so that a run can be resumed anywhere.
"""

import array
import bisect
import functools
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
from detectron2.data.samplers import RepeatFactorTrainingSampler

logger = logging.getLogger("d2ssl.data")

Order = Callable[[int], int]  # position in the stream -> index of the photo

# Keys of random states: a permutation has (seed, epoch), and a third number sets others apart.
_ROUNDING, _CLASSES = 2, 3


def photo_at(position: int, num_photos: int, seed: int) -> int:
    """Index of the photo at a position of the stream: one permutation after another."""
    epoch, place = divmod(position, num_photos)
    return int(_permutation(num_photos, seed, epoch)[place])


def evenly(rows: Sequence, count: int) -> list:
    """Up to ``count`` of the rows, evenly spaced."""
    count = min(count, len(rows))
    return [rows[len(rows) * i // count] for i in range(count)]


def interleaved(first: Order, second: Order, offset: int, share: float) -> Order:
    """Two orders as one: of any n positions n * share, but for rounding, are of the first.

    Args:
        offset: added to the second's indices: how many photos the first has.
        share: 0 to 1.
    """

    def index_at(position: int) -> int:
        place = math.floor(position * share)  # of the first, so many were before
        if math.floor((position + 1) * share) > place:
            return first(place)
        return offset + second(position - place)

    return index_at


@functools.lru_cache(maxsize=4)
def _permutation(num_photos: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_photos)


def classes_of(dataset_dict: dict) -> set[int]:
    """
    Classes of a photo: its own ``category_id``, those of its annotations, or, where these are not
    read yet, ``classes`` that the listing of its set knows.

    Crowds do not count: a detector learns nothing from them.
    """
    if "category_id" in dataset_dict:
        return {dataset_dict["category_id"]}
    if "annotations" not in dataset_dict:
        return set(dataset_dict.get("classes", ()))
    annotations = dataset_dict["annotations"]
    return {a["category_id"] for a in annotations if not a.get("iscrowd")}


def build_order(cfg, dataset_dicts: Sequence[dict]) -> Order:
    """The order that ``DATALOADER.SAMPLER_TRAIN`` asks for."""
    sampler, seed = cfg.DATALOADER.SAMPLER_TRAIN, cfg.SEED
    if sampler == "TrainingSampler":
        return functools.partial(photo_at, num_photos=len(dataset_dicts), seed=seed)
    classes = [classes_of(d) for d in dataset_dicts]
    if sampler == "ClassBalancedSampler":
        return ClassBalancedOrder(classes, seed)
    factors = repeat_factors(classes, cfg.DATALOADER.REPEAT_THRESHOLD)
    logger.info(
        f"{sampler}: {np.count_nonzero(factors > 1)} of {len(factors)} photos are repeated, up to "
        f"{factors.max():.2f} times; an epoch has about {factors.sum():.0f}"
    )
    return RepeatFactorOrder(factors, seed)


def repeat_factors(classes: Sequence[set[int]], threshold: float) -> np.ndarray:
    """
    How often an epoch shows each photo: the most that one of its classes c asks for,
    max(1, sqrt(threshold / f(c))) with f(c) the share of photos that have it (Gupta et al. 2019,
    LVIS); 1 for a photo without any. N float64, computed by Detectron2.

    Args:
        classes: of each photo.
        threshold: share of the photos below which a class is rare, e.g. 0.001.
    """
    dicts = [{"annotations": [{"category_id": c} for c in found]} for found in classes]
    from_frequency = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return from_frequency(dicts, threshold).double().numpy()


class RepeatFactorOrder:
    """
    Epochs that show some photos more often, as Detectron2's ``RepeatFactorTrainingSampler``.

    An epoch shows a photo as often as its factor says, rounded up with the probability of the
    fractional part. Where all factors are 1 the order is :func:`photo_at`'s.

    Args:
        factors: N, 1 or more.
    """

    def __init__(self, factors: np.ndarray, seed: int):
        self.factors, self.seed = factors, seed
        self._starts = [0]  # epochs differ in length: where those start that were gone through
        self._shuffled = (-1, np.empty(0, int))  # the epoch looked at last, and its photos

    def __call__(self, position: int) -> int:
        while self._starts[-1] <= position:
            repeats = self._repeats(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + int(repeats.sum()))
        epoch = bisect.bisect_right(self._starts, position) - 1
        if self._shuffled[0] != epoch:
            photos = np.repeat(np.arange(len(self.factors)), self._repeats(epoch))
            self._shuffled = epoch, photos[_permutation(len(photos), self.seed, epoch)]
        return int(self._shuffled[1][position - self._starts[epoch]])

    def _repeats(self, epoch: int) -> np.ndarray:
        draws = np.random.default_rng((self.seed, epoch, _ROUNDING)).random(len(self.factors))
        whole = np.floor(self.factors)
        return (whole + (draws < self.factors - whole)).astype(int)


class ClassBalancedOrder:
    """
    Every class equally often: the class is drawn first, then one of its photos (class-aware
    sampling, Shen et al. 2016, Relay Backpropagation).

    A photo's share of the stream is then the sum over its classes of 1 / (number of classes x
    photos of the class), as if it were drawn with that weight; but any C positions in a row that
    start at a multiple of C have each of the C classes once, and a class shows all of its photos
    before one of them again, which draws by weight reach only on average. That matters for the
    few photos that we train on. Photos without any class are a class of their own.

    Args:
        classes: of each photo.
    """

    def __init__(self, classes: Sequence[set[int]], seed: int):
        self.seed = seed
        found = sorted(set().union(*classes))
        photos = [[i for i, own in enumerate(classes) if c in own] for c in found]
        photos.append([i for i, own in enumerate(classes) if not own])
        self.photos = [np.array(own) for own in photos if own]  # by class
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}  # a class's present epoch

    def __call__(self, position: int) -> int:
        draw = position // len(self.photos)  # every class was drawn so many times before
        c = photo_at(position, len(self.photos), self.seed)
        epoch, place = divmod(draw, len(self.photos[c]))
        if self._shuffled.get(c, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, _CLASSES + c))
            self._shuffled[c] = epoch, rng.permutation(self.photos[c])
        return int(self._shuffled[c][1][place])


def batches_of_one_shape(order: Order, dataset_dicts: Sequence[dict], batch_size: int) -> Order:
    """
    The order in which no batch has both landscape and portrait photos, as Detectron2's
    ``AspectRatioGroupedDataset``: all of a batch are padded to its greatest height and width.

    Where there are fewer photos of one shape than a batch holds it stays as it was, as a batch
    would be the same photo again and again.
    """
    landscape = [d["width"] > d["height"] for d in dataset_dicts]
    if min(sum(landscape), len(landscape) - sum(landscape)) < batch_size:
        return order
    return GroupedOrder(order, landscape, batch_size)


class GroupedOrder:
    """
    Batches of one group: photos wait until there are enough of theirs.

    Args:
        groups: the group of each photo.
        batch_size: positions that start at a multiple of it are of one group.
    """

    def __init__(self, order: Order, groups: Sequence[int], batch_size: int):
        self.order, self.groups, self.batch_size = order, groups, batch_size
        self._read = 0  # of the order
        self._waiting = {group: [] for group in set(groups)}
        self._grouped = array.array("q")  # from position 0 on: what waits depends on all before

    def __call__(self, position: int) -> int:
        while len(self._grouped) <= position:
            index = self.order(self._read)
            self._read += 1
            waiting = self._waiting[self.groups[index]]
            waiting.append(index)
            if len(waiting) == self.batch_size:
                self._grouped.extend(waiting)
                waiting.clear()
        return self._grouped[position]
