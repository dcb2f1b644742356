"""The runs of a study (see :mod:`d2ssl.study.yaml_file`): arms x budgets x subsets x seeds."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Tuple, Union

from detectron2.config import CfgNode

from d2ssl.config import changed, leaves, pretrained_path
from d2ssl.data.build import unlabeled_photos
from d2ssl.engine.checkpoint import training_classes
from d2ssl.engine.inputs import file_hash

FIRST = "first"
SEED_STEP = 1000  # between the seeds of one subset
# What pretraining and its hand-off do not depend on, but for HANDOFF.
FINETUNE_ONLY = ("SOLVER.", "DATASETS.", "TEST.", "SSL.FINETUNE.", "SSL.SELF_TRAINING.",
                 "DATALOADER.SAMPLER_TRAIN")  # fmt: skip
HANDOFF = ("SSL.FINETUNE.FIT_PREDICTORS", "SSL.FINETUNE.WEIGHTS_CLASSES")
# What no result depends on.
INCIDENTAL = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "VERSION", "SSL.CACHE_GB",
              "SOLVER.CHECKPOINT_PERIOD", "SSL.SOLVER.CHECKPOINT_PERIOD")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to come to a detector: a config, the budgets that it is for, and perhaps the arm whose
    time it is to spend."""

    name: str
    cfg: CfgNode
    budgets: Tuple[int, ...]
    matched: str = ""

    @property
    def pretrains(self) -> bool:
        return self.cfg.SSL.ENABLED

    @property
    def uses_unlabeled(self) -> bool:
        """In pretraining, in self-training, or in both."""
        return self.pretrains or self.cfg.SSL.SELF_TRAINING.ENABLED

    @property
    def recipe(self) -> Dict[str, object]:
        """All config keys of fine-tuning that have nothing to do with unlabelled photos."""
        return _recipe(leaves(self.cfg))

    def kind(self, pretraining: bool) -> str:
        """Equal for arms whose iterations, of pretraining or of fine-tuning, take the same time on
        the same device."""
        skip = ("DATASETS", "MODEL.WEIGHTS", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.BASE_LR")
        skip += tuple(f"SSL.{key}" for key in skip)
        skip += FINETUNE_ONLY if pretraining else ()
        values = changed(self.cfg)
        if not pretraining:
            # An iteration takes as long with self-training as without; labelling is timed apart.
            values = _recipe(values)
        return config_key({k: v for k, v in values.items() if not k.startswith(skip)})


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
        twins = [
            other.name
            for other in self.arms.values()
            if not (other.uses_unlabeled or other.matched) and other.recipe == arm.recipe
        ]
        return self.baseline if self.baseline in twins else twins[0] if twins else ""

    def without(self, arm: Arm) -> str:
        """Its twin; where it has none, the baseline."""
        return self.twin(arm) or self.baseline

    def control(self, arm: Arm, budget: int) -> str:
        """The arm that fine-tunes as long as this one takes in all; "" where there is none for this
        budget. Without pretraining that is its twin, but for the time of labelling."""
        matched = [
            a.name for a in self.arms.values() if a.matched == arm.name and budget in a.budgets
        ]
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
                    if budget not in arm.budgets:
                        continue
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
    # Of the labels only class names and sizes enter the hand-off, which all budgets share.
    cfg.DATASETS.TRAIN = (study.train,)
    values = changed(cfg)
    values = {k: v for k, v in values.items() if not k.startswith(FINETUNE_ONLY) or k in HANDOFF}
    photos = [*study.unlabelled[arm.name], training_classes(cfg)]
    key = config_key({**values, "photos": photos})
    cfg.OUTPUT_DIR = os.path.join(study.output, "pretraining", arm.name, f"seed{seed}")
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
    # All of self-training's: its defaults are young, and one that changes must change the key.
    own = {k: v for k, v in leaves(cfg).items() if k.startswith("SSL.SELF_TRAINING.")}
    key = config_key({**_of_finetuning({**changed(cfg), **own}), **before})
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
    ssl = ("SSL.FINETUNE.", "SSL.CALIBRATION_PHOTOS")
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


def config_key(values: Mapping[str, object]) -> str:
    """A short hash of config keys and whatever else there is, but for what is incidental."""
    values = {k: v for k, v in values.items() if k not in INCIDENTAL}
    if "MODEL.WEIGHTS" in values:  # what is in it counts, not where it lies
        values["MODEL.WEIGHTS"] = file_hash(values["MODEL.WEIGHTS"])
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        others = other.recipe
        found[name] = {
            key: (value, others[key])
            for key, value in arm.recipe.items()
            if value != others[key] and (arm.uses_unlabeled or not key.startswith(start))
        }
    return {name: differences for name, differences in found.items() if differences}
