"""A study as files: one page that answers, the answer in Markdown, all numbers as JSON, a row a run
as CSV, two figures."""

import csv
import io
import json
import os
import shlex
import statistics
from typing import Dict, List, Mapping, Optional, Sequence

from detectron2.data import MetadataCatalog
from tabulate import tabulate

from d2ssl.atomic import atomic_open, make_folder
from d2ssl.config import changed, finetune_cfg, method_title
from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.photos import read_photo
from d2ssl.engine.environment import in_words, made_by, made_by_in_words
from d2ssl.evaluation.matches import TASKS
from d2ssl.evaluation.statistics import UNKNOWN
from d2ssl.report import pieces
from d2ssl.report.pictures import (
    SURE,
    draw_objects,
    predictions_file,
    read_predictions,
    side_by_side,
)
from d2ssl.study import plots
from d2ssl.study.findings import Results, describe_worth, gain, how_many, signed
from d2ssl.study.plan import Run, Study, Task, on_all_labels, recipe_differences

SIDE = 300  # of a picture, the longer one, in pixels
FEW_PHOTOS = 200  # of the test: up to here study.json holds what each detection matched
NO_USE = "none"
COLUMNS = ("arm", "budget", "subset", "seed", "segm AP", "bbox AP", "iterations", "seconds",
           "failed")  # fmt: skip


def write_study(
    study: Study,
    results: Results,
    found: dict,
    outcomes: Mapping[Task, Optional[dict]],
    command: str,
) -> str:
    """Write ``study.html``, ``study.md``, ``study.json``, ``runs.csv``, ``curve.png`` and
    ``differences.png``, and for each arm ``final/<arm>.yaml``, which trains it on all labels.

    Args:
        found: see :func:`~d2ssl.study.findings.findings`.
        outcomes: of each task, None where it was not run.
        command: that was typed.
    Returns:
        path of the page.
    """
    make_folder(os.path.join(study.output, "final"))
    runs = [task for task in outcomes if isinstance(task, Run)]
    known = [outcomes[run] for run in runs if outcomes[run]]
    about = describe(study, outcomes, command)
    kept = known
    if results.done and results.num_photos > FEW_PHOTOS:  # each run's own file has them
        kept = [{k: v for k, v in run.items() if k != "matches"} for run in known]
    files: Dict[str, bytes] = {
        "study.json": json.dumps(
            {**about, **found, "runs": kept}, allow_nan=False, separators=(",", ":")
        ).encode(),
        "runs.csv": _csv(known).encode(),
        "study.md": markdown(found).encode(),
    }
    for run in {run.arm: run for run in runs}.values():
        files[_final(run.arm)] = on_all_labels(study, run).dump().encode()
    if found["cells"]:
        files["curve.png"] = plots.plot_efficiency(found["cells"], list(study.arms), "png")
    if found["differences"]:
        files["differences.png"] = plots.plot_differences(
            found["differences"], list(study.arms), "png"
        )
    for name, content in files.items():
        with atomic_open(os.path.join(study.output, name), "wb") as file:
            file.write(content)
    path = os.path.join(study.output, "study.html")
    pieces.write_page(path, "Does it pay?", _sections(study, results, found, about, runs))
    return path


def _final(arm: str) -> str:
    return os.path.join("final", f"{arm}.yaml")


def describe(study: Study, outcomes, command: str) -> dict:
    """What was asked and where it ran."""
    results = [result for result in outcomes.values() if result]
    return {
        "command": command,
        **made_by(results),
        "baseline": study.baseline,
        "train": study.train,
        "test": study.test,
        "budgets": study.budgets,
        "subsets": study.subsets,
        "seeds": study.seeds,
        "effect": study.effect,
        "least": study.least,
        "planned": sum(isinstance(task, Run) for task in outcomes),
        "arms": {
            name: {
                "unlabeled": _use_of_unlabeled(arm),
                "matched": arm.matched,
                "iteration": _iteration([r for r in results if r["arm"] == name]),
                "config": {k: _plain(v) for k, v in changed(arm.cfg).items()},
            }
            for name, arm in study.arms.items()
        },
        "recipe_differences": {
            arm: {key: list(map(_plain, pair)) for key, pair in differences.items()}
            for arm, differences in recipe_differences(study).items()
        },
        "pretrainings": [
            result for task, result in outcomes.items() if result and not isinstance(task, Run)
        ],
    }


def _iteration(results: List[dict]) -> Dict[str, float]:
    """Seconds of an iteration of ``pretraining`` and of ``finetuning``, means over what is done."""
    done = [r for r in results if not r["failed"]]
    kinds = {"pretraining": [r for r in done if "budget" not in r],
             "finetuning": [r for r in done if "budget" in r]}  # fmt: skip
    return {
        kind: statistics.fmean(
            (r["seconds"] - r.get("labelling", 0.0)) / r["iterations"] for r in rows
        )
        for kind, rows in kinds.items()
        if rows
    }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _use_of_unlabeled(arm) -> str:
    """What an arm does with photos without labels, in words."""
    cfg, uses = arm.cfg, []
    if arm.pretrains:
        solver = cfg.SSL.SOLVER
        uses.append(
            f"{method_title(cfg)}, {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} photos"
        )
    if cfg.SSL.SELF_TRAINING.ENABLED:
        times = ", ".join(f"{share:.0%}" for share in cfg.SSL.SELF_TRAINING.AT)
        uses.append(f"self-training, labelled after {times} of fine-tuning")
    return "; ".join(uses) or NO_USE


def _csv(runs: Sequence[dict]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for run in runs:
        ap = run.get("ap", {})
        names = ("arm", "budget", "subset", "seed")
        writer.writerow(
            [*(run[n] for n in names), *(ap.get(what, "") for what in TASKS),
             run.get("iterations", ""), run.get("seconds", ""), run["failed"] or ""]
        )  # fmt: skip
    return out.getvalue()


def markdown(found: dict) -> str:
    """The answer as a table and sentences, to be pasted.

    Args:
        found: see :func:`~d2ssl.study.findings.findings`; what ``study.json`` holds will do.
    """
    cells = {(cell["arm"], cell["budget"]): cell for cell in found["cells"]}
    arms, budgets = (dict.fromkeys(key[i] for key in cells) for i in (0, 1))
    rows = [
        [arm, *(_ap(cells[arm, b]["segm"]) if (arm, b) in cells else "" for b in budgets)]
        for arm in arms
    ]
    table = tabulate(
        rows, ["segm AP", *(f"{b} labels" for b in budgets)], "github", disable_numparse=True
    )
    sentences = (sentence.partition(". ") for sentence in found["answer"])
    return "\n".join([table, "", *(f"- **{head}.** {rest}" for head, _, rest in sentences)]) + "\n"


# ---- the page; each function returns HTML


def _sections(study: Study, results: Results, found: dict, about: dict, runs) -> List[str]:
    arms = list(study.arms)
    if not found["cells"]:
        return [
            pieces.heading("Does it pay?"),
            pieces.line("Not one run is finished yet."),
            _failures(found),
        ]
    return [
        pieces.heading("Does it pay?"),
        _answer(found, about),
        _facts(study, results, about),
        pieces.heading("AP over labels", 2),
        pieces.plots([("Masks", plots.plot_efficiency(found["cells"], arms)),
                      ("Boxes", plots.plot_efficiency(found["cells"], arms, what="bbox"))]),
        _ap_table(found),
        pieces.heading("With and without", 2),
        _one("Paired difference, and above it that of each repeat",
             plots.plot_differences(found["differences"], arms)),
        _difference_table(found),
        _how_to_read(study, found, about),
        _convergence(found, arms),
        _sweep(found, arms),
        _photos(study, found, runs),
        _arms(study, about, runs),
        _failures(found),
        pieces.heading("Run it again", 2),
        pieces.folded("Command and versions", pieces.verbatim(_again(about))),
    ]  # fmt: skip


def _answer(found: dict, about: dict) -> str:
    done = sum(cell["runs"] for cell in found["cells"])
    unfinished = about["planned"] - done - len(found["failed"])
    parts = []
    if unfinished:
        parts.append(pieces.line(f"{unfinished} of {about['planned']} runs are still to come."))
    if not found["answer"]:
        parts.append(
            pieces.line(
                "No arm with unlabelled photos is finished beside the same without them yet."
                if any(arm["unlabeled"] != NO_USE for arm in about["arms"].values())
                else "No arm uses unlabelled photos, so whether they pay is not asked."
            )
        )
    for sentence in found["answer"]:
        head, _, rest = sentence.partition(". ")
        parts.append(pieces.paragraph(rest, f"{head}."))
    return "".join(parts)


def _facts(study: Study, results: Results, about: dict) -> str:
    photos = pieces.count(results.num_photos, "photo")
    return pieces.facts(
        [
            ("Tested on", f"{study.test} ({photos}), once per run"),
            ("Labels from", f"{study.train} ({pieces.count(study.total, 'photo')})"),
            ("Repeats", _repeats(study)),
            ("Device", "; ".join(about["devices"])),
            ("Versions", "; ".join(map(in_words, about["versions"]))),
        ]
    )  # fmt: skip


def _repeats(study: Study) -> str:
    if _only_all(study):
        return pieces.count(len(study.subsets) * study.seeds, "seed")
    subsets = pieces.count(len(study.subsets), "subset")
    return f"{subsets} of the labels, {pieces.count(study.seeds, 'seed')} each"


def _only_all(study: Study) -> bool:
    """Whether no choice of labels is left in it."""
    return study.budgets == [study.total]


def _ap_table(found: dict) -> str:
    rows = [
        [cell["arm"], str(cell["budget"]), str(cell["runs"]), *(_ap(cell[w]) for w in TASKS),
         str(cell["iterations"]), f"{cell['pretraining'] / 60:.1f} + {cell['seconds'] / 60:.1f}"]
        for cell in found["cells"]
    ]  # fmt: skip
    head = ["", "labels", "runs", "segm AP", "bbox AP", "iterations", "minutes"]
    return pieces.table(head, rows, main=3) + pieces.line(
        "minutes: of pretraining, which all budgets of a seed share, and of fine-tuning."
    )


def _ap(estimate: dict) -> str:
    if estimate["interval"] is None:
        return f"{estimate['mean']:.1f}"
    low, high = estimate["interval"]
    return f"{estimate['mean']:.1f} [{low:.1f}, {high:.1f}]"


def _one(caption: str, figure: bytes) -> str:
    return pieces.block("one", pieces.plots([(caption, figure)])) if figure else ""


def _difference_table(found: dict) -> str:
    rows = [
        [
            d["arm"], d["against"], str(d["budget"]), gain(d["segm"]), gain(d["bbox"]),
            gain(d["control"]) if d["control"] and "mean" in d["control"] else "–",
            describe_worth(d["worth"]) or "–", _more(d) if d["verdict"] else "",
            d["verdict"] or "",
        ]
        for d in found["differences"]
    ]  # fmt: skip
    head = ["", "over", "labels", "segm AP", "bbox AP", "segm AP over its control"]
    head += ["worth labels", "repeats", "verdict"]
    return pieces.table(head, rows, main=3, kind="dense")


def _more(difference: dict) -> str:
    units, more = difference["segm"]["units"], difference["more"]
    if difference["blank"] or difference["verdict"] != UNKNOWN:
        return str(units)
    if units == 1:
        return "1, too few"
    return f"{units}, " + ("enough" if more == 0 else how_many(more) if more else "no use")


def _how_to_read(study: Study, found: dict, about: dict) -> str:
    lines = [
        "Brackets are 95 % intervals over subsets, seeds and test photos. Differences are paired: "
        "the same labels, the same seed, the same photos on both sides.",
        "pays: above 0 beyond chance, over the same arm without unlabelled photos and over its "
        "control: longer fine-tuning that took the same time, or, of self-training without such an "
        "arm, as many iterations, which leaves out the time of labelling. does not pay: less than "
        f"{study.least:g} AP beyond chance, over the one or the other. Else, without a control and "
        "where a run of the arm failed, it cannot be told yet.",
        "Fix the number of repeats beforehand: who looks after each and stops when it pays is "
        "wrong in some 8 of 100 studies of ten repeats, instead of in 2 or 3, when there is no "
        "gain.",
        "worth labels: how many the other arm needs for the same AP, read from its curve between "
        "its smallest and its largest budget.",
        "repeats: how many there are, and about how many more it would take to see a difference of "
        f"{study.effect:g} AP in 80 of 100 studies; no use: with so few test photos no number "
        "would show it.",
    ]
    if study.total in study.budgets:
        lines.append(
            f"With all {study.total} labels there is no choice of them: intervals say what other "
            "seeds and test photos would give."
        )
    if not _only_all(study):
        lines.append(
            "There is one subset of labels, so the intervals say what other seeds would give, not "
            "what other labels would."
            if len(study.subsets) == 1
            else f"Subsets are drawn from the same {study.total} photos: the larger the budget, "
            "the more they are alike."
        )
    if len(about["devices"]) > 1:
        lines.append(
            "Not all runs were made on the same kind of device: the two sides of a difference may "
            "be of different ones, which round differently."
        )
    if len(found["differences"]) > 1:
        lines.append(
            f"{len(found['differences'])} differences are shown: by chance alone one in twenty "
            "such intervals leaves out 0."
        )
    return "".join(map(pieces.line, lines))


def _by_budget(series: Sequence[dict], column: int) -> Dict[int, Dict[str, List]]:
    lines: Dict[int, Dict[str, List]] = {}
    for entry in series:
        points = [(row[0], row[column]) for row in entry["points"]]
        lines.setdefault(entry["budget"], {})[entry["arm"]] = points
    return lines


def _convergence(found: dict, arms: Sequence[str]) -> str:
    figure = plots.plot_panels(
        _by_budget(found["curves"], 1), arms, "iteration", "segm AP, dev photos (%)", "o"
    )
    if not figure:
        return ""
    measured = [c for c in found["curves"] if len(c["points"]) > 1]
    steps = {f"{c['arm']} with {c['budget']} labels": c["points"][-1][1] - c["points"][-2][1]
             for c in measured}  # fmt: skip
    rising = [f"{name} ({signed(step)})" for name, step in steps.items() if step > 1]
    unknown = {c["budget"] for c in found["curves"] if not c["points"]}
    lines = [
        f"On average still rising by more than 1 AP at the last step: {', '.join(rising)}. A "
        "longer schedule may change the answer."
        if rising
        else "On average no arm rises by more than 1 AP at the last step."
        if measured
        else "",
        f"Not known with {', '.join(map(str, sorted(unknown)))} labels: no photo is left for it."
        if unknown
        else "",
    ]
    return (
        pieces.heading("Who converges, and when", 2)
        + _one("On the dev photos, which are in no budget shown here", figure)
        + "".join(map(pieces.line, filter(None, lines)))
    )


def _sweep(found: dict, arms: Sequence[str]) -> str:
    panels = [
        (name, plots.plot_panels(_by_budget(found["sweeps"], column), arms, "score", label))
        for column, name, label in (
            (3, "F1 of masks at an IoU of 0.5", "F1"),
            (1, "Precision", "precision"),
            (2, "Recall", "recall"),
            (4, "AP of what is kept", "segm AP (%)"),
        )
    ]
    return (
        pieces.heading("Which score to cut at", 2)
        + pieces.line("Predictions below the score are dropped. To choose one, use photos that "
                      "are not the test's.")
        + pieces.plots(panels)
    )  # fmt: skip


def _photos(study: Study, found: dict, runs: Sequence[Run]) -> str:
    """Labels, the other arm and the arm side by side; only where the predictions still lie."""
    figures: Dict[str, List[str]] = {}
    metadata = MetadataCatalog.get(study.test)
    photos = {photo["image_id"]: photo for photo in listed(study.test)}
    for change in found["photos"]:
        files = [
            predictions_file(finetune_cfg(run.cfg))
            for arm in (change["against"], change["arm"])
            for run in runs
            if (run.arm, run.budget) == (arm, change["budget"])
            and [run.subset, run.seed] == change["repeat"]
        ]
        if not all(map(os.path.isfile, files)):
            continue
        photo = next(iter(decoded(study.test, [photos[change["photo"]]])))
        image, name = read_photo(photo["file_name"]), os.path.basename(photo["file_name"])
        predicted = [
            read_predictions(file, metadata, SURE).get(photo["image_id"], []) for file in files
        ]
        drawn = [
            draw_objects(image, objects, metadata, SIDE)
            for objects in (photo.get("annotations", []), *predicted)
        ]
        caption = f"{name}: segm AP {change['before']:.0f} → {change['after']:.0f}"
        title = f"{change['against']} → {change['arm']}, {change['budget']} labels"
        figures.setdefault(title, []).append(pieces.figure(side_by_side(drawn), caption))
    if not figures:
        return ""
    out = pieces.heading("The photos that changed most", 2) + pieces.line(
        "Labels, the arm without unlabelled photos, and with them: predictions of one repeat with "
        f"a score of at least {100 * SURE:.0f} %. AP of the photo alone, mean over the repeats."
    )
    for title, pictures in figures.items():
        out += pieces.heading(title, 3) + pieces.block("photos", *pictures)
    return out


def _arms(study: Study, about: dict, runs: Sequence[Run]) -> str:
    rows = []
    for name, arm in study.arms.items():
        start = os.path.basename(arm.cfg.MODEL.WEIGHTS) or "random weights"
        note = f"fine-tunes for the total time of {arm.matched}" if arm.matched else ""
        rows.append([name, start, about["arms"][name]["unlabeled"], note])
    out = pieces.heading("The arms", 2) + pieces.table(
        ["", "starts from", "unlabelled photos", ""], rows, kind="words"
    )
    for name, differences in about["recipe_differences"].items():
        for key, (value, other) in differences.items():
            out += pieces.line(
                f"{key} is {value} in {name} and {other} in the arm it is compared with: that is "
                "compared, too."
            )
    names = {run.arm: None for run in runs}
    files = (shlex.quote(os.path.join(study.output, _final(name))) for name in names)
    return out + pieces.folded(
        f"Train one on all {study.total} labels",
        pieces.verbatim("\n".join(f"tools/train_net.py --config-file {file}" for file in files)),
    )


def _failures(found: dict) -> str:
    if not found["failed"]:
        return ""
    rows = [
        [f"{r['arm']}, {r['budget']} labels, subset {r['subset']}, seed {r['seed']}", r["failed"]]
        for r in found["failed"]
    ]
    return pieces.heading("Runs that failed", 2) + pieces.table(["", ""], rows, kind="words")


def _again(about: dict) -> str:
    took = [
        f"{name}: {seconds:.3f} s an iteration of {kind}"
        for name, arm in about["arms"].items()
        for kind, seconds in arm["iteration"].items()
    ]
    return "\n".join([about["command"], made_by_in_words(about), "", *took])
