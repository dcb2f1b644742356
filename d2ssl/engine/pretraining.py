"""The trainer of the first stage: a pretext method, on photos without labels."""

import logging

from detectron2.utils import comm

from d2ssl.config import PRETRAIN_PARTS
from d2ssl.data.build import build_pretrain_loader
from d2ssl.engine import hooks as d2ssl_hooks
from d2ssl.engine.checkpoint import load_weights
from d2ssl.engine.solver import build_optimizer, loaded_rise, named_leaves
from d2ssl.engine.trainer import Trainer
from d2ssl.errors import D2SSLError
from d2ssl.modeling import norm
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.modeling.trunk import pretrain_part_of

logger = logging.getLogger("d2ssl")


class PretrainTrainer(Trainer):
    """Trains a pretext method; ``cfg`` is a :func:`d2ssl.config.pretrain_cfg` without "auto"."""

    run_keys = ("SEED", "SSL.DATASETS")
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
        """What the method is trained on, through all of the trunk that learns; nothing of the
        method's own moves."""
        views = self.module.see(batch)
        for encoding in self.module.method.encodings(views):
            encoding.pyramid
        for view in views:
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
