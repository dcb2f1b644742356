"""Against made-up results with known answers."""

import math

import numpy as np
import pytest
from scipy.optimize import isotonic_regression
from scipy.stats import t

from d2ssl.evaluation.matches import Matches
from d2ssl.evaluation.statistics import (
    NOT,
    PAYS,
    UNKNOWN,
    Bootstrap,
    Estimate,
    interval,
    labels_worth,
    seeds_needed,
    verdict,
)

RUNS3 = {(0, 0): 40.0, (1, 0): 43.0, (2, 0): 46.0}


def constant(runs, draws):
    """Runs whose AP does not depend on the photos."""
    return {run: np.full(draws, float(value)) for run, value in runs.items()}


def itself(runs):
    return {run: run for run in runs}


def estimate(draws, units=3, run_sd=1.0, photo_se=0.0, photos=100):
    draws = np.asarray(draws, float)
    return Estimate(float(draws.mean()), draws, units, run_sd, photo_se, photos)


def test_runs_alone_give_students_interval():
    boot = Bootstrap(5, draws=40000)
    found = boot.mean(RUNS3, constant(RUNS3, 40000), itself(RUNS3))
    half = t.ppf(0.975, 2) * 3 / math.sqrt(3)
    assert found.mean == 43 and found.units == 3 and found.run_sd == pytest.approx(3)
    assert found.photo_se == 0
    assert found.interval == pytest.approx((43 - half, 43 + half), abs=0.04 * half)


def test_the_ends_of_an_interval_are_hardly_by_chance():
    """As many draws as a study takes: by 2000 the end of three runs is up to 12 % off."""
    half = t.ppf(0.975, 2) * 3 / math.sqrt(3)
    for seed in range(20):
        boot = Bootstrap(5, seed=seed)
        low, high = boot.mean(RUNS3, constant(RUNS3, 2000), itself(RUNS3)).interval
        assert (43 - low, high - 43) == pytest.approx((half, half), rel=0.06)


def test_runs_of_one_subset_are_no_repeats():
    """Three seeds on each of two subsets that differ: two units, not six."""
    runs = {(s, k): 10.0 * s + k for s in range(2) for k in range(3)}
    boot = Bootstrap(5, draws=20000)
    found = boot.mean(runs, constant(runs, 20000), {run: run[0] for run in runs})
    assert found.units == 2 and found.run_sd == pytest.approx(10 / math.sqrt(2))
    half = t.ppf(0.975, 1) * 5
    assert found.interval == pytest.approx((6 - half, 6 + half), rel=0.08)


def test_photos_alone_give_the_standard_error_of_their_mean():
    """Of photos that each have a value, mean and standard error are textbook."""
    values = np.array([1.0, 5.0, 2.0, 8.0, 4.0, 4.0, 7.0, 1.0])
    boot = Bootstrap(len(values), draws=40000)
    redrawn = boot.photos @ values / len(values)
    runs = {0: values.mean(), 1: values.mean()}
    found = boot.mean(runs, {run: redrawn for run in runs}, itself(runs))
    assert found.photo_se == pytest.approx(values.std(ddof=1) / math.sqrt(8), rel=0.02)
    half = t.ppf(0.975, 7) * found.photo_se
    assert found.interval == pytest.approx((4 - half, 4 + half), abs=0.08 * half)


def test_one_run_has_no_interval():
    found = Bootstrap(3).mean({0: 5.0}, constant({0: 5.0}, 2000), {0: 0})
    assert found.mean == 5 and found.interval is None and found.run_sd is None
    assert verdict(found, found) == UNKNOWN


def test_the_same_runs_are_drawn_in_every_arm():
    """Shifted by the same amount in all runs: the difference of the draws has no scatter at all."""
    boot = Bootstrap(4)
    shifted = {run: value + 2 for run, value in RUNS3.items()}
    a = boot.mean(RUNS3, constant(RUNS3, 2000), itself(RUNS3))
    b = boot.mean(shifted, constant(shifted, 2000), itself(RUNS3))
    assert np.allclose(b.draws - a.draws, 2)
    assert a.draws.std() > 1


@pytest.mark.parametrize(
    "units, seeds, photos, own",
    [(3, 1, 13, 1), (3, 2, 13, 1), (10, 1, 13, 1), (4, 1, 60, 1), (3, 1, 13, 6), (10, 1, 13, 6)],
)
def test_coverage(units, seeds, photos, own):
    """600 made-up studies whose true mean is 0: the interval holds it about 95 times in 100, where
    a percentile bootstrap over three runs does so some 83 times, and one that counts twice what
    each run has of its ``own`` on each photo, 99 times."""
    random = np.random.default_rng(0)
    runs = [(s, k) for s in range(units) for k in range(seeds)]
    held = 0
    boot = Bootstrap(photos, draws=400)
    for _ in range(600):
        by_photo = random.normal(size=photos) * 2
        by_unit = random.normal(size=units) * 1.5
        table = {
            (s, k): by_photo + by_unit[s] + random.normal() + random.normal(size=photos) * own
            for s, k in runs
        }
        redrawn = {run: boot.photos @ values / photos for run, values in table.items()}
        found = boot.mean(
            {run: values.mean() for run, values in table.items()},
            redrawn,
            {run: run[0] for run in runs},
        )
        low, high = found.interval
        held += low <= 0 <= high
    assert 0.93 <= held / 600 <= 0.98


def test_labels_worth_reads_the_curve_backwards():
    curve = np.array([[10.0], [20.0], [30.0]])
    read = lambda ap: labels_worth(np.array([ap]), [8, 16, 64], curve)[0]  # noqa: E731
    assert read(10) == pytest.approx(8) and read(20) == pytest.approx(16)
    assert read(15) == pytest.approx(8 * math.sqrt(2))  # half way in the logarithm
    assert read(25) == pytest.approx(32)
    assert read(30.1) == math.inf and read(9.9) == 0


def test_labels_worth_of_a_curve_that_dips():
    """25, 15 at 16 and 32 labels: noise, so both are 20."""
    curve = np.array([[10.0], [25.0], [15.0], [40.0]])
    worth = labels_worth(np.array([20.0, 19.99, 20.01]), [8, 16, 32, 64], curve.repeat(3, 1))
    assert 15.99 < worth[0] < 32 and worth[1] < 16 and worth[2] > 32


def test_labels_worth_of_many_draws_is_scipys_isotonic_regression_read_backwards():
    random, budgets = np.random.default_rng(0), [8, 16, 32, 61]
    curve = random.normal(size=(4, 300)) * 5 + np.arange(4)[:, None] * 3
    value = random.normal(size=300) * 6 + 5
    expected = [
        2 ** np.interp(ap, isotonic_regression(column).x + 1e-9 * np.arange(4), np.log2(budgets),
                       left=-np.inf, right=np.inf)
        for ap, column in zip(value, curve.T)
    ]  # fmt: skip
    assert {0, math.inf} < {*expected}
    np.testing.assert_allclose(labels_worth(value, budgets, curve), expected, rtol=1e-4)


def test_interval_of_draws_that_are_partly_infinite():
    draws = np.array([20.0] * 50 + [30.0] * 46 + [math.inf] * 4)
    assert interval(draws) == (20, math.inf)


def test_seeds_needed_is_the_textbook_sample_size():
    """sd 4, effect 3, power 0.8: 16 or 17 pairs in every table of the paired t test."""
    assert seeds_needed(estimate([0, 1], run_sd=4.0), 3.0) in (16, 17)
    assert seeds_needed(estimate([0, 1], run_sd=4.0), 6.0) < 8


def test_seeds_needed_when_the_photos_leave_too_much_doubt():
    assert seeds_needed(estimate([0, 1], run_sd=0.1, photo_se=2.0), 3.0) is None
    assert seeds_needed(estimate([0, 1], run_sd=0.1, photo_se=0.5), 3.0) is not None
    assert seeds_needed(estimate([0, 1], run_sd=6.0), 0.5) > 1000  # many, but a number
    assert seeds_needed(estimate([0, 1], run_sd=None), 3.0) is None


@pytest.mark.parametrize(
    "run_sd, photo_se, photos, effect", [(3.0, 0.8, 6, 4.0), (0.6, 1.0, 13, 3.4), (2.0, 1.0, 60, 4)]
)
def test_seeds_needed_keeps_its_promise(run_sd, photo_se, photos, effect):
    """At the number named the interval leaves out 0 in some 80 of 100 made-up studies."""
    needed = seeds_needed(estimate([0, 1], run_sd=run_sd, photo_se=photo_se, photos=photos), effect)
    random, boot, seen = np.random.default_rng(0), Bootstrap(photos, draws=200), 0
    for _ in range(400):
        by_photo = random.normal(size=photos) * photo_se * math.sqrt(photos) + effect
        shared = boot.photos @ by_photo / photos
        runs = dict(enumerate(random.normal(size=needed) * run_sd))
        found = boot.mean(
            {run: by_photo.mean() + own for run, own in runs.items()},
            {run: shared + own for run, own in runs.items()},
            itself(runs),
        )
        seen += found.interval[0] > 0
    assert 0.74 <= seen / 400 <= 0.9


def test_more_runs_do_not_help_where_the_photos_leave_too_much_open():
    """Of 6 photos 0.8 * (2.57 + 0.92) AP are open whatever is run; of 500 less."""
    assert seeds_needed(estimate([0, 1], run_sd=0.3, photo_se=0.8, photos=6), 2.7) is None
    assert seeds_needed(estimate([0, 1], run_sd=0.3, photo_se=0.8, photos=500), 2.7) is not None


def test_what_photos_leave_open_for_each_run_anew_more_runs_do_resolve():
    """Each run is good on other photos: of the doubt that is left almost nothing is shared."""
    random = np.random.default_rng(0)
    boot, shares, needed = Bootstrap(13), [], []
    for _ in range(30):
        tables = random.normal(size=(5, 13)) * 15
        runs = dict(enumerate(tables.mean(1)))
        redrawn = {run: boot.photos @ row / 13 for run, row in enumerate(tables)}
        found = boot.mean(runs, redrawn, itself(runs))
        shares.append(found.photo_se**2 / found.run_sd**2)
        needed.append(seeds_needed(found, 6.0))
    assert np.median(shares) < 0.1
    # Runs scatter by 15 / sqrt(13) = 4.2: the paired t test takes 6 for an effect of 6.
    assert None not in needed and 5 <= np.median(needed) <= 7


def test_a_coverage_on_ap_itself():
    """Detections of made-up detectors on photos with few objects; the truth is the mean over many
    such studies. AP is no mean over photos, and its intervals hold the truth all the same."""
    random = np.random.default_rng(1)
    boot, found = Bootstrap(13, draws=200), []
    for _ in range(80):
        objects = random.poisson(3, 13) + 1
        hard = random.normal(size=13) * 0.5  # photos are not alike
        values, redrawn = {}, {}
        for run in range(3):
            luck = random.normal() * 0.3
            aps = []
            for gain in (0.0, 0.6):
                matches = made_up(random, objects, hard + luck + gain)
                aps.append((matches.ap(np.ones((1, 13), int))[0], matches.ap(boot.photos)))
            values[run] = aps[1][0] - aps[0][0]
            redrawn[run] = aps[1][1] - aps[0][1]
        found.append(boot.mean(values, redrawn, itself(values)))
    truth = np.mean([e.mean for e in found])
    held = np.mean([e.interval[0] <= truth <= e.interval[1] for e in found])
    assert truth > 3 and 0.91 <= held < 1


def made_up(random, objects, ease):
    """Each object is found with a probability that grows with ``ease`` (of each photo), the surer
    the easier; beside it are as many false alarms as one in three objects."""
    rows = []
    for photo, (count, at) in enumerate(zip(objects, ease)):
        chance = 1 / (1 + math.exp(-at))
        for _ in range(count):
            if random.uniform() < chance:
                ious = np.arange(10) < random.integers(3, 11)
                rows.append((photo, random.normal() + at, ious))
        rows += [(photo, random.normal() - 1, np.zeros(10, bool))
                 for _ in range(random.poisson(count / 3))]  # fmt: skip
    rows.sort(key=lambda row: -row[1])
    photo, score, hit = (np.array([r[i] for r in rows]) for i in range(3))
    hit = hit.reshape(-1, 10).astype(bool)
    return Matches(list(range(len(objects))), np.array([objects]), np.zeros(len(rows), int),
                   photo.astype(int), score, hit, np.zeros_like(hit))  # fmt: skip


@pytest.mark.parametrize(
    "difference, control, expected",
    [
        ((2, 6), (1, 5), PAYS),
        ((2, 6), None, UNKNOWN),  # it may be the longer training alone
        ((2, 6), (-1, 5), UNKNOWN),  # as good as longer fine-tuning, for all that is known
        ((2, 6), (-4, 0.5), NOT),
        ((-3, 0.5), None, NOT),
        ((-3, 0.5), (1, 2), NOT),
        ((-3, 3), (-3, 3), UNKNOWN),
        ((0.1, 0.5), (2, 6), NOT),  # a gain, and not worth the trouble
    ],
)
def test_verdict(difference, control, expected):
    spread = lambda pair: pair and estimate(np.linspace(*pair, 2001))  # noqa: E731
    assert verdict(spread(difference), spread(control)) == expected
