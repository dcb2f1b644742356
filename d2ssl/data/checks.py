"""What can be wrong with data sets before they are trained on: damaged photos, labels that cannot
be right, the same photo twice.

Each photo is decoded once, in one of several processes, and little of it is kept.
:mod:`d2ssl.report.dataset_page` shows what was found.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pycocotools.mask as coco_mask
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from d2ssl.data.copies import Look, find_copies, look
from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.catalog import Decode, decoder, listed
from d2ssl.data.masks import annotation_mask, encode, read_label_image
from d2ssl.data.photos import map_photos
from d2ssl.data.sampling import evenly
from d2ssl.data.scales import finetune_scale
from d2ssl.errors import D2SSLError

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")

TINY = 8  # px of an object's size: two cells of P2
DOUBLE_IOU = 0.8  # two objects of one class that overlap more are taken for one
OFF_BY = 3.0  # px that a side of a box may lie off the mask's, or 10 % of the box
REDRAW = "draw it again or remove it"

_TEST = re.compile(r"(^|[_\W])(val|valid|validation|test|testing|dev|eval)([_\W\d]|$)", re.I)


@dataclass(frozen=True)
class Finding:
    """One thing to know about a set before training on it.

    severity: ERROR: not safe to train on; WARNING: worth a look; NOTE: a fact.
    what: in words that are the same for each case; detail: of this case.
    """

    severity: str
    what: str
    fix: str
    file: str = ""  # of the photo; empty where it is about the set
    detail: str = ""
    other: str = ""  # file of the photo that it is the same as


@dataclass
class Labels:
    """What the labels of a photo say."""

    kind: str = ""  # what is labelled: "objects", the "photo" or its "pixels"; "": nothing
    size: tuple[int, int] | None = None  # height, width that they refer to
    classes: list[int] = field(default_factory=list)  # a row an object, a photo, or a kind of pixel
    crowds: int = 0
    sound: list[int] = field(default_factory=list)  # objects that can be right, by index
    sides: list[float] = field(default_factory=list)  # sqrt(box area) of each of these, px
    areas: list[float] = field(default_factory=list)  # of its mask, or box if it has none, px^2
    masked: int = 0  # how many of these have a mask
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: str, what: str, fix: str, file: str, detail: str = "") -> None:
        self.findings.append(Finding(severity, what, fix, file, detail))


@dataclass
class CheckedSet:
    """A set and what was found in it."""

    name: str
    dicts: list[dict]  # as listed: labels that are read apart are not in them
    looks: list[Look]
    labels: list[Labels]
    classes: list[str]
    is_test: bool
    kind: str  # of its labels
    findings: list[Finding] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        return [entry["file_name"] for entry in self.dicts]

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of N objects: sqrt(box area) in px; area in px^2; N x 2 height, width of the photo.
        Crowds are left out."""
        sides = [side for one in self.labels for side in one.sides]
        areas = [area for one in self.labels for area in one.areas]
        sizes = [one.size for one in self.labels for _ in one.sides]
        return np.array(sides), np.array(areas), np.array(sizes, dtype=float).reshape(-1, 2)

    def class_counts(self) -> list[int]:
        """Objects (or photos) of each class, in the order of the classes."""
        counts = Counter(number for one in self.labels for number in one.classes)
        return [counts[i] for i in range(max([len(self.classes), *(i + 1 for i in counts)]))]


def check_sets(
    names: Sequence[str],
    min_size: int,
    max_size: int,
    test: Iterable[str] = (),
    shown: int = 12,
    num_workers: int | None = None,
) -> list[CheckedSet]:
    """
    Look at each photo and each label of registered sets.

    Args:
        names: of sets; several are compared with one another, as the splits of one.
        min_size, max_size: INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST of fine-tuning.
        test: sets that are tested on, or by which something is chosen; others are known by names
            such as ``my_val``.
        shown: photos of each set that are kept to be shown.
        num_workers: processes; default: as many as there are cores, none for few photos.

    Raises:
        D2SSLError: a set that is not registered, cannot be listed, or is empty.
    """
    ensure_registered(names)
    dicts = {name: listed(name) for name in names}
    for name in names:
        if not dicts[name]:
            raise D2SSLError(f"{name}: the data set is empty")
    files = list(dict.fromkeys(entry["file_name"] for name in names for entry in dicts[name]))
    kept = frozenset(entry["file_name"] for name in names for entry in evenly(dicts[name], shown))
    looks = dict(zip(files, map_photos(partial(look, shown=kept), files, "photos", num_workers)))
    sets = []
    for name in dicts:
        of_set = [looks[entry["file_name"]] for entry in dicts[name]]
        sets.append(_check_set(name, dicts[name], of_set, min_size, max_size, num_workers))
        sets[-1].is_test |= name in test
    _compare_sets(sets)
    return sets


def _check_set(name, dicts, looks, min_size, max_size, num_workers) -> CheckedSet:
    metadata = MetadataCatalog.get(name)  # of a set that was listed: COCO's loader fills it then
    kinds = (metadata.get(f"{prefix}classes", None) for prefix in ("thing_", "", "stuff_"))
    classes = list(next(filter(None, kinds), []))
    inspect = partial(
        _inspect,
        decode=decoder(name),
        classes=classes,
        ignore_label=metadata.get("ignore_label", 255),
        min_size=min_size,
        max_size=max_size,
    )
    # Without what is shown: it need not travel to another process.
    items = [(entry, seen.size, seen.problem) for entry, seen in zip(dicts, looks)]
    labels = list(map_photos(inspect, items, name, num_workers))
    kind = next((one.kind for one in labels if one.kind), "")
    checked = CheckedSet(name, dicts, looks, labels, classes, bool(_TEST.search(name)), kind)
    for one in labels:
        checked.findings += one.findings
    if kind:
        checked.findings += _of_set(checked)
    return checked


# Labels of one photo


def _inspect(item, decode: Decode | None, classes, ignore_label, min_size, max_size) -> Labels:
    """
    Args:
        item: a dict as listed, size and problem of its :class:`Look`.
    """
    entry, size, problem = item
    labels, file = Labels(), entry["file_name"]
    if problem:
        _add_unreadable(labels, "photo cannot be read", file, problem)
    try:
        entry = decode(entry) if decode else entry
    except D2SSLError as error:
        if not problem:  # else it is likely the same
            _add_unreadable(labels, "labels cannot be read", file, error)
        return labels
    said = entry.get("height"), entry.get("width")
    labels.size = size if None in said else said
    if size and labels.size != size:
        turned = labels.size == size[::-1]
        labels.add(ERROR, "photo has another size than its labels say",
                   "correct the photo's EXIF orientation" if turned else "scale the labels",
                   file, f"{_by(labels.size)} in the labels, {_by(size)} in the file")  # fmt: skip
    if "annotations" in entry:
        labels.kind = "objects"
        if labels.size:
            scale = finetune_scale(np.array([labels.size]), min_size, max_size)[0]
            _inspect_objects(entry["annotations"], labels, classes, scale, file)
    elif "category_id" in entry:
        labels.kind = "photo"
        if _exists(entry["category_id"], classes, labels, file, "photo"):
            labels.classes.append(entry["category_id"])
    elif "sem_seg_file_name" in entry:
        labels.kind = "pixels"
        try:
            values = np.unique(read_label_image(entry["sem_seg_file_name"], labels.size)).tolist()
        except D2SSLError as error:
            _add_unreadable(labels, "labels cannot be read", file, error)
            values = []
        values = [value for value in values if value != ignore_label]
        labels.classes += [v for v in values if _exists(v, classes, labels, file, "pixels")]
    return labels


def _add_unreadable(labels: Labels, what: str, file: str, error) -> None:
    problem, _, fix = str(error).removeprefix(f"{file}: ").rpartition("; ")
    labels.add(ERROR, what, fix, file, problem)


def _exists(category, classes, labels: Labels, file: str, where: str) -> bool:
    if isinstance(category, (int, np.integer)) and 0 <= category < (len(classes) or np.inf):
        return True
    labels.add(ERROR, "class that does not exist", "correct it, or register the set with it", file,
               f"{where}: class {category!r} of {len(classes)}")  # fmt: skip
    return False


def _inspect_objects(annotations, labels: Labels, classes, scale: float, file: str) -> None:
    shapes, numbers = [], []  # of what is sound: RLE, class
    for index, annotation in enumerate(annotations):
        where, category = f"object {index + 1}", annotation.get("category_id")
        if not _exists(category, classes, labels, file, where):
            continue
        if annotation.get("iscrowd"):
            labels.crowds += 1
            continue
        labels.classes.append(int(category))
        where += f" ({classes[category]})" if classes else ""
        box = _box(annotation, labels, file, where)
        shape = None if box is None else _shape(annotation, box, labels, file, where)
        if shape is None:
            continue
        side = float(np.sqrt((box[2:] - box[:2]).prod()))
        if side * scale < TINY:
            labels.add(NOTE, f"object under {TINY} px in fine-tuning", "raise "
                       "INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST, or cut the photos into parts",
                       file, f"{where}: {side * scale:.1f} px")  # fmt: skip
        labels.sound.append(index)
        labels.sides.append(side)
        labels.areas.append(float(coco_mask.area(shape)))
        labels.masked += bool(annotation.get("segmentation"))
        shapes.append(shape)
        numbers.append(category)
    if not shapes:
        return
    overlap = np.triu(coco_mask.iou(shapes, shapes, [0] * len(shapes)), 1)
    for i, j in np.argwhere(overlap > DOUBLE_IOU):
        if numbers[i] == numbers[j]:
            labels.add(WARNING, "object labelled twice", "remove one of the two", file,
                       f"objects {labels.sound[i] + 1} and {labels.sound[j] + 1}, "
                       f"IoU {overlap[i, j]:.2f}")  # fmt: skip


def _box(annotation: dict, labels: Labels, file: str, where: str) -> np.ndarray | None:
    """XYXY in px, clipped to the photo as training does; None, with a finding, where it cannot be
    right."""
    try:
        mode = annotation.get("bbox_mode", BoxMode.XYXY_ABS)
        box = np.array(BoxMode.convert([*annotation["bbox"]], mode, BoxMode.XYXY_ABS), float)
        valid = box.shape == (4,) and np.isfinite(box).all() and (box[:2] < box[2:]).all()
    except (KeyError, TypeError, ValueError, AssertionError):
        valid = False
    if not valid:
        labels.add(ERROR, "box without an area", REDRAW, file, where)
        return None
    height, width = labels.size
    inside = box.clip(0, [width, height] * 2)
    detail = f"{where}: {_numbers(box)}, the photo is {_by(labels.size)}"
    if not (inside[:2] < inside[2:]).all():
        labels.add(ERROR, "box outside the photo", REDRAW, file, detail)
        return None
    if np.abs(inside - box).max() > 1:
        labels.add(WARNING, "box reaches out of the photo", "correct it; training clips it", file,
                   detail)  # fmt: skip
    return inside


def _shape(annotation: dict, box: np.ndarray, labels: Labels, file: str, where: str) -> dict | None:
    """RLE of the mask, or of the box without one; None, with a finding, where it is wrong."""
    height, width = labels.size
    polygons = annotation.get("segmentation")
    if not polygons:
        x1, y1, x2, y2 = box.tolist()
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        return coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
    try:
        shape = encode(annotation_mask(annotation, height, width))
    except D2SSLError as error:
        problem, _, fix = str(error).rpartition("; ")
        labels.add(ERROR, "mask cannot be read", fix, file, f"{where}: {problem}")
        return None
    if not coco_mask.area(shape):
        labels.add(ERROR, "empty mask", REDRAW, file, where)
        return None
    other = coco_mask.toBbox(shape)
    other[2:] += other[:2]
    detail = f"{where}: box {_numbers(box)}, mask {_numbers(other)}"
    if (np.maximum(box[:2], other[:2]) >= np.minimum(box[2:], other[2:])).any():
        labels.add(ERROR, "mask and box lie apart", "make the box from the mask", file, detail)
        return None
    if np.abs(box - other).max() > max(OFF_BY, 0.1 * (box[2:] - box[:2]).max()):
        labels.add(WARNING, "mask and box disagree", "make the box from the mask", file, detail)
    return shape


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _numbers(box: np.ndarray) -> str:
    return f"({', '.join(f'{x:.0f}' for x in box)})"


# A set as a whole, and several sets


def _of_set(checked: CheckedSet) -> list[Finding]:
    labels, found = checked.labels, []
    masked = any(one.masked for one in labels)
    for file, one in zip(checked.files, labels):
        if not (one.classes or one.crowds or one.findings):
            found.append(Finding(NOTE, "photo without a label", "label what it shows, if anything; "
                                 "training leaves it out", file))  # fmt: skip
        if masked and one.masked < len(one.sound):
            found.append(Finding(ERROR, "object without a mask", "draw it; the others have one",
                                 file, f"{len(one.sound) - one.masked} objects"))  # fmt: skip
    crowds = sum(one.crowds for one in labels)
    if crowds:
        found.append(Finding(NOTE, "crowds", "nothing to do: training leaves them out, evaluation "
                             "ignores what is found in them", "",
                             f"{crowds} in {checked.name}"))  # fmt: skip
    absent = [c for c, n in zip(checked.classes, checked.class_counts()) if not n]
    if absent:
        found.append(Finding(WARNING, "classes without a label", "label some, or leave them out",
                             "", f"{', '.join(absent)}, in {checked.name}"))  # fmt: skip
    return found


def compare_with_detector(sets: Sequence[CheckedSet], num_classes: int, masks: bool) -> None:
    """Add findings about what a detector cannot learn from sets of objects.

    Args:
        num_classes: MODEL.ROI_HEADS.NUM_CLASSES.
        masks: MODEL.MASK_ON.
    """
    for one in sets:
        if one.kind != "objects":
            continue
        count = len(one.classes)
        if count and count != num_classes:
            one.findings.append(Finding(
                ERROR, "the detector is built for another number of classes",
                f"set MODEL.ROI_HEADS.NUM_CLASSES to {count}", "",
                f"{count} in {one.name}, NUM_CLASSES is {num_classes}"))  # fmt: skip
        if masks and one.labels and not any(labels.masked for labels in one.labels):
            one.findings.append(Finding(
                ERROR, "no masks for a detector with masks",
                "draw masks, or set MODEL.MASK_ON False", "", one.name))  # fmt: skip


def _compare_sets(sets: list[CheckedSet]) -> None:
    """The same picture twice in a set, or in two sets; findings go to the later one."""
    looks = {file: seen for one in sets for file, seen in zip(one.files, one.looks)}
    files = list(looks)
    first = {file: file for file in files}  # of the files that show the same picture
    for group in find_copies(list(looks.values())):
        first.update((files[i], files[group[0]]) for i in group)
    pictures = []  # of each set: first file of a picture -> the set's files that show it
    for one in sets:
        pictures.append(defaultdict(list))
        for file in one.files:
            pictures[-1][first[file]].append(file)
        for original, *copies in pictures[-1].values():
            one.findings += [
                Finding(WARNING, "photo twice in a set", "remove one of the two", copy,
                        "listed twice" if copy == original else f"the same as {original}",
                        "" if copy == original else original)
                for copy in copies
            ]  # fmt: skip
    known = any(one.is_test for one in sets)
    for j, later in enumerate(sets):
        for i, earlier in enumerate(sets[:j]):
            shared = [
                (pictures[j][p][0], pictures[i][p][0]) for p in pictures[j] if p in pictures[i]
            ]
            part = len(shared) == min(len(pictures[i]), len(pictures[j]))
            apart = later.is_test != earlier.is_test or not (known or part)
            later.findings += _shared(earlier, later, shared, apart)
            if later.kind and later.kind == earlier.kind and later.classes != earlier.classes:
                lists = (f"{one.name}: {', '.join(one.classes)}" for one in (earlier, later))
                later.findings.append(Finding(ERROR, "sets with different classes", "register both "
                                              "with the same classes in the same order", "",
                                              "; ".join(lists)))  # fmt: skip


def _shared(earlier: CheckedSet, later: CheckedSet, shared, apart: bool) -> list[Finding]:
    """
    Args:
        shared: (file of ``later``, file of ``earlier``) that show the same picture.
        apart: none should, as one set is trained on and the other tests it.
    """
    names = f"{earlier.name} and {later.name}"
    labelled = bool(earlier.kind and later.kind)
    if not shared:
        return []
    if earlier.is_test and later.is_test:
        return [Finding(WARNING, "test or dev sets that share photos", "nothing to do if "
                        "nothing is chosen by either: a photo that something was chosen by cannot "
                        "test it", "", f"{names}: {len(shared)}")]  # fmt: skip
    if not (apart and (labelled or earlier.is_test or later.is_test)):
        return [Finding(NOTE, "sets that share photos", "nothing to do if that is meant", "",
                        f"{names}: {len(shared)}")]  # fmt: skip
    if labelled:
        severity, what = ERROR, f"the same photo in {names}"
        fix = "remove it from one of the two: what was learnt by heart tests nothing"
    else:
        severity, what = WARNING, f"the same photo, once without labels, in {names}"
        fix = "do not pretrain on it, or say so beside the result"
    return [
        Finding(severity, what, fix, file)
        if file == other
        else Finding(severity, what, fix, file, f"the same as {other}", other)
        for file, other in shared
    ]
