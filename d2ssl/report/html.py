"""One self-contained page about a run: what it was, its AP, its curves, its pictures."""

import json
import math
import os
from typing import Dict, Sequence

from PIL import Image

from d2ssl.config import changed, finetune_cfg, method_title, pretrain_cfg, pretrained_path
from d2ssl.data.build import count_photos, load_dicts
from d2ssl.engine.environment import device_name, in_words, versions
from d2ssl.engine.handoff import methods_of, read_record
from d2ssl.engine.self_training import label_files
from d2ssl.report import pieces, plots
from d2ssl.report.pictures import SURE, compare_predictions, predictions_file, show_own_labels

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SMALL_TEST_SET = 200  # photos; COCO's own validation set has 5000


def write_report(cfg) -> str:
    """Write ``report.html`` about the run that ``cfg`` describes, from what lies in its folder.

    A stage that has not been run is left out with a line that says so.

    Args:
        cfg: the user's config, see :func:`d2ssl.config.load_cfg`; its data sets are registered.
    Returns:
        path of the page.
    """
    body = [_headline(cfg), _results(cfg), _pretraining(cfg), _finetuning(cfg), _settings(cfg)]
    title = f"{_method(cfg)} on {', '.join(cfg.DATASETS.TRAIN)}"
    path = os.path.join(cfg.OUTPUT_DIR, "report.html")
    pieces.write_page(path, title, body)
    return path


# Sections. Each returns HTML.


def _headline(cfg) -> str:
    facts = []
    if cfg.SSL.ENABLED:
        pretrain = pretrain_cfg(cfg).SOLVER
        facts += [
            ("Pretrained on", _sets(cfg.SSL.DATASETS)),
            ("Pretraining", f"{method_title(cfg)}, {cfg.SSL.PRECISION}, "
                            + _of_photos(pretrain.MAX_ITER, pretrain.IMS_PER_BATCH)),
        ]  # fmt: skip
    if cfg.SSL.SELF_TRAINING.ENABLED:
        times = ", ".join(f"{share:.0%}" for share in cfg.SSL.SELF_TRAINING.AT)
        facts.append(
            ("Labels by itself", f"the rest of {_sets(cfg.SSL.DATASETS)}, after {times} of it")
        )
    facts += [
        ("Fine-tuned on", _sets(cfg.DATASETS.TRAIN)),
        ("Fine-tuning", f"{'bf16' if cfg.SOLVER.AMP.ENABLED else 'fp32'}, "
                        + _of_photos(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH)),
        ("Tested on", _sets(cfg.DATASETS.TEST)),
        ("Started from", os.path.basename(cfg.MODEL.WEIGHTS) or "random weights"),
        ("Network", _network(cfg)),
        ("Seed", cfg.SEED),
        ("Device", device_name(cfg)),
        ("Versions", in_words(versions())),
    ]  # fmt: skip
    return pieces.heading(_method(cfg)) + pieces.facts(facts)


def _results(cfg) -> str:
    path = os.path.join(finetune_cfg(cfg).OUTPUT_DIR, "results.json")
    head = pieces.heading("Average precision", 2)
    if not os.path.isfile(path):
        return head + pieces.line("Not evaluated yet.")
    with open(path) as file:
        results = json.load(file)["results"]
    # Detectron2 puts the set's name around the results when there are several sets.
    parts, several = [head], len(cfg.DATASETS.TEST) > 1
    for name, tasks in results.items() if several else [(cfg.DATASETS.TEST[0], results)]:
        if several:
            parts.append(pieces.heading(name, 3))
        parts.append(_ap_table(tasks))
        parts.append(_small_set_note(name.removesuffix("_TTA")))
    return "\n".join(filter(None, parts))


def _ap_table(tasks: Dict[str, Dict[str, float]]) -> str:
    names = {
        "segm": "Masks",
        "bbox": "Boxes",
        "segm_TTA": "Masks, augmented (TTA)",
        "bbox_TTA": "Boxes, augmented (TTA)",
        "open_images_segm": "Masks, by the challenge",
        "open_images_bbox": "Boxes, by the challenge",
    }
    rows, classes = [], []
    for task in sorted(tasks, key=lambda t: t != "segm"):
        metrics = tasks[task]
        rows.append([names.get(task, task), *(_number(metrics.get(c)) for c in AP_COLUMNS)])
        for key, value in metrics.items():
            if key.startswith(("AP-", "AP50-")):
                what, _, name = key.partition("-")
                classes.append([name, f"{names.get(task, task)}, {what}", _number(value)])
    out = pieces.table(["", *AP_COLUMNS], rows, main=1)
    if any(metrics.get("AP") is None and "AP" in metrics for metrics in tasks.values()):
        out += pieces.line("The detector predicted nothing that could be evaluated; read – as 0.")
    elif any(cell == "–" for row in rows for cell in row):
        out += pieces.line(
            "– : the test set has no object of that size (COCO: small under 32², large over 96² "
            "pixels)."
        )
    if classes:
        out += pieces.folded("By class", pieces.table(["", "", ""], classes))
    return out


def _small_set_note(name: str) -> str:
    if count_photos([name]) >= SMALL_TEST_SET:
        return ""
    dicts = load_dicts([name])
    objects = sum(len(d.get("annotations", [])) for d in dicts)
    return pieces.line(
        f"{pieces.count(len(dicts), 'photo')}, {pieces.count(objects, 'object')}: differences of a "
        "few AP between single runs are noise. Compare means over several seeds."
    )


def _pretraining(cfg) -> str:
    head = pieces.heading("Pretraining", 2)
    if not cfg.SSL.ENABLED:
        return head + pieces.line("Switched off (SSL.ENABLED False): plain fine-tuning.")
    stage = pretrain_cfg(cfg)
    metrics = plots.read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json"))
    if not metrics:
        return head + pieces.line("Not run yet.")
    figures = [
        ("Loss", plots.plot_losses(metrics, read_record(pretrained_path(cfg)).get("loss_range"))),
        ("Spread of the embeddings: near 1 is healthy, 0 is collapse",
         plots.plot_spread(metrics)),
        ("Learning rate", plots.plot_learning_rate(metrics)),
    ]  # fmt: skip
    return head + pieces.plots(figures) + _sheets(stage) + _hand_off(cfg)


def _sheets(stage) -> str:
    return (
        _sheet(
            stage,
            "views.png",
            "What the network sees",
            "Views of the first photos. Where views share boxes, a box has the same number and "
            "colour in both.",
            "views of the first photos",
        )
        + _sheet(
            stage,
            "matches.png",
            "What it is told is the same",
            "Two views of a photo side by side. What has the same number and colour in both is one "
            "thing to the loss, and the network learns to describe it alike. Of cells only a few "
            "are shown, of one level; where the method matches them by their features, as the "
            "network saw them before training.",
            "what is the same in two views of a photo",
        )
        + _sheet(
            stage,
            "reconstructions.png",
            "What the network makes of it",
            "What was given, what was predicted, and the view that it was taken from.",
            "what the network made of the first photos",
        )
    )


def _sheet(stage, name: str, title: str, text: str, alt: str) -> str:
    """A picture that the stage left; nothing where it left none."""
    path = os.path.join(stage.OUTPUT_DIR, name)
    if not os.path.isfile(path):
        return ""
    with Image.open(path) as image:
        picture = pieces.picture(image.convert("RGB"), alt)
    return pieces.heading(title, 3) + pieces.line(text) + pieces.block("scroll", picture)


def _hand_off(cfg) -> str:
    path = pretrained_path(cfg)
    record = read_record(path)
    head = pieces.heading("Hand-off", 3)
    if not record:
        return head + pieces.line("No weights were handed off yet.")
    facts = [
        ("File", os.path.relpath(path, cfg.OUTPUT_DIR)),
        ("Tensors", record["tensors"]),
        ("Method", " after ".join(reversed(methods_of(record)))),
        ("Trained parts", ", ".join(record.get("trained", []))),
        ("Started from", record.get("initial_weights")),
        ("Photos", f"{record.get('num_photos')} of {', '.join(record.get('datasets', []))}"),
        ("Length", _of_photos(record.get("iterations"), record.get("photos_per_iteration"))),
        ("Seed", record.get("seed")),
        ("Versions", in_words(record.get("versions", {}))),
    ]
    conventions = "\n".join(f"{k}: {v}" for k, v in record.get("config", {}).items())
    folded = pieces.folded("Conventions that these weights need", pieces.verbatim(conventions))
    return head + pieces.facts(facts) + folded


def _finetuning(cfg) -> str:
    head = pieces.heading("Fine-tuning", 2)
    stage = finetune_cfg(cfg)
    metrics = plots.read_metrics(os.path.join(stage.OUTPUT_DIR, "metrics.json"))
    if not metrics:
        return head + pieces.line("Not run yet.")
    figures = [
        ("Loss", plots.plot_losses(metrics)),
        (f"AP on the {plots.watched(metrics)} photos", plots.plot_ap(metrics)),
        ("Learning rate", plots.plot_learning_rate(metrics)),
    ]
    return head + pieces.plots(figures) + _own_labels(stage) + _predictions(stage)


def _own_labels(stage) -> str:
    """Of self-training: the labels that it went on with last."""
    files = label_files(stage.OUTPUT_DIR) if stage.SSL.SELF_TRAINING.ENABLED else []
    if not files:
        return ""
    pictures, (used, photos, objects) = show_own_labels(files[-1], stage.DATASETS.TRAIN[0])
    figures = [
        pieces.figure(shown.image, f"{shown.name}: {shown.sure} taken, {shown.unsure} hidden")
        for shown in pictures
    ]
    options = stage.SSL.SELF_TRAINING
    return (
        pieces.heading("What the detector labelled itself", 3)
        + pieces.line(
            f"In colour what it took for labels (a score of at least {options.SCORE:.0%}); what it "
            f"was unsure of (at least {options.UNSURE:.0%}) is hidden and was painted over. "
            f"{pieces.count(objects, 'object')} on {used} of {pieces.count(photos, 'photo')}, the "
            f"others were left out; {os.path.basename(files[-1])} has all, in COCO's format."
        )
        + pieces.block("photos", *figures)
    )


def _predictions(stage) -> str:
    # The results are removed when a stage starts over; older predictions may still lie there.
    evaluated = os.path.isfile(os.path.join(stage.OUTPUT_DIR, "results.json"))
    if not evaluated or not os.path.isfile(predictions_file(stage)):
        return ""
    figures = [pieces.figure(shown.image, shown.caption) for shown in compare_predictions(stage)]
    return (
        pieces.heading("Labels and predictions", 3)
        + pieces.line(
            f"Left: labels. Right: predictions with a score of at least {100 * SURE:.0f} %."
        )
        + pieces.block("photos", *figures)
    )


def _settings(cfg) -> str:
    keys = "\n".join(f"{k}: {v}" for k, v in changed(cfg).items() if k.startswith("SSL."))
    return (
        pieces.heading("Settings", 2)
        + pieces.folded("SSL keys that differ from their defaults", pieces.verbatim(keys or "none"))
        + pieces.line("config.yaml in the output folder holds all keys.")
    )


# What the run was, in words.


def _method(cfg) -> str:
    detector = "self-trained Mask R-CNN" if cfg.SSL.SELF_TRAINING.ENABLED else "Mask R-CNN"
    if cfg.SSL.ENABLED:
        return f"{method_title(cfg)} pretraining, then {detector}"
    return f"{detector[0].upper()}{detector[1:]} without pretraining"


def _sets(names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({pieces.count(count_photos([name]), 'photo')})" for name in names)


def _network(cfg) -> str:
    model = cfg.MODEL
    if "resnet" in model.BACKBONE.NAME:
        return f"ResNet-{model.RESNETS.DEPTH}" + (" + FPN" if "fpn" in model.BACKBONE.NAME else "")
    return model.BACKBONE.NAME


def _of_photos(iterations: int, photos: int) -> str:
    return f"{iterations} iterations of {photos} photos"


def _number(value) -> str:
    return "–" if value is None or not math.isfinite(value) or value < 0 else f"{value:.1f}"
