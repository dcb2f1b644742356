"""The work of a study, each piece in a process of its own, started by submitit.

A task's outcome is in its folder, ``result.json``; so nothing is lost when the study is stopped,
and what is done is not done again. submitit starts the processes here, or hands them to SLURM.
"""

import json
import logging
import os
import statistics
import time
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np
import submitit
import torch
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

from d2ssl import pipeline
from d2ssl.atomic import atomic_open
from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.datasets.files import read_json
from d2ssl.errors import D2SSLError
from d2ssl.evaluation.matches import TASKS, match
from d2ssl.report.pictures import predictions_file
from d2ssl.report.plots import read_metrics, series
from d2ssl.study.plan import Pretraining, Run, Task

MINUTES = 7 * 24 * 60  # a job may take; SLURM wants less or more by its own option
POLL = 0.2  # seconds between two looks at the running jobs


# ---- in the job's process


def execute(task: Task, threads: int = 0) -> dict:
    """Do a task and keep its result; a failure that is the run's own is a result, too.

    Args:
        threads: of PyTorch on a CPU; 0: as it likes.
    Returns:
        what ``result.json`` holds: ``key``, ``failed`` (None, or why there is nothing else), and

        - of pretraining: ``iterations``, ``seconds``;
        - of a run: arm, budget, subset, seed; ``iterations``, ``seconds``; ``ap`` {segm, bbox} in
          percent; ``matches`` {segm, bbox}, see :meth:`~d2ssl.evaluation.matches.Matches.to_json`;
          ``curve``: [iteration, segm AP, bbox AP] on the dev photos.
    """
    if threads:
        torch.set_num_threads(threads)
    os.makedirs(task.folder, exist_ok=True)
    cfg = pipeline.set_up(task.cfg)
    try:
        result = _pretrain(task, cfg) if isinstance(task, Pretraining) else _finetune(task, cfg)
    except D2SSLError as error:
        logging.getLogger("d2ssl").error("%s", error)
        result = {**_identity(task), "failed": str(error)}
    _keep(task, result)
    return result


def _identity(task: Task) -> dict:
    if isinstance(task, Pretraining):
        return {"arm": task.arm, "seed": task.seed, "key": task.key}
    names = ("arm", "budget", "subset", "seed", "key")
    return {name: getattr(task, name) for name in names}


def _keep(task: Task, result: dict) -> None:
    with atomic_open(task.result_file, "w") as file:
        json.dump(result, file)


def _pretrain(task: Pretraining, cfg) -> dict:
    stage = pretrain_cfg(cfg)
    pipeline.pretrain(cfg, resume=_goes_on(task))
    seconds = _seconds(stage)
    _remove_weights(stage.OUTPUT_DIR, keep=os.path.basename(task.weights))
    return {
        **_identity(task), "failed": None, "iterations": stage.SOLVER.MAX_ITER, "seconds": seconds
    }  # fmt: skip


def _finetune(task: Run, cfg) -> dict:
    stage = finetune_cfg(cfg)
    pipeline.finetune(cfg, resume=_goes_on(task))
    truth = COCO(MetadataCatalog.get(stage.DATASETS.TEST[0]).json_file)
    predictions = read_json(predictions_file(stage))
    matches = {what: match(truth, predictions, what) for what in TASKS}
    everything = np.ones((1, len(truth.getImgIds())), int)
    result = {
        **_identity(task),
        "failed": None,
        "iterations": stage.SOLVER.MAX_ITER,
        "seconds": _seconds(stage),
        "ap": {what: float(found.ap(everything)[0]) for what, found in matches.items()},
        "curve": _curve(stage),
        "matches": {what: found.to_json() for what, found in matches.items()},
    }
    _remove_weights(stage.OUTPUT_DIR)  # hundreds of MB, in every run
    return result


def _goes_on(task: Task) -> bool:
    """Whether what lies in the folder was begun with the same key, which is noted there."""
    note = os.path.join(task.folder, "key")
    begun = os.path.isfile(note) and open(note).read() == task.key
    with atomic_open(note, "w") as file:
        file.write(task.key)
    return begun


def _seconds(stage) -> float:
    """Of all iterations, from their typical time: whatever else the machine does, and whether the
    training was interrupted."""
    _, times = series(read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json")), "time")
    return statistics.median(times) * stage.SOLVER.MAX_ITER if times else 0.0


def _curve(stage) -> List[List[float]]:
    """AP is not there, or -inf, where the detector predicted nothing: 0."""
    metrics = read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json"))
    names = [f"dev/{what}/AP" for what in TASKS]
    return [
        [i + 1, *(max(0.0, row.get(name, 0.0)) for name in names)]
        for i, row in metrics.items()
        if names[0] in row
    ]


def _remove_weights(folder: str, keep: str = "") -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            if (name.endswith(".pth") or name == "last_checkpoint") and name != keep:
                os.remove(os.path.join(place, name))


# ---- in the study's process


class Launcher:
    """Starts tasks, so many at once, and tells of each that has ended.

    Args:
        folder: where submitit keeps its files, and what the processes print.
        at_once: processes at a time.
        gpus: indices of GPUs to be given to the processes in turn; none on a CPU.
        cluster: "local", or "slurm": then each job asks for a GPU if ``gpus`` are given.
        options: of submitit's executor, e.g. {"slurm_partition": "gpu"}.
    """

    def __init__(
        self,
        folder: str,
        at_once: int,
        gpus: Sequence[int] = (),
        cluster: str = "local",
        options: Optional[Dict] = None,
    ):
        self.folder, self.at_once, self.cluster = folder, at_once, cluster
        self.free = [g for _ in range(-(-at_once // max(1, len(gpus)))) for g in gpus]
        on_cpu = cluster == "local" and not gpus
        self.threads = max(1, (os.cpu_count() or 1) // at_once) if on_cpu else 0
        self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self.executor.update_parameters(
            name="d2ssl", timeout_min=MINUTES, gpus_per_node=1 if gpus else 0, **(options or {})
        )

    def call(self, function: Callable, *args):
        """Run one function in a job and return what it returns."""
        job, gpu = self._submit(function, *args)
        try:
            return job.result()
        except submitit.core.utils.FailedJobError as error:
            raise D2SSLError(f"a job failed: {last_words(job)}; see {job.paths.stderr}") from error
        finally:
            self._release(gpu)

    def run(self, tasks: Sequence[Task], tell: Callable[[Task, dict], None]) -> None:
        """Run all tasks, in their order as far as what they need is done.

        Args:
            tell: called with each task that has ended, and its result.
        """
        waiting, running = list(tasks), {}
        try:
            while waiting or running:
                for task, (job, gpu) in list(running.items()):
                    if job.done():
                        del running[task]
                        self._release(gpu)
                        tell(task, _outcome(task, job))
                ready = [t for t in waiting if t.needs not in running and t.needs not in waiting]
                for task in ready[: self.at_once - len(running)]:
                    waiting.remove(task)
                    hopeless = task.needs and _without_needs(task)
                    if hopeless:
                        tell(task, hopeless)
                    else:
                        running[task] = self._submit(execute, task, self.threads)
                time.sleep(POLL)
        finally:
            for job, _ in running.values():  # on Ctrl-C
                job.cancel()

    def _submit(self, function: Callable, *args):
        gpu = self.free.pop(0) if self.free else None
        if gpu is not None and self.cluster == "local":
            self.executor.update_parameters(visible_gpus=(gpu,))
        return self.executor.submit(function, *args), gpu

    def _release(self, gpu: Optional[int]) -> None:
        if gpu is not None:
            self.free.append(gpu)


def _outcome(task: Task, job) -> dict:
    return task.result() or _failed(task, f"its process died: {last_words(job)}", died=True)


def _without_needs(task: Run) -> Optional[dict]:
    """The result of a run whose pretraining came to nothing; None where it is there."""
    found = task.needs.result()
    if found and not found["failed"]:
        return None
    why = found["failed"] if found else "its process died"
    return _failed(task, f"{task.needs} failed: {why}", died=not found)


def _failed(task: Task, why: str, **more) -> dict:
    result = {**_identity(task), "failed": why, **more}
    os.makedirs(task.folder, exist_ok=True)
    _keep(task, result)
    return result


def last_words(job) -> str:
    """The last line that a job's process printed to stderr."""
    lines = [line for line in (job.stderr() or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
