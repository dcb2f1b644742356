"""Which detections found which objects: what COCO's AP follows from, for any choice of photos.

pycocotools matches once; AP on photos drawn with replacement, on a single photo, or above a score
follows from the matches in a fraction of a millisecond. A bootstrap over test photos needs that.
"""

import contextlib
import io
from dataclasses import dataclass, replace
from typing import Dict, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

TASKS = ("segm", "bbox")
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST_AT_ONCE = 2**22  # choices of photos x detections, so that 5000 photos fit in memory


@dataclass(frozen=True)
class Matches:
    """The detections of one model on a test set, the surest first.

    photos: ids of the P photos, in COCO's order.
    objects: C x P, how many objects of each category a photo shows; crowds do not count.
    category, photo: D indices into the two axes of ``objects``.
    score: D, 0..1, falling.
    found: D x 10 bool, whether the detection found an object at each of COCO's IoUs.
    ignored: D x 10 bool, whether it counts neither for nor against (it lies on a crowd).
    """

    photos: Sequence[int]
    objects: np.ndarray
    category: np.ndarray
    photo: np.ndarray
    score: np.ndarray
    found: np.ndarray
    ignored: np.ndarray

    def ap(self, weights: np.ndarray) -> np.ndarray:
        """COCO's AP in percent on B choices of photos.

        Args:
            weights: B x P, how often each photo is taken.
        Returns:
            B values; NaN where the photos taken show no object.
        """
        step = max(1, MOST_AT_ONCE // max(1, len(self.score)))
        parts = [weights[i : i + step] for i in range(0, len(weights), step)]
        return np.concatenate([self._ap(part) for part in parts])

    def _ap(self, weights: np.ndarray) -> np.ndarray:
        per_category = [self._category_ap(c, weights) for c in range(len(self.objects))]
        known = ~np.isnan(per_category)
        with np.errstate(invalid="ignore"):
            return 100 * np.nansum(per_category, axis=0) / known.sum(0)

    def _category_ap(self, category: int, weights: np.ndarray) -> np.ndarray:
        mine = self.category == category
        times = weights[:, self.photo[mine]].astype(np.int64)  # B x D
        objects = weights @ self.objects[category]  # B
        # How many of COCO's recalls are reached with h objects found: a row a number of objects.
        numbers, row = np.unique(objects, return_inverse=True)
        hits = np.arange(numbers.max(initial=0) + 1)  # each finds another object
        reached = np.searchsorted(RECALLS, hits / np.maximum(numbers, 1)[:, None], side="right")
        reached = np.pad(reached, ((0, 0), (1, 0)))  # none before the first detection
        total = np.zeros(len(weights))
        # Often a detection is right at several IoUs in a row, and so are all others.
        flags = np.concatenate([self.found[mine], self.ignored[mine]])
        columns, same = np.unique(flags, axis=1, return_counts=True)
        for (found, ignored), count in zip(map(np.split, columns.T, [2] * len(same)), same):
            hit = np.cumsum(times * (found & ~ignored), axis=1)  # B x D
            seen = np.cumsum(times * ~ignored, axis=1)
            precision = hit / np.maximum(seen, 1)
            # The best precision at this recall or a higher one; 0 where none is reached.
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            at = np.take_along_axis(reached[row], np.pad(hit + 1, ((0, 0), (1, 0))), axis=1)
            total += count * (np.diff(at, axis=1) * precision).sum(1)
        return np.where(objects > 0, total / len(IOUS) / len(RECALLS), np.nan)

    def above(self, score: float) -> "Matches":
        """Without the detections below a score. Higher ones match first, so theirs stay."""
        return self._only(self.score >= score)

    def each_photo(self) -> np.ndarray:
        """AP in percent on every photo alone; NaN where it shows no object."""
        aps = []
        for i in range(len(self.photos)):
            alone = self._only(self.photo == i)
            aps.append(alone.ap(np.arange(len(self.photos))[None] == i)[0])
        return np.array(aps)

    def _only(self, keep: np.ndarray) -> "Matches":
        columns = ("category", "photo", "score", "found", "ignored")
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})

    def counts(self, iou: int = 0) -> Dict[str, int]:
        """Detections that are right and wrong at one of the IoUs (0: 0.5), and all objects."""
        counted = ~self.ignored[:, iou]
        right = int((self.found[:, iou] & counted).sum())
        return {
            "right": right,
            "wrong": int(counted.sum()) - right,
            "objects": int(self.objects.sum()),
        }

    def to_json(self) -> dict:
        """Plain values; the flags of a detection's ten IoUs are the bits of a number."""
        bits = 1 << np.arange(len(IOUS))
        columns = (
            self.category, self.photo, self.score.round(6), self.found @ bits, self.ignored @ bits
        )  # fmt: skip
        return {
            "photos": list(self.photos),
            "objects": self.objects.tolist(),
            "detections": [list(row) for row in zip(*(c.tolist() for c in columns))],
        }

    @classmethod
    def from_json(cls, content: dict) -> "Matches":
        rows = content["detections"]
        category, photo, score, found, ignored = (
            np.array([row[i] for row in rows], dtype=float if i == 2 else int) for i in range(5)
        )
        bits = np.arange(len(IOUS))
        return cls(
            content["photos"], np.array(content["objects"]), category, photo, score,
            (found[:, None] >> bits & 1).astype(bool), (ignored[:, None] >> bits & 1).astype(bool),
        )  # fmt: skip


def match(ground_truth: COCO, predictions: Sequence[dict], task: str) -> Matches:
    """Match as COCO does: all sizes, at most 100 detections a photo.

    Args:
        predictions: as ``COCOEvaluator`` keeps them in ``coco_instances_results.json``.
        task: ``segm`` or ``bbox``.
    """
    photos, categories = sorted(ground_truth.getImgIds()), sorted(ground_truth.getCatIds())
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        evaluation = COCOeval(ground_truth, _loaded(ground_truth, predictions, task), task)
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.evaluate()
    objects = np.zeros((len(categories), len(photos)), int)
    found = []
    for i, image in enumerate(evaluation.evalImgs):  # categories outer, photos inner
        if image is None:
            continue
        category, photo = divmod(i, len(photos))
        objects[category, photo] = (np.asarray(image["gtIgnore"]) == 0).sum()
        for d, score in enumerate(image["dtScores"]):
            hits, ignored = image["dtMatches"][:, d] > 0, image["dtIgnore"][:, d] > 0
            found.append((category, photo, score, hits, ignored))
    found.sort(key=lambda row: -row[2])  # stable, as COCO's own
    flags = np.zeros((0, len(IOUS)), bool)
    return Matches(
        photos,
        objects,
        *(np.array([row[i] for row in found], dtype=(int, int, float)[i]) for i in range(3)),
        *(np.array([row[i] for row in found]) if found else flags for i in (3, 4)),
    )


def _loaded(ground_truth: COCO, predictions: Sequence[dict], task: str) -> COCO:
    if not predictions:  # loadRes refuses an empty list
        nothing = COCO()
        nothing.dataset = {**ground_truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
    if task == "segm":  # with a box in it, loadRes would take the box's area for the mask's
        predictions = [{k: v for k, v in p.items() if k != "bbox"} for p in predictions]
    return ground_truth.loadRes([dict(p) for p in predictions])
