"""The trainer of the second stage: the stock detector, on people's labels and on its own."""

import contextlib
import functools
import logging
import os
from typing import Dict, List

from detectron2.engine.hooks import EvalHook
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from torch import nn

from d2ssl.data.build import (
    build_finetune_loader,
    build_validation_batches,
    calibration_batches,
    mapper_at_test_size,
    training_side,
    unlabeled_photos,
)
from d2ssl.data.sampling import interleaved, photo_at
from d2ssl.engine import hooks as d2ssl_hooks
from d2ssl.engine.checkpoint import fitting, load_weights, training_classes
from d2ssl.engine.coco import build_evaluator, flatten
from d2ssl.engine.self_training import LabelPhotos, MirroredAtScales, detect
from d2ssl.engine.solver import build_optimizer, named_leaves
from d2ssl.engine.trainer import Trainer
from d2ssl.errors import D2SSLError
from d2ssl.modeling import norm
from d2ssl.modeling.trunk import part_of

logger = logging.getLogger("d2ssl")


class FinetuneTrainer(Trainer):
    """Trains the stock detector; ``cfg`` is a :func:`d2ssl.config.finetune_cfg`."""

    def __init__(self, cfg, resume=False):
        self.find_unused_parameters = bool(cfg.SSL.FINETUNE.FROZEN_PARTS)
        self.last_results: dict = {}
        super().__init__(cfg, resume)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_finetune_loader(cfg)

    @classmethod
    def build_model(cls, cfg):
        return build_model(cfg)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    def load_weights(self):
        return load_weights(self.module, self.cfg.MODEL.WEIGHTS, *fitting(self.cfg))

    def classes(self):
        return training_classes(self.cfg)

    def start_from(self, report):
        super().start_from(report)
        cfg, backbone = self.cfg, self.module.backbone
        random = not any(part_of(name).startswith(("STEM", "RES")) for name in report.loaded)
        if random and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            raise D2SSLError(
                f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT} would freeze random "
                "weights for good; set it to 0, or give MODEL.WEIGHTS"
            )
        wanted = cfg.SSL.FINETUNE.CALIBRATE_NORMS
        if wanted == "always" or (wanted == "auto" and random):
            self._calibrate(backbone)
        norm.refuse_uncalibrated(backbone)

    def _calibrate(self, backbone: nn.Module) -> None:
        """Give frozen norms the statistics of the training photos at test size."""
        cfg, module = self.cfg, self.module
        if not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules()):
            return
        batches = calibration_batches(cfg, cfg.DATASETS.TRAIN, cfg.SSL.CALIBRATION_PHOTOS)
        bottom_up = getattr(backbone, "bottom_up", backbone)  # without an FPN it is the ResNet
        trainable = {p for p in bottom_up.parameters() if p.requires_grad}
        norm.unfreeze(bottom_up)
        norm.recalibrate(bottom_up, lambda b: bottom_up(module.preprocess_image(b).tensor), batches)
        norm.freeze(bottom_up)
        for parameter in bottom_up.parameters():
            parameter.requires_grad_(parameter in trainable)
        logger.info("Norm statistics measured on %d photos", sum(map(len, batches)))

    def uses_bf16(self):
        return self.cfg.SOLVER.AMP.ENABLED

    def lr_floor(self):
        return self.cfg.SSL.FINETUNE.LR_FLOOR

    @classmethod
    def build_optimizer(cls, cfg, model):
        name = cfg.SSL.FINETUNE.OPTIMIZER
        return build_optimizer(cfg.SOLVER, name, cls.parameters_by_part(model))

    @classmethod
    def parameters_by_part(cls, model):
        parts: Dict[str, list] = {}
        for name, module, leaf in named_leaves(model):
            parts.setdefault(part_of(name), []).append((module, leaf))
        return parts

    def lr_multiple(self, part, iteration):
        return self.schedule(iteration) * self.cfg.SSL.FINETUNE.LR_FACTOR[part]

    def stage_hooks(self):
        cfg, options = self.cfg, self.cfg.SSL.FINETUNE
        self.averaged = None
        found = []
        if options.FROZEN_PARTS:
            frozen = [
                getattr(module, leaf)
                for part, leaves in self.parameters_by_part(self.module).items()
                if part in options.FROZEN_PARTS
                for module, leaf in leaves
            ]
            found.append(d2ssl_hooks.Unfreeze(frozen, options.UNFREEZE_ITER))
        if options.EMA_DECAY > 0:
            self.averaged = d2ssl_hooks.AveragedWeights(self.module, options.EMA_DECAY)
            found.append(self.averaged)
        if cfg.SSL.SELF_TRAINING.ENABLED:
            found += self._self_training()
        watched = [options.DEV_DATASET] if options.DEV_DATASET else cfg.DATASETS.TEST
        if options.VAL_LOSS and cfg.TEST.EVAL_PERIOD > 0 and watched:
            batches = build_validation_batches(cfg, watched)
            found.append(
                d2ssl_hooks.ValidationLoss(cfg.TEST.EVAL_PERIOD, self.module, batches, cfg.SEED)
            )
        if options.DEV_DATASET:
            found.append(
                d2ssl_hooks.KeepBest(
                    cfg.TEST.EVAL_PERIOD,
                    self.evaluate_on_dev,
                    self.save_weights,
                    "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP",
                )
            )
        return found

    def evaluation_hooks(self):
        cfg = self.cfg
        if not cfg.DATASETS.TEST:
            return []
        # With a dev set the test set is looked at once, at the end: period 0.
        period = 0 if cfg.SSL.FINETUNE.DEV_DATASET else cfg.TEST.EVAL_PERIOD
        return [EvalHook(period, self.evaluate)]

    def _self_training(self) -> List[LabelPhotos]:
        """The hook; none where each photo has labels."""
        cfg, options = self.cfg, self.cfg.SSL.SELF_TRAINING
        stream, scales, model = self.loader.stream, options.SCALES, self.module
        side = training_side(cfg)
        labeled, order = stream.dicts, stream.order
        mapper = mapper_at_test_size(cfg, scale=max(scales, default=1.0))
        if scales:
            model = GeneralizedRCNNWithTTA(cfg, model, MirroredAtScales(scales))

        def label(photos):
            with self._reported_weights():
                return detect(
                    model, photos, mapper, options.SCORE, options.UNSURE, side,
                    most=cfg.TEST.DETECTIONS_PER_IMAGE,
                )  # fmt: skip

        def use(found):
            if found:
                others = functools.partial(photo_at, num_photos=len(found), seed=cfg.SEED)
                both = interleaved(order, others, len(labeled), options.LABELED)
                self.loader.switch_to([*labeled, *found], both)

        iterations = {min(round(share * self.max_iter), self.max_iter - 1) for share in options.AT}
        photos = unlabeled_photos(cfg)
        if not photos:
            logger.info("SSL.SELF_TRAINING: each photo of SSL.DATASETS has labels, none is left")
            return []
        return [LabelPhotos(iterations, label, photos, use, cfg.OUTPUT_DIR, self.classes(), side)]

    @contextlib.contextmanager
    def _reported_weights(self):
        """Inside, the model holds the averaged weights, where there are any."""
        if not self.averaged:
            yield
            return
        self.averaged.swap()
        try:
            yield
        finally:
            self.averaged.swap()

    def evaluate(self, cfg=None) -> dict:
        """Results on ``DATASETS.TEST``, with the averaged weights where there are any."""
        with self._reported_weights():
            results = self.test(cfg or self.cfg, self.module)
        if cfg is None:
            self.last_results = results
        return results

    def evaluate_with_tta(self) -> dict:
        """The same by :meth:`test_with_tta`."""
        with self._reported_weights():
            return self.test_with_tta(self.cfg, self.module)

    @classmethod
    def test_with_tta(cls, cfg, model) -> dict:
        """Results with test-time augmentation (``TEST.AUG``), named as by Detectron2's own script:
        ``bbox_TTA`` and ``segm_TTA``, or of several sets their names with ``_TTA``."""
        logger.info("Evaluating with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [build_evaluator(name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}

    def evaluate_on_dev(self) -> Dict[str, float]:
        """Flat results on the dev set, see :func:`~d2ssl.engine.coco.flatten`."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = (cfg.SSL.FINETUNE.DEV_DATASET,)
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "dev")
        return flatten(self.evaluate(cfg))

    def save_weights(self, name: str) -> str:
        """Write ``<name>.pth`` with the weights that results are reported for; its path."""
        with self._reported_weights():
            return self.checkpointer.save_weights(name)
