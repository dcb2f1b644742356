"""What a study's runs should take."""

import pytest

from d2ssl.data.build import count_photos
from d2ssl.errors import D2SSLError
from d2ssl.study.timing import matched_iterations, timings
from d2ssl.study.yaml_file import read_study


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


def test_a_gpus_time_is_not_a_cpus_but_its_results_are_shown_on_any_machine(write_yaml, tmp_path):
    here, there = (
        read_study(write_yaml(), output=str(tmp_path / "out"), elsewhere=e) for e in (False, True)
    )
    measured = []

    def call(function, arm, *args):
        measured.append(arm.cfg.MODEL.DEVICE)
        return {"iteration": 1.0, "photo": 2.0}

    timings(there, call, 1)
    on_gpu = len(measured)
    assert set(measured) == {"cuda"}
    assert timings(here, None, 1) == timings(there, None, 1)
    timings(here, call, 1)
    assert len(measured) == 2 * on_gpu and set(measured[on_gpu:]) == {"cpu"}
    with pytest.raises(D2SSLError, match="was not begun yet"):
        timings(read_study(write_yaml(), output=str(tmp_path / "other")), None, 1)
