"""Every option that d2ssl adds to a Detectron2 config, and the config of each stage.

The user writes one yaml: a standard Mask R-CNN config plus an ``SSL`` node.
:func:`pretrain_cfg` and :func:`finetune_cfg` derive from it the plain Detectron2 config that each
stage runs with, so that the network, colour order, mean, std and stride are the same in both.
"""

import contextlib
import difflib
import math
import os
import re
from typing import Dict

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ssl.errors import D2SSLError

PRETRAIN_PARTS = ("bottom_up", "fpn", "box_head")
LEVELS = ("res2", "res3", "res4", "res5", "p2", "p3", "p4", "p5")
AUTO = "auto"  # a value that d2ssl.engine.auto takes from the size of the data set
AUTO_KEYS = {  # and what else they may be
    "SSL.SOLVER.IMS_PER_BATCH": "a whole number above 0",
    "SSL.SOLVER.BASE_LR": "a number above 0",
    "SSL.MOMENTUM": "a number above 0 and up to 1",
    "SSL.QUEUE.SIZE": "a whole number above 0",
}
CLASSES = "SSL.FINETUNE.WEIGHTS_CLASSES"  # a name or a tuple of names
PAIR = ([str, float], [str, int])  # an entry of SSL.METHODS
PROPOSAL_SOURCES = ("selective_search", "grid", "random", "annotations")  # or a COCO JSON file
REGION_SOURCES = ("superpixels", "kmeans", "grid")
BATCH_NORMS = ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN")
# DATALOADER.SAMPLER_TRAIN, see d2ssl.data.sampling; the last is not Detectron2's.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "ClassBalancedSampler")
DETECTRON2_LR_AT_16 = 0.02  # photos a batch, in its baselines; others in proportion
STUDY_KEYS = ("CONFIG", "COMMON", "BUDGETS", "ARMS")  # of another kind of yaml
SOLVERS = ("SOLVER", "SSL.SOLVER")
PARTS = ("STEM", "RES2", "RES3", "RES4", "RES5", "FPN", "RPN", "BOX_HEAD", "MASK_HEAD", "OTHER")

CHOICES = {  # of a value, or of each of its values
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    **{f"{node}.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR") for node in SOLVERS},
    **{f"{node}.WARMUP_METHOD": ("linear", "constant") for node in SOLVERS},
    **{f"SSL.{node}.OPTIMIZER": ("SGD", "LARS", "AdamW") for node in ("SOLVER", "FINETUNE")},
    "SSL.LEVELS": LEVELS,
    "SSL.TRAIN": PRETRAIN_PARTS,
    "SSL.PRECISION": ("bf16", "fp32"),
    "SSL.REGIONS.SOURCE": REGION_SOURCES,
    "SSL.COLORIZATION.TARGET": ("ab", "rgb"),
    "SSL.FINETUNE.CALIBRATE_NORMS": ("auto", "always", "never"),
    "SSL.FINETUNE.FIT_PREDICTORS": ("auto", "never"),
    "SSL.FINETUNE.FROZEN_PARTS": PARTS,
}


def _names(values) -> bool:
    return all(isinstance(value, str) for value in values)


def _shares(values) -> bool:
    return all(0 < value < 1 for value in values)


# key -> (whether a value will do, what to give instead); a TypeError or ValueError: it won't.
VALUES = {
    "MODEL.DEVICE": (lambda v: re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", v), "cpu or cuda"),
    "INPUT.MIN_SIZE_TRAIN": (lambda v: min(v) >= 0, "short sides in pixels, e.g. (640, 800)"),
    **{
        key: (_names, "names")
        for key in ("DATASETS.TRAIN", "DATASETS.TEST", "SSL.DATASETS", "SSL.REGISTER")
    },
    **{f"{node}.MAX_ITER": (lambda v: v >= 1, "1 or more") for node in SOLVERS},
    **{f"{node}.WARMUP_ITERS": (lambda v: v >= 0, "0 or more") for node in SOLVERS},
    **{
        f"{node}.STEPS": (
            lambda v: all(a < b for a, b in zip((0, *v), v)),
            "rising iterations above 0, e.g. (600, 800)",
        )
        for node in SOLVERS
    },
    **{f"{node}.CHECKPOINT_PERIOD": (lambda v: v >= 1, "1 or more") for node in SOLVERS},
    "SOLVER.BASE_LR": (lambda v: 0 < v < math.inf, "a number above 0"),
    "SSL.TEMPERATURE": (lambda v: 0 < v < math.inf, "a number above 0"),
    **{
        f"SSL.INPUT.{key}": (lambda v: 0 <= v <= 1, "a probability, 0 to 1")
        for key in ("FLIP", "COLOR_JITTER_PROB", "GRAY_PROB", "SOLARIZE_PROB", "CUTOUT_PROB")
    },
    **{
        f"SSL.{key}": (lambda v: v >= 1, "1 or more")
        for key in ("QUEUE.KEYS_PER_PHOTO", "CELLS.GRID", "HEAD.HIDDEN_DIM", "HEAD.OUT_DIM")
    },
    "SSL.INPUT.CROP_SCALE": (
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
        "the least and the most, e.g. (0.5, 1.0)",
    ),
    "SSL.INPUT.COLOR_JITTER": (
        lambda v: len(v) == 4 and min(v) >= 0 and v[3] <= 0.5,
        "brightness, contrast, saturation and hue, up to 0.5, e.g. (0.4, 0.4, 0.2, 0.1)",
    ),
    "SSL.CALIBRATION_PHOTOS": (lambda v: v >= 2, "2 or more"),
    "SSL.REGIONS.NUM": (lambda v: 1 <= v <= 256, "1 to 256"),
    "SSL.HOLES.SHARE": (lambda v: 0 < v <= 1, "a share of the view, above 0 and up to 1"),
    "SSL.HOLES.SIZE": (lambda v: 0 < v <= 1, "a share of the view's side, above 0 and up to 1"),
    "SSL.SOCO.NUM_BOXES": (lambda v: v >= 1, "1 or more"),
    "SSL.SELF_TRAINING.AT": (lambda v: v and _shares(v), "shares between 0 and 1, e.g. (0.5,)"),
    "SSL.SELF_TRAINING.LABELED": (lambda v: _shares([v]), "a share between 0 and 1, e.g. 0.5"),
    "SSL.SELF_TRAINING.SCALES": (
        lambda v: all(0 < x < math.inf for x in v),
        "multiples of the test size, e.g. (0.8, 1.0)",
    ),
    **{
        f"SSL.{key}": (lambda v: 0 <= v <= 1, "a share of photos, 0 to 1")
        for key in ("FINETUNE.COPY_PASTE", "FINETUNE.STRONG", "SELF_TRAINING.STRONG")
    },
    "SSL.FINETUNE.AUGMENT_UNTIL": (lambda v: 0 < v <= 1, "a share of the iterations, up to 1"),
    "SSL.FINETUNE.EMA_DECAY": (lambda v: 0 <= v <= 1, "0 to 1, e.g. 0.998"),
    "SSL.FINETUNE.SCALE_JITTER": (
        lambda v: not v or len(v) == 2 and 0 < v[0] <= v[1] < math.inf,
        "the range of the factor, e.g. (0.1, 2.0)",
    ),
    CLASSES: (
        lambda v: (
            v in ("", "coco") or not isinstance(v, str) and _names(v) and len(set(v)) == len(v)
        ),
        '"coco", or the names in their order, ("cat", "dog")',
    ),
}


def add_ssl_config(cfg: CN) -> None:
    """Declare the ``SSL`` node on a Detectron2 config, in place."""
    cfg.SSL = CN()
    ssl = cfg.SSL
    ssl.ENABLED = True  # False: plain fine-tuning from MODEL.WEIGHTS
    ssl.METHOD = "SoCo"  # a registered pretext method, see configs/methods/
    ssl.METHODS = []  # several at once with weights: [["SoCo", 1.0], ["Colorization", 5.0]]
    ssl.DATASETS = ()  # photos to pretrain on; their labels are for PROPOSALS.SOURCE alone
    ssl.REGISTER = ()  # "my_module:my_function", called before any data set is looked up
    ssl.TRAIN = ["bottom_up", "fpn", "box_head"]  # what learns; the rest keeps its weights
    ssl.PRECISION = "bf16"  # "bf16" or "fp32"; losses, boxes and statistics are always fp32
    ssl.FPN_NORM = "BN"  # norm in the FPN while pretraining; folded into its convolutions after
    ssl.CACHE_GB = 4.0  # decoded photos held in memory, at the size that training needs
    ssl.CALIBRATION_PHOTOS = 64  # photos that norm statistics are measured on, at most

    # Detectron2's SOLVER keys a second time, for pretraining.
    ssl.SOLVER = cfg.SOLVER.clone()
    ssl.SOLVER.OPTIMIZER = "SGD"  # "SGD", "LARS" or "AdamW"
    ssl.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    ssl.SOLVER.LR_FLOOR = 0.0  # the cosine ends at this fraction of BASE_LR
    ssl.SOLVER.IMS_PER_BATCH = AUTO
    ssl.SOLVER.BASE_LR = AUTO
    ssl.SOLVER.MAX_ITER = 5000
    ssl.SOLVER.WARMUP_ITERS = 100
    ssl.SOLVER.WEIGHT_DECAY = 1e-5
    ssl.SOLVER.CHECKPOINT_PERIOD = 1000
    # Weights that came with MODEL.WEIGHTS start at this fraction of the lr and rise by cosine
    # until they meet the main schedule; 1.0 switches the rule off.
    ssl.SOLVER.LOADED_LR_FACTOR = 1.0
    ssl.SOLVER.LR_FACTOR = CN({"BOTTOM_UP": 1.0, "FPN": 1.0, "BOX_HEAD": 1.0, "HEADS": 1.0})

    ssl.INPUT = CN()
    ssl.INPUT.VIEW_SIZE = 224  # side of the large views in pixels, a multiple of 32
    ssl.INPUT.SMALL_VIEW_SIZE = 96  # side of the small view, a multiple of 32
    ssl.INPUT.CROP_SCALE = (0.5, 1.0)  # share of the photo's area that a cropped view shows
    ssl.INPUT.FLIP = 0.5
    ssl.INPUT.COLOR_JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    ssl.INPUT.COLOR_JITTER_PROB = 0.8
    ssl.INPUT.GRAY_PROB = 0.2
    ssl.INPUT.SOLARIZE_PROB = 0.2  # cropped views only
    ssl.INPUT.PLANE_SHIFT = 0.0  # each colour plane moves by its own offset, up to this x 255
    ssl.INPUT.CUTOUT_PROB = 0.5  # per box, cropped views only

    ssl.PROPOSALS = CN()
    ssl.PROPOSALS.SOURCE = "selective_search"  # or grid, random, annotations, a COCO json file
    ssl.PROPOSALS.CACHE_DIR = ""  # default: $D2SSL_CACHE, else ~/.cache/d2ssl
    ssl.PROPOSALS.MIN_SCALE = 0.05  # sqrt(box area) / sqrt(photo area), at least
    ssl.PROPOSALS.MAX_SCALE = 0.8  # and at most
    ssl.PROPOSALS.MAX_ASPECT = 3.0  # longer side / shorter side, at most

    ssl.MOMENTUM = AUTO  # of the momentum encoder, e.g. 0.99; rises to 1 by cosine
    ssl.HEAD = CN({"HIDDEN_DIM": 4096, "OUT_DIM": 256})  # projector and predictor
    ssl.TEMPERATURE = 0.2  # of contrastive losses
    # Feature maps that methods without boxes compare, of res2..res5, p2..p5. With res5 alone only
    # the bottom-up learns.
    ssl.LEVELS = ["p2", "p3", "p4", "p5"]
    ssl.QUEUE = CN()
    ssl.QUEUE.SIZE = AUTO  # photos whose keys are kept as negatives
    ssl.QUEUE.KEYS_PER_PHOTO = 8  # of each photo's cells or regions; a whole photo has one
    ssl.QUEUE.SYMMETRIC = True  # each view finds the other; False: as in MoCo v2 the first alone
    ssl.CELLS = CN()
    ssl.CELLS.GRID = 14  # a level with more cells a side is averaged down to it
    ssl.CELLS.RADIUS = 0.7  # cells this close in the photo, in diagonals of a cell, are the same
    ssl.REGIONS = CN()
    ssl.REGIONS.SOURCE = "superpixels"  # or kmeans, grid
    ssl.REGIONS.NUM = 16  # regions of a photo, at most
    ssl.HOLES = CN()
    ssl.HOLES.SHARE = 0.25  # of the view's area that is to be filled in
    ssl.HOLES.SIZE = 0.25  # side of the largest hole, as a share of the view's
    ssl.DECODER = CN({"CONV_DIM": 128})  # of Colorization and Inpainting
    ssl.COLORIZATION = CN({"TARGET": "ab"})  # "ab" of Lab, or "rgb"

    ssl.SOCO = CN()
    ssl.SOCO.NUM_BOXES = 4  # matched boxes per pair of views
    ssl.SOCO.BOX_JITTER = 0.1  # of one view's box, as a share of its side
    ssl.SOCO.MIN_BOX_SIZE = 16  # pixels of the view, after clipping

    # While it fine-tunes, the detector labels the photos of SSL.DATASETS that nobody labelled, and
    # goes on with both.
    ssl.SELF_TRAINING = CN()
    ssl.SELF_TRAINING.ENABLED = False
    ssl.SELF_TRAINING.AT = (0.5,)  # after these shares of SOLVER.MAX_ITER
    ssl.SELF_TRAINING.SCORE = 0.9  # what is found with at least this score becomes a label,
    ssl.SELF_TRAINING.UNSURE = 0.1  # what has at least this one is painted over: neither is right
    # To label a photo it looks at it at these multiples of the test size, each time mirrored, too,
    # and what it finds is merged (Detectron2's test-time augmentation); none: one look, as in tests
    ssl.SELF_TRAINING.SCALES = ()  # e.g. (0.8, 1.0, 1.25)
    ssl.SELF_TRAINING.LABELED = 0.5  # share of photos with labels of their own, from then on
    # Share of the photos it labelled that are learnt in another look, see FINETUNE.STRONG; as they
    # were labelled, they say to the detector what it said itself.
    ssl.SELF_TRAINING.STRONG = 1.0

    # What fine-tuning can do beyond stock Detectron2; at its defaults it is stock.
    ssl.FINETUNE = CN()
    ssl.FINETUNE.OPTIMIZER = "SGD"
    ssl.FINETUNE.LR_FLOOR = 0.0
    ssl.FINETUNE.LR_FACTOR = CN(dict.fromkeys(PARTS, 1.0))
    ssl.FINETUNE.FROZEN_PARTS = ()  # e.g. ("STEM", "RES2", "FPN"); needs UNFREEZE_ITER
    ssl.FINETUNE.UNFREEZE_ITER = 0  # they train from this iteration on
    ssl.FINETUNE.CALIBRATE_NORMS = "auto"  # "auto": from random weights; "always"; "never"
    ssl.FINETUNE.FIT_PREDICTORS = "auto"  # weights for other classes: keep those of equal names
    ssl.FINETUNE.WEIGHTS_CLASSES = ""  # "coco" or names, where the weights do not say themselves
    ssl.FINETUNE.SCALE_JITTER = ()  # e.g. (0.1, 2.0): photos at a factor of their scale, cropped
    ssl.FINETUNE.COPY_PASTE = 0.0  # share of photos that objects of another one are pasted into
    # Share of photos in other colours, half of them blurred, with a square cut out of half of the
    # objects.
    ssl.FINETUNE.STRONG = 0.0
    # Share of SOLVER.MAX_ITER after which these three end; SELF_TRAINING.STRONG goes on.
    ssl.FINETUNE.AUGMENT_UNTIL = 1.0
    ssl.FINETUNE.EMA_DECAY = 0.0  # e.g. 0.998: evaluate and save the averaged weights
    ssl.FINETUNE.VAL_LOSS = True  # with TEST.EVAL_PERIOD: the losses on the test or dev photos
    # A set apart from the test set. Where one is named, TEST.EVAL_PERIOD evaluates it, and
    # DATASETS.TEST is evaluated once, at the end; model_best.pth keeps the weights of its best AP.
    ssl.FINETUNE.DEV_DATASET = ""


def get_cfg() -> CN:
    """Detectron2's default config with the ``SSL`` node."""
    cfg = get_detectron2_cfg()
    add_ssl_config(cfg)
    return cfg


def load_cfg(config_file: str = "", opts=()) -> CN:
    """The config of one run: defaults, then the yaml, then ``KEY VALUE`` overrides; frozen.

    Raises:
        D2SSLError: a file that is absent, a key that does not exist (the nearest is named), a
            value of the wrong type, or options that contradict one another.
    """
    cfg = get_cfg()
    if config_file and not os.path.isfile(config_file):
        raise D2SSLError(f"--config-file {config_file}: no such file")
    try:
        if config_file:
            with _any_type(cfg):
                cfg.merge_from_file(config_file)
        known = set(_all_keys(cfg))
        for key in opts[::2]:
            if key not in known:
                raise KeyError(f"Non-existent key: {key}")
        with _any_type(cfg):
            cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise D2SSLError(_explain(cfg, error)) from None
    except (TypeError, AttributeError):  # what Detectron2 makes of a yaml that has no keys
        raise D2SSLError(
            f"--config-file {config_file}: cannot be read as a config; give a yaml of keys and "
            "values, see configs/"
        ) from None
    if cfg.SEED < 0:
        cfg.SEED = 0  # an exact resume needs a seed
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    _check(cfg)
    cfg.freeze()
    return cfg


@contextlib.contextmanager
def _any_type(cfg: CN):
    """Inside, "auto" may be replaced by a number and a number by "auto", a name by a tuple of them:
    yacs refuses another type than the default's, unless that is None."""
    before = {key: get_key(cfg, key) for key in (*AUTO_KEYS, CLASSES)}
    for key in before:
        set_key(cfg, key, None)
    yield
    for key, value in before.items():
        if get_key(cfg, key) is None:
            set_key(cfg, key, value)


def get_key(cfg: CN, key: str):
    """The value of a dotted key."""
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def set_key(cfg: CN, key: str, value) -> None:
    """Set a dotted key of a config that is not frozen."""
    node, _, name = key.rpartition(".")
    get_key(cfg, node)[name] = value


def leaves(node, prefix: str = "") -> Dict[str, object]:
    """Every value of a config under its dotted key."""
    if not isinstance(node, dict):  # a CfgNode is a dict
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in leaves(child, f"{prefix}.{name}" if prefix else name).items()
    }


def changed(cfg: CN) -> Dict[str, object]:
    """The values that are not the defaults, under their dotted keys."""
    defaults = leaves(get_cfg())
    return {key: value for key, value in leaves(cfg).items() if value != defaults.get(key, None)}


def _explain(cfg: CN, error: Exception) -> str:
    message = str(error).strip("'\"")
    mismatch = re.search(r"<class 'tuple'> vs.* vs\. (\S+)\) for config key: (\S+)", message)
    if mismatch:
        value, key = mismatch.groups()
        return f"""{key} {value}: is a list; write "('{value}',)", with the comma"""
    match = re.search(r"Non-existent (?:config )?key: (\S+)", message)
    if not match:
        return f"config: {' '.join(message.split())}"
    key = match.group(1)
    if key in STUDY_KEYS:
        return f"config key {key} is a study's: give this file to tools/study.py"
    if key in leaves(cfg):
        return f"config key {key}: in a yaml its parts are levels, {key.replace('.', ': {')}: ..."
    near = difflib.get_close_matches(key, list(_all_keys(cfg)), n=1, cutoff=0.0)
    return f"config key {key} does not exist; the nearest is {near[0]}"


def _all_keys(node: CN, prefix: str = ""):
    """Those of values and of the nodes above them."""
    for name, value in node.items():
        if isinstance(value, CN):
            yield from _all_keys(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _check(cfg: CN) -> None:
    ssl = cfg.SSL

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise D2SSLError(message)

    def one_of(key: str, value, choices) -> None:
        require(value in choices, f"{key} {value}: choose from {', '.join(map(str, choices))}")

    for key, choices in CHOICES.items():
        value = get_key(cfg, key)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            one_of(key, one, choices)
    for key, (test, what) in VALUES.items():
        value, fits = get_key(cfg, key), False
        with contextlib.suppress(TypeError, ValueError):
            fits = test(value)
        require(fits, f"{key} {value}: give {what}")
    for key in AUTO_KEYS:
        value, what = get_key(cfg, key), AUTO_KEYS[key]
        fits = {
            "a whole number above 0": type(value) is int and value > 0,
            "a number above 0": type(value) in (int, float) and 0 < value < math.inf,
            "a number above 0 and up to 1": type(value) in (int, float) and 0 < value <= 1,
        }
        require(value == AUTO or fits[what], f'{key} {value}: give {what}, or "auto"')
    require(
        all(isinstance(m, (list, tuple)) and list(map(type, m)) in PAIR for m in ssl.METHODS),
        f'SSL.METHODS {ssl.METHODS}: write pairs, [["SoCo", 1.0], ["Colorization", 5.0]]',
    )
    one_of("SSL.FPN_NORM", ssl.FPN_NORM or '""', ('""', "BN"))
    proposals = ssl.PROPOSALS
    if not proposals.SOURCE.endswith(".json"):
        one_of("SSL.PROPOSALS.SOURCE", proposals.SOURCE, (*PROPOSAL_SOURCES, "a .json file"))
    least, most = proposals.MIN_SCALE, proposals.MAX_SCALE
    require(
        0 <= least <= most,
        f"SSL.PROPOSALS: MIN_SCALE {least} and MAX_SCALE {most}: give 0 <= MIN_SCALE <= MAX_SCALE",
    )
    require(not ssl.ENABLED or ssl.TRAIN, "SSL.TRAIN is empty; name bottom_up, fpn or box_head")
    require(
        not ssl.ENABLED or ssl.DATASETS,
        "SSL.DATASETS is empty; name the photos to pretrain on, or set SSL.ENABLED False",
    )
    self_training = ssl.SELF_TRAINING
    require(
        not self_training.ENABLED or ssl.DATASETS,
        "SSL.DATASETS is empty; name the photos that SSL.SELF_TRAINING is to label",
    )
    require(
        0 < self_training.UNSURE <= self_training.SCORE <= 1,
        f"SSL.SELF_TRAINING: UNSURE {self_training.UNSURE} and SCORE {self_training.SCORE}: give "
        "0 < UNSURE <= SCORE <= 1",
    )
    scales = self_training.SCALES
    require(
        not scales or cfg.INPUT.MIN_SIZE_TEST > 0,
        "SSL.SELF_TRAINING.SCALES are of the test size: set INPUT.MIN_SIZE_TEST",
    )
    for key, wanted in (
        ("TEST.AUG.ENABLED", cfg.TEST.AUG.ENABLED),
        ("SSL.SELF_TRAINING.SCALES", self_training.ENABLED and scales),
    ):
        require(
            not wanted
            or cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
            and not cfg.MODEL.KEYPOINT_ON,
            f"{key}: Detectron2's test-time augmentation is for GeneralizedRCNN without keypoints; "
            "leave its default",
        )
    require(
        not (self_training.ENABLED and cfg.MODEL.KEYPOINT_ON),
        "SSL.SELF_TRAINING makes no keypoints: set MODEL.KEYPOINT_ON False, or ENABLED False",
    )
    lowest = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
    require(
        not self_training.ENABLED or self_training.UNSURE >= lowest,
        f"SSL.SELF_TRAINING.UNSURE {self_training.UNSURE}: the detector gives nothing below "
        f"MODEL.ROI_HEADS.SCORE_THRESH_TEST {lowest}; lower that one",
    )
    for key in ("VIEW_SIZE", "SMALL_VIEW_SIZE"):
        size = ssl.INPUT[key]
        require(
            size >= 32 and size % 32 == 0,
            f"SSL.INPUT.{key} {size}: the FPN needs a multiple of 32, "
            f"e.g. {max(32, size // 32 * 32)}",
        )
    require(
        ssl.FINETUNE.COPY_PASTE == 0 or cfg.MODEL.MASK_ON and not cfg.MODEL.KEYPOINT_ON,
        "SSL.FINETUNE.COPY_PASTE cuts objects out by their masks: set it to 0.0, or MODEL.MASK_ON "
        "True and KEYPOINT_ON False",
    )
    sampler, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    require(
        sampler != "RandomSubsetTrainingSampler",
        f"DATALOADER.SAMPLER_TRAIN {sampler}: name a part of the set in DATASETS.TRAIN instead, "
        "e.g. my_train@16#seed3",
    )
    one_of("DATALOADER.SAMPLER_TRAIN", sampler, SAMPLERS)
    require(
        sampler != "RepeatFactorTrainingSampler" or 0 < threshold <= 1,
        f"DATALOADER.REPEAT_THRESHOLD {threshold}: give the share of photos below which a class "
        "is rare, above 0 and up to 1, e.g. 0.001",
    )
    require(
        not ssl.ENABLED or max(cfg.INPUT.MIN_SIZE_TRAIN) > 0,
        f"INPUT.MIN_SIZE_TRAIN {cfg.INPUT.MIN_SIZE_TRAIN}: pretraining needs the short side that "
        "photos are scaled to later; give it, or set SSL.ENABLED False",
    )
    require(
        not cfg.TEST.PRECISE_BN.ENABLED,
        "TEST.PRECISE_BN is not supported: the hand-off measures statistics anew; set it False",
    )
    require(
        not cfg.MODEL.LOAD_PROPOSALS,
        "MODEL.LOAD_PROPOSALS is not supported: the detector finds its own; set it False",
    )
    for solver in (cfg.SOLVER, ssl.SOLVER):
        require(
            solver.BIAS_LR_FACTOR == 1 and solver.WEIGHT_DECAY_BIAS in (None, solver.WEIGHT_DECAY),
            "SOLVER.BIAS_LR_FACTOR and WEIGHT_DECAY_BIAS are not supported; leave their defaults",
        )
        require(
            not solver.get("BASE_LR_END"),  # not in v0.6
            "SOLVER.BASE_LR_END is not supported; SSL.FINETUNE.LR_FLOOR and SSL.SOLVER.LR_FLOOR "
            "are shares of BASE_LR at which a cosine schedule ends",
        )
    if ssl.FINETUNE.FROZEN_PARTS:
        require(
            ssl.FINETUNE.UNFREEZE_ITER > 0,
            "SSL.FINETUNE.FROZEN_PARTS needs UNFREEZE_ITER, the iteration from which they learn",
        )
        require(
            cfg.MODEL.BACKBONE.FREEZE_AT == 0,
            "SSL.FINETUNE.FROZEN_PARTS needs MODEL.BACKBONE.FREEZE_AT 0: "
            "what FREEZE_AT freezes cannot be unfrozen later",
        )


def pretrain_cfg(cfg: CN) -> CN:
    """The plain Detectron2 config of the pretraining stage, frozen.

    Norms are built trainable and nothing is frozen by stage: ``FREEZE_AT`` would win over
    ``NORM`` (it replaces the norms of the first stages whatever ``NORM`` says).
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "PretextModel"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if cfg.MODEL.FPN.NORM == "":
        cfg.MODEL.FPN.NORM = cfg.SSL.FPN_NORM
    if cfg.MODEL.RESNETS.NORM in BATCH_NORMS:
        cfg.MODEL.RESNETS.NORM = "BN"
    # The trainer lets processes share statistics. With SyncBN the hand-off, made by one process,
    # would wait for the others.
    for node in (cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD):
        if "Sync" in node.NORM:
            node.NORM = "BN"
    cfg.DATASETS.TRAIN = tuple(cfg.SSL.DATASETS)
    cfg.DATASETS.TEST = ()
    cfg.SOLVER = cfg.SSL.SOLVER.clone()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "pretrain")
    cfg.freeze()
    return cfg


def finetune_cfg(cfg: CN) -> CN:
    """The plain Detectron2 config of the fine-tuning stage, frozen.

    With ``SSL.ENABLED`` its weights are what pretraining hands off.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SSL.ENABLED:
        cfg.MODEL.WEIGHTS = pretrained_path(cfg)
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "finetune")
    cfg.freeze()
    return cfg


def stock_cfg(cfg: CN) -> CN:
    """:func:`finetune_cfg` without the ``SSL`` node: the network in plain Detectron2 terms.

    Data sets must be registered by whoever trains with it; ``balloon_train@16`` is d2ssl's name.
    ``ClassBalancedSampler`` is d2ssl's too: stock Detectron2 gets its default. So are LARS and
    AdamW, whose lr and weight decay would not do for its SGD: it gets those of its own baselines.
    """
    cfg = finetune_cfg(cfg)
    cfg.defrost()
    if cfg.SSL.FINETUNE.OPTIMIZER != "SGD":
        cfg.SOLVER.BASE_LR = DETECTRON2_LR_AT_16 * cfg.SOLVER.IMS_PER_BATCH / 16
        cfg.SOLVER.WEIGHT_DECAY = get_detectron2_cfg().SOLVER.WEIGHT_DECAY
    del cfg["SSL"]
    if cfg.DATALOADER.SAMPLER_TRAIN == "ClassBalancedSampler":
        cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    cfg.OUTPUT_DIR = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "stock")
    cfg.freeze()
    return cfg


def method_title(cfg: CN) -> str:
    """The pretext method in words: ``SoCo``, or ``1.0 SoCo + 5.0 Colorization``."""
    return " + ".join(f"{weight} {name}" for name, weight in cfg.SSL.METHODS) or cfg.SSL.METHOD


def pretrained_path(cfg: CN) -> str:
    """Where the hand-off of the run that ``cfg`` describes lies."""
    return os.path.join(cfg.OUTPUT_DIR, "pretrain", "model_pretrained.pth")
