"""A study's yaml: what it may say, and what is refused."""

import pytest
import yaml

from d2ssl.errors import D2SSLError
from d2ssl.study.plan import Run, plan, recipe_differences
from d2ssl.study.yaml_file import read_study
from tests.conftest import CONFIGS


def test_overrides_of_the_study_and_of_the_config(write_yaml):
    study = read_study(write_yaml(), ["BUDGETS", "[2, 4]", "SEEDS", "3", "SOLVER.MAX_ITER", "7"])
    assert study.budgets == [2, 4] and study.seeds == 3
    assert {arm.cfg.SOLVER.MAX_ITER for arm in study.arms.values()} == {7}
    # More seeds, or more subsets, change none of the runs that there were.
    seeds = [task.seed for task in plan(study, {}) if isinstance(task, Run)][::6]
    assert seeds == [0, 1000, 2000, 1, 1001, 2001]


def test_the_first_photos_as_the_only_subset(write_yaml):
    study = read_study(write_yaml(SUBSETS=["first"], SEEDS=2))
    assert study.labels(3, "first") == "balloon_demo_train@3"
    assert study.dev_set(3, "first") == "balloon_demo_train@-2"
    # Of one subset the seeds are the repeats; of several the subsets, except with all labels.
    assert study.unit(3, "first", 0) != study.unit(3, "first", 1)
    several = read_study(write_yaml(SEEDS=2))
    assert several.unit(3, 0, 0) == several.unit(3, 0, 1) != several.unit(3, 1, 2)
    assert several.unit(8, 0, 0) != several.unit(8, 0, 1)


def test_an_override_reaches_all_arms_or_is_refused(write_yaml):
    arms = {"scratch": {"SSL.ENABLED": False}, "soco": {"SSL.SOLVER.MAX_ITER": 3}}
    study = read_study(write_yaml(ARMS=arms), ["SOLVER.BASE_LR", "0.3"])
    assert {arm.cfg.SOLVER.BASE_LR for arm in study.arms.values()} == {0.3}
    with pytest.raises(D2SSLError, match="SSL.SOLVER.MAX_ITER: arm soco sets it, .*change it in"):
        read_study(write_yaml(ARMS=arms), ["SSL.SOLVER.MAX_ITER", "9"])


def test_on_slurm_the_gpu_need_not_be_here(write_yaml, tmp_path):
    devices = [
        read_study(write_yaml(), opts, elsewhere=elsewhere).arms["scratch"].cfg.MODEL.DEVICE
        for opts, elsewhere in (((), True), (("MODEL.DEVICE", "cpu"), True))
    ]
    assert devices == ["cuda", "cpu"]
    base = tmp_path / "base.yaml"
    base.write_text(f"_BASE_: {CONFIGS / 'demo.yaml'}\nMODEL: {{DEVICE: cpu}}\n")
    on_cpu = read_study(write_yaml(CONFIG=str(base)), elsewhere=True)
    assert on_cpu.arms["scratch"].cfg.MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"BUDGET": [3]}, "key BUDGET does not exist; the nearest is BUDGETS"),
        ({"BASELINE": "imagenet"}, "BASELINE imagenet: choose from scratch, soco, longer"),
        ({"BUDGETS": [3, 80]}, "BUDGETS 80: balloon_demo_train has 8 photos"),
        ({"BUDGETS": 3}, "BUDGETS 3: give a list"),
        ({"SEEDS": "two"}, "SEEDS two: give a whole number"),
        ({"SUBSETS": ["frist"]}, 'SUBSETS frist: give seeds of 0 or more, or "first"'),
        ({"TRAIN": "balloon_demo_trian"}, "balloon_demo_trian"),
        ({"TRAIN": ""}, "TRAIN is missing"),
        ({"TRAIN": "balloon_demo_val", "BUDGETS": [3], "DEV": 0}, "has the test photo"),
        ({"COMMON": {"DATASETS.TEST": ["balloon_demo_train@-2"]}}, "TRAIN balloon_demo_train has"),
        (
            {"COMMON": {"SOLVER": {"MAX_ITER": 4}}},
            "SOLVER: a study's keys are in one piece, SOLVER.",
        ),
        ({"COMMON": {3: 4}}, "key 3: give a config key"),
        (
            {"ARMS": {"long": yaml.safe_load("{SOLVER.STEPS: (16, 18)}")}, "BASELINE": "long"},
            "arm long: SOLVER.STEPS: (16: between braces yaml ends a value",
        ),
        ({"COMMON": {"SOLVER.MAX_ITER": 0}}, "SOLVER.MAX_ITER"),
        (
            {"ARMS": {"x": {}, "scratch": {"SSL.ENABLED": False, "DATASETS.TEST": []}}},
            "must be one",
        ),
        ({"ARMS": {"scratch": {"SSL.ENABLED": False, "SEED": 3}}}, "SEED is set by SEEDS"),
        ({"ARMS": {"scratch": {"SSL.ENABLD": False}}}, "arm scratch: config key SSL.ENABLD"),
        ({"ARMS": {"scratch": {"FROM": "scratch"}}}, "arm scratch is FROM scratch"),
        ({"ARMS": {"scratch": {}}}, "BASELINE scratch: must be without unlabelled photos"),
        ({"COMMON": {"SOLVER.MAX_ITERS": 3}}, "COMMON, overrides: config key SOLVER.MAX_ITERS"),
        ({"COMMON": {"MODEL.ROI_HEADS.NUM_CLASSES": 2}}, "NUM_CLASSES is 2, and balloon_demo"),
        ({"COMMON": {"MODEL.WEIGHTS": "no.pth"}}, "arm scratch: MODEL.WEIGHTS no.pth: no such"),
        ({"CONFIG": "nowhere.yaml"}, "nowhere.yaml: no such file; its path is relative to"),
        ({"ARMS": {"a b": {}}, "BASELINE": "a b"}, "names are folders"),
        ({"ARMS": {"..": {}}, "BASELINE": ".."}, "arm ..: names are folders"),
        ({"ARMS": {50: {}}, "BASELINE": "50"}, "quote what yaml takes for a number"),
        ({"ARMS": {"scratch": "soco"}}, "arm scratch: give KEY: VALUE pairs"),
        ({"ARMS": {"scratch": {"FROM": ["a", "b"]}}}, "COMPUTE_MATCHED name one arm"),
        ({"BUDGETS": [3, "6"]}, "BUDGETS [3, '6']: give a list of whole numbers"),
        ({"ARMS": {"scratch": {"BUDGETS": 3}}}, "arm scratch: BUDGETS 3: give a list"),
        (
            {"ARMS": {"scratch": {"SSL.ENABLED": False}, "x": {"BUDGETS": [3, 4]}}},
            "arm x: BUDGETS [3, 4]: choose from those of the study, [3, 6, 8]",
        ),
        ({"SUBSETS": [[1]]}, "SUBSETS [[1]]: give a list of whole numbers"),
        ({"COMMON": {"MODEL.MASK_ON": False}}, "MODEL.MASK_ON is False"),
        (
            {
                "ARMS": {
                    "scratch": {"SSL.ENABLED": False},
                    "x": {"SSL.DATASETS": ["balloon_demo_val"]},
                }
            },
            "arm x: SSL.DATASETS has the test photo ",
        ),
        (
            {"ARMS": {"scratch": {"SSL.ENABLED": False}, "x": {"COMPUTE_MATCHED": "scratch"}}},
            "arm x: COMPUTE_MATCHED scratch: name an arm with unlabelled photos",
        ),
        (
            {"ARMS": {"scratch": {"SSL.ENABLED": False}, "y": {}, "x": {"COMPUTE_MATCHED": "y"}}},
            "arm x: spends the time of y on fine-tuning",
        ),
        (  # no control: it is of other weights than what y is compared with
            {
                "ARMS": {
                    "scratch": {"SSL.ENABLED": False},
                    "coco": {"SSL.ENABLED": False, "MODEL.WEIGHTS": "detectron2://coco.pkl"},
                    "y": {"FROM": "coco", "SSL.ENABLED": True},
                    "x": {"FROM": "scratch", "COMPUTE_MATCHED": "y"},
                }
            },
            "arm x: as the control of y it must be coco, only longer",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(write_yaml, keys, message):
    with pytest.raises(D2SSLError) as error:
        read_study(write_yaml(**keys))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a", "COMMON:\nARMS: {}", "ARMS: ["])
def test_what_is_no_study_is_said_in_one_line(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(D2SSLError) as error:
        read_study(str(tmp_path / "study.yaml"))
    assert "\n" not in str(error.value)


def test_an_override_that_is_none(write_yaml):
    with pytest.raises(D2SSLError, match="BUDGETS .3,6: while parsing"):
        read_study(write_yaml(), ["BUDGETS", "[3,6"])
    with pytest.raises(D2SSLError, match="key SEEDZ does not exist; the nearest is SEEDS"):
        read_study(write_yaml(), ["SEEDZ", "3"])
    with pytest.raises(D2SSLError, match="no such file"):
        read_study("nowhere.yaml")
    with pytest.raises(
        D2SSLError, match="BUDGETS 8: give a list"
    ):  # whatever is given in its place
        read_study(write_yaml(BUDGETS=8), ["BUDGETS", "[8]"])


def test_the_studies_in_configs(write_yaml, tmp_path, monkeypatch):
    """On the drawn photos: the yamls name sets that are not everywhere."""
    write_yaml()  # registers them
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "donor.pth").touch()  # that a user makes first
    sets = ["TRAIN", "balloon_demo_train", "DATASETS.TEST", "('balloon_demo_val',)"]
    sets += ["SSL.DATASETS", "('balloon_demo_unlabeled',)", "BUDGETS", "[3]", "DEV", "2"]
    for file in sorted((CONFIGS / "study").glob("*.yaml")):
        study = read_study(str(file), sets)
        lengths = {arm.name: 9 for arm in study.arms.values() if arm.matched}
        runs = [task for task in plan(study, lengths) if isinstance(task, Run)]
        left = [arm for arm in study.arms.values() if arm.budgets]  # some are for 16 labels alone
        assert left and len(runs) == len(left) * len(study.subsets)
        if file.stem != "pennfudan_choice":  # which asks what recipes are worth, as "stock" does
            assert recipe_differences(study).keys() <= {"stock"}, file
