"""One self-contained page about data sets before they are trained on, and the same in few words."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence

import matplotlib
import numpy as np
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from tabulate import tabulate

from d2ssl.atomic import make_folder
from d2ssl.data.checks import ERROR, SEVERITIES, CheckedSet, Finding
from d2ssl.data.datasets.catalog import decoder
from d2ssl.data.photos import read_photo
from d2ssl.data.scales import CANONICAL_SIZE, LEVELS, finetune_scale, fpn_levels, view_scales
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods import PRETEXT_REGISTRY
from d2ssl.modeling.trunk import canonical_size_in_views
from d2ssl.report import pieces
from d2ssl.report.pictures import SIDE, describe_labels, draw_labels
from d2ssl.report.plots import BLUE, GREY, ORANGE, STYLE, svg, tidy

COCO_SIZES = (32, 96)  # px: small, medium, large
MOST_ROWS = 100  # of one kind of finding
MOST_PICTURES = 8  # of findings
MOST_CLASSES = 30  # that are not folded away
ALIKE = 1.25  # sizes that differ by less than this factor are called alike


def write_dataset_page(path: str, sets: Sequence[CheckedSet], cfg) -> None:
    """
    Args:
        path: of the page; its folder is made where it is missing.
        sets: what :func:`d2ssl.data.checks.check_sets` found.
        cfg: its INPUT says how large photos are in fine-tuning, its SSL node what pretraining
            sees.
    """
    make_folder(os.path.dirname(path))
    title = ", ".join(one.name for one in sets)
    body = [
        pieces.heading(title),
        pieces.paragraph("", verdict(sets)),
        _findings(sets),
        _contents(sets),
        _classes(sets),
        _sizes(sets, cfg),
        *(_photos(one) for one in sets),
    ]
    pieces.write_page(path, title, body)


def verdict(sets: Sequence[CheckedSet]) -> str:
    errors = sum(finding.severity == ERROR for finding in _all(sets))
    return f"Not safe to train on: {pieces.count(errors, 'error')}." if errors else (
        "Safe to train on: no error was found."
    )  # fmt: skip


def summary(sets: Sequence[CheckedSet], cfg) -> str:
    """The page in a few lines of plain text."""
    lines = [tabulate(_rows(sets), tablefmt="plain", disable_numparse=True)]
    for findings in _by_kind(sets):
        one = findings[0]
        where = ": ".join(filter(None, (one.file, one.detail)))
        lines += ["", f"{one.severity}: {one.what} ({len(findings)})"]
        lines += [f"  {'' if len(findings) == 1 else 'first: '}{where}"] if where else []
        lines += [f"  -> {one.fix}"]
    for one in sets:
        said = _mismatch(one, cfg)
        lines += ["", f"{one.name}: {said}"] if said else []
    return "\n".join([*lines, "", verdict(sets)])


def _all(sets: Sequence[CheckedSet]) -> Iterator[Finding]:
    return (finding for one in sets for finding in one.findings)


def _by_kind(sets: Sequence[CheckedSet]) -> list[list[Finding]]:
    """Findings of one kind together, errors first."""
    kinds: dict[tuple, list[Finding]] = {}
    for finding in _all(sets):
        kinds.setdefault((SEVERITIES.index(finding.severity), finding.what), []).append(finding)
    return [kinds[key] for key in sorted(kinds)]


# Sections. Each returns HTML.


def _findings(sets: Sequence[CheckedSet]) -> str:
    rows = []
    for findings in _by_kind(sets):
        for one in findings[:MOST_ROWS]:
            what = ": ".join(filter(None, (one.what, one.detail)))
            rows.append((one.severity, what, one.file or "–", one.fix))
        if len(findings) > MOST_ROWS:
            more = f"{len(findings) - MOST_ROWS} more: {findings[0].what}"
            rows.append((findings[0].severity, more, "–", findings[0].fix))
    head = pieces.heading("Findings", 2)
    if not rows:
        return head + pieces.line("None.")
    table = pieces.table(("", "what", "file", "what to do"), rows, main=0, kind="words")
    return head + table + _found_photos(sets)


def _contents(sets: Sequence[CheckedSet]) -> str:
    head, *rows = _rows(sets)
    return pieces.heading("Contents", 2) + pieces.table(head, rows)


def _rows(sets: Sequence[CheckedSet]) -> list[list[str]]:
    """Head and a row a set: what is in it."""
    sizes = ["smallest photo", "median", "largest"]
    rows = [["set", "photos", "labelled", "objects", "classes", "crowds", *sizes]]
    for one in sets:
        objects = one.kind == "objects"
        labelled = sum(bool(x.classes or x.crowds) for x in one.labels)
        count = str(sum(len(x.classes) for x in one.labels)) if objects else "–"
        crowds = str(sum(x.crowds for x in one.labels)) if objects else "–"
        classes = str(len(one.class_counts())) if one.kind else "–"
        photos = str(len(one.dicts))
        rows.append([one.name, photos, str(labelled), count, classes, crowds, *_photo_sizes(one)])
    return rows


def _photo_sizes(checked: CheckedSet) -> list[str]:
    """Width and height of the smallest, a median and the largest photo."""
    sizes = sorted((look.size for look in checked.looks if look.size), key=np.prod)
    if not sizes:
        return ["–"] * 3
    return [f"{width}x{height}" for height, width in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]


def _classes(sets: Sequence[CheckedSet]) -> str:
    sets = [one for one in sets if one.kind]
    if not sets:
        return ""
    counted = {"objects": "objects", "photo": "photos", "pixels": "photos that show it"}
    names = max((one.classes for one in sets), key=len)
    counts = [one.class_counts() for one in sets]
    number = max(map(len, counts))
    rows = [
        [
            names[i] if i < len(names) else f"class {i}",
            *(column[i] if i < len(column) else 0 for column in counts),
        ]
        for i in range(number)
    ]
    rows.sort(key=lambda row: -sum(row[1:]))
    head = ["", *(f"{one.name}: {counted[one.kind]}" for one in sets)]
    out = pieces.heading("Classes", 2) + pieces.bars(head, rows[:MOST_CLASSES])
    if number > MOST_CLASSES:
        rest = pieces.bars(head, rows[MOST_CLASSES:])
        out += pieces.folded(f"{number - MOST_CLASSES} rarer classes", rest)
    return out


def _sizes(sets: Sequence[CheckedSet], cfg) -> str:
    sets = [one for one in sets if any(labels.sides for labels in one.labels)]
    if not sets:
        return ""
    least, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    low, high = COCO_SIZES
    scaled = f"short side {least} px, long side at most {most} px" if least else "not scaled"
    out = pieces.heading("Sizes of objects", 2) + pieces.line(
        "The size of an object is the square root of its box's area; in the photo, of its mask's: "
        f"APs, APm and APl are of objects under {low}, {low} to {high} and over {high} px there. "
        f"In fine-tuning photos are {scaled} (INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST)."
    )
    if cfg.SSL.ENABLED:
        out += pieces.line(
            f"From P{LEVELS[0]} to P{LEVELS[-1]}: the level of the pyramid that Detectron2 pools "
            "an object from. Pretext methods with boxes scale that rule with SSL.INPUT.VIEW_SIZE, "
            "so that an object trains about the level that sees it later: in pretraining P4 begins "
            f"at {pretrain_canonical_size(cfg)} px, not at {CANONICAL_SIZE} px."
        )
    bins = _bins(np.concatenate([sides for one in sets for _, sides, _ in _plotted(one, cfg)]))
    for one in sets:
        said = _mismatch(one, cfg)
        out += pieces.heading(one.name, 3) + (pieces.paragraph(said) if said else "")
        caption = "Objects by size, and the level that they are pooled from in fine-tuning"
        plot = pieces.plots([(caption, _plot(one, cfg, bins))])
        out += pieces.block("one", plot) + _size_table(one, cfg) + _level_table(one, cfg)
    return out


def _size_table(checked: CheckedSet, cfg) -> str:
    _, areas, _ = checked.objects()
    rows = [_quantiles("in the photo", np.sqrt(areas))]
    rows += [_quantiles(name, sides) for name, sides in _appearances(checked, cfg)]
    low, high = COCO_SIZES
    head = ["size in px", "median", "10 %", "90 %", f"under {low}", f"{low} to {high}",
            f"over {high}"]  # fmt: skip
    return pieces.table(head, rows, main=1)


def _quantiles(name: str, sides: np.ndarray) -> list[str]:
    low, high = COCO_SIZES
    shares = (sides < low).mean(), ((sides >= low) & (sides <= high)).mean(), (sides > high).mean()
    quantiles = np.quantile(sides, (0.5, 0.1, 0.9))
    return [name, *(f"{x:.0f}" for x in quantiles), *(f"{share:.0%}" for share in shares)]


def _level_table(checked: CheckedSet, cfg) -> str:
    columns = _plotted(checked, cfg)
    levels = [fpn_levels(sides, canonical) for _, sides, canonical in columns]
    bounds = [CANONICAL_SIZE * 2 ** (level - 4) for level in LEVELS]
    rows = []
    for level, low, high in zip(LEVELS, [0, *bounds[1:]], [*bounds[1:], None]):
        name = f"P{level}: {low:g} to {high:g} px" if high else f"P{level}: from {low:g} px"
        rows.append([name, *(f"{(found == level).mean():.0%}" for found in levels)])
    return pieces.table(["level", *(name for name, _, _ in columns)], rows)


def _found_photos(sets: Sequence[CheckedSet]) -> str:
    """Pictures of the first photos that errors and warnings are about."""
    figures, seen = [], set()
    for severity in SEVERITIES[:2]:
        for one in sets:
            about = {file: i for i, file in enumerate(one.files)}
            for finding in one.findings:
                case = finding.file, finding.what
                if finding.severity != severity or not finding.file or case in seen:
                    continue
                if len(figures) == MOST_PICTURES or not one.looks[about[finding.file]].size:
                    continue
                seen.add(case)
                caption = f"{finding.severity}: {finding.what}; {finding.detail}".rstrip("; ")
                figures.append(_figure(one, about[finding.file], caption, finding.other))
    if not figures:
        return ""
    return pieces.heading("Some of them", 3) + pieces.block("sheet", *figures)


def _photos(checked: CheckedSet) -> str:
    figures = [
        _figure(checked, i) for i, look in enumerate(checked.looks) if look.picture is not None
    ]
    if not figures:
        return ""
    return pieces.heading(f"Photos of {checked.name}", 2) + pieces.block("sheet", *figures)


def _figure(checked: CheckedSet, index: int, caption: str = "", other: str = "") -> str:
    """A photo of a set with the labels that can be right; above it the one it is the same as."""
    entry, picture = checked.dicts[index], checked.looks[index].picture
    metadata, file = MetadataCatalog.get(checked.name), entry["file_name"]
    picture = read_photo(file) if picture is None else picture
    decode = decoder(checked.name)
    try:
        entry = decode(entry) if decode else entry
        words = caption or describe_labels(entry, metadata)
        if "annotations" in entry:
            sound = [entry["annotations"][i] for i in checked.labels[index].sound]
            entry = {**entry, "annotations": sound}
        drawn = draw_labels(entry, picture, metadata, SIDE)
    except D2SSLError:  # is among the findings
        words, drawn = caption or "labels cannot be read", draw_labels({}, picture, metadata, SIDE)
    figure = pieces.figure(drawn, f"{os.path.basename(file)}: {words}")
    if other:
        first = draw_labels({}, read_photo(other), metadata, SIDE)
        figure = pieces.figure(first, os.path.basename(other)) + figure
    return figure


# How large objects appear


def pretrain_canonical_size(cfg) -> int:
    """Size of an object that is pooled from level 4 in pretraining, in px of the view."""
    return canonical_size_in_views(cfg, CANONICAL_SIZE, cfg.SSL.INPUT.VIEW_SIZE)


def _views(cfg) -> list[tuple[str, View]]:
    """Those that differ in how large objects are in them, with their names."""
    names = [name for name, _ in cfg.SSL.METHODS] or [cfg.SSL.METHOD]
    views = max((PRETEXT_REGISTRY.get(name).draws(cfg) for name in names), key=len)
    found = {}
    for view in views:
        if view.of is not None:
            view = dataclasses.replace(view, crop_scale=views[view.of].crop_scale)
        if view.crop_scale is None:
            name = f"whole photos of {view.size} px"
        else:
            low, high = view.crop_scale
            name = f"crops of {view.size} px ({low:.0%} to {high:.0%} of the photo)"
        found.setdefault(name, view)
    return list(found.items())


def _main_view(cfg) -> tuple[str, View]:
    """The one of SSL.INPUT.VIEW_SIZE; of two, the crop."""
    size = cfg.SSL.INPUT.VIEW_SIZE
    return max(_views(cfg), key=lambda row: (row[1].size == size, row[1].crop_scale is not None))


def _in_finetuning(checked: CheckedSet, cfg) -> np.ndarray:
    sides, _, sizes = checked.objects()
    return sides * finetune_scale(sizes, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def _in_view(checked: CheckedSet, view: View) -> np.ndarray:
    sides, _, sizes = checked.objects()
    return (sides[:, None] * view_scales(view, sizes)).ravel()


def _appearances(checked: CheckedSet, cfg) -> Iterable[tuple[str, np.ndarray]]:
    """Where objects are seen, and their sizes there in px."""
    yield "in fine-tuning", _in_finetuning(checked, cfg)
    if cfg.SSL.ENABLED:
        for name, view in _views(cfg):
            yield name, _in_view(checked, view)


def _plotted(checked: CheckedSet, cfg) -> list[tuple[str, np.ndarray, int]]:
    """Fine-tuning and the main view: name, sizes in px, the size that is pooled from level 4."""
    columns = [("in fine-tuning", _in_finetuning(checked, cfg), CANONICAL_SIZE)]
    if cfg.SSL.ENABLED:
        name, view = _main_view(cfg)
        columns.append((f"in {name}", _in_view(checked, view), pretrain_canonical_size(cfg)))
    return columns


def size_ratio(checked: CheckedSet, cfg) -> float:
    """Median size of objects in fine-tuning / in the main view of pretraining."""
    _, view = _main_view(cfg)
    return float(np.median(_in_finetuning(checked, cfg)) / np.median(_in_view(checked, view)))


def _mismatch(checked: CheckedSet, cfg) -> str:
    """How much larger or smaller pretraining sees objects, in a sentence."""
    if not cfg.SSL.ENABLED or not any(labels.sides for labels in checked.labels):
        return ""
    name, view = _main_view(cfg)
    ratio = size_ratio(checked, cfg)
    medians = (np.median(_in_view(checked, view)), np.median(_in_finetuning(checked, cfg)))
    numbers = f"median {medians[0]:.0f} px against {medians[1]:.0f} px"
    if 1 / ALIKE <= ratio <= ALIKE:
        return f"Pretraining sees objects about as large as fine-tuning does, in {name}: {numbers}."
    times = f"{ratio:.1f} times smaller" if ratio > 1 else f"{1 / ratio:.1f} times larger"
    side = max(32, round(cfg.SSL.INPUT.VIEW_SIZE * ratio / 32) * 32)
    cost = (side / cfg.SSL.INPUT.VIEW_SIZE) ** 2
    return (
        f"Pretraining sees objects {times} than fine-tuning does, in {name}: {numbers}. They "
        f"would be alike with SSL.INPUT.VIEW_SIZE {side}, at {cost:.1f} times the pixels."
    )


def _bins(sides: np.ndarray) -> np.ndarray:
    """Edges of a histogram, two an octave, from at most 8 to at least 1024 px."""
    low, high = min(8, sides.min()), max(1024, sides.max())
    return 2 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 0.1, 0.5)


def _plot(checked: CheckedSet, cfg, bins: np.ndarray) -> bytes:
    """Histogram of sizes in fine-tuning, as bars, and in the main view, as an outline; SVG."""
    looks = ((BLUE, "stepfilled", 0.55), (ORANGE, "step", 1.0))
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for (name, sides, _), (color, kind, alpha) in zip(_plotted(checked, cfg), looks):
            axes.hist(sides, bins, weights=np.full(len(sides), 100 / len(sides)), histtype=kind,
                      color=color, alpha=alpha, linewidth=1.8, label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlim(bins[0], bins[-1])
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)  # room for the names of the levels
        edges = [CANONICAL_SIZE * 2.0 ** (level - 4) for level in LEVELS[1:]]
        for edge in edges:
            axes.axvline(edge, color=GREY, linewidth=0.9, linestyle="--")
        top = axes.get_xaxis_transform()
        for level, left, right in zip(LEVELS, [bins[0], *edges], [*edges, bins[-1]]):
            axes.text(np.sqrt(left * right), 0.98, f"P{level}", transform=top, ha="center",
                      va="top")  # fmt: skip
        ticks = 2 ** np.arange(np.log2(bins[0]), np.log2(bins[-1]) + 0.1)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("size of objects (px)")
        axes.set_ylabel("objects (%)")
        tidy(axes)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
        return svg(figure)
