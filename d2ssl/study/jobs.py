"""The work of a study, each piece in a process of its own, started by submitit.

A task's outcome is in its folder, ``result.json``; so nothing is lost when the study is stopped,
and what is done is not done again. submitit starts the processes here, or hands them to SLURM.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence

import cv2
import numpy as np
import submitit
import torch
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO

from d2ssl import pipeline
from d2ssl.atomic import atomic_open
from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.datasets.files import read_json
from d2ssl.engine.environment import device_name, versions
from d2ssl.errors import D2SSLError, Diverged
from d2ssl.evaluation.matches import TASKS, match
from d2ssl.report.pictures import predictions_file
from d2ssl.report.plots import read_metrics, series
from d2ssl.study.plan import Pretraining, Run, Task

MINUTES = 24 * 60  # a job may take; what SLURM stops goes on with the next command
POLL = 0.2  # seconds between two looks at the running jobs


# ---- in the job's process


def execute(task: Task, threads: int = 0) -> dict:
    """Do a task and keep its result; a failure is a result, too.

    Args:
        threads: see :func:`use_threads`.
    Returns:
        what ``result.json`` holds: ``key``; ``device``; ``failed``, None, or why there is nothing
        else; ``final``, whether there is no use in trying again; and

        - of pretraining: arm, seed; ``iterations``, ``seconds``;
        - of a run: arm, budget, subset, seed; ``iterations``; ``seconds``, and how many of them
          were ``labelling`` (of self-training); ``ap`` {segm, bbox} in
          percent; ``matches`` {segm, bbox}, see :meth:`~d2ssl.evaluation.matches.Matches.to_json`;
          ``curve``: [iteration, segm AP, bbox AP] on the dev photos.
    """
    use_threads(threads)
    os.makedirs(task.folder, exist_ok=True)
    with open(os.path.join(task.folder, "lock"), "w") as lock:
        # A process of an earlier command may be at it: jobs outlive what started them.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return task.result() or _execute(task)


def use_threads(number: int) -> None:
    """Let PyTorch and OpenCV have so many threads in this process; 0: as many as they like."""
    if number:
        torch.set_num_threads(number)
        cv2.setNumThreads(number)  # else a thread a core, in each of the processes


def _execute(task: Task) -> dict:
    cfg = pipeline.set_up(with_device(task.cfg))
    work = _pretrain if isinstance(task, Pretraining) else _finetune
    result = {**_identity(task), "device": device_name(cfg), "failed": None, "final": True,
              "versions": versions()}  # fmt: skip
    try:
        result.update(work(task, cfg))
    except D2SSLError as error:
        logging.getLogger("d2ssl").error("%s", error)
        result.update(failed=str(error), final=isinstance(error, Diverged))
        _remove_weights(task.folder)
    _keep(task, result)
    return result


def with_device(cfg):
    """The config on this machine, which need not be the one where the study was typed."""
    cfg = cfg.clone()
    cfg.defrost()
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


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
    _remove_weights(stage.OUTPUT_DIR, keep=os.path.basename(task.weights))
    return {"iterations": stage.SOLVER.MAX_ITER, "seconds": _seconds(stage)}


def _finetune(task: Run, cfg) -> dict:
    stage = finetune_cfg(cfg)
    pipeline.finetune(cfg, resume=_goes_on(task))
    truth = COCO(MetadataCatalog.get(stage.DATASETS.TEST[0]).json_file)
    predictions = read_json(predictions_file(stage))
    matches = {what: match(truth, predictions, what) for what in TASKS}
    everything = np.ones((1, len(truth.getImgIds())), int)
    _remove_weights(stage.OUTPUT_DIR)  # hundreds of MB, in every run
    return {
        "iterations": stage.SOLVER.MAX_ITER,
        "seconds": _seconds(stage) + _labelling_seconds(stage),
        "labelling": _labelling_seconds(stage),
        "ap": {what: float(found.ap(everything)[0]) for what, found in matches.items()},
        "curve": _curve(stage),
        "matches": {what: found.to_json() for what, found in matches.items()},
    }


def _goes_on(task: Task) -> bool:
    """Whether what lies in the folder was begun with the same key, which is noted there."""
    note = Path(task.folder, "key")
    begun = note.is_file() and note.read_text() == task.key
    if not begun:  # else what is there would be gone on from under the new key
        _remove_weights(task.folder)
    with atomic_open(str(note), "w") as file:
        file.write(task.key)
    return begun


def _seconds(stage) -> float:
    """Of all iterations, each taken for one that a tenth of them undercut: other work on the
    machine hardly counts, nor whether the training was interrupted."""
    _, times = series(read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json")), "time")
    return float(np.quantile(times, 0.1)) * stage.SOLVER.MAX_ITER if times else 0.0


def _labelling_seconds(stage) -> float:
    metrics = read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json"))
    return sum(series(metrics, "labelling_seconds")[1])


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
        gpus: GPUs of this machine, given to the processes in turn; on SLURM only whether there are
            any, one for each job.
        threads: of each process, see :func:`use_threads`.
        slurm: options of SLURM without their prefix, e.g. {"partition": "gpu"}; None: processes on
            this machine.
    Raises:
        D2SSLError: SLURM is not there, or does not know an option.
    """

    def __init__(
        self,
        folder: str,
        at_once: int,
        gpus: Sequence[int] = (),
        threads: int = 0,
        slurm: Optional[Dict] = None,
    ):
        self.at_once, self.threads = at_once, threads
        self.free = list(gpus) * -(-at_once // max(1, len(gpus))) if slurm is None else []
        each = {"gpus_per_node": 1 if gpus else 0}
        try:
            if slurm is None:  # not AutoExecutor, which cannot say which GPU
                self.executor = submitit.LocalExecutor(folder)
                self.executor.update_parameters(timeout_min=MINUTES, **each)
            else:
                self.executor = submitit.AutoExecutor(folder, cluster="slurm")
                slurm = {"time": MINUTES, "job_name": "d2ssl", **slurm}
                options = {f"slurm_{key}": value for key, value in slurm.items()}
                self.executor.update_parameters(**{**each, **options})
        except (NameError, RuntimeError, AssertionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise D2SSLError(f"--cluster slurm: {reason}") from error

        if slurm is not None and not _sacct_works():
            logging.getLogger("d2ssl").warning(
                "sacct does not work here: a job that SLURM stops is waited for until you press "
                "Ctrl-C; the same command tries it again"
            )

    def call(self, function: Callable, *args):
        """Run one function in a job and return what it returns.

        Raises:
            D2SSLError: it failed, or its process died.
        """
        job, gpu = self._submit(function, *args)
        try:
            return job.result()
        except submitit.core.utils.UncompletedJobError as error:
            raise D2SSLError(f"a job failed: {last_words(job)}; see {job.paths.stderr}") from error
        finally:
            if not job.done():  # Ctrl-C
                job.cancel()
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
            for job, _ in running.values():  # Ctrl-C
                job.cancel()

    def _submit(self, function: Callable, *args):
        gpu = self.free.pop(0) if self.free else None
        if gpu is not None:
            self.executor.update_parameters(visible_gpus=(gpu,))
        try:
            with _children_print_to(os.path.join(self.executor.folder, "submitit.log")):
                return self.executor.submit(function, *args), gpu
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            reason = " ".join(str(error).split())[-300:]
            raise D2SSLError(f"--cluster slurm: a job was refused: {reason}") from error

    def _release(self, gpu: Optional[int]) -> None:
        if gpu is not None:
            self.free.append(gpu)


def _sacct_works() -> bool:
    """submitit asks it whether a job still runs; it needs SLURM's accounting."""
    found = shutil.which("sacct")
    return found is not None and not subprocess.run([found, "-X"], capture_output=True).returncode


@contextlib.contextmanager
def _children_print_to(path: str) -> Iterator[None]:
    """Processes that are started inside: each of submitit's answers Ctrl-C with a traceback."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    terminal = os.dup(2)
    with open(path, "a") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _outcome(task: Task, job) -> dict:
    try:
        return job.result()
    except submitit.core.utils.UncompletedJobError:
        # What it kept before it ended so counts all the same.
        return task.result() or _failed(task, f"its process died: {last_words(job)}", False)


def _without_needs(task: Run) -> Optional[dict]:
    """The result of a run whose pretraining came to nothing; None where it is there."""
    found = task.needs.recorded()
    if found and not found["failed"]:
        return None
    why = found["failed"] if found else "it left no result"
    return _failed(task, f"{task.needs} failed: {why}", bool(found) and found["final"])


def _failed(task: Task, why: str, final: bool) -> dict:
    result = {**_identity(task), "device": "", "failed": why, "final": final}
    os.makedirs(task.folder, exist_ok=True)
    _keep(task, result)
    return result


def last_words(job) -> str:
    """The last line that a job's process, rather than SLURM, printed to stderr."""
    lines = [line for line in (job.stderr() or "").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("srun: ")] or lines
    return lines[-1].strip() if lines else "it said nothing"
