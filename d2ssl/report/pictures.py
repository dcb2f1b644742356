"""Labels and predictions on photos: pictures to look at before trusting numbers."""

import os
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.datasets.files import read_json
from d2ssl.data.mapper import paint_over
from d2ssl.data.masks import annotation_mask, read_label_image
from d2ssl.data.photos import read_photo, shrink
from d2ssl.errors import D2SSLError
from d2ssl.report.pieces import count

# Distinct on photos, and with white or black text on them.
COLORS = (
    (230, 25, 75), (0, 130, 200), (245, 190, 20), (60, 180, 75), (145, 30, 180), (245, 130, 48),
    (70, 240, 240), (240, 50, 230), (128, 0, 0), (210, 245, 60), (0, 0, 128), (170, 110, 40),
)  # fmt: skip
HIDDEN = (128, 128, 128)
NUM_PHOTOS = 8  # of a run that are shown
SIDE = 480  # px of a picture's longer side
SURE = 0.5  # predictions with a lower score are not shown


def color_of(number: int) -> Tuple[int, int, int]:
    return COLORS[(number - 1) % len(COLORS)]


@dataclass
class LabelsAndPredictions:
    """One test photo with its labels beside its predictions."""

    name: str
    num_labels: int
    num_predictions: int
    image: np.ndarray  # H x W x 3 uint8 RGB: labels, a gap, predictions

    @property
    def caption(self) -> str:
        return f"{self.name}: {self.num_labels} labelled, {self.num_predictions} predicted"


def predictions_file(cfg) -> str:
    """Where Detectron2's evaluator keeps the predictions of a :func:`finetune_cfg`."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json")


def compare_predictions(
    cfg, num_photos: int = NUM_PHOTOS, side: int = SIDE
) -> List[LabelsAndPredictions]:
    """The first photos of the test set: labels on the left, predictions on the right.

    Where ``DATASETS.TEST`` names several sets it is the last, whose predictions Detectron2 keeps.

    Args:
        cfg: a :func:`~d2ssl.config.finetune_cfg` whose evaluation has been run.
        side: longer side of each picture in pixels.
    """
    name = cfg.DATASETS.TEST[-1]
    photos = decoded(name, listed(name)[:num_photos])
    metadata = MetadataCatalog.get(name)  # of a set that was listed: COCO's loader fills it then
    found = read_predictions(predictions_file(cfg), metadata, SURE)
    return [
        beside_predictions(photo, found.get(photo["image_id"], []), metadata, side)
        for photo in photos
    ]


@dataclass
class OwnLabels:
    """One photo with what the detector labelled on it."""

    name: str
    sure: int
    unsure: int
    image: np.ndarray  # H x W x 3 uint8 RGB


def show_own_labels(path: str, name: str) -> Tuple[List[OwnLabels], Tuple[int, int, int]]:
    """The first photos of a file of :mod:`d2ssl.engine.self_training`, objects in colour with their
    score and what is hidden in training in grey.

    Args:
        name: of the labelled set, for the classes.
    Returns:
        the pictures; of the whole file: photos with an object, photos, objects.
    """
    content = read_json(path)
    root, metadata, shown = content["info"]["image_root"], MetadataCatalog.get(name), []
    for image in content["images"][:NUM_PHOTOS]:
        rows = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        rows = [{**row, "bbox_mode": BoxMode.XYWH_ABS} for row in rows]
        sure, unsure = ([r for r in rows if r["iscrowd"] == crowd] for crowd in (0, 1))
        photo = shrink(read_photo(os.path.join(root, image["file_name"])), SIDE)
        if unsure:
            photo = paint_over(photo, [r["segmentation"] for r in unsure], HIDDEN)
        size = image["height"], image["width"]
        picture = draw_objects(photo, sure, metadata, SIDE, size)
        shown.append(OwnLabels(image["file_name"], len(sure), len(unsure), picture))
    objects = [a["image_id"] for a in content["annotations"] if not a["iscrowd"]]
    return shown, (len(set(objects)), len(content["images"]), len(objects))


def read_predictions(path: str, metadata, min_score: float) -> Dict[object, List[dict]]:
    """image_id -> predicted objects, in the form of a dataset dict's annotations with ``score``.

    Args:
        path: of a COCO results file, as Detectron2's evaluator writes it.
        metadata: of the set that was predicted on.

    Raises:
        D2SSLError: a file that is missing, or not of that kind.
    """
    found: Dict[object, List[dict]] = {}
    try:
        for row in read_json(path):
            if row["score"] >= min_score:
                found.setdefault(row["image_id"], []).append(_as_annotation(row, metadata))
    except (KeyError, TypeError) as error:
        raise D2SSLError(
            f"{path}: no predictions for this set (at {error}); give the file "
            "coco_instances_results.json that Detectron2 wrote when it evaluated the set"
        ) from error
    return found


def beside_predictions(
    photo: dict, predictions: List[dict], metadata, side: int
) -> LabelsAndPredictions:
    """A photo with its labels on the left, predictions on the right."""
    image, labels = read_photo(photo["file_name"]), photo.get("annotations", [])
    halves = [draw_objects(image, x, metadata, side) for x in (labels, predictions)]
    name = os.path.basename(photo["file_name"])
    return LabelsAndPredictions(name, len(labels), len(predictions), side_by_side(halves))


def side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height, H x W x 3 uint8, with a grey gap between them."""
    gap = np.full((images[0].shape[0], 8, 3), 128, np.uint8)
    joined = [part for image in images for part in (gap, image)]
    return np.concatenate(joined[1:], axis=1)


def _as_annotation(row: dict, metadata) -> dict:
    """A row of a COCO results file, in the form of a dataset dict's annotation."""
    category = row["category_id"]
    if hasattr(metadata, "thing_dataset_id_to_contiguous_id"):
        category = metadata.thing_dataset_id_to_contiguous_id[category]
    return {**row, "category_id": category, "bbox_mode": BoxMode.XYWH_ABS}


def draw_labels(photo: dict, image: np.ndarray, metadata, side: int) -> np.ndarray:
    """A photo with what its dict says of it: objects, or classes of pixels.

    Args:
        image: the photo, H x W x 3 uint8 RGB, or a copy of it that was scaled down.
        side: longer side of the picture in pixels.
    """
    if photo.get("annotations"):
        size = photo.get("height", image.shape[0]), photo.get("width", image.shape[1])
        return draw_objects(image, photo["annotations"], metadata, side, size)
    if "sem_seg_file_name" in photo:
        return _draw_pixels(image, photo["sem_seg_file_name"], metadata, side)
    return shrink(image, side)  # in its colours


def describe_labels(photo: dict, metadata) -> str:
    """What :func:`draw_labels` draws, in words; the class of a photo that has one."""
    if "annotations" in photo:
        return count(len(photo["annotations"]), "object")
    if "category_id" in photo:
        return class_name(photo["category_id"], metadata.get("classes", []))
    return "classes of pixels" if "sem_seg_file_name" in photo else "no labels"


def _draw_pixels(image: np.ndarray, path: str, metadata, side: int) -> np.ndarray:
    visualizer = _on_grey(image, metadata, side)
    size = visualizer.output.width, visualizer.output.height
    labels = cv2.resize(
        read_label_image(path).astype(np.uint16), size, None, 0, 0, cv2.INTER_NEAREST
    )
    classes = metadata.get("stuff_classes", [])
    for number in np.unique(labels).tolist():
        if number < len(classes):  # else it is to be ignored
            color = [c / 255 for c in color_of(number + 1)]
            mask = (labels == number).astype(np.uint8)
            visualizer.draw_binary_mask(mask, color, text=classes[number], alpha=0.4)
    return visualizer.output.get_image()


def draw_objects(
    image: np.ndarray, objects: List[dict], metadata, side: int, size: Sequence[int] = ()
) -> np.ndarray:
    """Masks, or boxes where an object has no mask, on a grey photo; the colour is the class's.

    Args:
        image: H x W x 3 uint8 RGB.
        side: longer side of the picture in pixels.
        size: height, width of the photo that the objects refer to, where ``image`` is a scaled
            copy of it.
    """
    visualizer = _on_grey(image, metadata, side)
    to = visualizer.output.height, visualizer.output.width
    objects = [_scaled(x, size or image.shape[:2], to) for x in objects]
    has_masks = all(x.get("segmentation") is not None for x in objects)
    classes = metadata.get("thing_classes", [])
    drawn = visualizer.overlay_instances(
        boxes=None if has_masks else np.reshape([x["bbox"] for x in objects], (-1, 4)),
        labels=[_object_text(x, classes) for x in objects],
        masks=[x["segmentation"] for x in objects] if has_masks else None,
        assigned_colors=[tuple(c / 255 for c in color_of(x["category_id"] + 1)) for x in objects],
        alpha=0.4,
    )
    return drawn.get_image()


def _on_grey(image: np.ndarray, metadata, side: int) -> Visualizer:
    small = shrink(image, side)  # on a large photo Visualizer takes seconds
    grey = np.array(Image.fromarray(small).convert("L").convert("RGB"))
    return Visualizer(grey, metadata, scale=side / max(small.shape[:2]))


def _scaled(annotation: dict, size: Sequence[int], to: Sequence[int]) -> dict:
    """An object of a photo of ``size`` (height, width) in a copy: its box as XYXY, its mask as
    arrays."""
    scale = np.array([to[1] / size[1], to[0] / size[0]])
    box = BoxMode.convert([*annotation["bbox"]], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    mask = annotation.get("segmentation") or None
    if isinstance(mask, list):
        mask = [np.reshape(polygon, (-1, 2)) * scale for polygon in mask]
    elif mask:
        mask = annotation_mask(annotation, *size).astype(np.uint8)
        mask = cv2.resize(mask, (to[1], to[0]), interpolation=cv2.INTER_NEAREST)
    return {**annotation, "bbox": np.array(box, float) * np.tile(scale, 2), "segmentation": mask}


def _object_text(annotation: dict, classes: Sequence[str]) -> str:
    words = []
    if len(classes) > 1:  # else there is nothing to tell apart
        words.append(class_name(annotation["category_id"], classes))
    if "score" in annotation:
        words.append(f"{annotation['score']:.0%}")
    if annotation.get("iscrowd"):
        words.append("(crowd)")
    return " ".join(words)


def class_name(number: int, classes: Sequence[str]) -> str:
    return classes[number] if 0 <= number < len(classes) else f"class {number}"
