"""What both trainers share: Detectron2's ``DefaultTrainer`` with other parts built in."""

import logging
import weakref
from typing import Dict, List, Set, Tuple

import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from torch import nn

from d2ssl.atomic import make_folder
from d2ssl.engine import hooks as d2ssl_hooks
from d2ssl.engine.checkpoint import (
    Checkpointer,
    MatchReport,
    conventions_of,
    refuse_other_conventions,
)
from d2ssl.engine.launch import distribute
from d2ssl.engine.precision import apply_precision
from d2ssl.engine.solver import load_optimizer, main_schedule
from d2ssl.engine.stage_folder import begun, clear
from d2ssl.engine.weights_file import differing_keys, get, other_conventions, settings
from d2ssl.errors import D2SSLError, Diverged

logger = logging.getLogger("d2ssl")

FIX = "give the same one, another OUTPUT_DIR, or start over without --resume"


def another_config(folder: str, held: Dict) -> D2SSLError:
    """That a folder holds a run under other values of these keys, as far as they are known."""
    values = f" ({settings(held)})" if held else ""
    return D2SSLError(f"{folder} holds a run of another config{values}; {FIX}")


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
    run_keys = ("SEED", "DATASETS.TRAIN")  # a resumed run has the same

    def __init__(self, cfg, resume: bool = False):
        TrainerBase.__init__(self)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        make_folder(cfg.OUTPUT_DIR)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.loaded_parts: Set[str] = set()
        self.schedule = main_schedule(cfg.SOLVER, self.lr_floor())
        torch.manual_seed(cfg.SEED)  # random weights are the same in every run of a seed
        self.module = self.build_model(cfg)
        self.loader = self.build_train_loader(cfg)
        resume = resume and begun(cfg.OUTPUT_DIR)
        if not resume:
            self.start_from(self.load_weights())
            clear(cfg.OUTPUT_DIR)
        apply_precision(self.module, self.uses_bf16())
        optimizer = self.build_optimizer(cfg, self.module)
        model = distribute(self.module, self.find_unused_parameters)
        self._trainer = SimpleTrainer(model, self.loader, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            classes=self.classes(),
            conventions={**conventions_of(cfg), **{key: get(cfg, key) for key in self.run_keys}},
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
        try:
            self.checkpointer.resume_or_load("", resume=True)
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise D2SSLError(
                f"{folder} cannot be resumed: damaged, or a run of another config; {FIX} "
                f"({reason[0] if reason else repr(error)})"
            ) from error
        said = self.checkpointer.conventions
        other = other_conventions(self.cfg, said)
        run = {key: said[key] for key in self.run_keys if key in said}
        other |= differing_keys(self.cfg, run)
        if other or not self.checkpointer.fits:
            raise another_config(folder, other)
        if self.iter >= self.max_iter:
            raise D2SSLError(
                f"{folder} holds {self.iter + 1} iterations, and MAX_ITER is {self.max_iter}: give "
                "as many at least, or start over without --resume"
            )

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

    def evaluation_hooks(self) -> list:
        """Hooks that run after the checkpointer, before the writers."""
        return []

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
        found += self.evaluation_hooks()
        if comm.is_main_process():
            # A short run has a curve, too, and no evaluation overwrites one that is not written.
            period = max(1, min(20, self.max_iter // 20, cfg.TEST.EVAL_PERIOD or 20))
            found.append(hooks.PeriodicWriter(self.build_writers(), period))
        return found

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
