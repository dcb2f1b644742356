"""What a study says of made-up results with known answers."""

import json

import numpy as np
import pytest

from d2ssl.evaluation.statistics import NOT, PAYS, UNKNOWN
from d2ssl.study.findings import Results, findings, how_many
from d2ssl.study.plan import Run, plan
from d2ssl.study.yaml_file import read_study
from tests.study.made_up import CLEAR, ap_of, result_of


@pytest.fixture
def make(write_yaml, tmp_path):
    """Callable: {(arm, budget): [photos found in each repeat, or why it failed]} -> findings."""

    def make(table, **keys):
        keys = {"SUBSETS": 3, "BUDGETS": [3, 6], "DEV": 0, **keys}
        study = read_study(write_yaml(**keys), output=str(tmp_path / "out"))
        runs = [t for t in plan(study, {"longer": 8}) if isinstance(t, Run)]
        counted, results = {}, Results(study)
        for run in runs:
            outcomes = table.get((run.arm, run.budget), [])
            i = counted[run.arm, run.budget] = counted.get((run.arm, run.budget), -1) + 1
            if i < len(outcomes):
                results.add(result_of(run, outcomes[i]))
        found = findings(study, results, {"soco": 30.0})
        json.dumps(found, allow_nan=False)
        return found

    return make


def of(rows, arm, budget, against="scratch"):
    return next(r for r in rows if (r["arm"], r["budget"]) == (arm, budget)
                and r.get("against", against) == against)  # fmt: skip


def test_means_and_paired_differences(make):
    found = make(CLEAR)
    cell = of(found["cells"], "soco", 3)
    assert cell["segm"]["mean"] == pytest.approx(np.mean([ap_of(12), ap_of(12), ap_of(13)]))
    assert cell["runs"] == cell["segm"]["units"] == 3
    assert cell["pretraining"] == 30 and of(found["cells"], "scratch", 3)["pretraining"] == 0
    pairs = [ap_of(12) - ap_of(4), ap_of(12) - ap_of(4), ap_of(13) - ap_of(5)]
    difference = of(found["differences"], "soco", 3)
    assert difference["segm"]["mean"] == pytest.approx(np.mean(pairs))
    assert difference["segm"]["run_sd"] == pytest.approx(np.std(pairs, ddof=1))
    assert [row[:2] for row in difference["each"]] == [[0, 0], [1, 1], [2, 2]]
    assert [row[2] for row in difference["each"]] == pytest.approx(pairs)
    assert np.mean([row[3] for row in difference["each"]]) == pytest.approx(
        difference["bbox"]["mean"]
    )
    control = [ap_of(12) - ap_of(4), ap_of(12) - ap_of(5), ap_of(13) - ap_of(5)]
    assert difference["control"]["mean"] == pytest.approx(np.mean(control))
    assert of(found["differences"], "longer", 3)["control"] is None


def test_a_clear_gain_pays_and_is_worth_the_labels_that_the_baseline_needs(make):
    found = make(CLEAR)
    difference = of(found["differences"], "soco", 3)
    assert difference["verdict"] == PAYS
    assert difference["worth"]["labels"][0] == pytest.approx(6)  # where the baseline has that AP
    sentence = found["answer"][0]
    assert sentence.startswith("soco with 3 labels: pays. +49.5 [")
    assert "would" not in sentence  # no more repeats are needed
    assert "its 3 labels do what 6 [" in sentence


def test_more_than_the_largest_and_fewer_than_the_smallest_budget(make):
    found = make({**CLEAR, ("soco", 6): [15, 15, 16], ("soco", 3): [1, 1, 1]})
    assert of(found["differences"], "soco", 6)["worth"]["labels"][0] is None
    assert of(found["differences"], "soco", 3)["worth"]["labels"][0] == 0
    assert "fewer than 3" in found["answer"][0] and "more than 6" in found["answer"][1]


def test_no_gain_over_the_control_does_not_pay(make):
    """Longer fine-tuning is as good in every run: pretraining is not what helped."""
    found = make({**CLEAR, ("longer", 3): CLEAR["soco", 3]})
    difference = of(found["differences"], "soco", 3)
    assert difference["segm"]["interval"][0] > 0 and difference["control"]["mean"] == 0
    assert difference["verdict"] == NOT
    assert "does not pay" in found["answer"][0] and "over longer" in found["answer"][0]


def test_without_a_finished_control_nothing_is_claimed(make):
    of_control = {key: values for key, values in CLEAR.items() if key[0] != "longer"}
    unfinished = make(of_control)
    assert of(unfinished["differences"], "soco", 3)["verdict"] == UNKNOWN
    assert "longer, its control, is not finished" in unfinished["answer"][0]
    arms = {"scratch": {"SSL.ENABLED": False}, "soco": {}}
    none = make(of_control, ARMS=arms)
    assert of(none["differences"], "soco", 3)["verdict"] == UNKNOWN
    assert "no compute-matched arm" in none["answer"][0]


def test_what_failed_is_not_called_unfinished(make):
    """Nor is more of it asked for."""
    why = ["the loss became infinite"] * 3
    control = make({**CLEAR, ("longer", 3): why})["answer"][0]
    assert "longer, its control, failed" in control and "3 runs of longer failed" in control
    assert "subsets" not in control
    baseline = make({**CLEAR, ("scratch", 3): why})["answer"]
    assert any("3 runs of scratch failed and none is finished: the loss" in a for a in baseline)


def test_what_did_not_vary_is_said(make):
    one = make({k: [v[0], v[1]] for k, v in CLEAR.items()}, SUBSETS=1, SEEDS=2)
    assert one["answer"] and all("all of one choice of the labels" in a for a in one["answer"])
    assert not any("one choice" in a for a in make(CLEAR)["answer"])


def test_numbers_of_repeats_are_rough():
    assert how_many(8) == "about 8 more" and how_many(479) == "more than 100 more"


def test_an_arm_is_judged_against_the_same_without_pretraining(make):
    """Weights from elsewhere are not pretraining's merit."""
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "coco": {"SSL.ENABLED": False, "MODEL.WEIGHTS": "detectron2://coco.pkl"},
        "coco+soco": {"MODEL.WEIGHTS": "detectron2://coco.pkl"},
        "coco-longer": {"FROM": "coco", "COMPUTE_MATCHED": "coco+soco"},
    }
    counts = {"scratch": [4, 4, 5], "coco": [12, 12, 13], "coco+soco": [12, 12, 13],
              "coco-longer": [12, 13, 13]}  # fmt: skip
    found = make({(arm, 3): values for arm, values in counts.items()}, ARMS=arms)
    assert of(found["differences"], "coco+soco", 3)["verdict"] is None
    own = of(found["differences"], "coco+soco", 3, "coco")
    assert own["segm"]["mean"] == 0 and own["verdict"] == NOT
    assert len(found["answer"]) == 1 and "over coco," in found["answer"][0]


def test_labels_are_worth_what_was_measured(make):
    """The baseline at 8 labels is not there yet: more than 6 is all that can be said."""
    table = {**CLEAR, ("soco", 8): [16, 16, 16], ("soco", 3): [15, 15, 15]}
    found = make(table, BUDGETS=[3, 6, 8])
    worth = of(found["differences"], "soco", 3)["worth"]
    assert worth["between"] == [3, 6] and worth["labels"][0] is None
    assert "what more than 6 [" in found["answer"][0]


def test_detectors_that_find_nothing_prove_nothing(make):
    """No variance, no difference, and no verdict: "does not pay" would be believed."""
    found = make({(arm, 3): [[], [], []] for arm in ("scratch", "soco", "longer")})
    difference = of(found["differences"], "soco", 3)
    assert difference["verdict"] == UNKNOWN and difference["more"] is None
    assert "nothing to compare: train longer" in found["answer"][0]


def test_what_scatters_cannot_be_told_yet(make):
    found = make({**CLEAR, ("soco", 3): [1, 6, 9]})
    difference = of(found["differences"], "soco", 3)
    assert difference["verdict"] == UNKNOWN
    # 3 repeats whose differences have an sd of 25 AP: hundreds for an effect of 3.
    assert difference["segm"]["run_sd"] > 20 and (difference["more"] or 1000) > 100


def test_one_repeat_has_no_interval(make):
    found = make({key: values[:1] for key, values in CLEAR.items()}, SUBSETS=1)
    difference = of(found["differences"], "soco", 3)
    assert difference["segm"]["interval"] is None and difference["verdict"] == UNKNOWN
    assert len(difference["worth"]["labels"]) == 1 and "no interval" in found["answer"][0]


def test_runs_of_all_labels_are_repeats_though_their_subset_is_the_same(make):
    table = {(arm, 8): [4, 5, 6, 7] for arm in ("scratch", "soco")}
    table |= {(arm, 3): [4, 5, 6, 7] for arm in ("scratch", "soco")}
    found = make(table, SUBSETS=2, SEEDS=2, BUDGETS=[3, 8])
    assert of(found["cells"], "soco", 8)["segm"]["units"] == 4
    assert of(found["cells"], "soco", 3)["segm"]["units"] == 2


def test_a_failed_run_is_listed_and_its_pair_left_out(make):
    found = make({**CLEAR, ("scratch", 3): [4, "the loss became infinite", 5]})
    assert [(f["arm"], f["subset"], f["failed"]) for f in found["failed"]] == [
        ("scratch", 1, "the loss became infinite")
    ]
    assert of(found["cells"], "scratch", 3)["runs"] == 2
    lost = make({**CLEAR, ("soco", 3): [12, "the loss became infinite", 13]})
    assert "; 1 run of soco failed." in lost["answer"][0]
    pairs = [ap_of(12) - ap_of(4), ap_of(13) - ap_of(5)]
    assert of(found["differences"], "soco", 3)["segm"]["mean"] == pytest.approx(np.mean(pairs))


def test_labels_are_worth_what_the_same_repeats_say(make):
    """It finds less in each pair; that the best of them is missing on one side is no gain."""
    found = make({**CLEAR, ("scratch", 3): [10, 4, 10], ("soco", 3): [9, "diverged", 9]})
    difference = of(found["differences"], "soco", 3)
    assert difference["segm"]["mean"] < 0 and difference["worth"]["labels"][0] == 0


def test_worth_and_verdict_agree(make):
    """One object more in each run, each time by other photos: these leave nothing open that all
    runs share, neither for the gain nor for what it is worth."""
    runs = range(4)
    table = {("scratch", 3): [range(8)] * 4, ("scratch", 6): [range(12)] * 4,
             ("soco", 3): [{*range(8)} - {i} | {8 + i, 12 + i} for i in runs]}  # fmt: skip
    difference = of(make(table, SUBSETS=4)["differences"], "soco", 3)
    assert difference["segm"]["interval"][0] > 0
    assert difference["worth"]["labels"][1] > 3


def test_the_curve_rises_as_it_does_for_the_same_labels(make):
    """Only the lucky first choice is done with 6 labels: it has 2 objects more there, not 8."""
    table = {("scratch", 3): [10, 2, 3], ("soco", 3): [11, 3, 4], ("scratch", 6): [12]}
    worth = of(make(table)["differences"], "soco", 3)["worth"]
    steps = (ap_of(11) - ap_of(10)) / (ap_of(12) - ap_of(10))
    assert worth["labels"][0] == pytest.approx(3 * 2**steps, rel=0.05)


def test_the_luck_of_runs_that_did_not_fail_pays_nothing(make):
    finds = {"scratch": [4, 4, 5, 4, 5], "longer": [4, 5, 5, 4, 5], "soco": [12, 12, 13, 13, 12]}
    table = {(arm, 3): values for arm, values in finds.items()}
    assert of(make(table, SUBSETS=5)["differences"], "soco", 3)["verdict"] == PAYS
    table["soco", 3][4] = "the loss became infinite"
    found = make(table, SUBSETS=5)
    assert of(found["differences"], "soco", 3)["verdict"] == UNKNOWN
    assert found["answer"][0].endswith(
        "; 1 run of soco failed. The runs that are left may be the lucky ones."
    )


def test_a_study_that_goes_on_says_so(make):
    found = make({**CLEAR, ("soco", 3): [12, 12]})
    assert found["answer"][0].endswith("; 1 of 3 repeats still to come.")
    assert not any("to come" in answer for answer in make(CLEAR)["answer"])
    behind = make({**CLEAR, ("longer", 3): [4, 5]})
    assert "; 1 of 3 repeats still to come" in behind["answer"][0]
    failed = {**CLEAR, ("soco", 3): [12, "diverged"], ("scratch", 3): [4, "diverged"]}
    assert "; 1 of 3 repeats still to come" in make(failed)["answer"][0]


def test_few_repeats_do_not_say_that_no_number_would_do(make):
    """The arms find the other half of the objects: what the photos leave open is large."""
    table = {("scratch", 3): [[0, 1, 2, 3]] * 2, ("soco", 3): [[4, 5, 6, 7, 8]] * 2,
             ("longer", 3): [[0, 1, 2, 3]] * 2}  # fmt: skip
    found = make(table, SUBSETS=2)
    assert "As far as 2 subsets can say, no number of subsets would show" in found["answer"][0]
    several = {key: [finds[0]] * 5 for key, finds in table.items()}
    assert ". No number of subsets" in make(several, SUBSETS=5)["answer"][0]


def test_an_arm_that_only_failed_is_in_the_answer(make):
    found = make({**CLEAR, ("soco", 3): ["the loss became infinite"] * 2})
    assert found["answer"][-1] == (
        "soco with 3 labels: cannot tell yet. 2 runs of soco failed and none is finished: the "
        "loss became infinite"
    )


def test_repeats_are_asked_for_by_whichever_scatters_more(make):
    table = {("scratch", 3): [4, 4, 5], ("soco", 3): [5, 5, 6], ("longer", 3): [1, 8, 4]}
    difference = of(make(table, EFFECT=30.0)["differences"], "soco", 3)
    assert difference["segm"]["run_sd"] < 1 and difference["control"]["run_sd"] > 10
    assert difference["verdict"] == UNKNOWN and difference["more"] > 1
    begun = of(make({**table, ("longer", 3): [4]}, EFFECT=30.0)["differences"], "soco", 3)
    assert begun["control"]["run_sd"] is None and begun["more"] == 0  # its scatter is not known


def test_the_photos_that_changed_most(make):
    """The baseline finds photos 0..3, the arm 2..6: 0 and 1 are lost, 4, 5, 6 gained."""
    table = {("scratch", 3): [range(4)] * 3, ("soco", 3): [range(2, 7)] * 3}
    changed = make(table)["photos"]
    assert [c["photo"] for c in changed] == [4, 5, 6, 0, 1]
    assert [(c["before"], c["after"]) for c in changed][::4] == [(0, 100), (100, 0)]


def test_the_score_sweep(make):
    found = make({("scratch", 3): [4, 4, 5]})
    points = {p[0]: p[1:] for p in of(found["sweeps"], "scratch", 3)["points"]}
    precision, recall, f1, ap = points[0.8]
    assert precision == 1 and recall == pytest.approx(13 / 48)
    assert f1 == pytest.approx(2 * 13 / (13 + 48))
    assert ap == pytest.approx(of(found["cells"], "scratch", 3)["segm"]["mean"])
    assert points[0.85] == [None, 0, 0, 0]


def test_curves_are_means_over_runs(make):
    points = of(make(CLEAR)["curves"], "soco", 3)["points"]
    assert points == [[2, 2, 2], [4, 6, 6]]  # 1 + seed of 0, 1, 2


def test_before_the_first_run(make):
    assert make({})["answer"] == [] == make({})["cells"]
