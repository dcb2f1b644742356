"""The trainers of both stages: Detectron2's ``DefaultTrainer`` with other parts built in."""

import contextlib
import functools
import logging
import os
import weakref
from typing import Dict, List, Set, Tuple

import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils import comm
from torch import nn

from d2ssl.config import PRETRAIN_PARTS
from d2ssl.data.build import (
    build_finetune_loader,
    build_pretrain_loader,
    build_validation_batches,
    calibration_batches,
    mapper_at_test_size,
    training_side,
    unlabeled_photos,
)
from d2ssl.data.sampling import interleaved, photo_at
from d2ssl.engine import hooks as d2ssl_hooks
from d2ssl.engine.checkpoint import (
    Checkpointer,
    MatchReport,
    conventions_of,
    fitting,
    load_weights,
    refuse_other_conventions,
    training_classes,
)
from d2ssl.engine.coco import build_evaluator, flatten
from d2ssl.engine.launch import distribute
from d2ssl.engine.precision import apply_precision
from d2ssl.engine.self_training import LabelPhotos, MirroredAtScales, detect
from d2ssl.engine.solver import (
    build_optimizer,
    load_optimizer,
    loaded_rise,
    main_schedule,
    named_leaves,
)
from d2ssl.errors import D2SSLError, Diverged
from d2ssl.modeling import norm
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.modeling.trunk import part_of, pretrain_part_of

logger = logging.getLogger("d2ssl")


class Trainer(DefaultTrainer):
    """What both stages share.

    ``DefaultTrainer`` builds the optimizer before it loads weights, its mixed precision is CUDA
    only and its DistributedDataParallel fails on a CPU; so the parts are put together here, in the
    order that norms need: model, weights, norms, precision, processes, optimizer. The loop and
    its hooks stay Detectron2's.

    Args:
        cfg: the stage's own config.
        resume: continue from the last checkpoint in ``cfg.OUTPUT_DIR``, if there is one.
    """

    find_unused_parameters = False

    def __init__(self, cfg, resume: bool = False):
        TrainerBase.__init__(self)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.loaded_parts: Set[str] = set()
        self.last_results: dict = {}
        self.schedule = main_schedule(cfg.SOLVER, self.lr_floor())
        torch.manual_seed(cfg.SEED)  # random weights are the same in every run of a seed
        self.module = self.build_model(cfg)
        self.loader = self.build_train_loader(cfg)
        resume = resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        if not resume:
            self.start_from(self.load_weights())
        apply_precision(self.module, self.uses_bf16())
        optimizer = self.build_optimizer(cfg, self.module)
        model = distribute(self.module, self.find_unused_parameters)
        self._trainer = SimpleTrainer(model, self.loader, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            classes=self.classes(),
            conventions=conventions_of(cfg),
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self.build_hooks())
        if resume:
            self._load_checkpoint()
            self.start_iter = self.iter + 1
            self.loader.start_iter = self.start_iter
            logger.info("Resumed after iteration %d", self.iter)

    def _load_checkpoint(self) -> None:
        folder = self.cfg.OUTPUT_DIR
        fix = "give the same one, another OUTPUT_DIR, or start over without --resume"
        try:
            self.checkpointer.resume_or_load("", resume=True)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise D2SSLError(
                f"{folder} cannot be resumed: damaged, or a run of another config; {fix} "
                f"({reason[0] if reason else repr(error)})"
            ) from error
        if not self.checkpointer.fits:
            raise D2SSLError(f"{folder} holds a run of another config; {fix}")

    # What a stage fills in.

    def load_weights(self) -> MatchReport:
        """Load ``MODEL.WEIGHTS`` for a fresh start."""
        raise NotImplementedError

    def classes(self) -> List[str]:
        """Names of the model's classes; none where it has none."""
        return []

    def start_from(self, report: MatchReport) -> None:
        """Make the norms fit, after weights were loaded for a fresh start."""
        logger.info("%s", report)
        refuse_other_conventions(self.cfg, report)

    def uses_bf16(self) -> bool:
        raise NotImplementedError

    def lr_floor(self) -> float:
        """Where the cosine schedule ends, as a share of BASE_LR."""
        raise NotImplementedError

    @classmethod
    def parameters_by_part(cls, model) -> Dict[str, List[Tuple[nn.Module, str]]]:
        """part -> list of (module, parameter name in it)."""
        raise NotImplementedError

    def lr_multiple(self, part: str, iteration: int) -> float:
        """lr of a part at an iteration, as a multiple of BASE_LR."""
        raise NotImplementedError

    def stage_hooks(self) -> list:
        """Hooks that run before the checkpointer."""
        raise NotImplementedError

    # What Detectron2's trainer asks for.

    def build_hooks(self):
        cfg = self.cfg
        found = [
            hooks.IterationTimer(),
            d2ssl_hooks.LearningRate(self.optimizer, cfg.SOLVER.BASE_LR, self.lr_multiple),
            d2ssl_hooks.SeedEachIteration(cfg.SEED),
            *self.stage_hooks(),
        ]
        if comm.is_main_process():
            found.append(
                hooks.PeriodicCheckpointer(
                    self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=2
                )
            )
        if cfg.DATASETS.TEST:
            # With a dev set the test set is looked at once, at the end: period 0.
            period = 0 if cfg.SSL.FINETUNE.DEV_DATASET else cfg.TEST.EVAL_PERIOD
            found.append(hooks.EvalHook(period, self.evaluate))
        if comm.is_main_process():
            # A short run has a curve, too, and no evaluation overwrites one that is not written.
            period = max(1, min(20, self.max_iter // 20, cfg.TEST.EVAL_PERIOD or 20))
            found.append(hooks.PeriodicWriter(self.build_writers(), period))
        return found

    def evaluate(self) -> dict:
        return self.test(self.cfg, self.module)

    def train(self):
        """Run what is left of the training.

        Raises:
            Diverged: the loss became infinite or NaN.
        """
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except FloatingPointError as error:
            raise Diverged(
                f"{str(error).splitlines()[0]} Lower SOLVER.BASE_LR (SSL.SOLVER.BASE_LR while "
                "pretraining), or set SOLVER.CLIP_GRADIENTS.ENABLED True"
            ) from error

    # v0.6's DefaultTrainer forgets the optimizer: momentum would restart at zero on resume.

    def state_dict(self):
        return {
            **TrainerBase.state_dict(self),
            "optimizer": self.optimizer.state_dict(),
            "loaded_parts": sorted(self.loaded_parts),
        }

    def load_state_dict(self, state_dict):
        TrainerBase.load_state_dict(self, state_dict)
        load_optimizer(self.optimizer, state_dict["optimizer"])
        self.loaded_parts = set(state_dict["loaded_parts"])


class PretrainTrainer(Trainer):
    """Trains a pretext method; ``cfg`` is a :func:`d2ssl.config.pretrain_cfg` without "auto"."""

    find_unused_parameters = True  # a level that no box falls on, a level that is not compared

    def build_train_loader(self, cfg):
        require_two_photos(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
        method = self.module.method
        return build_pretrain_loader(cfg, method.views, method.view_pairs, method.needs)

    @classmethod
    def build_model(cls, cfg):
        return norm.synchronize(PretextModel(cfg).to(cfg.MODEL.DEVICE))

    def load_weights(self):
        return load_weights(self.module.trunk, self.cfg.MODEL.WEIGHTS)

    def start_from(self, report):
        super().start_from(report)
        model = self.module
        self.loaded_parts = {pretrain_part_of(name).upper() for name in report.loaded}
        self._refuse_random_below_learning()
        if report.loaded:
            model.eval()
            names = norm.calibrate(
                model.trunk, self._encode_all, self._calibration_batches(), only=report.loaded
            )
            logger.info("%d norms switched to batch statistics of these photos", len(names))
        model.reset_twins()

    def _encode_all(self, batch) -> None:
        """Every view through all of the trunk that learns; nothing of the method's own moves."""
        for view in self.module.see(batch):
            view.online.pyramid
            if view.boxes is not None:
                view.online.box_features(view.boxes)

    def _refuse_random_below_learning(self) -> None:
        """A part left random under one that learns is not handed off, so nothing would fit."""
        trained = set(self.cfg.SSL.TRAIN)
        for i, part in enumerate(PRETRAIN_PARTS):
            loaded = part.upper() in self.loaded_parts
            if part not in trained and not loaded and trained & set(PRETRAIN_PARTS[i + 1 :]):
                raise D2SSLError(
                    f"SSL.TRAIN leaves {part} at random weights below what learns; name it too, or "
                    "give MODEL.WEIGHTS that hold it"
                )

    def _calibration_batches(self):
        """The first views that training will draw; the same in every process."""
        photos = min(self.cfg.SSL.CALIBRATION_PHOTOS, len(self.loader.stream.dicts))
        step = min(photos, 8)
        for first in range(0, photos, step):
            yield [self.loader.stream[i] for i in range(first, min(first + step, photos))]

    def uses_bf16(self):
        return self.cfg.SSL.PRECISION == "bf16"

    def lr_floor(self):
        return self.cfg.SOLVER.LR_FLOOR

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg.SOLVER, cfg.SOLVER.OPTIMIZER, cls.parameters_by_part(model))

    @classmethod
    def parameters_by_part(cls, model):
        return {
            part: [(owner, leaf) for m in modules for _, owner, leaf in named_leaves(m)]
            for part, modules in model.parameter_parts().items()
        }

    def lr_multiple(self, part, iteration):
        solver = self.cfg.SOLVER
        value = self.schedule(iteration)
        if part in self.loaded_parts:
            value = min(value, loaded_rise(iteration, self.max_iter, solver.LOADED_LR_FACTOR))
        return value * solver.LR_FACTOR[part]

    def stage_hooks(self):
        return [
            d2ssl_hooks.MoveTwins(self.module, self.cfg.SSL.MOMENTUM),
            d2ssl_hooks.CollapseMeter(self.module),
        ]


def require_two_photos(batch_size: int) -> None:
    """Heads with BatchNorm need two rows or more; raises :class:`D2SSLError`."""
    if batch_size < 2:
        raise D2SSLError(
            f"SSL.SOLVER.IMS_PER_BATCH gives {batch_size} photo per process; batch statistics "
            "need 2 or more"
        )


class FinetuneTrainer(Trainer):
    """Trains the stock detector; ``cfg`` is a :func:`d2ssl.config.finetune_cfg`."""

    def __init__(self, cfg, resume=False):
        self.find_unused_parameters = bool(cfg.SSL.FINETUNE.FROZEN_PARTS)
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
                return detect(model, photos, mapper, options.SCORE, options.UNSURE, side)

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
