"""What a handful of runs on a handful of photos says, and what it does not.

Two things are by chance: the runs (which photos were labelled, the seed) and the test photos. Both
are drawn again, a few thousand times, and the same draw serves every arm and budget, so that
differences are paired:

photos   with replacement, AP taken anew (:meth:`~d2ssl.evaluation.matches.Matches.ap`)
runs     by multipliers: each deviation from the mean is weighted by its own N(0, 1) instead of its
         own count (multiplier or wild bootstrap; van der Vaart and Wellner 1996, ch. 2.9)

That one run is better on some photos and another on others makes runs differ. It is in the second
already, so of the first only what all runs share is added. Both are then spread as Student's t is
against the normal distribution. A percentile bootstrap of three runs holds the truth in some 83 of
100 cases instead of 95; this one keeps what it promises (tests/evaluation/test_statistics.py
measures it).
"""

import math
from dataclasses import dataclass
from typing import Dict, Hashable, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy.stats import chi2, t

DRAWS = 2000  # of the photos
REPEAT = 20  # draws of the runs to each: tails as heavy as those of few runs take many
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over runs, and what else it might as well have been.

    draws: DRAWS * REPEAT values, scattered around ``mean`` as the truth may be.
    units: independent repeats behind it: the subsets of labels, or the seeds where there is one
        subset.
    run_sd: standard deviation from unit to unit, that of photos they differ on included; None for
        one unit.
    photo_se: standard error due to the choice of test photos that all units share: it stays.
    photos: of the test.
    """

    mean: float
    draws: np.ndarray
    units: int
    run_sd: Optional[float]
    photo_se: float
    photos: int

    @property
    def interval(self) -> Optional[Tuple[float, float]]:
        """95 % interval; None for one unit, since a single run says nothing about the next."""
        return None if self.units < 2 else interval(self.draws)


def interval(draws: np.ndarray) -> Tuple[float, float]:
    """The middle 95 %; infinite draws are allowed, so that nothing is interpolated."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


class Bootstrap:
    """The draws that all estimates of a study share.

    Args:
        num_photos: P test photos.
        draws: of the photos.
        seed: of the draws; the same one gives the same intervals.
    """

    def __init__(self, num_photos: int, draws: int = DRAWS, seed: int = 0):
        random = np.random.default_rng(seed)
        self.seed, self.size, self.num_photos = seed, draws * REPEAT, num_photos
        # How often each photo is taken: DRAWS x P.
        self.photos = random.multinomial(num_photos, [1 / num_photos] * num_photos, size=draws)
        self._luck = random.uniform(size=(2, self.size))
        self._spreads: Dict[Tuple[int, int], np.ndarray] = {}

    def multipliers(self, run: Hashable) -> np.ndarray:
        """N(0, 1) of a run, the same wherever that run appears."""
        key = [ord(c) for c in repr(run)]
        return np.random.default_rng([self.seed, *key]).standard_normal(self.size)

    def _spread(self, which: int, units: int) -> np.ndarray:
        """What turns a normal draw into one of Student's t with units - 1 degrees of freedom."""
        freedom = units - 1
        if (which, freedom) not in self._spreads:  # most of the time of an estimate
            self._spreads[which, freedom] = np.sqrt(freedom / chi2.ppf(self._luck[which], freedom))
        return self._spreads[which, freedom]

    def mean(
        self,
        values: Mapping[Hashable, float],
        redrawn: Mapping[Hashable, np.ndarray],
        unit_of: Mapping[Hashable, Hashable],
    ) -> Estimate:
        """The mean over runs, with its draws.

        Args:
            values: run -> AP, or a difference of two APs.
            redrawn: run -> the same on each draw of photos, DRAWS values.
            unit_of: run -> what it shares its chance with: runs of one subset of labels are no
                independent repeats.
        """
        units: dict = {}
        for run in values:
            units.setdefault(unit_of[run], []).append(run)
        means = {u: float(np.mean([values[r] for r in runs])) for u, runs in units.items()}
        mean, n = float(np.mean(list(means.values()))), len(units)
        draws = np.full(self.size, mean)
        sd = float(np.std(list(means.values()), ddof=1)) if n > 1 else None
        if n > 1:
            moved = np.zeros(self.size)
            for unit, runs in units.items():
                multiplier = sum(self.multipliers(r) for r in runs) / math.sqrt(len(runs))
                moved += multiplier * (means[unit] - mean)
            draws += moved / math.sqrt(n * (n - 1)) * self._spread(0, n)
        if self.num_photos == 1:
            return Estimate(mean, draws, n, sd, 0.0, self.num_photos)
        each = np.array([np.mean([redrawn[r] for r in runs], axis=0) for runs in units.values()])
        each = each - np.nanmean(each, axis=1, keepdims=True)
        each = np.nan_to_num(each)  # a draw of photos without any object
        each *= math.sqrt(self.num_photos / (self.num_photos - 1))
        # The variance of the mean is what units share, plus what is their own by their number.
        of_one, of_mean = each.var(axis=1).mean(), each.mean(0).var()
        shared = max(0.0, (n * of_mean - of_one) / (n - 1)) if n > 1 else of_mean
        part = math.sqrt(shared / of_mean) if of_mean else 0.0
        draws += part * np.tile(each.mean(0), REPEAT) * self._spread(1, self.num_photos)
        return Estimate(mean, draws, n, sd, math.sqrt(shared), self.num_photos)


def labels_worth(
    value: np.ndarray, budgets: Sequence[int], curve: Sequence[np.ndarray]
) -> np.ndarray:
    """How many labels the baseline needs for a given AP.

    The baseline's curve over its budgets is made monotone (isotonic regression: more labels do not
    hurt; where they seem to, it is noise) and read backwards, linear in the logarithm of the
    budget. Nothing is extrapolated.

    Args:
        value: B values of AP.
        budgets: K numbers of labels, rising.
        curve: K x B, the baseline's AP at each.
    Returns:
        B numbers of labels; 0 below the lowest budget, infinity above the highest.
    """
    logs, curve = np.log2(budgets), np.asarray(curve, float)
    # The slope makes the way back unique where the curve is flat.
    rising = _isotonic(curve) + 1e-9 * np.arange(len(budgets))[:, None]
    labels = np.where(value < rising[0], -np.inf, np.inf)
    for k in range(len(budgets) - 1):
        low, high = rising[k], rising[k + 1]
        share = (value - low) / (high - low)
        between = (low <= value) & (value <= high)
        labels = np.where(between, logs[k] + share * (logs[k + 1] - logs[k]), labels)
    return 2**labels


def _isotonic(curve: np.ndarray) -> np.ndarray:
    """Isotonic regression of each column of K x B, by the max-min formula (Robertson, Wright and
    Dykstra 1988, ch. 1.4), as a loop over tens of thousands of draws takes a second."""
    steps = range(len(curve))
    sums = np.concatenate([np.zeros((1, curve.shape[1])), curve.cumsum(0)])
    means = [[(sums[j + 1] - sums[i]) / (j + 1 - i) if i <= j else None for j in steps]
             for i in steps]  # fmt: skip
    return np.stack(
        [np.max([np.min(means[i][k:], axis=0) for i in steps[: k + 1]], axis=0) for k in steps]
    )


def seeds_needed(
    estimate: Estimate, effect: float, power: float = 0.8, most: int = 100_000
) -> Optional[int]:
    """How many units (subsets, or seeds of one subset) it takes to see a difference.

    See: the interval leaves out 0 in 80 of 100 studies if the true difference is ``effect``. It is
    as wide as the doubt of the units and that of the photos make it, each by its own degrees of
    freedom; those of both together are by Welch and Satterthwaite. From few units this is itself a
    rough figure: their standard deviation is.

    Returns:
        units in all; None where the variance is unknown (one unit), or where more would not do:
        what the test photos leave open for all units alike is more than that.
    """
    if estimate.run_sd is None:
        return None
    n = np.arange(2, most + 1)
    parts = [(estimate.run_sd**2 / n, n - 1)]
    if estimate.photo_se:
        parts.append((estimate.photo_se**2, estimate.photos - 1))
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / np.maximum(sum(v**2 / f for v, f in parts), 1e-300)
    half = np.sqrt(sum(v * t.ppf((1 + LEVEL) / 2, f) ** 2 for v, f in parts))
    enough = half + t.ppf(power, np.maximum(freedom, 1)) * np.sqrt(variance) <= effect
    return int(n[enough.argmax()]) if enough.any() else None


PAYS, NOT, UNKNOWN = "pays", "does not pay", "cannot tell yet"


def verdict(difference: Estimate, control: Optional[Estimate], least: float = 1.0) -> str:
    """What paired differences say of an arm that pretrains.

    Args:
        difference: to the same arm without pretraining, in AP.
        control: to the arm that spent the same time on longer fine-tuning; None: there is none, or
            it is not finished, so nothing can be claimed yet.
        least: AP below which a gain is not worth the trouble.
    Returns:
        ``does not pay``: less than ``least`` beyond chance, over the one or over the other;
        ``pays``: above 0 beyond chance, over both; else ``cannot tell yet``.
    """
    known = [e.interval for e in (difference, control) if e is not None and e.interval]
    if any(high < least for _, high in known):
        return NOT
    return PAYS if len(known) == 2 and all(low > 0 for low, _ in known) else UNKNOWN
