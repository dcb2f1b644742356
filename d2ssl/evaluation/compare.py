"""The same photos, weights and number of views for every pretext method: what comes of it?

A run is one method with one seed: pretraining of a given number of photo views, and retrieval
(:mod:`d2ssl.evaluation.retrieval`) before and after it. Its outcome is kept in ``result.json`` in
its folder, so that an interrupted comparison goes on where it stopped.
"""

import contextlib
import gc
import glob
import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from scipy.special import stdtrit

from d2ssl.atomic import atomic_open
from d2ssl.config import leaves, load_cfg, pretrain_cfg
from d2ssl.data.build import register_datasets
from d2ssl.engine.auto import resolve_auto
from d2ssl.engine.environment import device_name, made_by, versions
from d2ssl.engine.inputs import contents, file_hash, pretraining_inputs
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.errors import D2SSLError
from d2ssl.evaluation import retrieval
from d2ssl.evaluation.retrieval import BoxRetrieval
from d2ssl.modeling.pretext_model import PretextModel

# What must be equal in all configs, or more than the method would be compared.
COMMON = (
    "MODEL",
    "INPUT.FORMAT",
    "DATASETS.TEST",
    "SSL.DATASETS",
    "SSL.INPUT.VIEW_SIZE",
    "SSL.PROPOSALS",
)
OWN = {"SEED": "--seeds", "OUTPUT_DIR": "--output", "SSL.SOLVER.MAX_ITER": "--views"}
CURVE_POINTS = 40


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    cfg: the user's config at the run's length; its OUTPUT_DIR is the run's folder.
    views_per_step: photo views that one iteration shows the network.
    key: changes with anything that the outcome follows from.
    """

    method: str
    cfg: object
    views_per_step: int
    key: str

    @property
    def seed(self) -> int:
        return self.cfg.SEED

    @property
    def result_file(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, "result.json")

    def __str__(self):
        return f"{self.method} seed {self.seed}"


def plan(
    files: Sequence[str],
    opts: Sequence[str],
    seeds: Sequence[int],
    views: int,
    output: str,
    heldout: str = "",
) -> List[Run]:
    """The runs, one seed after another: the first results of all methods come early, and a
    machine that is slow for a while slows all of them.

    Args:
        files: a yaml for each method. The method is called as ``SSL.METHOD`` where the file has
            that name in lower case, else as the file.
        opts: KEY VALUE overrides, for all methods.
        views: photo views that a run may show, at most.
        heldout: data set for retrieval; default: ``DATASETS.TEST``.

    Raises:
        D2SSLError: a bad config, configs that differ in more than the method, no method, or less
            views than one iteration takes.
    """
    for key in opts[::2]:
        if key in OWN:
            raise D2SSLError(f"{key} is set by {OWN[key]}; leave it out of the overrides")
    cfgs: Dict[str, object] = {}
    drawn: Dict[str, int] = {}
    for file in files:
        cfg, per_photo = _load(file, opts, heldout)
        stem = os.path.splitext(os.path.basename(file))[0]
        one = not cfg.SSL.METHODS and cfg.SSL.METHOD.lower() == stem.lower()
        name = cfg.SSL.METHOD if one else stem
        if name in cfgs:
            raise D2SSLError(f"{file}: a second file for {name}; give each its own name")
        cfgs[name], drawn[name] = cfg, per_photo
    if not cfgs:
        raise D2SSLError("no method to compare; name yamls such as configs/methods/*.yaml")
    _refuse_incomparable(cfgs)
    inputs = {name: _inputs(cfg) for name, cfg in cfgs.items()}
    return [
        _run(name, cfg, inputs[name], drawn[name], seed, views, output)
        for seed in dict.fromkeys(seeds)
        for name, cfg in cfgs.items()
    ]


def _inputs(cfg) -> List:
    """What the outcome follows from besides the config, the held-out photos included."""
    heldout = contents(cfg.DATASETS.TEST, labels=cfg.SSL.PROPOSALS.SOURCE == "annotations")
    return [pretraining_inputs(cfg), file_hash(cfg.MODEL.WEIGHTS), list(heldout.values())]


def _load(file: str, opts: Sequence[str], heldout: str) -> Tuple[object, int]:
    """A method's config without "auto", and how many views of a photo it draws an iteration."""
    if not os.path.isfile(file):
        beside = glob.glob(os.path.join(os.path.dirname(file), "*.yaml"))
        names = ", ".join(sorted(map(os.path.basename, beside))) or "no yaml at all"
        raise D2SSLError(f"{file}: no such file; in that folder there is {names}")
    if heldout:
        opts = [*opts, "DATASETS.TEST", f"('{heldout}',)"]
    try:
        cfg = load_cfg(file, opts)
        if not cfg.SSL.ENABLED:
            raise D2SSLError("SSL.ENABLED is False, so nothing is pretrained; leave it True")
        register_datasets(cfg)
        cfg = resolve_auto(cfg)
        return cfg, len(PretextModel(pretrain_cfg(cfg)).method.views)
    except D2SSLError as error:
        raise D2SSLError(f"{file}: {error}") from error


def _refuse_incomparable(cfgs: Dict[str, object]) -> None:
    (first, reference), *others = ((name, leaves(cfg)) for name, cfg in cfgs.items())
    for name, values in others:
        for key, value in values.items():
            common = any(f"{key}.".startswith(f"{part}.") for part in COMMON)
            if common and value != reference.get(key):
                raise D2SSLError(
                    f"{key} is {reference.get(key)} for {first} and {value} for {name}: only the "
                    f"method may differ; add {key} and a value to the command"
                )


def _run(name: str, cfg, inputs: List, per_photo: int, seed: int, views: int, output: str) -> Run:
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SSL.SOLVER
    per_step = solver.IMS_PER_BATCH * per_photo
    steps = views // per_step
    if steps < 1:
        raise D2SSLError(
            f"--views {views}: one step of {name} takes {solver.IMS_PER_BATCH} photos with "
            f"{per_photo} views each; give {per_step} or more"
        )
    # The schedule keeps its shape.
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * steps / solver.MAX_ITER)
    solver.STEPS = tuple(step * steps // solver.MAX_ITER for step in solver.STEPS)
    solver.MAX_ITER = steps
    solver.CHECKPOINT_PERIOD = steps + 1  # none on the way
    cfg.SEED = seed
    key = json.dumps([cfg.dump(), protocol(), inputs])
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    cfg.OUTPUT_DIR = os.path.join(output, name, f"seed{seed}")
    cfg.freeze()
    return Run(name, cfg, per_step, key)


def protocol() -> dict:
    """The constants of retrieval, by name."""
    return {name: value for name, value in vars(retrieval).items() if name.isupper()}


def finished(run: Run) -> Optional[dict]:
    """The kept result of a run, None where there is none of the same config.

    A run that failed is not finished: it is tried again.
    """
    try:
        with open(run.result_file) as file:
            result = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return result if result["key"] == run.key and not result["failed"] else None


def execute(run: Run, ask: BoxRetrieval) -> dict:
    """Pretrain, measure, and keep the result.

    Returns:
        method, seed, key, versions, device; iterations, photo_views; ``loss``: [photo views, mean
        loss] at up to CURVE_POINTS places; ``before``, ``after``: top-1 of retrieval, see
        :class:`BoxRetrieval`;
        ``seconds_per_view``: of an iteration that a tenth of all undercut, so that other work on
        the machine hardly counts, None for fewer than three; ``spread`` of the embeddings at the
        end, None where the method has none; ``seconds`` of it all; ``failed``: None, or why there
        is nothing but the first five.
    """
    stage = pretrain_cfg(run.cfg)
    shutil.rmtree(stage.OUTPUT_DIR, ignore_errors=True)  # what an interrupted run left
    os.makedirs(stage.OUTPUT_DIR)
    with atomic_open(os.path.join(run.cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
        file.write(run.cfg.dump())
    result = {"method": run.method, "seed": run.seed, "key": run.key, "failed": None,
              "versions": versions(), "device": device_name(run.cfg)}  # fmt: skip
    with _log_to(os.path.join(run.cfg.OUTPUT_DIR, "log.txt")):
        try:
            result.update(_pretrain_and_measure(run, stage, ask))
        except D2SSLError as error:
            result["failed"] = str(error)
    for name in ("*.pth", "last_checkpoint"):  # hundreds of MB, in every run
        for path in glob.glob(os.path.join(glob.escape(stage.OUTPUT_DIR), name)):
            os.remove(path)
    gc.collect()  # trainer and hooks refer to each other; with them go memory and loader processes
    with atomic_open(run.result_file, "w") as file:
        json.dump(result, file, indent=1)
    return result


def _pretrain_and_measure(run: Run, stage, ask: BoxRetrieval) -> dict:
    started = time.perf_counter()
    trainer = PretrainTrainer(stage)
    before = ask(trainer.module.trunk)
    trainer.train()
    after = ask(trainer.module.trunk)
    logged = {name: history.values() for name, history in trainer.storage.histories().items()}
    times = sorted(value for value, _ in logged.get("time", []))
    spread = logged.get("embedding_spread", [(None, 0)])[-1][0]
    return {
        "iterations": stage.SOLVER.MAX_ITER,
        "photo_views": stage.SOLVER.MAX_ITER * run.views_per_step,
        "loss": curve(logged["total_loss"], run.views_per_step),
        "before": before,
        "after": after,
        "seconds_per_view": times[len(times) // 10] / run.views_per_step if times else None,
        "spread": spread if spread is None or math.isfinite(spread) else None,
        "seconds": time.perf_counter() - started,
    }


def curve(history: Sequence[Tuple[float, int]], views_per_step: int) -> List[List[float]]:
    """(loss, iteration) of all iterations -> [photo views, mean loss] of CURVE_POINTS spans."""
    spans = min(CURVE_POINTS, len(history))
    curve = []
    for i in range(spans):
        span = history[len(history) * i // spans : len(history) * (i + 1) // spans]
        middle = statistics.fmean(iteration + 1 for _, iteration in span)
        curve.append([middle * views_per_step, statistics.fmean(loss for loss, _ in span)])
    return curve


@contextlib.contextmanager
def _log_to(path: str) -> Iterator[None]:
    """Log messages, warnings and progress bars go to a file, and not to the terminal."""
    root = logging.getLogger()
    level = root.level
    with open(path, "w") as file, contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)


def progress(runs: Sequence[Run], results: Sequence[Optional[dict]], last: int) -> str:
    """One line on the run that has just ended, and on the time that the others may take.

    Args:
        results: of each run; None: not yet run.
        last: index of the run that has just ended.
    """
    run, result = runs[last], results[last]
    if result["failed"]:
        line = f"{run} failed: {result['failed']}"
    else:
        first, final = (result["loss"][end][1] for end in (0, -1))
        before, after = (100 * result[when]["fpn"] for when in ("before", "after"))
        line = (
            f"{run}: loss {first:.3g} -> {final:.3g}, top-1 {before:.1f} -> {after:.1f} %, "
            f"{result['seconds']:.0f} s"
        )
    waiting = [run for run, result in zip(runs, results) if result is None]
    if not waiting:
        return line
    seconds = seconds_left([r for r in results if r], waiting)
    about = "" if math.isnan(seconds) else f", about {max(1, round(seconds / 60))} min"
    return f"{line}; {len(waiting)} to go{about}"


def seconds_left(results: Iterable[dict], waiting: Iterable[Run]) -> float:
    """What the waiting runs will take, if each takes as long as its method did before, or, where
    there is none yet, as runs did on average; NaN before the first."""
    took: Dict[str, List[float]] = {}
    for result in results:
        if not result["failed"]:
            took.setdefault(result["method"], []).append(result["seconds"])
    everything = [seconds for values in took.values() for seconds in values]
    if not everything:
        return math.nan
    return sum(statistics.fmean(took.get(run.method, everything)) for run in waiting)


def comparison(
    runs: Sequence[Run], results: Sequence[Optional[dict]], ask: BoxRetrieval, **settings
) -> dict:
    """Everything about a comparison, finished or not, as plain values for JSON.

    Args:
        settings: what was asked for: ``command``, ``overrides``, ``photo_views``.
    """
    known = [result for result in results if result]
    return {
        **settings,
        **made_by(known),
        "start": os.path.basename(runs[0].cfg.MODEL.WEIGHTS) or "random weights",
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "retrieval": {
            "heldout": ask.heldout,
            "photos": ask.num_photos,
            "boxes": ask.num_boxes,
            "chance": ask.chance,
            "protocol": protocol(),
        },
        "methods": summarize(known),
        "runs": known,
    }


def summarize(results: Sequence[dict]) -> List[dict]:
    """One dict a method, in order of first appearance, over the seeds that were finished.

    Returns:
        method; ``seeds`` finished and ``failed``, {seed: why}. Where a seed was finished: ``loss``
        [first, last] of the curve, ``spread``, median over seeds, ``seconds_per_view``, the least;
        ``relative_cost``: the latter as a multiple of SoCo's, None without SoCo; ``top1``:
        {feature: {before, after: means, range: [least, most] after, gain: mean over seeds of
        after - before of the same seed, interval: 95 % t interval of the gain, None for one
        seed}}.
    """
    rows = []
    for method in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == method]
        done = [r for r in runs if not r["failed"]]
        failed = {r["seed"]: r["failed"] for r in runs if r["failed"]}
        row = {"method": method, "seeds": [r["seed"] for r in done], "failed": failed}
        if done:
            row["loss"] = [_median(r["loss"][end][1] for r in done) for end in (0, -1)]
            row["spread"] = _median(r["spread"] for r in done)
            costs = [r["seconds_per_view"] for r in done if r["seconds_per_view"]]
            row["seconds_per_view"] = min(costs, default=None)
            row["top1"] = {name: _top1_over_seeds(done, name) for name in done[0]["after"]}
        rows.append(row)
    soco = next((r.get("seconds_per_view") for r in rows if r["method"] == "SoCo"), None)
    for row in rows:
        own = row.get("seconds_per_view")
        row["relative_cost"] = own / soco if own and soco else None
    return rows


def _median(values: Iterable[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _top1_over_seeds(runs: Sequence[dict], feature: str) -> dict:
    before, after = ([r[when][feature] for r in runs] for when in ("before", "after"))
    gain, interval = mean_interval([b - a for a, b in zip(before, after)])
    return {
        "before": statistics.fmean(before),
        "after": statistics.fmean(after),
        "range": [min(after), max(after)],
        "gain": gain,
        "interval": interval,
    }


def mean_interval(
    values: Sequence[float], confidence: float = 0.95
) -> Tuple[float, Optional[List[float]]]:
    """Mean and its two-sided Student t interval [low, high]; None for a single value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None
    half = stdtrit(n - 1, (1 + confidence) / 2) * statistics.stdev(values) / math.sqrt(n)
    return mean, [float(mean - half), float(mean + half)]
