"""How long will it take on this machine? A few iterations of each kind of work, measured once.

The length of the compute-matched arms follows from it. What a study was begun with is kept, so that
it is the same for all seeds, after an interruption, and on another machine.
"""

import json
import os
import statistics
import tempfile
import time
from typing import Dict, Mapping

import torch

from d2ssl import pipeline
from d2ssl.atomic import atomic_open, make_folder
from d2ssl.config import changed, finetune_cfg, pretrain_cfg
from d2ssl.data.build import build_validation_batches, count_photos
from d2ssl.engine.finetuning import FinetuneTrainer
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.study.jobs import use_threads, with_device
from d2ssl.study.plan import Arm, Pretraining, Run, Study, Task, config_key

ON_CPU, ON_GPU = 7, 40  # iterations; a GPU's are short, but it takes more to come up to speed
MEASURED = 5  # of them, the last
START = 20  # seconds for a process to come up: imports, photos, weights


def measure(arm: Arm, train: str, pretraining: bool, threads: int) -> Dict[str, float]:
    """In a process of its own: ``iteration``, seconds of one of pretraining or of fine-tuning, and,
    of fine-tuning, ``photo``, seconds of a photo at test."""
    use_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        cfg = with_device(arm.cfg)
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        cfg.DATASETS.TRAIN = (train,)
        iterations = ON_CPU if cfg.MODEL.DEVICE == "cpu" else ON_GPU
        cfg.SOLVER.MAX_ITER = cfg.SSL.SOLVER.MAX_ITER = iterations
        cfg.SOLVER.WARMUP_ITERS = cfg.SSL.SOLVER.WARMUP_ITERS = 0
        cfg.SOLVER.BASE_LR = cfg.SSL.SOLVER.BASE_LR = 1e-6  # whether it diverges is not asked here
        cfg.SSL.SELF_TRAINING.ENABLED = False  # an iteration takes as long with it
        cfg.SSL.ENABLED = pretraining  # what weights fine-tuning starts from does not matter here
        cfg.freeze()
        cfg = pipeline.set_up(cfg)
        if pretraining:
            return {"iteration": _iteration(PretrainTrainer(pretrain_cfg(cfg)))}
        stage = finetune_cfg(cfg)
        stage.defrost()
        stage.DATASETS.TEST = ()
        trainer = FinetuneTrainer(stage)
        return {"iteration": _iteration(trainer), "photo": _photo(trainer.module, cfg)}


def _iteration(trainer) -> float:
    trainer.train()
    times = [value for value, _ in trainer.storage.history("time").values()]
    return statistics.median(times[-MEASURED:])


@torch.no_grad()
def _photo(model, cfg) -> float:
    model.eval()
    times = []
    for batch in build_validation_batches(cfg, cfg.DATASETS.TEST, limit=3):
        started = time.perf_counter()
        model(batch)
        times.append(time.perf_counter() - started)
    return min(times)


def timings(study: Study, call, threads: int) -> Dict[str, Dict[str, float]]:
    """Of each arm: seconds of an iteration of ``pretraining`` (0 without) and of ``finetuning``,
    and of a ``photo`` at test; measured where ``timing.json`` does not know it yet.

    Args:
        call: runs a function in a job, :meth:`~d2ssl.study.jobs.Launcher.call`.
    """
    path = os.path.join(study.output, "timing.json")
    known = _read(path)

    def find(arm: Arm, pretraining: bool) -> Dict[str, float]:
        kind = f"{arm.cfg.MODEL.DEVICE} {arm.kind(pretraining)}"
        if kind not in known:
            what = "pretraining" if pretraining else "fine-tuning"
            print(f"timing {what} of {arm.name}, once, some minutes at most ...", flush=True)
            known[kind] = call(measure, arm, study.train, pretraining, threads)
            _write(path, known)
        return known[kind]

    found = {}
    for name, arm in study.arms.items():
        finetuning = find(arm, False)
        found[name] = {
            "pretraining": find(arm, True)["iteration"] if arm.pretrains else 0.0,
            "finetuning": finetuning["iteration"],
            "photo": finetuning["photo"],
        }
    return found


def matched_iterations(study: Study, seconds: Mapping[str, Mapping[str, float]]) -> Dict[str, int]:
    """Length of fine-tuning of the compute-matched arms: their own, and as many iterations more as
    the other arm's pretraining and labelling take the time of."""
    lengths = {}
    for arm in study.arms.values():
        if arm.matched:
            other = study.arms[arm.matched].cfg
            spent = other.SSL.SOLVER.MAX_ITER * seconds[arm.matched]["pretraining"]
            spent += labelling_photos(other) * seconds[arm.matched]["photo"]
            own = arm.cfg.SOLVER.MAX_ITER
            lengths[arm.name] = own + round(spent / seconds[arm.name]["finetuning"])
    return lengths


def keep_lengths(study: Study, lengths: Mapping[str, int]) -> None:
    """Note with the study how long its compute-matched arms are, see :func:`kept_lengths`."""
    rows = {
        name: {"of": _what_is_matched(study, name), "iterations": iterations}
        for name, iterations in lengths.items()
    }
    _write(_lengths_file(study), rows)


def kept_lengths(study: Study) -> Dict[str, int]:
    """What :func:`keep_lengths` noted, of arms that neither they nor what they are matched to have
    changed since."""
    rows = _read(_lengths_file(study))
    return {
        name: rows[name]["iterations"]
        for name, arm in study.arms.items()
        if arm.matched and rows.get(name, {}).get("of") == _what_is_matched(study, name)
    }


def _what_is_matched(study: Study, name: str) -> str:
    arm = study.arms[name]
    pair = {n: config_key(changed(study.arms[n].cfg)) for n in (name, arm.matched)}
    return config_key({**pair, "photos": study.unlabelled[arm.matched]})


def _lengths_file(study: Study) -> str:
    return os.path.join(study.output, "lengths.json")


def _read(path: str) -> Dict[str, Dict]:
    if not os.path.isfile(path):
        return {}
    with open(path) as file:
        return json.load(file)


def _write(path: str, content: Mapping) -> None:
    make_folder(os.path.dirname(path))
    with atomic_open(path, "w") as file:
        json.dump(content, file, indent=1)


def labelling_photos(cfg) -> float:
    """What self-training looks at, at most, in all the times that it labels: in photos of the test
    size, seen once."""
    options = cfg.SSL.SELF_TRAINING
    if not options.ENABLED:
        return 0
    looks = sum(2 * scale**2 for scale in options.SCALES) or 1  # each mirrored, too
    return looks * len(options.AT) * count_photos(cfg.SSL.DATASETS)


def seconds_of(task: Task, study: Study, seconds: Mapping[str, Mapping[str, float]]) -> float:
    """What a task should take, alone on its share of the machine."""
    one = seconds[task.arm]
    if isinstance(task, Pretraining):
        return START + task.cfg.SSL.SOLVER.MAX_ITER * one["pretraining"]
    assert isinstance(task, Run)
    photos = count_photos([study.test]) + labelling_photos(task.cfg)
    if task.cfg.SSL.FINETUNE.DEV_DATASET:
        photos += study.curve_points * study.dev
    return START + task.cfg.SOLVER.MAX_ITER * one["finetuning"] + photos * one["photo"]
