"""From the results of the runs to what the study says, as plain values for JSON."""

import math
from typing import Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np

from d2ssl.evaluation.matches import TASKS, Matches
from d2ssl.evaluation.statistics import (
    PAYS,
    UNKNOWN,
    Bootstrap,
    Estimate,
    interval,
    labels_worth,
    seeds_needed,
    verdict,
)
from d2ssl.report.pieces import count
from d2ssl.study.plan import Study

THRESHOLDS = [round(0.05 * i, 2) for i in range(1, 20)]  # of the score
NOTHING = 1.0  # AP: detectors that are all below have found nothing that could be compared
CHANGED_PHOTOS, CHANGED_BY = 6, 5.0  # AP of a photo, at least
FEW = 5  # units; what fewer share by the test photos is hardly known
MANY = 100  # repeats; how many more it would take is a rough figure, and beyond this none at all


class Results:
    """The results of a study's runs by arm and budget, as they come in."""

    def __init__(self, study: Study):
        self.study = study
        self.done: Dict[Tuple[str, int], Dict[Tuple, dict]] = {}
        self.failed: Dict[Tuple, dict] = {}
        self.boot: Optional[Bootstrap] = None
        self._redrawn: Dict[Tuple, np.ndarray] = {}

    def add(self, result: dict) -> None:
        """
        Args:
            result: of a run, see :func:`~d2ssl.study.jobs.execute`.
        """
        repeat = (result["subset"], result["seed"])
        if result["failed"]:
            self.failed[result["arm"], result["budget"], *repeat] = result
            return
        self.failed.pop((result["arm"], result["budget"], *repeat), None)  # it was tried again
        matches = {what: Matches.from_json(found) for what, found in result["matches"].items()}
        runs = self.done.setdefault((result["arm"], result["budget"]), {})
        runs[repeat] = {**result, "matches": matches}
        self.boot = self.boot or Bootstrap(self.num_photos)

    def failures(self, arm: str, budget: int) -> List[dict]:
        return [result for key, result in self.failed.items() if key[:2] == (arm, budget)]

    @property
    def num_photos(self) -> int:
        one = next(iter(next(iter(self.done.values())).values()))
        return len(one["matches"][TASKS[0]].photos)

    def runs(self, arm: str, budget: int) -> Dict[Tuple, dict]:
        """(subset, seed) -> result."""
        return self.done.get((arm, budget), {})

    def ap(self, arm: str, budget: int, what: str, beside: str = "") -> Optional[Estimate]:
        """Mean AP of an arm, over the repeats that ``beside`` has finished too, where it is given;
        None without one."""
        return self._estimate([(arm, budget, 1), (beside or arm, budget, 0)], what)

    def difference(self, arm: str, other: str, budget: int, what: str) -> Optional[Estimate]:
        """AP of an arm minus that of another, over the repeats that both have finished."""
        return self._estimate([(arm, budget, 1), (other, budget, -1)], what)

    def rise(self, arm: str, budget: int, to: int, what: str) -> Optional[Estimate]:
        """AP of an arm with ``to`` labels minus that with ``budget``, over the repeats that both
        have finished; None without one, and with all labels, where there is no choice of them that
        both could share."""
        if self.study.total in (budget, to):
            return None
        return self._estimate([(arm, to, 1), (arm, budget, -1)], what)

    def _estimate(self, terms, what: str) -> Optional[Estimate]:
        values = self._values(terms, what)
        if not values:
            return None
        redrawn = {
            r: sum(sign * self._draws(arm, budget, r, what) for arm, budget, sign in terms)
            for r in values
        }
        units = {r: self.study.unit(terms[0][1], *r) for r in values}
        return self.boot.mean(values, redrawn, units)

    def each_difference(self, arm: str, other: str, budget: int, what: str) -> Dict[Tuple, float]:
        """(subset, seed) -> AP of an arm minus that of another, where both have finished."""
        return self._values([(arm, budget, 1), (other, budget, -1)], what)

    def _values(self, terms, what: str) -> Dict[Tuple, float]:
        repeats = set.intersection(*(set(self.runs(arm, budget)) for arm, budget, _ in terms))
        return {
            r: sum(sign * self.runs(arm, budget)[r]["ap"][what] for arm, budget, sign in terms)
            for r in sorted(repeats, key=str)
        }

    def _draws(self, arm: str, budget: int, repeat: Tuple, what: str) -> np.ndarray:
        key = (arm, budget, repeat, what)
        if key not in self._redrawn:
            matches = self.runs(arm, budget)[repeat]["matches"][what]
            self._redrawn[key] = matches.ap(self.boot.photos)
        return self._redrawn[key]


def findings(study: Study, results: Results, pretraining: Mapping[str, float]) -> dict:
    """What can be said so far.

    Args:
        pretraining: arm -> seconds that one of its pretrainings took, mean over the seeds.
    Returns:
        ``cells``: of each arm and budget, see :func:`_cell`; ``differences``: of each arm and
        budget to the baseline, and of arms with unlabelled photos to the same without, see
        :func:`_difference`; ``curves``, ``sweeps``, ``photos``; ``failed``: the runs that came to
        nothing; ``answer``: a sentence for each arm with unlabelled photos and each budget.
    """
    known = [(arm, budget) for budget in study.budgets for arm in study.arms
             if results.runs(arm, budget)]  # fmt: skip
    pairs = [(arm, other, budget) for arm, budget in known for other in _others(study, arm)]
    differences = [_difference(study, results, *pair) for pair in pairs]
    differences = [d for d in differences if d]
    return {
        "cells": [{**_cell(results, a, b), "pretraining": pretraining.get(a, 0.0)}
                  for a, b in known],
        "differences": differences,
        "curves": [{"arm": a, "budget": b, "points": _curve(results, a, b)} for a, b in known],
        "sweeps": [{"arm": a, "budget": b, "points": _sweep(results, a, b)} for a, b in known],
        "photos": _changed_photos(study, results),
        "failed": list(results.failed.values()),
        "answer": [sentence(study, d) for d in differences if d["verdict"]]
                  + _without_a_run(study, results),
    }  # fmt: skip


def _without_a_run(study: Study, results: Results) -> List[str]:
    """A sentence for each arm with unlabelled photos and each budget of which, or of what it is
    compared with, no run came to an end, and one or more failed."""
    found = []
    for arm in filter(lambda arm: arm.uses_unlabeled, study.arms.values()):
        for budget in arm.budgets:
            for name in (arm.name, study.without(arm)):
                failed = results.failures(name, budget)
                if failed and not results.runs(name, budget):
                    found.append(
                        f"{arm.name} with {budget} labels: {UNKNOWN}. {count(len(failed), 'run')} "
                        f"of {name} failed and none is finished: {failed[0]['failed']}"
                    )
    return found


def _others(study: Study, arm: str) -> List[str]:
    """Whom an arm is compared with: the same without unlabelled photos, and the baseline."""
    others = [study.without(study.arms[arm])] if study.arms[arm].uses_unlabeled else []
    return [other for other in dict.fromkeys([*others, study.baseline]) if other != arm]


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
    runs = list(results.runs(arm, budget).values())
    return {
        "arm": arm,
        "budget": budget,
        "runs": len(runs),
        "iterations": runs[0]["iterations"],
        "seconds": float(np.mean([r["seconds"] for r in runs])),
        **{what: _plain(results.ap(arm, budget, what), 0.0) for what in TASKS},
    }


def _difference(
    study: Study, results: Results, arm: str, other: str, budget: int
) -> Optional[dict]:
    """An arm against another; None without a repeat that both have finished.

    Returns:
        arm, against, budget; ``segm``, ``bbox``: mean, interval, run_sd, photo_se, units;
        ``each``: [subset, seed, segm, bbox] of each repeat; ``left``: repeats that are still to
        come, of one of both or of the control; ``failed``: {arm: how many of its
        repeats did}, of this, the other and the control; and, where the other is the same without
        unlabelled photos, else None: ``control``: segm as above against the arm that spent the same
        time on fine-tuning, its name (no mean while it is not finished) and what ``labelling``
        added to the arm's own time, a share; ``verdict``; ``more``: repeats that it would take on
        top of these to see ``study.effect``, None where that is not known or no number would do;
        ``worth``, see :func:`_worth`; ``blank``: neither has found anything, so there is nothing to
        compare.
    """
    both = {what: results.difference(arm, other, budget, what) for what in TASKS}
    if not both["segm"]:
        return None
    segm, bbox = (results.each_difference(arm, other, budget, what) for what in TASKS)
    name = study.control(study.arms[arm], budget) if study.arms[arm].uses_unlabeled else ""
    failed = {a: len(results.failures(a, budget)) for a in (arm, other, name)}
    failed = {a: number for a, number in failed.items() if number}
    found = {"arm": arm, "against": other, "budget": budget, "failed": failed,
             **{what: _plain(estimate) for what, estimate in both.items()},
             "each": [[*repeat, value, bbox[repeat]] for repeat, value in segm.items()],
             "left": _left(study, results, budget, filter(None, (arm, other, name))),
             "control": None, "verdict": None, "more": None, "worth": None,
             "blank": False}  # fmt: skip
    if not study.arms[arm].uses_unlabeled or other != study.without(study.arms[arm]):
        return found
    if max(results.ap(a, budget, "segm").mean for a in (arm, other)) < NOTHING:
        return {**found, "verdict": UNKNOWN, "blank": True}
    control = results.difference(arm, name, budget, "segm") if name else None
    said = verdict(both["segm"], control, study.least)
    if said == PAYS and arm in failed:
        said = UNKNOWN  # the runs that are left are the lucky ones
    return {
        **found,
        "control": name
        and {
            "arm": name,
            "labelling": _labelling(results, arm, budget),
            **(_plain(control) if control else {}),
        },
        "verdict": said,
        "more": _more(study, both["segm"], control),
        "worth": _worth(study, results, arm, other, budget),
    }


def _repeats(study: Study) -> int:
    """That are planned, of each arm and budget."""
    return len(study.subsets) * study.seeds


def _left(study: Study, results: Results, budget: int, arms: Iterable[str]) -> int:
    """How many of the repeats have not ended in all of these arms, well or badly."""
    ended = [
        {*results.runs(arm, budget)}
        | {(failed["subset"], failed["seed"]) for failed in results.failures(arm, budget)}
        for arm in arms
    ]
    return max(0, _repeats(study) - len(set.intersection(*ended)))


def _more(study: Study, *differences: Optional[Estimate]) -> Optional[int]:
    """Repeats that it takes on top of these until each of the differences is seen; those whose
    scatter is not known yet are left out."""
    known = [d for d in differences if d and d.run_sd is not None]
    needed = [seeds_needed(d, study.effect) for d in known]
    if not known or None in needed:
        return None
    return max(0, *(total - d.units for total, d in zip(needed, known)))


def _labelling(results: Results, arm: str, budget: int) -> float:
    """Time of labelling photos as a share of that of all else, mean over the runs."""
    runs = results.runs(arm, budget).values()
    spent = [(r.get("labelling", 0.0), r["seconds"]) for r in runs]
    return float(np.mean([labels / max(whole - labels, 1e-9) for labels, whole in spent]))


def _worth(study: Study, results: Results, arm: str, other: str, budget: int) -> Optional[dict]:
    """How many labels the other arm needs for the arm's segm AP.

    Returns:
        ``labels``: [number, low, high], the last two where there is an interval; ``between``: the
        smallest and the largest budget of the other arm. A number of 0 is fewer than the smallest,
        None more than the largest. None in all where the other has but one budget.
    """
    budgets = [b for b in study.budgets if results.runs(other, b)]
    if len(budgets) < 2:
        return None
    # The arm's AP is the other's and what it gained, of the same repeats, and the curve goes
    # through the other's: else what both sides share would put the gain in doubt.
    base = results.ap(other, budget, "segm", beside=arm)
    gained = results.difference(arm, other, budget, "segm")
    rises = {b: results.rise(other, budget, b, "segm") for b in budgets if b != budget}
    curve = [
        [base] if b == budget else [base, rises[b]] if rises[b] else [results.ap(other, b, "segm")]
        for b in budgets
    ]
    means = [[sum(part.mean for part in parts)] for parts in curve]
    values = list(labels_worth(np.array([base.mean + gained.mean]), budgets, means))
    if all(part.units > 1 for parts in [[gained], *curve] for part in parts):
        draws = [sum(part.draws for part in parts) for parts in curve]
        values += interval(labels_worth(base.draws + gained.draws, budgets, draws))
    labels = [None if math.isinf(v) else float(v) for v in values]
    return {"labels": labels, "between": [budgets[0], budgets[-1]]}


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
    """For each arm with unlabelled photos, at the budget where most repeats are finished (of
    several the smallest): the photos whose segm AP it changed most against the same without, up or
    down, mean over the repeats of both."""
    found = []
    for name, arm in study.arms.items():
        other = study.without(arm)
        common = {
            budget: sorted(set(results.runs(name, budget)) & set(results.runs(other, budget)),
                           key=str)
            for budget in study.budgets
        }  # fmt: skip
        budget = max(study.budgets, key=lambda b: len(common[b]))
        if not arm.uses_unlabeled or other == name or not common[budget]:
            continue
        before, after = (
            np.mean([results.runs(a, budget)[r]["matches"]["segm"].each_photo()
                     for r in common[budget]], axis=0)
            for a in (other, name)
        )  # fmt: skip
        first = common[budget][0]
        photos = results.runs(name, budget)[first]["matches"]["segm"].photos
        change = np.nan_to_num(np.abs(after - before))
        most = np.argsort(-change, kind="stable")[:CHANGED_PHOTOS]
        most = sorted(most, key=lambda i: before[i] - after[i])
        found += [
            {
                "arm": name, "against": other, "budget": budget, "repeat": list(first),
                "photo": photos[i], "before": float(before[i]), "after": float(after[i]),
            }
            for i in most
            if change[i] >= CHANGED_BY
        ]  # fmt: skip
    return found


# ---- in words


def sentence(study: Study, difference: dict) -> str:
    """The plainest answer that the numbers allow, for an arm with unlabelled photos at a budget."""
    d = difference
    if d["blank"]:
        return (
            f"{d['arm']} with {d['budget']} labels: {d['verdict']}. Neither it nor {d['against']} "
            f"reaches {NOTHING:g} AP, so there is nothing to compare: train longer "
            "(SOLVER.MAX_ITER), or check MODEL.WEIGHTS and SOLVER.BASE_LR."
        )
    worth, control = describe_worth(d["worth"]), d["control"]
    one_choice = len(study.subsets) == 1 and d["budget"] < study.total
    parts = [
        f"{d['arm']} with {d['budget']} labels: {d['verdict']}. {gain(d['segm'])} segm AP over "
        f"{d['against']}, {_describe_control(d)}",
        f"its {d['budget']} labels do what {worth} do without it" if worth else "",
        *(f"{count(number, 'run')} of {arm} failed" for arm, number in d["failed"].items()),
        "one repeat, so no interval"
        if d["segm"]["interval"] is None
        else "all of one choice of the labels"
        if one_choice
        else "",
        f"{d['left']} of {_repeats(study)} repeats still to come" if d["left"] else "",
    ]
    is_open = d["verdict"] == UNKNOWN and control and "mean" in control
    power = describe_power(study, d) if is_open else ""
    if d["arm"] in d["failed"]:
        power = "The runs that are left may be the lucky ones."
    return f"{'; '.join(filter(None, parts))}. {power}".strip()


def signed(value: float) -> str:
    """With its sign, and never -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def gain(estimate: dict) -> str:
    """A difference with its interval."""
    if estimate["interval"] is None:
        return signed(estimate["mean"])
    low, high = map(signed, estimate["interval"])
    return f"{signed(estimate['mean'])} [{low}, {high}]"


def _describe_control(difference: dict) -> str:
    control = difference["control"]
    if not control:
        return "but there is no compute-matched arm: longer fine-tuning might have done the same"
    if "mean" not in control:
        state = "failed" if control["arm"] in difference["failed"] else "is not finished"
        return f"but {control['arm']}, its control, {state}"
    if control["arm"] == difference["against"]:
        return (
            f"which has as many iterations; labelling added {control['labelling']:.0%} of its time"
        )
    return f"{gain(control)} over {control['arm']}"


def describe_worth(worth: Optional[dict]) -> str:
    """A number of labels with its interval; empty where it is not known."""
    if worth is None:
        return ""
    low, high = worth["between"]

    def words(labels: Optional[float]) -> str:
        if labels is None:
            return f"more than {high}"
        return f"fewer than {low}" if labels == 0 else f"{labels:.0f}"

    middle, *ends = map(words, worth["labels"])
    return middle + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def describe_power(study: Study, difference: dict) -> str:
    """How many repeats more it would take to see the effect that the study asks about."""
    budget, more, segm = difference["budget"], difference["more"], difference["segm"]
    what = f"a difference of {study.effect:g} AP"
    several = len(study.subsets) > 1
    repeat = ("subset" if budget < study.total else "run") if several else "seed"
    if segm["run_sd"] is None:
        return f"One {repeat} cannot say how many it takes to see {what}."
    if more is None:
        no = "No" if segm["units"] >= FEW else f"As far as {segm['units']} {repeat}s can say, no"
        return (
            f"{no} number of {repeat}s would show {what}: what the test photos leave open is more."
        )
    if more == 0:
        return f"{segm['units']} {repeat}s are enough to see {what}."
    return (
        f"{how_many(more).capitalize()} {repeat}{'s' * (more > 1)} would be needed to see {what}."
    )


def how_many(more: int) -> str:
    return f"about {more} more" if more <= MANY else f"more than {MANY} more"
