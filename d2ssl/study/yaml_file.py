"""A study's yaml, read and checked: arms x labelled budgets x subsets x seeds.

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
      soco: {SSL.METHOD: SoCo, BUDGETS: [8, 16]}                         of these budgets alone
      longer: {FROM: imagenet, COMPUTE_MATCHED: soco, BUDGETS: [8, 16]}

``_BASE_`` works as in Detectron2's configs.
"""

import difflib
import os
import re
from typing import List, Mapping, Sequence, Set, Tuple, Union

import yaml
from detectron2.config import CfgNode

from d2ssl.config import get_cfg, leaves, load_cfg
from d2ssl.data.build import check_classes, count_photos, load_photos, register_datasets
from d2ssl.data.datasets import ensure_registered
from d2ssl.engine.auto import resolve_auto
from d2ssl.engine.inputs import contents, pretraining_inputs
from d2ssl.errors import D2SSLError
from d2ssl.study.plan import FIRST, Arm, Study

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
    _check_types(file, asked)
    common, written = {}, asked["BUDGETS"]
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
        own = (overlay or {}).get("BUDGETS", [])
        if not {*own} <= {*written, *asked["BUDGETS"]}:
            raise D2SSLError(
                f"{file}: arm {name}: BUDGETS {own}: choose from those of the study, {written}"
            )
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
        budgets = overlay.pop("BUDGETS", asked["BUDGETS"])
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
            cfg.MODEL.DEVICE = keys.get("MODEL.DEVICE", _device(base))
            cfg.freeze()
        arms[name] = Arm(name, cfg, tuple(b for b in budgets if b in asked["BUDGETS"]), matched)
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
        _check_list(f"{file}: arm {name}: BUDGETS", overlay.get("BUDGETS", []))
    _check_list(f"{file}: BUDGETS", asked["BUDGETS"])
    if isinstance(asked["SUBSETS"], list):
        _check_list(f"{file}: SUBSETS", asked["SUBSETS"], (int, str), ' or "first"')


def _check_list(what: str, values, kinds=int, or_first: str = "") -> None:
    if not isinstance(values, list) or any(not isinstance(value, kinds) for value in values):
        raise D2SSLError(f"{what} {values}: give a list of whole numbers{or_first}")


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


def _device(base: str) -> str:
    """As the yaml has it; loaded, it is the CPU where there is no GPU."""
    return CfgNode.load_yaml_with_base(base).get("MODEL", {}).get("DEVICE", "cuda")


def _arm_cfg(base: str, keys: Mapping[str, object], register) -> CfgNode:
    for key, value in keys.items():
        if isinstance(value, str) and value.startswith("(") and not value.endswith(")"):
            raise D2SSLError(
                f'{key}: {value}: between braces yaml ends a value at its comma; quote it, "(1, 2)"'
            )
        if not isinstance(key, str):
            raise D2SSLError(f"key {key}: give a config key, e.g. SOLVER.MAX_ITER")
        if isinstance(value, dict):
            inside = next(iter(value), "...")
            raise D2SSLError(f"{key}: a study's keys are in one piece, {key}.{inside}: ...")
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
            len(arm.cfg.DATASETS.TEST) == 1
            and arm.cfg.DATASETS.TEST == arms[study.baseline].cfg.DATASETS.TEST,
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
    tested = _paths([study.test])
    shared = min(_paths([study.train]) & tested, default="")
    require(not shared, f"TRAIN {study.train} has the test photo {shared}; the photos must differ")
    for arm in arms.values():
        weights = arm.cfg.MODEL.WEIGHTS
        require(
            not weights or "://" in weights or os.path.isfile(weights),
            f"arm {arm.name}: MODEL.WEIGHTS {weights}: no such file",
        )
        check_classes(arm.cfg, [study.train, study.test])  # before hours of training
        unlabeled = _paths(arm.cfg.SSL.DATASETS) if arm.uses_unlabeled else set()
        shared = min(unlabeled & tested, default="")
        require(
            not shared, f"arm {arm.name}: SSL.DATASETS has the test photo {shared}; leave it out"
        )


def _paths(names: Sequence[str]) -> Set[str]:
    return {os.path.realpath(photo["file_name"]) for photo in load_photos(names)}


def _same_but_for_length(study: Study, arm: Arm, other: Arm) -> bool:
    """Whether an arm is a control: of the time that another takes, and nothing else."""
    twin = study.arms[study.without(other)]
    return arm.recipe == twin.recipe
