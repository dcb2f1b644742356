"""What a study's runs should take."""

import json
import os

import pytest

from d2ssl.data.build import count_photos
from d2ssl.errors import D2SSLError
from d2ssl.study.conduct import Conductor
from d2ssl.study.plan import Run, plan
from d2ssl.study.timing import keep_lengths, kept_lengths, matched_iterations
from d2ssl.study.yaml_file import read_study


def keep_failure(task):
    os.makedirs(task.folder)
    names = ("arm", "budget", "subset", "seed", "key")
    result = {"failed": "the loss became infinite", "final": True}
    with open(task.result_file, "w") as file:
        json.dump({**{name: getattr(task, name) for name in names}, **result}, file)


def test_the_control_of_self_training_has_the_time_of_labelling(write_yaml):
    twice = {"FROM": "scratch", "SSL.SELF_TRAINING.ENABLED": True,
             "SSL.SELF_TRAINING.AT": (0.3, 0.6)}  # fmt: skip
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "self": twice,
        "longer": {"FROM": "scratch", "COMPUTE_MATCHED": "self"},
        "voted": {"FROM": "self", "SSL.SELF_TRAINING.SCALES": (0.5, 1.0)},
        "longer-still": {"FROM": "scratch", "COMPUTE_MATCHED": "voted"},
    }
    study = read_study(write_yaml(ARMS=arms))
    seconds = dict.fromkeys(arms, {"pretraining": 0.0, "finetuning": 0.5, "photo": 1.0})
    own, photos = (
        study.arms["scratch"].cfg.SOLVER.MAX_ITER,
        count_photos(["balloon_demo_unlabeled"]),
    )
    assert matched_iterations(study, seconds) == {
        "longer": own + 2 * 2 * photos,
        "longer-still": own + 2 * 2 * photos * 2.5,  # half size is a quarter, and all mirrored, too
    }


def test_a_study_keeps_the_lengths_that_it_was_begun_with(write_yaml, tmp_path):
    """Whatever is timed later, and wherever; not those of what has changed."""
    here, there = (
        read_study(write_yaml(), output=str(tmp_path / "out"), elsewhere=e) for e in (False, True)
    )

    def taking(seconds):
        measured = []

        def call(function, arm, *args):
            measured.append(arm.cfg.MODEL.DEVICE)
            return {"iteration": seconds[len(measured) - 1], "photo": 0.0}

        return call, measured

    call, measured = taking([1.0, 5.0])  # of fine-tuning, of pretraining
    on_gpu = Conductor(there, "", call)
    assert set(measured) == {"cuda"} and on_gpu.lengths == {"longer": 4 + 2 * 5}
    call, measured = taking([1.0, 9.0])
    before = Conductor(here, "", call)
    assert set(measured) == {"cpu"} and before.lengths == {"longer": 4 + 2 * 9}  # not begun yet
    keep_lengths(there, on_gpu.lengths)
    after = Conductor(here, "", call)
    assert len(measured) == 2 and after.lengths == on_gpu.lengths
    with pytest.raises(D2SSLError, match="nothing was run here yet; leave --report-only out"):
        Conductor(here, "")
    keep_failure(on_gpu.tasks[0])
    assert [t.key for t in Conductor(here, "").tasks] == [t.key for t in on_gpu.tasks]
    more = read_study(write_yaml(), ["SSL.TEMPERATURE", "0.3"], str(tmp_path / "out"))
    assert kept_lengths(here) and not kept_lengths(more)


def test_a_handoff_that_no_run_waits_for_is_not_made_again(write_yaml, tmp_path):
    arms = {"scratch": {"SSL.ENABLED": False}, "soco": {}}
    study = read_study(write_yaml(ARMS=arms, SUBSETS=1), output=str(tmp_path / "out"))

    def waiting():
        call = lambda *args: {"iteration": 1.0, "photo": 0.0}  # noqa: E731
        return [str(task) for task in Conductor(study, "", call).waiting]

    before = waiting()
    assert "pretraining of soco, seed 0" in before
    for task in plan(study, {}):
        if isinstance(task, Run) and task.arm == "soco":
            keep_failure(
                task
            )  # for good, as runs that are done are kept; the weights are not there
    assert waiting() == [name for name in before if "soco" not in name]
