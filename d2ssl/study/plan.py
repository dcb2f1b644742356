"""The runs of a study, from its yaml: arms x labelled budgets x subsets x seeds.

    CONFIG: ../ssl_fpn_balloon.yaml     what all runs share, with
    COMMON: {SOLVER.MAX_ITER: 400}      these keys changed
    TRAIN: balloon_train                the set whose labels are budgeted
    DEV: 13                             of its photos, for curves: never in a smaller budget
    BUDGETS: [8, 16, 61]
    SUBSETS: 3                          choices of the labelled photos, nested over the budgets
    SEEDS: 1                            runs of each
    BASELINE: imagenet
    ARMS:
      imagenet: {SSL.ENABLED: False}
      soco: {SSL.METHOD: SoCo}
      longer: {FROM: imagenet, COMPUTE_MATCHED: soco}

``_BASE_`` works as in Detectron2's configs.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml
from detectron2.config import CfgNode

from d2ssl.config import changed, get_cfg, leaves, load_cfg, pretrained_path
from d2ssl.data.build import check_classes, count_photos, register_datasets, unlabeled_photos
from d2ssl.data.datasets import ensure_registered
from d2ssl.engine.auto import resolve_auto
from d2ssl.engine.inputs import contents, file_hash, pretraining_inputs
from d2ssl.errors import D2SSLError

FIRST = "first"
DEFAULTS = {
    "CONFIG": "",
    "COMMON": {},
    "TRAIN": "",
    "DEV": 0,
    "BUDGETS": [],
    "SUBSETS": 3,  # a number, or a list of seeds and "first": the first photos of the set
    "SEEDS": 1,
    "BASELINE": "",
    "ARMS": {},
    "CURVE_POINTS": 5,  # evaluations of the dev photos in a run
    "EFFECT": 3.0,  # AP that the study should be able to see
    "LEAST": 1.0,  # AP below which a gain is not worth the trouble
}
TYPES = {
    str: (str, "a name"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    list: (list, "a list"),
    dict: (dict, "KEY: VALUE pairs"),
    "SUBSETS": ((int, list), "a number, or a list"),
}
OWN = {
    "SEED": "SEEDS",
    "OUTPUT_DIR": "--output",
    "DATASETS.TRAIN": "TRAIN and BUDGETS",
    "SSL.FINETUNE.DEV_DATASET": "DEV",
    "TEST.EVAL_PERIOD": "CURVE_POINTS",
}
SEED_STEP = 1000  # between the seeds of one subset
# What pretraining and its hand-off do not depend on.
FINETUNE_ONLY = ("SOLVER.", "DATASETS.", "TEST.", "SSL.FINETUNE.", "SSL.SELF_TRAINING.",
                 "DATALOADER.SAMPLER_TRAIN")  # fmt: skip
# What no result depends on.
INCIDENTAL = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "VERSION", "SSL.CACHE_GB")


@dataclass(frozen=True)
class Arm:
    """A way to come to a detector: a config, and perhaps the arm whose time it is to spend."""

    name: str
    cfg: CfgNode
    matched: str = ""

    @property
    def pretrains(self) -> bool:
        return self.cfg.SSL.ENABLED

    @property
    def uses_unlabeled(self) -> bool:
        """In pretraining, in self-training, or in both."""
        return self.pretrains or self.cfg.SSL.SELF_TRAINING.ENABLED

    def kind(self, pretraining: bool) -> str:
        """Equal for arms whose iterations, of pretraining or of fine-tuning, take the same time."""
        skip = ("DATASETS", "MODEL.WEIGHTS", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.BASE_LR")
        skip += tuple(f"SSL.{key}" for key in skip)
        skip += FINETUNE_ONLY if pretraining else ()
        values = changed(self.cfg)
        if not pretraining:
            values = _recipe(
                values
            )  # self-training changes what is read, and labels apart from that
        values = {k: v for k, v in values.items() if not k.startswith(skip)}
        return _key({**values, "device": self.cfg.MODEL.DEVICE})


@dataclass(frozen=True)
class Study:
    """What a study's yaml asks for, checked.

    total: photos of ``train``.
    labelled: of ``train`` and of the test set, what they hold, see
        :func:`~d2ssl.engine.inputs.contents`.
    unlabelled: of each arm with unlabelled photos, likewise, see
        :func:`~d2ssl.engine.inputs.pretraining_inputs`.
    """

    arms: Dict[str, Arm]
    baseline: str
    train: str
    total: int
    dev: int
    budgets: List[int]
    subsets: List[Union[int, str]]
    seeds: int
    curve_points: int
    effect: float
    least: float
    output: str
    labelled: Mapping[str, str]
    unlabelled: Mapping[str, List]

    @property
    def test(self) -> str:
        return self.arms[self.baseline].cfg.DATASETS.TEST[0]

    def twin(self, arm: Arm) -> str:
        """The arm that differs from one with unlabelled photos by these alone; "" without one."""
        recipe = _recipe(changed(arm.cfg))
        twins = [
            other.name
            for other in self.arms.values()
            if not (other.uses_unlabeled or other.matched) and _recipe(changed(other.cfg)) == recipe
        ]
        return self.baseline if self.baseline in twins else twins[0] if twins else ""

    def without(self, arm: Arm) -> str:
        """Its twin; where it has none, the baseline."""
        return self.twin(arm) or self.baseline

    def control(self, arm: Arm) -> str:
        """The arm that fine-tunes as long as this one takes in all; "" where there is none. Without
        pretraining that is its twin, but for the time of labelling."""
        matched = [a.name for a in self.arms.values() if a.matched == arm.name]
        return matched[0] if matched else "" if arm.pretrains else self.twin(arm)

    def labels(self, budget: int, subset: Union[int, str]) -> str:
        """The data set of a budget; the same for all subsets where the budget is everything."""
        return self.train if budget == self.total else f"{self.train}@{budget}{_of_seed(subset)}"

    def dev_set(self, budget: int, subset: Union[int, str]) -> str:
        """Photos that are in no budget up to this one; none where there are not enough."""
        if not self.dev or budget + self.dev > self.total:
            return ""
        return f"{self.train}@-{self.dev}{_of_seed(subset)}"

    def unit(self, budget: int, subset: Union[int, str], seed: int):
        """What independent repeats of a budget are: subsets, or seeds where these do not differ."""
        return subset if len(self.subsets) > 1 and budget < self.total else (subset, seed)


def _of_seed(subset: Union[int, str]) -> str:
    return "" if subset == FIRST else f"#seed{subset}"


@dataclass(frozen=True, eq=False)
class Task:
    """One process' work: ``result.json`` in its folder is there when it is done.

    cfg: the config of the main job for it; OUTPUT_DIR is the task's folder.
    key: changes with whatever its outcome follows from.
    """

    cfg: CfgNode
    key: str

    @property
    def seed(self) -> int:
        return self.cfg.SEED

    @property
    def folder(self) -> str:
        return self.cfg.OUTPUT_DIR

    @property
    def result_file(self) -> str:
        return os.path.join(self.folder, "result.json")

    def recorded(self) -> Optional[dict]:
        """What came of it under this key, a failure included; None if it was not run."""
        try:
            with open(self.result_file) as file:
                result = json.load(file)
        except (FileNotFoundError, ValueError):
            return None
        return result if result["key"] == self.key else None

    def result(self) -> Optional[dict]:
        """The same, if there is no use in trying again: it is done, or it diverged."""
        recorded = self.recorded()
        return recorded if recorded and recorded["final"] else None


@dataclass(frozen=True, eq=False)
class Pretraining(Task):
    """Shared by all runs that start from the same hand-off."""

    arm: str

    needs = None

    def result(self) -> Optional[dict]:
        done = super().result()
        return done if done and (done["failed"] or os.path.isfile(self.weights)) else None

    @property
    def weights(self) -> str:
        return pretrained_path(self.cfg)

    def __str__(self):
        return f"pretraining of {self.arm}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Run(Task):
    """Fine-tuning on one budget of labels, and the test."""

    arm: str
    budget: int
    subset: Union[int, str]
    needs: Optional[Pretraining] = None

    def __str__(self):
        subset = f"the first of {self.subset}" if self.subset == FIRST else f"subset {self.subset}"
        return f"{self.arm}, {self.budget} labels, {subset}, seed {self.seed}"


# ---- the yaml


def read_study(
    file: str,
    opts: Sequence[str] = (),
    output: str = "",
    register: Sequence[str] = (),
    elsewhere: bool = False,
) -> Study:
    """
    Args:
        file: the study's yaml.
        opts: ``KEY VALUE`` overrides: of the study's own keys (``SEEDS 10``), or of config keys in
            all arms (``SOLVER.MAX_ITER 800``).
        output: folder of the study; default: output/study/<name of the yaml>.
        register: more functions that register data sets, see ``SSL.REGISTER``.
        elsewhere: it will run on other machines, so that there is no GPU here says nothing.

    Raises:
        D2SSLError: a key that does not exist, an arm that is not there, a budget that is larger
            than the set, or whatever a config can have wrong.
    """
    asked = _read(file)
    common = {}
    if len(opts) % 2:
        raise D2SSLError(
            f'{" ".join(opts)}: overrides are pairs, KEY VALUE; quote a list, BUDGETS "[8, 16]"'
        )
    for key, value in zip(opts[::2], opts[1::2]):
        if key in asked:
            asked[key] = _value(key, value)
        elif "." in key or key in leaves(get_cfg()):
            common[key] = value
        else:
            raise D2SSLError(_unknown(key, DEFAULTS, "overrides"))
    _check_types(file, asked)
    for name, overlay in asked["ARMS"].items():
        for key in common.keys() & (overlay or {}).keys():
            raise D2SSLError(
                f"{key}: arm {name} sets it, and an override is for all arms: change it in {file}"
            )
    common = {**asked["COMMON"], **common}
    base = os.path.join(os.path.dirname(file), asked["CONFIG"])
    if not os.path.isfile(base):
        raise D2SSLError(
            f"{file}: CONFIG {base}: no such file; its path is relative to the study's"
        )
    arms = {}
    for name in asked["ARMS"]:
        overlay = _inherited(file, asked["ARMS"], name)
        matched = overlay.pop("COMPUTE_MATCHED", "")
        keys = {**common, **overlay}
        try:
            cfg = _arm_cfg(base, keys, register)
        except D2SSLError as error:
            where = (
                "COMMON, overrides"
                if _fault(base, common, register) == str(error)
                else f"arm {name}"
            )
            raise D2SSLError(f"{file}: {where}: {error}") from error
        if elsewhere:
            cfg.defrost()
            cfg.MODEL.DEVICE = keys.get("MODEL.DEVICE", "cuda")
            cfg.freeze()
        arms[name] = Arm(name, cfg, matched)
    tests = [arm.cfg.DATASETS.TEST for arm in arms.values()]
    study = Study(
        arms=arms,
        baseline=asked["BASELINE"],
        train=asked["TRAIN"],
        total=_count(file, asked["TRAIN"]),
        dev=asked["DEV"],
        budgets=sorted(set(asked["BUDGETS"])),
        subsets=_subsets(asked["SUBSETS"]),
        seeds=asked["SEEDS"],
        curve_points=asked["CURVE_POINTS"],
        effect=float(asked["EFFECT"]),
        least=float(asked["LEAST"]),
        output=output or os.path.join("output", "study", _stem(file)),
        labelled=contents(dict.fromkeys([asked["TRAIN"], *sum(tests, ())])),
        unlabelled={n: pretraining_inputs(a.cfg) for n, a in arms.items() if a.uses_unlabeled},
    )
    _check(file, study)
    return study


def _read(file: str) -> dict:
    if not os.path.isfile(file):
        raise D2SSLError(f"--config-file {file}: no such file")
    try:
        content = CfgNode.load_yaml_with_base(file, allow_unsafe=False)
    except (yaml.YAMLError, OSError, ValueError, AssertionError) as error:
        raise D2SSLError(f"{file}: {' '.join(str(error).split())}") from error
    except TypeError:  # Detectron2 looks for _BASE_ in whatever there is
        content = None
    if not isinstance(content, dict):
        raise D2SSLError(f"{file}: is no study; write KEY: VALUE pairs, see configs/study")
    for key in content:
        if key not in DEFAULTS:
            raise D2SSLError(_unknown(str(key), DEFAULTS, file))
    return {**DEFAULTS, **content}


def _value(key: str, text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise D2SSLError(f"{key} {text}: {' '.join(str(error).split())}") from error


def _check_types(file: str, asked: Mapping) -> None:
    for key, default in DEFAULTS.items():
        kinds, words = TYPES["SUBSETS"] if key == "SUBSETS" else TYPES[type(default)]
        if not isinstance(asked[key], kinds) or isinstance(asked[key], bool):
            raise D2SSLError(f"{file}: {key} {asked[key]}: give {words}")
    for name, overlay in asked["ARMS"].items():
        if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w.+-]*", name):
            raise D2SSLError(
                f"{file}: arm {name}: names are folders, too; begin with a letter or digit, use "
                "these and _ . + -, and quote what yaml takes for a number, yes or no"
            )
        overlay = {} if overlay is None else overlay
        named = isinstance(overlay, dict) and all(
            isinstance(overlay.get(key, ""), str) for key in ("FROM", "COMPUTE_MATCHED")
        )
        if not named:
            raise D2SSLError(
                f"{file}: arm {name}: give KEY: VALUE pairs; FROM and COMPUTE_MATCHED name one arm"
            )
    for key, kinds, or_first in (("BUDGETS", int, ""), ("SUBSETS", (int, str), ' or "first"')):
        values = asked[key] if isinstance(asked[key], list) else []
        if any(not isinstance(value, kinds) for value in values):
            raise D2SSLError(f"{file}: {key} {values}: give a list of whole numbers{or_first}")


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def _unknown(key: str, known, where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{where}: key {key} does not exist; the nearest is {near[0]}"


def _inherited(file: str, arms: Mapping[str, dict], name: str, seen: Tuple = ()) -> dict:
    """The keys of an arm, on top of those of the arm that it is FROM."""
    overlay = dict(arms[name] or {})
    parent = overlay.pop("FROM", "")
    if not parent:
        return overlay
    if parent not in arms or parent in (*seen, name):
        raise D2SSLError(f"{file}: arm {name} is FROM {parent}; name another arm of the study")
    return {**_inherited(file, arms, parent, (*seen, name)), **overlay}


def _arm_cfg(base: str, keys: Mapping[str, object], register) -> CfgNode:
    for key in keys:
        if key in OWN:
            raise D2SSLError(f"{key} is set by {OWN[key]}; leave it out")
    cfg = load_cfg(base, [word for pair in keys.items() for word in pair])
    cfg.defrost()
    cfg.SSL.REGISTER = (*cfg.SSL.REGISTER, *register)
    cfg.freeze()
    register_datasets(cfg)
    return resolve_auto(cfg)


def _fault(base: str, common: Mapping[str, object], register) -> str:
    """What is wrong without any arm; empty if nothing is."""
    try:
        _arm_cfg(base, common, register)
    except D2SSLError as error:
        return str(error)
    return ""


def _count(file: str, train: str) -> int:
    if not train:
        raise D2SSLError(f"{file}: TRAIN is missing; name the set whose labels are budgeted")
    ensure_registered([train])
    return count_photos([train])


def _subsets(asked: Union[int, list]) -> List[Union[int, str]]:
    return list(range(asked)) if isinstance(asked, int) else list(dict.fromkeys(asked))


def _check(file: str, study: Study) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise D2SSLError(f"{file}: {message}")

    arms = study.arms
    require(bool(arms), "ARMS is empty; name two or more")
    require(
        study.baseline in arms,
        f"BASELINE {study.baseline or '(missing)'}: choose from {', '.join(arms)}",
    )
    require(
        not (arms[study.baseline].matched or arms[study.baseline].uses_unlabeled),
        f"BASELINE {study.baseline}: must be without unlabelled photos and not compute-matched; "
        "give it SSL.ENABLED: False",
    )
    for arm in arms.values():
        other = arms.get(arm.matched)
        require(
            not arm.matched or (other is not None and other.uses_unlabeled),
            f"arm {arm.name}: COMPUTE_MATCHED {arm.matched}: name an arm with unlabelled photos",
        )
        require(
            not (arm.matched and arm.uses_unlabeled),
            f"arm {arm.name}: spends the time of {arm.matched} on fine-tuning, so it needs "
            "SSL.ENABLED False, and no SSL.SELF_TRAINING",
        )
        require(
            not arm.matched or _same_but_for_length(study, arm, other),
            f"arm {arm.name}: as the control of {arm.matched} it must be "
            f"{other and study.without(other)}, only longer; write FROM and COMPUTE_MATCHED, and "
            "no other key",
        )
        require(
            arm.cfg.MODEL.MASK_ON,
            f"arm {arm.name}: MODEL.MASK_ON is False, and a study compares masks; leave it True",
        )
        require(
            len(arm.cfg.DATASETS.TEST) == 1 and arm.cfg.DATASETS.TEST[0] == study.test,
            f"arm {arm.name}: DATASETS.TEST must be one set, the same in all arms",
        )
    require(bool(study.budgets), "BUDGETS is empty; e.g. [8, 16]")
    for budget in study.budgets:
        require(
            type(budget) is int and 1 <= budget <= study.total,
            f"BUDGETS {budget}: {study.train} has {study.total} photos",
        )
    require(study.seeds >= 1 and bool(study.subsets), "SEEDS and SUBSETS: give 1 or more")
    for subset in study.subsets:
        require(
            subset == FIRST or type(subset) is int and subset >= 0,
            f'SUBSETS {subset}: give seeds of 0 or more, or "first"',
        )
    require(0 <= study.dev < study.total, f"DEV {study.dev}: {study.train} has {study.total}")
    require(study.curve_points >= 1, "CURVE_POINTS: give 1 or more")
    require(study.test != study.train, "DATASETS.TEST is TRAIN: the photos must be others")
    for arm in arms.values():
        weights = arm.cfg.MODEL.WEIGHTS
        require(
            not weights or "://" in weights or os.path.isfile(weights),
            f"arm {arm.name}: MODEL.WEIGHTS {weights}: no such file",
        )
        check_classes(arm.cfg, [study.train, study.test])  # before hours of training
        require(
            not arm.uses_unlabeled or study.test not in arm.cfg.SSL.DATASETS,
            f"arm {arm.name}: SSL.DATASETS has the test photos, {study.test}; leave them out",
        )


def _same_but_for_length(study: Study, arm: Arm, other: Arm) -> bool:
    """Whether an arm is a control: of the time that another takes, and nothing else."""
    twin = study.arms[study.without(other)]
    return _recipe(changed(arm.cfg)) == _recipe(changed(twin.cfg))


def recipe_differences(study: Study) -> Dict[str, Dict[str, Tuple]]:
    """What differs in an arm's fine-tuning from the arm that it is compared with.

    An arm with unlabelled photos should differ from another by these alone, or more than that is
    compared; others may start from other weights.

    Returns:
        arm -> {config key: (its value, the other's value)}; arms without a difference are left out.
    """
    start = ("MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.STRIDE_IN_1X1",
             "MODEL.PIXEL_", "INPUT.FORMAT")  # fmt: skip
    found = {}
    for name, arm in study.arms.items():
        other = study.arms[study.without(arm) if arm.uses_unlabeled else study.baseline]
        mine, others = (_recipe(leaves(a.cfg)) for a in (arm, other))
        found[name] = {
            key: (value, others[key])
            for key, value in mine.items()
            if value != others[key] and (arm.uses_unlabeled or not key.startswith(start))
        }
    return {name: differences for name, differences in found.items() if differences}


# ---- the runs


def plan(study: Study, matched_iterations: Mapping[str, int]) -> List[Task]:
    """All tasks in the order in which they should run: one repeat after the other, so that the
    first results of all arms come early; each pretraining before the runs that need it.

    Args:
        matched_iterations: arm -> length of fine-tuning, for the compute-matched ones.
    """
    tasks: Dict[str, Task] = {}
    for number, subset in enumerate(study.subsets):
        for k in range(study.seeds):
            seed = number + SEED_STEP * k  # more subsets or seeds later change none of these
            for budget in study.budgets:
                for arm in study.arms.values():
                    needs = None
                    if arm.pretrains:
                        made = _pretraining(study, arm, seed)
                        needs = tasks.setdefault(made.key, made)
                    iterations = matched_iterations.get(arm.name, arm.cfg.SOLVER.MAX_ITER)
                    run = _run(study, arm, budget, subset, seed, iterations, needs)
                    if arm.pretrains or not arm.uses_unlabeled or unlabeled_photos(run.cfg):
                        tasks[run.folder] = run  # else it would be its twin once more
    return list(tasks.values())


def _pretraining(study: Study, arm: Arm, seed: int) -> Pretraining:
    cfg = arm.cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    values = {k: v for k, v in changed(cfg).items() if not k.startswith(FINETUNE_ONLY)}
    key = _key({**values, "photos": study.unlabelled[arm.name]})
    cfg.OUTPUT_DIR = os.path.join(study.output, "pretraining", arm.name, f"seed{seed}")
    # Of these only class names and sizes enter the hand-off, which all budgets share.
    cfg.DATASETS.TRAIN = (study.train,)
    cfg.freeze()
    return Pretraining(cfg, key, arm.name)


def _run(study, arm: Arm, budget, subset, seed, iterations, needs) -> Run:
    cfg = with_length(arm.cfg, iterations)
    cfg.defrost()
    cfg.SEED = seed
    cfg.DATASETS.TRAIN = (study.labels(budget, subset),)
    cfg.SSL.FINETUNE.DEV_DATASET = study.dev_set(budget, subset)
    dev = cfg.SSL.FINETUNE.DEV_DATASET
    cfg.TEST.EVAL_PERIOD = -(-iterations // study.curve_points) if dev else 0
    cfg.SSL.ENABLED = False  # that is the other task
    photos = [study.labelled[study.train], study.labelled[study.test]]
    if cfg.SSL.SELF_TRAINING.ENABLED:
        photos += study.unlabelled[arm.name]
    before = {"pretraining": needs.key if needs else "", "photos": photos}
    key = _key({**_of_finetuning(changed(cfg)), **before})
    if needs:
        cfg.MODEL.WEIGHTS = needs.weights
    place = (arm.name, f"{budget}", f"subset{subset}-seed{seed}")
    cfg.OUTPUT_DIR = os.path.join(study.output, "runs", *place)
    cfg.freeze()
    return Run(cfg, key, arm.name, budget, subset, needs)


def on_all_labels(study: Study, run: Run) -> CfgNode:
    """The main job's config for the arm of a run, with every label there is."""
    cfg = with_length(study.arms[run.arm].cfg, run.cfg.SOLVER.MAX_ITER)
    cfg.defrost()
    cfg.DATASETS.TRAIN = (study.train,)
    cfg.TEST.EVAL_PERIOD = 0
    cfg.OUTPUT_DIR = os.path.join(study.output, "final", run.arm)
    cfg.freeze()
    return cfg


def _of_finetuning(values: Mapping[str, object]) -> Dict[str, object]:
    """Those that fine-tuning depends on, besides what it starts from."""
    ssl = ("SSL.FINETUNE.",)
    if values.get("SSL.SELF_TRAINING.ENABLED"):
        ssl += ("SSL.SELF_TRAINING.", "SSL.DATASETS")
    return {k: v for k, v in values.items() if not k.startswith("SSL.") or k.startswith(ssl)}


def _recipe(values: Mapping[str, object]) -> Dict[str, object]:
    """Those of fine-tuning that have nothing to do with unlabelled photos."""
    return _of_finetuning({k: v for k, v in values.items() if "SELF_TRAINING" not in k})


def with_length(cfg: CfgNode, iterations: int) -> CfgNode:
    """A copy that fine-tunes for so many iterations; the schedule keeps its shape but for the
    warmup, which is no share of the length."""
    cfg = cfg.clone()
    cfg.defrost()
    solver, unfreeze = cfg.SOLVER, cfg.SSL.FINETUNE.UNFREEZE_ITER
    solver.STEPS = tuple(step * iterations // solver.MAX_ITER for step in solver.STEPS)
    cfg.SSL.FINETUNE.UNFREEZE_ITER = unfreeze * iterations // solver.MAX_ITER
    solver.MAX_ITER = iterations
    cfg.freeze()
    return cfg


def _key(values: Mapping[str, object]) -> str:
    values = {k: v for k, v in values.items() if k not in INCIDENTAL}
    if "MODEL.WEIGHTS" in values:  # what is in it counts, not where it lies
        values["MODEL.WEIGHTS"] = file_hash(values["MODEL.WEIGHTS"])
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
