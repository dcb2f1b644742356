"""What a study's yaml becomes: arms, budgets, subsets, seeds."""

import copy
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.config import load_cfg
from d2ssl.data.build import load_dicts
from d2ssl.data.datasets import register_dataset
from d2ssl.study.conduct import notes
from d2ssl.study.plan import (
    Pretraining,
    Run,
    on_all_labels,
    plan,
    recipe_differences,
)
from d2ssl.study.yaml_file import read_study

MATCHED = {"longer": 9}


@pytest.fixture
def study(write_yaml, tmp_path):
    return read_study(write_yaml(), output=str(tmp_path / "out"))


def runs_of(tasks):
    return [task for task in tasks if isinstance(task, Run)]


def photos(name):
    return {d["file_name"] for d in load_dicts([name])}


def test_every_arm_gets_the_same_labels_and_seed(study):
    runs = runs_of(plan(study, MATCHED))
    assert len(runs) == 3 * 3 * 2  # arms, budgets, subsets
    for budget in (3, 6, 8):
        for subset in (0, 1):
            group = [r for r in runs if (r.budget, r.subset) == (budget, subset)]
            assert {r.arm for r in group} == {"scratch", "soco", "longer"}
            assert len({r.cfg.DATASETS.TRAIN for r in group}) == len({r.seed for r in group}) == 1
            assert len(load_dicts(group[0].cfg.DATASETS.TRAIN)) == budget


def test_an_arm_with_budgets_of_its_own_has_these_alone(write_yaml):
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "soco": {"BUDGETS": [6, 3]},
        "x": {"FROM": "soco"},
        "longer": {"FROM": "scratch", "COMPUTE_MATCHED": "soco", "BUDGETS": [3]},
    }
    for opts in ([], ["BUDGETS", "[3, 8]"]):  # what is left out on the way is left out of both
        study = read_study(write_yaml(ARMS=arms), opts)
        tasks = plan(study, MATCHED)
        budgets = {arm: {r.budget for r in runs_of(tasks) if r.arm == arm} for arm in arms}
        left = {*study.budgets}
        own = {"scratch": {3, 6, 8}, "soco": {3, 6}, "x": {3, 6}, "longer": {3}}
        assert budgets == {arm: own[arm] & left for arm in arms}
        assert study.control(study.arms["soco"], 3) == "longer"
        assert study.control(study.arms["soco"], 6) == ""


def test_labels_are_nested_differ_by_subset_and_never_are_dev_photos(study):
    small, large = (photos(study.labels(budget, 0)) for budget in (3, 6))
    assert small < large and small != photos(study.labels(3, 1))
    dev = photos(study.dev_set(6, 0))
    assert len(dev) == 2 and not dev & large
    assert study.dev_set(8, 0) == "" and study.labels(8, 0) == "balloon_demo_train"


def test_the_test_set_is_evaluated_once_and_the_dev_set_at_each_point(study):
    for run in runs_of(plan(study, MATCHED)):
        if run.budget == 8:
            assert run.cfg.SSL.FINETUNE.DEV_DATASET == "" and run.cfg.TEST.EVAL_PERIOD == 0
        else:
            assert run.cfg.SSL.FINETUNE.DEV_DATASET
            assert run.cfg.TEST.EVAL_PERIOD == (5 if run.arm == "longer" else 2)


def test_an_arm_on_all_labels_is_a_config_of_the_main_job(study, tmp_path):
    for run in runs_of(plan(study, MATCHED)):
        file = tmp_path / "final.yaml"
        file.write_text(on_all_labels(study, run).dump())
        cfg = load_cfg(str(file))
        assert cfg.DATASETS.TRAIN == (study.train,) and not cfg.SSL.FINETUNE.DEV_DATASET
        assert cfg.SSL.ENABLED == (run.arm == "soco")
        assert cfg.SOLVER.MAX_ITER == (9 if run.arm == "longer" else 4)


def test_a_pretraining_is_shared_by_budgets_and_comes_before_them(study):
    tasks = plan(study, MATCHED)
    pretrainings = [task for task in tasks if isinstance(task, Pretraining)]
    assert [p.seed for p in pretrainings] == [0, 1]  # it varies with the rest
    for run in runs_of(tasks):
        assert (run.needs is not None) == (run.arm == "soco")
        if run.needs:
            assert run.needs.seed == run.seed and tasks.index(run.needs) < tasks.index(run)
            assert run.cfg.MODEL.WEIGHTS == run.needs.weights and not run.cfg.SSL.ENABLED


def test_arms_that_differ_in_fine_tuning_alone_share_a_pretraining(write_yaml, tmp_path):
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "soco": {},
        "soco-slow": {"FROM": "soco", "SSL.FINETUNE.LR_FACTOR.RES2": 0.1},
        "soco-long": {"FROM": "soco", "SSL.SOLVER.MAX_ITER": 40},
    }
    study = read_study(write_yaml(ARMS=arms, SUBSETS=1), output=str(tmp_path / "out"))
    tasks = plan(study, {})
    assert [t.arm for t in tasks if isinstance(t, Pretraining)] == ["soco", "soco-long"]
    needs = {run.arm: run.needs for run in runs_of(tasks)}
    assert needs["soco-slow"] is needs["soco"] is not needs["soco-long"]


def test_the_compute_matched_arm_keeps_the_schedules_shape(study):
    run = next(r for r in runs_of(plan(study, {"longer": 400})) if r.arm == "longer")
    assert run.cfg.SOLVER.MAX_ITER == 400 and run.cfg.SOLVER.STEPS == (300,)  # of 4: (3,)


def test_keys_change_with_what_an_outcome_follows_from_and_with_nothing_else(write_yaml, tmp_path):
    def keys(output="out", opts=(), **asked):
        study = read_study(write_yaml(**asked), opts, str(tmp_path / output))
        return [task.key for task in plan(study, MATCHED)]

    before = keys()
    assert len(set(before)) == len(before)
    assert keys("elsewhere", ["DATALOADER.NUM_WORKERS", "3"]) == before
    assert not set(keys(opts=["SSL.TEMPERATURE", "0.3"])) >= set(before)
    assert not set(keys(opts=["SSL.FINETUNE.FIT_PREDICTORS", "never"])) & set(
        before
    )  # hand-off, too
    assert not set(keys(opts=["SSL.CALIBRATION_PHOTOS", "2"])) & set(before)
    other_lr = keys(opts=["SOLVER.BASE_LR", "0.01"])
    pretrainings = [i for i, t in enumerate(plan(read_study(write_yaml()), MATCHED))
                    if isinstance(t, Pretraining)]  # fmt: skip
    for i, (old, new) in enumerate(zip(before, other_lr)):
        assert (old == new) == (i in pretrainings)


def test_self_training_is_judged_against_the_same_without(write_yaml, tmp_path):
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "paste": {"FROM": "scratch", "SSL.FINETUNE.COPY_PASTE": 0.5},
        "self": {"FROM": "paste", "SSL.SELF_TRAINING.ENABLED": True},
        "soco": {},
    }
    study = read_study(write_yaml(ARMS=arms), output=str(tmp_path / "out"))
    self_ = study.arms["self"]
    assert self_.uses_unlabeled and not self_.pretrains
    # The same number of iterations: it is its own compute-matched control.
    assert study.without(self_) == study.control(self_, 3) == "paste"
    assert study.control(study.arms["soco"], 3) == ""
    assert recipe_differences(study) == {
        "paste": {"SSL.FINETUNE.COPY_PASTE": (0.5, 0.0)},
    }
    tasks = plan(study, {})
    assert {t.arm for t in tasks if isinstance(t, Pretraining)} == {"soco"}
    run = next(r for r in runs_of(tasks) if r.arm == "self")
    assert run.cfg.SSL.SELF_TRAINING.ENABLED and not run.needs


def test_a_longer_arm_is_no_control(write_yaml, tmp_path):
    """What it gains may be that of its length: without its twin there is none."""
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "self": {"FROM": "scratch", "SSL.SELF_TRAINING.ENABLED": True, "SOLVER.MAX_ITER": 9},
    }
    study = read_study(write_yaml(ARMS=arms), output=str(tmp_path / "out"))
    assert study.without(study.arms["self"]) == "scratch"
    assert study.control(study.arms["self"], 3) == ""


def test_where_all_photos_are_labelled_self_training_has_no_run(write_yaml, tmp_path):
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "self": {"SSL.ENABLED": False, "SSL.SELF_TRAINING.ENABLED": True},
    }
    study = read_study(write_yaml(ARMS=arms, SUBSETS=1), output=str(tmp_path / "out"))
    runs = [(run.arm, run.budget) for run in plan(study, {})]
    assert runs == [("scratch", 3), ("self", 3), ("scratch", 6), ("scratch", 8)]  # of 8, 2 are dev


def test_keys_of_self_training(write_yaml, tmp_path):
    def keys(**self_training):
        arms = {"scratch": {"SSL.ENABLED": False}}
        arms["self"] = {"SSL.ENABLED": False, "SSL.SELF_TRAINING.ENABLED": True, **self_training}
        study = read_study(write_yaml(ARMS=arms), output=str(tmp_path / "out"))
        return {run.arm: run.key for run in runs_of(plan(study, {}))}

    before = keys()
    for change in ({"SSL.SELF_TRAINING.SCORE": 0.8}, {"SSL.DATASETS": ["balloon_demo_train"]}):
        after = keys(**change)
        assert after["self"] != before["self"] and after["scratch"] == before["scratch"]
    assert keys(**{"SSL.TEMPERATURE": 0.3}) == before  # of pretraining, which it has none of


def test_recipe_differences(write_yaml):
    arms = {
        "scratch": {"SSL.ENABLED": False},
        "soco": {"SSL.SOLVER.BASE_LR": 0.3},
        "soco-fast": {"SOLVER.BASE_LR": 0.5},
        "coco": {
            "SSL.ENABLED": False,
            "MODEL.WEIGHTS": "detectron2://coco.pkl",
            "MODEL.BACKBONE.FREEZE_AT": 2,
        },
        "coco+soco": {"MODEL.WEIGHTS": "detectron2://coco.pkl"},
    }
    study = read_study(write_yaml(ARMS=arms))
    assert study.without(study.arms["soco"]) == "scratch"
    assert recipe_differences(study) == {
        "soco-fast": {"SOLVER.BASE_LR": (0.5, 0.02)},
        # Like coco but for what it does not freeze: that would be taken for pretraining's merit.
        "coco+soco": {"MODEL.WEIGHTS": ("detectron2://coco.pkl", "")},
    }


def test_weights_count_by_what_is_in_them(write_yaml, tmp_path):
    def keys(path):
        arms = {"scratch": {"SSL.ENABLED": False, "MODEL.WEIGHTS": str(path)}}
        return [t.key for t in plan(read_study(write_yaml(ARMS=arms)), {})]

    paths = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for path, content in zip(paths, (b"1", b"1", b"2")):
        path.write_bytes(content)
    a, b, c = map(keys, paths)
    assert a == b and not set(a) & set(c)


def test_keys_follow_what_is_in_the_photos(write_yaml, tmp_path):
    """More test photos, a corrected label: runs of before are no answer any more."""
    file = write_yaml(SUBSETS=1)
    rows = {name: DatasetCatalog.get(f"balloon_demo_{name}") for name in ("train", "val")}

    def keys():
        tasks = plan(read_study(file), MATCHED)
        return {str(task): task.key for task in tasks}

    def register(name, dicts):
        classes = MetadataCatalog.get(f"balloon_demo_{name}").thing_classes
        register_dataset(f"balloon_demo_{name}", lambda: dicts, thing_classes=classes)

    before = keys()
    register("val", rows["val"][:3])
    after = keys()
    changed_tasks = {task for task in before if before[task] != after[task]}
    assert changed_tasks == {task for task in before if "pretraining" not in task}
    register("val", rows["val"])
    assert keys() == before
    classes = MetadataCatalog.get("balloon_demo_train").thing_classes
    for named in (["kitten"], classes):  # of a detector, other predictors are kept
        for name in rows:
            MetadataCatalog.pop(f"balloon_demo_{name}")  # or it may not be named anew
            register_dataset(f"balloon_demo_{name}", lambda d=rows[name]: d, thing_classes=named)
        same = {*keys().values()} & {*before.values()}
        assert same == ({*before.values()} if named == classes else set())
    corrected = copy.deepcopy(rows["train"])
    corrected[0]["annotations"][0]["bbox"][2] += 1
    register("train", corrected)
    assert {t for t, key in keys().items() if key != before[t]} == changed_tasks
    # Where it lies does not count, but what is in the file.
    for row in rows["train"]:
        copied = shutil.copy(row["file_name"], tmp_path)
        row["file_name"] = str(copied)
    register("train", rows["train"])
    assert keys() == before
    with open(rows["train"][0]["file_name"], "ab") as photo:
        photo.write(b"changed")
    assert {t for t, key in keys().items() if key != before[t]} == changed_tasks


def test_pretraining_follows_what_its_proposals_are_made_of(write_yaml, tmp_path):
    file = tmp_path / "boxes.json"
    rows = DatasetCatalog.get("balloon_demo_train")

    def key(source):
        arms = {"scratch": {"SSL.ENABLED": False}, "soco": {"SSL.PROPOSALS.SOURCE": source}}
        common = {"SSL.DATASETS": ["balloon_demo_train"]}
        study = read_study(write_yaml(ARMS=arms, COMMON=common, SUBSETS=1))
        return next(t.key for t in plan(study, {}) if isinstance(t, Pretraining))

    file.write_text("{}")
    searched, from_file, from_labels = map(key, ("grid", str(file), "annotations"))
    file.write_text('{"annotations": []}')
    rows[0]["annotations"][0]["bbox"][2] += 1
    classes = MetadataCatalog.get("balloon_demo_train").thing_classes
    register_dataset("balloon_demo_train", lambda: rows, thing_classes=classes)
    assert key("grid") == searched
    assert key(str(file)) != from_file and key("annotations") != from_labels


def test_an_arm_without_its_like_at_a_budget_is_told_of(write_yaml):
    arms = {
        "scratch": {"SSL.ENABLED": False, "BUDGETS": [6]},
        "self": {"SSL.ENABLED": False, "SSL.SELF_TRAINING.ENABLED": True, "BUDGETS": [3, 6]},
    }
    found = notes(read_study(write_yaml(ARMS=arms)))
    assert found[0] == "scratch is not for 3 labels, so self is compared with nothing there"
