"""A study from its yaml to its page: time a little, plan, run, say what came of it."""

import logging
import math
import os
import time
from typing import Dict, Optional

import torch
from tabulate import tabulate

from d2ssl.study.findings import Results, findings
from d2ssl.study.jobs import Launcher
from d2ssl.study.page import write_study
from d2ssl.study.plan import Run, Study, Task, plan, read_study, recipe_differences
from d2ssl.study.timing import matched_iterations, seconds_of, timings, total

read = read_study
GIB_A_PROCESS = 4  # Mask R-CNN R50-FPN trains two photos in about 3
PAGE_EVERY = 300  # seconds, while runs come in


def launcher(study: Study, jobs: int, cluster: str, slurm: Dict[str, str]) -> Launcher:
    """
    Args:
        jobs: processes at a time; 0: one a GPU, on a CPU one a core as far as memory goes.
        slurm: options of SLURM, without their prefix.
    """
    gpus = range(torch.cuda.device_count())
    if cluster == "slurm":
        gpus = range(1) if study.arms[study.baseline].cfg.MODEL.DEVICE != "cpu" else range(0)
    elif study.arms[study.baseline].cfg.MODEL.DEVICE == "cpu":
        gpus = range(0)
    if not jobs:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        by_memory = max(1, int(memory / GIB_A_PROCESS))
        jobs = len(gpus) or min(os.cpu_count() or 1, by_memory)
    options = {f"slurm_{key}": value for key, value in slurm.items()}
    return Launcher(os.path.join(study.output, "jobs"), jobs, gpus, cluster, options)


def run(study: Study, launcher: Launcher, command: str) -> None:
    """Run what is not done yet, telling of each run, and write the page.

    Args:
        command: as the user typed it; it is kept with the results.
    """
    seconds = timings(study, launcher.call, launcher.threads)
    tasks = plan(study, matched_iterations(study, seconds))
    results = {task: task.result() for task in tasks}
    waiting = [task for task, result in results.items() if result is None]
    _warn(study)
    left = _duration(total(waiting, study, seconds, launcher.at_once))
    print(
        f"{len(tasks)} tasks, {len(tasks) - len(waiting)} of them done before, "
        f"{launcher.at_once} at a time; about {left} to go"
    )
    written = time.monotonic()

    def tell(task: Task, result: dict) -> None:
        nonlocal written
        results[task] = result
        waiting.remove(task)
        left = _duration(total(waiting, study, seconds, launcher.at_once))
        ahead = f"; {len(waiting)} to go, about {left}" if waiting else ""
        print(f"{task}: {_outcome(result)}{ahead}", flush=True)
        if time.monotonic() - written > PAGE_EVERY:
            _write(study, results, seconds, command)
            written = time.monotonic()

    launcher.run(list(waiting), tell)
    print(f"Answer: {_write(study, results, seconds, command)}")


def report(study: Study, command: str) -> str:
    """Write the page from what is done; its path."""
    seconds = timings(study, None, 0)
    tasks = plan(study, matched_iterations(study, seconds))
    return _write(study, {task: task.result() for task in tasks}, seconds, command)


def dry_run(study: Study, launcher: Launcher) -> str:
    """The runs, one a line, and how long they will take here."""
    seconds = timings(study, launcher.call, launcher.threads)
    tasks = plan(study, matched_iterations(study, seconds))
    rows = []
    for task in tasks:
        solver = task.cfg.SOLVER if isinstance(task, Run) else task.cfg.SSL.SOLVER
        time_ = _duration(seconds_of(task, study, seconds))
        rows.append([str(task), solver.MAX_ITER, "done" if task.result() else time_])
    waiting = [task for task in tasks if task.result() is None]
    left = _duration(total(waiting, study, seconds, launcher.at_once))
    _warn(study)
    return (
        tabulate(rows, ["task", "iterations", "time"])
        + f"\n\n{len(tasks)} tasks, {len(waiting)} to run, {launcher.at_once} at a time: "
        + f"about {left}"
        + (f", with {launcher.threads} thread(s) each." if launcher.threads else ".")
    )


def _write(study: Study, results: Dict[Task, Optional[dict]], seconds, command: str) -> str:
    runs = [task for task in results if isinstance(task, Run)]
    found = Results(study, runs, [results[run] for run in runs])
    return write_study(study, found, findings(study, found), results, seconds, command)


def _warn(study: Study) -> None:
    for key, values in recipe_differences(study).items():
        shown = ", ".join(f"{value} in {arm}" for arm, value in values.items())
        logging.getLogger("d2ssl").warning("%s is not the same in all arms: %s", key, shown)


def _outcome(result: dict) -> str:
    if result["failed"]:
        return f"failed: {result['failed']}"
    time_ = _duration(result["seconds"])
    if "ap" not in result:
        return time_
    return f"segm AP {result['ap']['segm']:.1f}, bbox AP {result['ap']['bbox']:.1f}, {time_}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
