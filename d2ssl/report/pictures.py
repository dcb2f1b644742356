"""What training sees, and what the detector found: pictures to look at before trusting numbers."""

import json
import os
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import matplotlib
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont

from d2ssl.atomic import atomic_open
from d2ssl.data.photos import read_photo
from d2ssl.data.views import View

# Distinct on photos, and with white or black text on them.
COLORS = (
    (230, 25, 75), (0, 130, 200), (245, 190, 20), (60, 180, 75), (145, 30, 180), (245, 130, 48),
    (70, 240, 240), (240, 50, 230), (128, 0, 0), (210, 245, 60), (0, 0, 128), (170, 110, 40),
)  # fmt: skip
INK, PAPER, GAP = (40, 44, 52), (255, 255, 255), 12


class PutPictures(HookBase):
    """Before training: what the network will see, as ``views.png`` and in TensorBoard."""

    def __init__(self, draw, path: str):
        self.draw, self.path = draw, path

    @classmethod
    def of_views(cls, cfg, trainer, num_photos: int = 6) -> "PutPictures":
        """The first photos of a pretraining stage's own stream; its random state is its own."""
        stream = trainer.loader.stream

        def draw():
            mapper, count = stream.mapper, min(num_photos, len(stream.dicts))
            items = [stream[position] for position in range(count)]
            return views_sheet(items, mapper.views, mapper.view_pairs, mapper.image_format)

        return cls(draw, os.path.join(trainer.cfg.OUTPUT_DIR, "views.png"))

    def before_train(self):
        if not comm.is_main_process():
            return
        sheet = self.draw()
        with atomic_open(self.path, "wb") as file:
            Image.fromarray(sheet).save(file, "PNG")
        self.trainer.storage.put_image("views", sheet.transpose(2, 0, 1))


def views_sheet(
    items: Sequence[dict],
    views: Sequence[View],
    view_pairs: Sequence[Tuple[int, int]],
    image_format: str,
) -> np.ndarray:
    """A contact sheet: a row a photo, its views side by side, their matched boxes drawn.

    A matched box has the same number and colour in both views of its pair. Views are enlarged by
    the same whole factor, so that a small view looks small.

    Args:
        items: what :class:`~d2ssl.data.mapper.PretextMapper` makes of each photo.
        views, view_pairs: as the pretext method declares them.
        image_format: colour order of the items' views, "RGB" or "BGR".
    Returns:
        H x W x 3 uint8 RGB.
    """
    sizes = [view.size for view in views]
    scale = max(1, round(256 / max(sizes)))
    font, small = _font(14), _font(12)
    captions = [_view_caption(i, view) for i, view in enumerate(views)]
    widths = [max(s * scale, int(font.getlength(c)) + 1) for s, c in zip(sizes, captions)]
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(sizes))]
    head, row = 2 * GAP + 14, max(sizes) * scale + 20 + GAP
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(sizes) + 1), head + row * len(items)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, caption in zip(lefts, captions):
        draw.text((left, GAP), caption, INK, font)
    for i, item in enumerate(items):
        top = head + i * row
        draw.text((lefts[0], top), _photo_caption(item, view_pairs), INK, small)
        boxes = numbered_boxes(item["pairs"], view_pairs, len(views))
        for view, left, drawn in zip(item["views"], lefts, boxes):
            image = view.numpy().transpose(1, 2, 0)  # H x W x 3
            image = image[:, :, ::-1] if image_format == "BGR" else image
            sheet.paste(_with_boxes(image, drawn, scale), (left, top + 20))
    return np.array(sheet)


def numbered_boxes(pairs, view_pairs, num_views: int) -> List[List[Tuple[int, np.ndarray]]]:
    """For each view its (number, XYXY box in view pixels); numbers start at 1 in a photo.

    A proposal that is repeated in a pair keeps its number; where a pair shares nothing (id -1)
    there is no box.
    """
    numbers: Dict[Tuple[int, int], int] = {}
    found: List[List[Tuple[int, np.ndarray]]] = [[] for _ in range(num_views)]
    for p, (pair, members) in enumerate(zip(pairs, view_pairs)):
        for k, proposal in enumerate(pair["ids"].tolist()):
            if proposal < 0:
                continue
            number = numbers.setdefault((p, proposal), len(numbers) + 1)
            for view, boxes in zip(members, pair["boxes"]):
                found[view].append((number, boxes[k].numpy()))
    return found


def _with_boxes(image: np.ndarray, boxes, scale: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    draw, font = ImageDraw.Draw(picture), _font(12)
    for number, box in boxes:
        x1, y1, x2, y2 = (float(v) * scale for v in box)
        # PIL includes the last pixel; a box that ends at x = W covers pixel W - 1.
        frame = round(x1), round(y1), round(x2) - 1, round(y2) - 1
        draw.rectangle(frame, outline=_color(number), width=2)
    # Labels last, so that no frame crosses them; those that begin at one corner stand in a row.
    taken: List[Tuple[float, float]] = []
    for number, box in {(n, tuple(b.tolist())): (n, b) for n, b in boxes}.values():
        width, height = font.getlength(str(number)) + 6, 15
        x, y = (min(v * scale, side - edge) for v, side, edge in
                zip(box[:2].tolist(), picture.size, (width, height)))  # fmt: skip
        while any(abs(x - u) < width and abs(y - v) < height for u, v in taken):
            x += width
        taken.append((x, y))
        draw.rectangle((x, y, x + width, y + height), _color(number))
        ink = (0, 0, 0) if np.dot(_color(number), (0.299, 0.587, 0.114)) > 140 else PAPER
        draw.text((x + 3, y), str(number), ink, font)
    return picture


def _color(number: int) -> Tuple[int, int, int]:
    return COLORS[(number - 1) % len(COLORS)]


def _view_caption(index: int, view: View) -> str:
    what = "whole photo" if view.crop_scale is None else "crop"
    return f"V{index + 1} {what} {view.size} px"


def _photo_caption(item: dict, view_pairs) -> str:
    caption = f"photo {item['image_id']}"
    for (a, b), pair in zip(view_pairs, item["pairs"]):
        if (pair["ids"] < 0).all():
            caption += f", V{a + 1} and V{b + 1} share nothing"
    return caption


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings this one along; what a machine has installed differs.
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, "DejaVuSans.ttf"), size)


@dataclass
class Comparison:
    """One test photo with its labels beside its predictions."""

    name: str
    num_labels: int
    num_predictions: int
    image: np.ndarray  # H x W x 3 uint8 RGB: labels, a gap, predictions


def predictions_file(cfg) -> str:
    """Where Detectron2's evaluator keeps the predictions of a :func:`finetune_cfg`."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json")


def compare_predictions(
    cfg, num_photos: int = 8, min_score: float = 0.5, side: int = 480
) -> List[Comparison]:
    """The first photos of the test set: labels on the left, predictions on the right.

    Where ``DATASETS.TEST`` names several sets it is the last, whose predictions Detectron2 keeps.

    Args:
        cfg: a :func:`~d2ssl.config.finetune_cfg` whose evaluation has been run.
        min_score: predictions below it are not drawn.
        side: longer side of each picture in pixels.
    """
    name = cfg.DATASETS.TEST[-1]
    metadata = MetadataCatalog.get(name)
    with open(predictions_file(cfg)) as file:
        rows = json.load(file)
    found: Dict[object, List[dict]] = {}
    for row in rows:
        if row["score"] >= min_score:
            found.setdefault(row["image_id"], []).append(_as_annotation(row, metadata))
    out = []
    for photo in DatasetCatalog.get(name)[:num_photos]:
        image, labels = read_photo(photo["file_name"]), photo.get("annotations", [])
        predictions = found.get(photo["image_id"], [])
        halves = [_draw_objects(image, x, metadata, side) for x in (labels, predictions)]
        gap = np.full((halves[0].shape[0], 8, 3), 128, np.uint8)
        out.append(
            Comparison(
                os.path.basename(photo["file_name"]),
                len(labels),
                len(predictions),
                np.concatenate([halves[0], gap, halves[1]], axis=1),
            )
        )
    return out


def _as_annotation(row: dict, metadata) -> dict:
    """A row of a COCO results file, in the form of a dataset dict's annotation."""
    category = row["category_id"]
    if hasattr(metadata, "thing_dataset_id_to_contiguous_id"):
        category = metadata.thing_dataset_id_to_contiguous_id[category]
    return {**row, "category_id": category, "bbox_mode": BoxMode.XYWH_ABS}


def _draw_objects(image: np.ndarray, objects: List[dict], metadata, side: int) -> np.ndarray:
    """Masks, or boxes where an object has no mask, on a grey photo; the colour is the class's."""
    grey = np.array(Image.fromarray(image).convert("L").convert("RGB"))
    visualizer = Visualizer(grey, metadata, scale=side / max(image.shape[:2]))
    has_masks = all("segmentation" in x for x in objects)
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    drawn = visualizer.overlay_instances(
        boxes=None if has_masks else np.array(boxes, dtype=float).reshape(-1, 4),
        labels=[_object_text(x, metadata.get("thing_classes", [])) for x in objects],
        masks=[x["segmentation"] for x in objects] if has_masks else None,
        assigned_colors=[tuple(c / 255 for c in _color(x["category_id"] + 1)) for x in objects],
        alpha=0.4,
    )
    return drawn.get_image()


def _object_text(annotation: dict, classes: Sequence[str]) -> str:
    words = []
    if len(classes) > 1:  # else there is nothing to tell apart
        words.append(classes[annotation["category_id"]])
    if "score" in annotation:
        words.append(f"{annotation['score']:.0%}")
    if annotation.get("iscrowd"):
        words.append("(crowd)")
    return " ".join(words)
