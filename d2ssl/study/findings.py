"""From the results of the runs to what the study says, as plain values for JSON."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from d2ssl.evaluation.matches import TASKS, Matches
from d2ssl.evaluation.statistics import (
    Bootstrap,
    Estimate,
    interval,
    labels_worth,
    seeds_needed,
    verdict,
)
from d2ssl.report.pieces import count
from d2ssl.study.plan import Run, Study

THRESHOLDS = [round(0.05 * i, 2) for i in range(1, 20)]  # of the score
CHANGED_PHOTOS, CHANGED_BY = 6, 5.0  # AP of a photo, at least


class Results:
    """The finished runs of a study, by arm and budget.

    Args:
        runs: of the plan.
        results: of each, None where it is not finished.
    """

    def __init__(self, study: Study, runs: Sequence[Run], results: Sequence[Optional[dict]]):
        self.study = study
        self.done: Dict[Tuple[str, int], Dict[Tuple, dict]] = {}
        self.failed: List[dict] = []
        for run, result in zip(runs, results):
            if result is None:
                continue
            if result["failed"]:
                self.failed.append(result)
                continue
            repeat = (run.subset, run.seed)
            self.done.setdefault((run.arm, run.budget), {})[repeat] = self._read(result)
        self.boot = Bootstrap(self.num_photos) if self.done else None
        self._redrawn: Dict[Tuple, np.ndarray] = {}

    @staticmethod
    def _read(result: dict) -> dict:
        read = {what: Matches.from_json(found) for what, found in result["matches"].items()}
        return {**result, "matches": read}

    @property
    def num_photos(self) -> int:
        one = next(iter(next(iter(self.done.values())).values()))
        return len(one["matches"][TASKS[0]].photos)

    def runs(self, arm: str, budget: int) -> Dict[Tuple, dict]:
        """(subset, seed) -> result."""
        return self.done.get((arm, budget), {})

    def ap(self, arm: str, budget: int, what: str) -> Optional[Estimate]:
        """Mean AP of an arm; None without a finished run."""
        return self._estimate([(arm, 1)], budget, what)

    def difference(self, arm: str, other: str, budget: int, what: str) -> Optional[Estimate]:
        """AP of an arm minus that of another, over the repeats that both have finished."""
        return self._estimate([(arm, 1), (other, -1)], budget, what)

    def _estimate(self, terms, budget: int, what: str) -> Optional[Estimate]:
        repeats = set.intersection(*(set(self.runs(arm, budget)) for arm, _ in terms))
        if not repeats:
            return None
        repeats = sorted(repeats, key=str)
        values = {
            r: sum(sign * self.runs(arm, budget)[r]["ap"][what] for arm, sign in terms)
            for r in repeats
        }
        redrawn = {
            r: sum(sign * self._draws(arm, budget, r, what) for arm, sign in terms) for r in repeats
        }
        units = {r: self.study.unit(budget, *r) for r in repeats}
        return self.boot.mean(values, redrawn, units)

    def _draws(self, arm: str, budget: int, repeat: Tuple, what: str) -> np.ndarray:
        key = (arm, budget, repeat, what)
        if key not in self._redrawn:
            matches = self.runs(arm, budget)[repeat]["matches"][what]
            self._redrawn[key] = matches.ap(self.boot.photos)
        return self._redrawn[key]


def findings(study: Study, results: Results) -> dict:
    """What can be said so far.

    Returns:
        ``cells``: of each arm and budget, see :func:`_cell`; ``differences``: of each arm and
        budget to the baseline, see :func:`_difference`; ``curves``, ``sweeps``, ``photos``;
        ``failed``: the runs that came to nothing; ``answer``: a sentence for each pretraining arm.
    """
    if not results.done:
        empty: dict = {"cells": [], "differences": [], "curves": [], "sweeps": [], "photos": []}
        return {**empty, "failed": results.failed, "answer": []}
    places = [(arm, budget) for budget in study.budgets for arm in study.arms]
    known = [place for place in places if results.runs(*place)]
    differences = [
        _difference(study, results, arm, budget)
        for arm, budget in known
        if arm != study.baseline and results.difference(arm, study.baseline, budget, "segm")
    ]
    return {
        "cells": [_cell(results, *place) for place in known],
        "differences": differences,
        "curves": [{"arm": a, "budget": b, "points": _curve(results, a, b)} for a, b in known],
        "sweeps": [{"arm": a, "budget": b, "points": _sweep(results, a, b)} for a, b in known],
        "photos": _changed_photos(study, results),
        "failed": results.failed,
        "answer": answer(study, differences),
    }


def _plain(estimate: Estimate, least: float = -100.0) -> dict:
    """As plain values; an AP is never below 0 or above 100, a difference of two within +-100."""
    ends = estimate.interval
    return {
        "mean": estimate.mean,
        "interval": ends and [max(ends[0], least), min(ends[1], 100.0)],
        "run_sd": estimate.run_sd,
        "photo_se": estimate.photo_se,
        "units": estimate.units,
    }


def _cell(results: Results, arm: str, budget: int) -> dict:
    runs = results.runs(arm, budget).values()
    return {
        "arm": arm,
        "budget": budget,
        "runs": len(runs),
        "iterations": [r["iterations"] for r in runs][0],
        "seconds": float(np.mean([r["seconds"] for r in runs])),
        **{what: _plain(results.ap(arm, budget, what), 0.0) for what in TASKS},
    }


def _difference(study: Study, results: Results, arm: str, budget: int) -> dict:
    """An arm against the baseline, and, where it pretrains, against the arm that spent the same
    time on fine-tuning.

    Returns:
        arm, budget; ``segm``, ``bbox``: mean, interval, run_sd, photo_se, units; ``control``: the
        same in segm AP and the control's name, None without one; ``verdict``; ``more``: repeats
        that it would take on top of these to see ``study.effect``, None where that is not known
        or no number would do; ``worth``: [labels, low, high], see :func:`_worth`.
    """
    both = {what: results.difference(arm, study.baseline, budget, what) for what in TASKS}
    controls = [a.name for a in study.arms.values() if a.matched == arm]
    control = controls and results.difference(arm, controls[0], budget, "segm")
    needed = seeds_needed(both["segm"], study.effect)
    return {
        "arm": arm,
        "budget": budget,
        **{what: _plain(estimate) for what, estimate in both.items()},
        "control": {"arm": controls[0], **_plain(control)} if control else None,
        "verdict": verdict(both["segm"], control or None, study.least),
        "more": None if needed is None else max(0, needed - both["segm"].units),
        "worth": _worth(study, results, arm, budget),
    }


def _worth(study: Study, results: Results, arm: str, budget: int) -> Optional[List]:
    """[labels, low, high] that the baseline needs for the arm's segm AP; 0: fewer than the
    smallest budget, None: more than the largest. None in all where it has but one budget."""
    budgets = [b for b in study.budgets if results.runs(study.baseline, b)]
    if len(budgets) < 2:
        return None
    own = results.ap(arm, budget, "segm")
    curve = [results.ap(study.baseline, b, "segm") for b in budgets]
    middle = labels_worth(np.array([own.mean]), budgets, [[e.mean] for e in curve])[0]
    values = [middle]
    if all(e.units > 1 for e in [own, *curve]):
        values += interval(labels_worth(own.draws, budgets, [e.draws for e in curve]))
    return [None if math.isinf(v) else float(v) for v in values]


def _curve(results: Results, arm: str, budget: int) -> List[List[float]]:
    """[iteration, segm AP, bbox AP] on the dev photos, mean over the runs."""
    curves = [r["curve"] for r in results.runs(arm, budget).values()]
    shared = set.intersection(*({row[0] for row in curve} for curve in curves))
    rows = [row for curve in curves for row in curve if row[0] in shared]
    return [
        [i, *np.mean([row[1:] for row in rows if row[0] == i], axis=0).tolist()]
        for i in sorted(shared)
    ]


def _sweep(results: Results, arm: str, budget: int) -> List[List[float]]:
    """[score, precision, recall, F1, segm AP] where only masks of at least that score are kept;
    precision and recall at an IoU of 0.5, over all runs; precision None where none is kept."""
    runs = [r["matches"]["segm"] for r in results.runs(arm, budget).values()]
    everything = np.ones((1, results.num_photos), int)
    points = []
    for threshold in THRESHOLDS:
        kept = [matches.above(threshold) for matches in runs]
        counts = [matches.counts() for matches in kept]
        right, wrong, objects = (sum(c[k] for c in counts) for k in ("right", "wrong", "objects"))
        precision = right / (right + wrong) if right + wrong else None
        recall = right / objects if objects else 0.0
        f1 = 2 * right / (right + wrong + objects) if objects else 0.0
        ap = float(np.mean([matches.ap(everything)[0] for matches in kept]))
        points.append([threshold, precision, recall, f1, ap])
    return points


def _changed_photos(study: Study, results: Results) -> List[dict]:
    """For each pretraining arm, at the budget where it has most runs (of several the smallest):
    the photos whose segm AP it changed most, up or down, mean over the common runs."""
    found = []
    for arm in study.arms.values():
        common = {
            b: sorted(
                set(results.runs(arm.name, b)) & set(results.runs(study.baseline, b)), key=str
            )
            for b in study.budgets
        }
        budget = max(study.budgets, key=lambda b: len(common[b]))
        if arm.pretrains and arm.name != study.baseline and common[budget]:
            found += _of_arm(study, results, arm.name, budget, common[budget])
    return found


def _of_arm(study: Study, results: Results, arm: str, budget: int, repeats: List) -> List[dict]:
    each = np.eye(results.num_photos, dtype=int)
    before, after = (
        np.mean([results.runs(a, budget)[r]["matches"]["segm"].ap(each) for r in repeats], axis=0)
        for a in (study.baseline, arm)
    )
    photos = results.runs(arm, budget)[repeats[0]]["matches"]["segm"].photos
    change = np.nan_to_num(np.abs(after - before))
    most = sorted(
        np.argsort(-change, kind="stable")[:CHANGED_PHOTOS], key=lambda i: before[i] - after[i]
    )
    return [
        {
            "arm": arm, "budget": budget, "photo": photos[i],
            "before": float(before[i]), "after": float(after[i]), "repeat": list(repeats[0]),
        }
        for i in most
        if change[i] >= CHANGED_BY
    ]  # fmt: skip


def answer(study: Study, differences: Sequence[dict]) -> List[str]:
    """A sentence for each pretraining arm and budget, the plainest that the numbers allow."""
    sentences = []
    for d in differences:
        arm = study.arms[d["arm"]]
        if not arm.pretrains:
            continue
        sentences.append(
            f"{d['arm']} with {d['budget']} labels: {d['verdict']}. {describe_gain(d['segm'])} "
            f"over {study.baseline}{_describe_control(d)}; {_describe_worth(study, d)}"
            f"{describe_power(study, d)}"
        )
    return sentences


def signed(value: float) -> str:
    """With its sign, and never -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def describe_gain(estimate: dict) -> str:
    gain = f"{signed(estimate['mean'])} segm AP"
    if estimate["interval"] is None:
        return f"{gain} (one repeat, so no interval)"
    low, high = estimate["interval"]
    return f"{gain} [{signed(low)}, {signed(high)}]"


def _describe_control(difference: dict) -> str:
    control = difference["control"]
    if not control:
        return " (no compute-matched arm: longer fine-tuning might have done the same)"
    return f", {describe_gain(control)} over {control['arm']}"


def describe_labels(study: Study, labels: Optional[float]) -> str:
    if labels is None:
        return f"more than {study.budgets[-1]}"
    return f"fewer than {study.budgets[0]}" if labels == 0 else f"{labels:.0f}"


def _describe_worth(study: Study, difference: dict) -> str:
    if difference["worth"] is None:
        return "what that is worth in labels needs a second budget. "
    middle, *ends = (describe_labels(study, labels) for labels in difference["worth"])
    between = f" [{ends[0]}, {ends[1]}]" if ends else ""
    return f"its {difference['budget']} labels do what {middle}{between} do without it. "


def describe_power(study: Study, difference: dict) -> str:
    """How many repeats more it would take to see the effect that the study asks about."""
    budget, more, segm = difference["budget"], difference["more"], difference["segm"]
    what = f"a difference of {study.effect:g} AP"
    repeat = "subset" if study.unit(budget, study.subsets[0], 0) in study.subsets else "seed"
    if segm["run_sd"] is None:
        return f"How many {repeat}s it takes to see {what} is unknown from one."
    if more is None:
        return f"No number of {repeat}s would show {what}: the test photos are too few."
    if more == 0:
        return f"{segm['units']} {repeat}s are enough to see {what}."
    return f"{count(more, f'more {repeat}')} would be needed to see {what}."
