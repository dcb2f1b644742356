"""Made-up results with known answers: on each of 16 photos is one object, found or not."""

import numpy as np

from d2ssl.evaluation.matches import IOUS, TASKS, Matches

PHOTOS = 16
# (arm, budget) -> objects found in each repeat: soco with 3 labels does what scratch does with 6.
CLEAR = {
    ("scratch", 3): [4, 4, 5], ("soco", 3): [12, 12, 13], ("longer", 3): [4, 5, 5],
    ("scratch", 6): [12, 12, 13], ("soco", 6): [13, 12, 12], ("longer", 6): [12, 12, 12],
}  # fmt: skip


def made_up(found, score=0.8):
    """Matches of a model that finds the objects on some photos, and elsewhere nothing."""
    found = sorted(found)
    count = len(found)
    return Matches(
        list(range(PHOTOS)),
        np.ones((1, PHOTOS), int),
        np.zeros(count, int),
        np.array(found, int),
        np.full(count, score),
        np.ones((count, len(IOUS)), bool),
        np.zeros((count, len(IOUS)), bool),
    )


def ap_of(count):
    """All that is found is right: precision 1 up to a recall of count / PHOTOS."""
    return 100 * (100 * count // PHOTOS + 1) / 101


def result_of(run, outcome, curve=((2, 1.0, 2.0), (4, 5.0, 6.0))):
    """Of a run: how many of the photos' objects it found, or which, or why it failed.

    Args:
        curve: [iteration, segm AP, bbox AP]; both are by the run's seed higher.
    """
    identity = {"arm": run.arm, "budget": run.budget, "subset": run.subset, "seed": run.seed}
    if isinstance(outcome, str):
        return {**identity, "failed": outcome}
    matches = made_up(range(outcome) if isinstance(outcome, int) else outcome)
    return {
        **identity,
        "failed": None,
        "iterations": 4,
        "seconds": 60.0,
        "ap": {what: ap_of(len(matches.score)) for what in TASKS},
        "curve": [[i, segm + run.seed, bbox] for i, segm, bbox in curve],
        "matches": {what: matches.to_json() for what in TASKS},
    }
