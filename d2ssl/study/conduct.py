"""A study from its yaml to its page: time a little, plan, run, say what came of it."""

import logging
import math
import os
import re
import statistics
import time
from typing import Dict, List, Optional

import torch
from tabulate import tabulate

from d2ssl.compat import available_cores
from d2ssl.errors import D2SSLError
from d2ssl.study.findings import Results, findings
from d2ssl.study.jobs import Launcher
from d2ssl.study.page import write_study
from d2ssl.study.plan import Run, Study, Task, plan, recipe_differences
from d2ssl.study.timing import (
    keep_lengths,
    kept_lengths,
    matched_iterations,
    seconds_of,
    timings,
)

logger = logging.getLogger("d2ssl")

GIB_A_PROCESS = 4  # Mask R-CNN R50-FPN trains two photos in about 3, without the photos in memory
PAGE_EVERY = 600  # seconds, while runs come in


def launcher(study: Study, jobs: int, slurm: Optional[Dict] = None) -> Launcher:
    """
    Args:
        jobs: processes at a time; 0: one a GPU, on a CPU one a core as far as memory goes.
        slurm: options of SLURM; None: processes on this machine.

    Raises:
        D2SSLError: SLURM without a number of jobs, or what :class:`Launcher` refuses.
    """
    cfg = study.arms[study.baseline].cfg
    folder, on_cpu = os.path.join(study.output, "jobs"), cfg.MODEL.DEVICE == "cpu"
    if slurm is not None:
        if not jobs:
            raise D2SSLError("--cluster slurm needs --jobs, how many may be queued at a time")
        return Launcher(folder, jobs, [] if on_cpu else [0], slurm=slurm)
    gpus, cores = [] if on_cpu else _gpus(), available_cores()
    fit = max(1, min(cores, int(_memory() / (GIB_A_PROCESS + cfg.SSL.CACHE_GB))))
    jobs = jobs or len(gpus) or fit
    return Launcher(folder, jobs, gpus, threads=max(1, cores // jobs))


def _gpus() -> List[int]:
    """Those that this process may use, by the numbers that the machine has for them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not given:
        return list(range(torch.cuda.device_count()))
    if not re.fullmatch(r"\d+(,\d+)*", given):
        raise D2SSLError(f"CUDA_VISIBLE_DEVICES {given}: give numbers, e.g. 0,1")
    return [int(number) for number in given.split(",")]


def _memory() -> float:
    """GiB of this machine, or of the container."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            most = min(most, int(file.read()))
    except (OSError, ValueError):  # no container, or one without a limit
        pass
    return most / 2**30


class Conductor:
    """What the ways to call a study share: its tasks, their results so far, their time.

    Args:
        call: runs a function in a job; None: nothing is to be run.
        threads: of each process.
        command: as the user typed it; it is kept with the results.
    """

    def __init__(self, study: Study, command: str, call=None, threads: int = 0):
        self.study, self.command = study, command
        for arm, differences in recipe_differences(study).items():
            for key, (value, other) in differences.items():
                logger.warning("%s is %s in %s and %s in the arm it is compared with: that is "
                               "compared, too", key, value, arm, other)  # fmt: skip
        for note in notes(study):
            logger.warning("%s", note)
        # As it was begun, also where that was on another machine: else its results would not fit.
        self.lengths = kept_lengths(study)
        if call:
            self.seconds = timings(study, call, threads)
            self.lengths = {**matched_iterations(study, self.seconds), **self.lengths}
        self.tasks = plan(study, self.lengths)
        self.outcomes = {task: task.recorded() for task in self.tasks}
        if not (call or any(self.outcomes.values())):
            other = any(os.path.isfile(task.result_file) for task in self.tasks)
            raise D2SSLError(
                f"{study.output}: what was run here was of other values or photos; give the same "
                "overrides and data"
                if other
                else f"{study.output}: nothing was run here yet; leave --report-only out"
            )
        left = [task for task in self.tasks if task.result() is None]
        needed = {task.needs for task in left}
        self.waiting = [task for task in left if isinstance(task, Run) or task in needed]
        self.results = Results(study)
        for task, result in self.outcomes.items():
            if result and isinstance(task, Run):
                self.results.add(result)

    def left(self, at_once: int) -> str:
        seconds = (seconds_of(task, self.study, self.seconds) for task in self.waiting)
        return duration(sum(seconds) / at_once)

    def table(self, at_once: int, threads: int) -> str:
        """The runs, one a line, and how long they will take."""
        rows = []
        for task in self.tasks:
            solver = task.cfg.SOLVER if isinstance(task, Run) else task.cfg.SSL.SOLVER
            time_ = duration(seconds_of(task, self.study, self.seconds))
            rows.append([str(task), solver.MAX_ITER, time_ if task in self.waiting else "done"])
        return (
            tabulate(rows, ["task", "iterations", "time"])
            + f"\n\n{len(rows)} tasks, {len(self.waiting)} to run, {at_once} at a time: about "
            + self.left(at_once)
            + (f", with {threads} thread(s) each." if threads else ".")
        )

    def run(self, jobs: Launcher) -> None:
        """Run what is not done yet, telling of each run, and write the page."""
        print(
            f"{len(self.tasks)} tasks, {len(self.tasks) - len(self.waiting)} of them done before, "
            f"{jobs.at_once} at a time; about {self.left(jobs.at_once)} to go",
            flush=True,
        )
        keep_lengths(self.study, self.lengths)
        written = time.monotonic()

        def tell(task: Task, result: dict) -> None:
            nonlocal written
            self.outcomes[task] = result
            self.waiting.remove(task)
            if isinstance(task, Run):
                self.results.add(result)
            many = len(self.waiting)
            ahead = f"; {many} to go, about {self.left(jobs.at_once)}" if many else ""
            print(f"{task}: {_outcome(result)}{ahead}", flush=True)
            if time.monotonic() - written > PAGE_EVERY:
                self.write()
                written = time.monotonic()

        try:
            jobs.run(list(self.waiting), tell)
        finally:
            path = self.write()
        print(f"Answer: {path}")

    def write(self) -> str:
        """Write the page from what is done; its path."""
        took: Dict[str, List[float]] = {}
        for arm, pretraining in {(task.arm, task.needs) for task in self.tasks if task.needs}:
            result = self.outcomes[pretraining]
            if result and not result["failed"]:
                took.setdefault(arm, []).append(result["seconds"])
        means = {arm: statistics.fmean(values) for arm, values in took.items()}
        found = findings(self.study, self.results, means)
        return write_study(self.study, self.results, found, self.outcomes, self.command)


def notes(study: Study) -> List[str]:
    """What keeps a study from answering, said before it runs."""
    found = []
    for arm in study.arms.values():
        solver = arm.cfg.SOLVER
        other = study.arms[study.without(arm)]
        without = [b for b in arm.budgets if b not in other.budgets]
        if without and arm.uses_unlabeled:
            found.append(
                f"{other.name} is not for {_listed(without)}, so {arm.name} is compared with "
                "nothing there"
            )
        alone = [b for b in arm.budgets if arm.pretrains and not study.control(arm, b)]
        if alone:
            found.append(
                f"no arm is COMPUTE_MATCHED to {arm.name} with {_listed(alone)}, so whether it "
                "pays cannot be told"
            )
        if max([solver.WARMUP_ITERS, *solver.STEPS]) >= solver.MAX_ITER:
            found.append(
                f"{arm.name}: SOLVER.STEPS {tuple(solver.STEPS)} and WARMUP_ITERS "
                f"{solver.WARMUP_ITERS} do not fit in MAX_ITER {solver.MAX_ITER}"
            )
    without = [b for b in study.budgets if study.dev and not study.dev_set(b, study.subsets[0])]
    if without:
        found.append(
            f"no curve with {_listed(without)}: DEV {study.dev} leaves "
            f"{study.total - study.dev} of {study.total} photos"
        )
    return found


def _listed(budgets: List[int]) -> str:
    return f"{', '.join(map(str, budgets))} labels"


def _outcome(result: dict) -> str:
    if result["failed"]:
        return f"failed: {result['failed']}"
    time_ = duration(result["seconds"])
    if "ap" not in result:
        return time_
    return f"segm AP {result['ap']['segm']:.1f}, bbox AP {result['ap']['bbox']:.1f}, {time_}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
