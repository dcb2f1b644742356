"""Self-training: the detector labels the photos that nobody labelled, and goes on with all of them.

What it is sure of becomes a label, and what it is unsure of is painted over: as a label it might be
wrong, and without one it would be background. What it labelled is learnt in another look. K. Sohn
et al., "A Simple Semi-Supervised Learning Framework for Object Detection" (STAC), 2020, with labels
made during one training instead of by another one before it.
"""

import glob
import json
import logging
import math
import os
import time
from typing import Callable, Dict, List, Sequence

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from d2ssl.atomic import atomic_open
from d2ssl.data.datasets.files import read_json
from d2ssl.data.mapper import shrunk
from d2ssl.data.masks import encode
from d2ssl.data.photos import scaled_size
from d2ssl.errors import D2SSLError

logger = logging.getLogger("d2ssl")

LABELS = "labels"  # how their files begin
ANY_SIDE = 1 << 30  # px


def label_files(folder: str) -> List[str]:
    """Of a run, in the order in which they were made."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"{LABELS}_*.json")))


class LabelPhotos(HookBase):
    """Labels photos before some iterations, and trains on them from then on.

    It has no state: a resumed run reads the labels from the file.

    Args:
        iterations: before which it labels.
        label: gives annotations for the photos, one list each, see :func:`detect`.
        photos: dataset dicts without annotations.
        use: called with the photos on which something was found, as dataset dicts.
        folder: for ``labels_<iteration>.json``, in COCO's format.
        classes: names.
        side: short side of the photos in memory, that labels are scaled down to.
    """

    def __init__(
        self,
        iterations: Sequence[int],
        label: Callable[[Sequence[dict]], List[List[dict]]],
        photos: Sequence[dict],
        use: Callable[[List[dict]], None],
        folder: str,
        classes: Sequence[str],
        side: float,
    ):
        self.iterations, self.label, self.photos = set(iterations), label, photos
        self.use, self.folder, self.classes, self.side = use, folder, classes, side

    def before_train(self):
        for file in label_files(self.folder):  # as before: of labels that are empty, none
            if file < self._file(self.trainer.start_iter):
                self.use(read_labels(file, self.photos, self.side))

    def before_step(self):
        if self.trainer.iter in self.iterations:
            file, started = self._file(self.trainer.iter), time.perf_counter()
            mine = self.label(self.photos[comm.get_rank() :: comm.get_world_size()])
            shares = comm.all_gather(mine)
            if comm.is_main_process():
                # Photo i was labelled by process i modulo their number.
                labels = [
                    shares[i % len(shares)][i // len(shares)] for i in range(len(self.photos))
                ]
                write_labels(file, self.photos, labels, self.classes)
            comm.synchronize()
            self.use(read_labels(file, self.photos, self.side))
            took = time.perf_counter() - started
            self.trainer.storage.put_scalar("labelling_seconds", took, smoothing_hint=False)

    def _file(self, iteration: int) -> str:
        return os.path.join(self.folder, f"{LABELS}_{iteration:07d}.json")


class MirroredAtScales:
    """The copies of a photo that ``GeneralizedRCNNWithTTA`` is to look at: at each scale one as it
    is and one mirrored. It gives the best boxes of all (by NMS) with the mean of their masks.

    Args:
        scales: in any unit; the photo is given at the largest.
    """

    def __init__(self, scales: Sequence[float]):
        self.factors = [scale / max(scales) for scale in scales]

    def __call__(self, example: dict) -> List[dict]:
        side = min(example["image"].shape[-2:])
        # Detectron2 limits the long side, too, by one number for all scales: here it is done.
        sides = [round(side * factor) for factor in self.factors]
        return DatasetMapperTTA(sides, ANY_SIDE, flip=True)(example)


@torch.no_grad()
def detect(
    model: nn.Module,
    photos: Sequence[dict],
    mapper: Callable,
    score: float,
    unsure: float,
    side: float = math.inf,
    most: float = math.inf,
) -> List[List[dict]]:
    """What a detector finds on photos, as COCO's annotations with ``score``: the photos' lists.

    Args:
        model: Detectron2's; it is in eval mode inside.
        mapper: makes its input of a photo.
        score: of what becomes an object, at least; and better ones of its class cover no more than
            half of its mask.
        unsure: what else has at least this score is marked ``iscrowd``, of its mask without what
            objects cover. Where nothing is left of it, it is left out.
        side: short side in pixels that masks are made at, at most; then they are enlarged. On a
            large photo that takes a fraction of the time.
        most: what the model gives of a photo, at most (below 0: no limit, as in Detectron2); it is
            said where that cuts objects off.
    """
    found, full = [], 0
    with inference_context(model):
        for photo in tqdm(photos, "labelling", disable=not comm.is_main_process(), leave=False):
            size = photo["height"], photo["width"]
            height, width = scaled_size(*size, side)
            example = {**mapper(photo), "height": height, "width": width}
            instances = model([example])[0]["instances"]
            instances = instances[instances.scores >= unsure].to("cpu")
            full += 0 <= most <= len(instances)
            found.append(annotations(instances, score, size))
    if full:
        logger.warning(
            "%d photo(s) with %d detections, as many as TEST.DETECTIONS_PER_IMAGE allows: what "
            "else is there is learnt as background; raise it", full, most
        )  # fmt: skip
    return found


def annotations(instances, score: float, size: Sequence[int] = ()) -> List[dict]:
    """Predicted ``Instances`` as annotations of a photo of this ``size`` (height, width; default:
    theirs); see :func:`detect`."""
    height, width = instances.image_size
    if instances.has("pred_masks"):
        masks = instances.pred_masks.numpy()
    else:
        masks = np.zeros((len(instances), height, width), bool)
        for mask, box in zip(masks, instances.pred_boxes.tensor.round().int().tolist()):
            mask[box[1] : box[3], box[0] : box[2]] = True
    sure = (instances.scores >= score).numpy()
    if instances.has("pred_masks"):
        sure &= ~_covered(masks, instances.scores.numpy(), instances.pred_classes.numpy(), sure)
    masks[~sure] &= ~masks[sure].any(0)
    encoded = [_encode(mask, size or (height, width)) for mask in masks]
    rows = zip(instances.scores.tolist(), instances.pred_classes.tolist(), encoded, sure)
    return [
        {
            # As in people's labels the box of the mask; what is predicted need not agree so.
            "bbox": coco_mask.toBbox(mask).tolist(),
            "segmentation": mask,
            "category_id": category,
            "iscrowd": int(not is_sure),
            "score": value,
        }
        for value, category, mask, is_sure in rows
        if coco_mask.area(mask)
    ]


def _covered(
    masks: np.ndarray, scores: np.ndarray, classes: np.ndarray, sure: np.ndarray
) -> np.ndarray:
    """Of which objects most lies in better ones of their class: second halves of the same object.
    NMS sees their boxes alone."""
    covered = np.zeros(len(masks), bool)
    better = {c: np.zeros(masks.shape[1:], bool) for c in np.unique(classes)}
    for i in np.argsort(-scores, kind="stable"):
        if sure[i]:
            before = better[classes[i]]
            share = np.count_nonzero(masks[i] & before) / max(1, np.count_nonzero(masks[i]))
            covered[i] = share > 0.5
            before |= masks[i] & ~covered[i]
    return covered


def _encode(mask: np.ndarray, size: Sequence[int]) -> dict:
    columns = np.ascontiguousarray(mask.T, np.uint8)  # enlarged so, it need not be turned for RLE
    rle = encode(cv2.resize(columns, tuple(size), interpolation=cv2.INTER_NEAREST_EXACT).T)
    return {**rle, "counts": rle["counts"].decode()}  # as JSON has it


def write_labels(
    file: str, photos: Sequence[dict], labels: Sequence[List[dict]], classes: Sequence[str]
) -> None:
    """Photos with annotations as COCO JSON that labelling tools read, e.g. to correct them.

    What the detector was unsure of has ``iscrowd`` 1; each annotation has its ``score``. File names
    start from ``image_root``, under ``info``.
    """
    root = os.path.commonpath([os.path.dirname(os.path.abspath(p["file_name"])) for p in photos])
    content: Dict = {
        "info": {"description": "labels of a detector's own making", "image_root": root},
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "images": [],
        "annotations": [],
    }
    for number, (photo, found) in enumerate(zip(photos, labels)):
        name = os.path.relpath(photo["file_name"], root)
        size = {"height": photo["height"], "width": photo["width"]}
        content["images"].append({"id": number, "file_name": name, **size})
        for row in found:
            content["annotations"].append(
                {
                    **row,
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "area": float(coco_mask.area(row["segmentation"])),
                }
            )
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with atomic_open(file, "w") as out:
        json.dump(content, out)


def read_labels(file: str, photos: Sequence[dict], side: float) -> List[dict]:
    """Those of the photos of :func:`write_labels` that have an object, as dataset dicts of copies
    with a short side of at most ``side``; what the detector was unsure of is not among the
    ``annotations``, but a list of masks (RLE) under ``hidden``.

    Raises:
        D2SSLError: a photo that was labelled is not among them, or has another size.
    """
    content, found = read_json(file), {}
    for row in content["annotations"]:
        found.setdefault(row["image_id"], []).append(row)
    by_path = {os.path.abspath(photo["file_name"]): photo for photo in photos}
    root = os.path.commonpath([os.path.dirname(path) for path in by_path]) if photos else ""
    by_name = {os.path.relpath(path, root): photo for path, photo in by_path.items()}  # if moved
    dicts = []
    for image in content["images"]:
        rows = found.get(image["id"], [])
        if all(row["iscrowd"] for row in rows):
            continue
        path = os.path.join(content["info"]["image_root"], image["file_name"])
        photo = by_path.get(os.path.normpath(path)) or by_name.get(image["file_name"], {})
        if any(photo.get(key) != image[key] for key in ("height", "width")):
            raise D2SSLError(
                f"{file}: {path} of {image['width']} x {image['height']} px is not among the "
                "photos to be labelled; give the data sets as they were, or start over without "
                "--resume"
            )
        dicts.append(_at_side(photo, rows, side))
    count = sum(len(d["annotations"]) for d in dicts)
    logger.info("The detector labelled %d objects on %d photos: %s", count, len(dicts), file)
    if not count:
        logger.warning(
            "The detector is sure of nothing, so nothing changes: train longer, label later "
            "(SSL.SELF_TRAINING.AT) or lower SSL.SELF_TRAINING.SCORE"
        )
    return dicts


def _at_side(photo: dict, rows: Sequence[dict], side: float) -> dict:
    """A photo with rows of the file as its labels, at the size that it is trained on."""
    annotations = [{**row, "bbox_mode": BoxMode.XYWH_ABS} for row in rows]
    small = shrunk({**photo, "annotations": annotations}, side)
    rows = small["annotations"]
    small["annotations"] = [row for row in rows if not row["iscrowd"]]
    return {**small, "hidden": [row["segmentation"] for row in rows if row["iscrowd"]]}
