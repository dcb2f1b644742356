"""The main job, stage by stage: pretrain, hand off, fine-tune, evaluate, report."""

import gc
import json
import logging
import os
from typing import Dict

import torch
from detectron2.evaluation import verify_results
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    build_model,
)
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger

from d2ssl.atomic import atomic_open, make_folder
from d2ssl.config import finetune_cfg, get_key, method_title, pretrain_cfg, pretrained_path
from d2ssl.data.build import check_classes, check_dev, detection_sets, register_datasets
from d2ssl.data.loader import require_shares
from d2ssl.engine.auto import resolve_auto
from d2ssl.engine.checkpoint import load_weights, refuse_other_conventions
from d2ssl.engine.finetuning import FinetuneTrainer
from d2ssl.engine.handoff import hand_off, read_record
from d2ssl.engine.precision import apply_precision
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.engine.stage_folder import begun, clear, left
from d2ssl.engine.trainer import another_config
from d2ssl.engine.weights_file import differing_keys, settings
from d2ssl.errors import D2SSLError
from d2ssl.report.html import write_report
from d2ssl.report.sheets import PutPictures

logger = logging.getLogger("d2ssl")

STAGES = ("pretrain", "finetune", "all")
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}


def set_up(cfg):
    """Loggers, the output folder, and the data sets of a run.

    Returns:
        the config, with numbers in place of "auto".
    """
    rank = comm.get_rank()
    register_datasets(cfg)
    for key, registry in REGISTRIES.items():  # a module of SSL.REGISTER may have added to them
        name = get_key(cfg, key)
        if name not in registry:
            known = ", ".join(known for known, _ in registry)
            raise D2SSLError(f"{key} {name}: choose from {known}")
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if (
        cfg.SSL.ENABLED
        and isinstance(detector, type)
        and (not issubclass(detector, GeneralizedRCNN) or issubclass(detector, PanopticFPN))
    ):
        raise D2SSLError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: pretraining is for "
            "GeneralizedRCNN; set it so, or SSL.ENABLED False"
        )
    make_folder(cfg.OUTPUT_DIR)
    for name in ("fvcore", "detectron2", "d2ssl"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    cfg = resolve_auto(cfg)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    logger.info("Output goes to %s; %d process(es) on %s", cfg.OUTPUT_DIR, comm.get_world_size(),
                cfg.MODEL.DEVICE)  # fmt: skip
    return cfg


def _keep_config(cfg) -> None:
    """Write down what is run, once nothing of it was refused."""
    if comm.is_main_process():
        for name, text in (("config.yaml", cfg.dump()), ("environment.txt", collect_env_info())):
            with atomic_open(os.path.join(cfg.OUTPUT_DIR, name), "w") as file:
                file.write(text)


def run(cfg, stage: str = "all", resume: bool = False) -> Dict:
    """Run the enabled stages; each process of a distributed run calls it.

    Args:
        cfg: the user's frozen config, see :func:`d2ssl.config.load_cfg`.
        stage: ``pretrain``, ``finetune`` or ``all``.
        resume: continue a stage from its last checkpoint; what is finished is not repeated.
    Returns:
        the COCO results, {"bbox": {"AP": ...}, "segm": {...}}; empty without fine-tuning.
    """
    cfg = set_up(cfg)
    results = {}
    if stage in ("finetune", "all"):
        _check_finetuning(cfg)
    if cfg.SSL.ENABLED and stage in ("pretrain", "all"):
        pretrain(cfg, resume)
    if stage in ("finetune", "all"):
        results = finetune(cfg, resume)
    if comm.is_main_process():
        logger.info("Report: %s", write_report(cfg))
    _compare_with_expected(cfg, results)
    return results


def _check_finetuning(cfg) -> None:
    """What would be refused after hours of pretraining."""
    if not cfg.DATASETS.TRAIN:
        raise D2SSLError(
            "DATASETS.TRAIN is empty: name a set with labels, or give --stage pretrain"
        )
    scaled = FinetuneTrainer.auto_scale_workers(finetune_cfg(cfg), comm.get_world_size())
    require_shares(scaled.SOLVER.IMS_PER_BATCH)
    check_classes(cfg, detection_sets(cfg))
    check_dev(cfg)


def pretrain(cfg, resume: bool = False) -> None:
    """Pretrain and hand off."""
    stage = pretrain_cfg(cfg)
    if not (resume and _handed_off(cfg)):
        _refuse_own_weights(cfg, stage, finetune_cfg(cfg))
        _train_pretext(cfg, stage, resume)
        gc.collect()  # a trainer and its hooks hold one another, and with them model and workers
        if comm.is_main_process():
            hand_off(cfg)
    comm.synchronize()


def _train_pretext(cfg, stage, resume: bool) -> None:
    trainer = PretrainTrainer(stage, resume)
    _keep_config(cfg)
    clear(finetune_cfg(cfg).OUTPUT_DIR)  # what is there was fine-tuned from other weights
    trainer.register_hooks(
        [
            PutPictures.of_views(trainer),
            PutPictures.of_matches(trainer),
            PutPictures.of_reconstructions(trainer),
        ]
    )
    trainer.train()


def finetune(cfg, resume: bool = False) -> Dict:
    """Fine-tune from the hand-off, or from ``MODEL.WEIGHTS``, and evaluate."""
    stage = finetune_cfg(cfg)
    if cfg.SSL.ENABLED:
        _refuse_another_handoff(cfg, stage.MODEL.WEIGHTS)
    if not (resume and begun(stage.OUTPUT_DIR)):
        _refuse_own_weights(stage, stage)
    trainer = FinetuneTrainer(stage, resume)
    _keep_config(cfg)
    trainer.train()
    weights = trainer.save_weights("model_result")
    results = trainer.last_results
    _write_results(stage, results, weights)
    # Not by the results: the first process alone has them, and all of them evaluate.
    if stage.DATASETS.TEST and stage.TEST.AUG.ENABLED:
        results = {**results, **trainer.evaluate_with_tta()}
        _write_results(stage, results, weights)
    return results


def evaluate_only(cfg) -> Dict:
    """Evaluate ``cfg.MODEL.WEIGHTS`` on ``cfg.DATASETS.TEST``."""
    if not cfg.MODEL.WEIGHTS:
        raise D2SSLError("--eval-only needs MODEL.WEIGHTS path/to/model_result.pth")
    if not cfg.DATASETS.TEST:
        raise D2SSLError("--eval-only needs DATASETS.TEST, the sets to evaluate on")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SSL.ENABLED = cfg.SSL.SELF_TRAINING.ENABLED = False  # no photos without labels are needed
    cfg.freeze()
    cfg = set_up(cfg)
    model = build_model(cfg)
    report = load_weights(model, cfg.MODEL.WEIGHTS)
    refuse_other_conventions(cfg, report)
    check_classes(cfg, cfg.DATASETS.TEST, report.classes)
    if report.missing or report.mismatched:
        logger.warning("Not all of the detector is in this file.\n%s", report)
    apply_precision(model, cfg.SOLVER.AMP.ENABLED)
    results = FinetuneTrainer.test(cfg, model)
    _write_results(cfg, results, cfg.MODEL.WEIGHTS)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **FinetuneTrainer.test_with_tta(cfg, model)}
        _write_results(cfg, results, cfg.MODEL.WEIGHTS)
    _compare_with_expected(cfg, results)
    return results


def _compare_with_expected(cfg, results: Dict) -> None:
    """With ``TEST.EXPECTED_RESULTS``: exit code 1 where others came out, as in Detectron2."""
    if results and comm.is_main_process():
        verify_results(cfg, results)


def _refuse_own_weights(cfg, *stages) -> None:
    """Before anything is removed: MODEL.WEIGHTS must not be what a stage is about to replace."""
    for stage in stages:
        if os.path.realpath(cfg.MODEL.WEIGHTS) in map(os.path.realpath, left(stage.OUTPUT_DIR)):
            raise D2SSLError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} are an earlier run's, which would be removed; "
                "name another OUTPUT_DIR"
            )
    comm.synchronize()  # each process has looked


def _handed_off(cfg) -> bool:
    """Whether the hand-off of this run, at its full length, is there.

    Raises:
        D2SSLError: it is another run's.
    """
    record = read_record(pretrained_path(cfg))
    if not record:
        return False
    held = _made_otherwise(cfg, record)
    if record["seed"] != cfg.SEED:
        held["SEED"] = record["seed"]
    if held:
        raise another_config(pretrain_cfg(cfg).OUTPUT_DIR, held)
    return record["iterations"] >= pretrain_cfg(cfg).SOLVER.MAX_ITER


def _refuse_another_handoff(cfg, path: str) -> None:
    """What is fine-tuned and reported as this config's was pretrained by it; by another seed will
    do."""
    record = read_record(path)
    if not record:
        raise D2SSLError(
            f"{path}: no such file; run --stage pretrain first, or set SSL.ENABLED False"
        )
    held = _made_otherwise(cfg, record)
    if record["iterations"] < pretrain_cfg(cfg).SOLVER.MAX_ITER:
        held["SSL.SOLVER.MAX_ITER"] = record["iterations"]
    if held:
        raise D2SSLError(
            f"{path} was pretrained with {settings(held)}, and this config says otherwise: set it "
            "so, or run --stage pretrain"
        )


def _made_otherwise(cfg, record: Dict) -> Dict:
    """The config keys in which a hand-off is not of this config, with their values then."""
    pairs = {
        "SSL.METHOD": (record["method"], method_title(cfg)),
        "SSL.DATASETS": (record["datasets"], list(cfg.SSL.DATASETS)),
    }
    held = {key: then for key, (then, now) in pairs.items() if then != now}
    return {**held, **differing_keys(cfg, record["config"])}


def _write_results(cfg, results: Dict, weights: str) -> None:
    if not (results and comm.is_main_process()):
        return
    content = {
        "results": results,
        "weights": weights,
        "test": list(cfg.DATASETS.TEST),
        "train": list(cfg.DATASETS.TRAIN),
        "iterations": cfg.SOLVER.MAX_ITER,
        "seed": cfg.SEED,
    }
    path = os.path.join(cfg.OUTPUT_DIR, "results.json")
    with atomic_open(path, "w") as file:
        json.dump(_without_nan(content), file, indent=1)
    logger.info("Results: %s", path)


def _without_nan(value):
    """NaN (no objects of that size) is no JSON; it becomes null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value
