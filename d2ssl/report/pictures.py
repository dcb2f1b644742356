"""What training sees, and what the detector found: pictures to look at before trusting numbers."""

import os
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont

from d2ssl.atomic import atomic_open
from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.datasets.files import read_json
from d2ssl.data.mapper import paint_over
from d2ssl.data.masks import annotation_mask, read_label_image
from d2ssl.data.photos import read_photo, shrink
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError
from d2ssl.modeling.units import Cells, Regions
from d2ssl.report.pieces import count

# Distinct on photos, and with white or black text on them.
COLORS = (
    (230, 25, 75), (0, 130, 200), (245, 190, 20), (60, 180, 75), (145, 30, 180), (245, 130, 48),
    (70, 240, 240), (240, 50, 230), (128, 0, 0), (210, 245, 60), (0, 0, 128), (170, 110, 40),
)  # fmt: skip
INK, PAPER, GAP = (40, 44, 52), (255, 255, 255), 12
HIDDEN = (128, 128, 128)
FEWEST_CELLS = 7  # a side of a view: with less the picture says little, with more it is crowded


class PutPictures(HookBase):
    """A picture as a PNG file, and in TensorBoard under the file's name.

    Args:
        draw: gives the picture, H x W x 3 uint8 RGB; None where there is nothing to show.
        at_end: it is drawn after the last step; else before the first.
    """

    def __init__(self, draw, path: str, at_end: bool = False):
        self.draw, self.path, self.at_end = draw, path, at_end

    @classmethod
    def of_views(cls, cfg, trainer, num_photos: int = 6) -> "PutPictures":
        """The first photos of a pretraining stage's own stream; its random state is its own."""
        stream = trainer.loader.stream

        def draw():
            mapper, count = stream.mapper, min(num_photos, len(stream.dicts))
            items = [stream[position] for position in range(count)]
            return views_sheet(items, mapper.views, mapper.view_pairs, mapper.image_format)

        return cls(draw, os.path.join(trainer.cfg.OUTPUT_DIR, "views.png"))

    @classmethod
    def of_matches(cls, trainer, num_photos: int = 4) -> "PutPictures":
        """Which cells or regions of the same photos count as the same in the loss; nothing for
        methods that compare neither. Of several methods the first that does."""
        stream, model = trainer.loader.stream, trainer.module
        comparing = [m for m in model.method.modules()
                     if isinstance(getattr(m, "units", None), (Cells, Regions))]  # fmt: skip

        def draw():
            if not comparing:
                return None
            method, pair = comparing[0], comparing[0].view_pairs[0]
            batch = [stream[position] for position in range(min(num_photos, len(stream.dicts)))]
            with inference_context(model), torch.no_grad():
                a, b = (model.see(batch)[index] for index in pair)
                same, _ = method.compare(a, b)
            captions = [_view_caption(index, stream.mapper.views[index]) for index in pair]
            names = [item["image_id"] for item in batch]
            image_format = stream.mapper.image_format
            return matches_sheet(method.units, (a, b), same, captions, names, image_format)

        return cls(draw, os.path.join(trainer.cfg.OUTPUT_DIR, "matches.png"))

    @classmethod
    def of_reconstructions(cls, trainer, num_photos: int = 6) -> "PutPictures":
        """What a generative method has learnt to make of the same photos; nothing for others."""
        stream, model = trainer.loader.stream, trainer.module

        def draw():
            batch = [stream[position] for position in range(min(num_photos, len(stream.dicts)))]
            # With stored statistics: none of them moves, and no other process is waited for.
            with inference_context(model), torch.no_grad():
                pictures = model.method.pictures(model.see(batch))
            if not pictures:
                return None
            names = [item["image_id"] for item in batch]
            return reconstructions_sheet(pictures, names, stream.mapper.image_format)

        path = os.path.join(trainer.cfg.OUTPUT_DIR, "reconstructions.png")
        return cls(draw, path, at_end=True)

    def before_train(self):
        if not self.at_end:
            self._put()

    def after_step(self):
        # In after_train TensorBoard's writer is closed already.
        if self.at_end and self.trainer.iter + 1 == self.trainer.max_iter:
            self._put()

    def _put(self):
        if not comm.is_main_process():
            return
        sheet = self.draw()
        if sheet is None:
            return
        with atomic_open(self.path, "wb") as file:
            Image.fromarray(sheet).save(file, "PNG")
        name = os.path.splitext(os.path.basename(self.path))[0]
        self.trainer.storage.put_image(name, sheet.transpose(2, 0, 1))


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
    scale = max(1, round(256 / max(view.size for view in views)))
    rows = []
    for item in items:
        boxes = numbered_boxes(item["pairs"], view_pairs, len(views))
        tiles = [
            _with_boxes(_enlarged(view, scale, image_format), drawn, scale)
            for view, drawn in zip(item["views"], boxes)
        ]
        rows.append((_photo_caption(item, view_pairs), tiles))
    return _contact_sheet([_view_caption(i, view) for i, view in enumerate(views)], rows)


def matches_sheet(units, views, same: torch.Tensor, captions, names, image_format) -> np.ndarray:
    """A contact sheet: a row a photo, two views side by side, what is the same in both marked.

    Of cells up to as many as there are colours, of one level, well apart; of regions all. What
    bears a number in one view is the same as what bears it in the other.

    Args:
        units: the :class:`~d2ssl.modeling.units.Cells` or ``Regions`` that are compared.
        views: two :class:`~d2ssl.modeling.pretext_model.ViewBatch` of the same photos.
        same: N x R x R bool, which rows of the first are the same as which of the second.
        captions: of the two views.
        names: of the photos.
        image_format: colour order of the views, "RGB" or "BGR".
    Returns:
        H x W x 3 uint8 RGB.
    """
    scale = max(1, round(384 / max(view.pixels.shape[-1] for view in views)))
    mark = _mark_regions if isinstance(units, Regions) else _mark_cells
    rows = []
    for i, name in enumerate(names):
        tiles = [_enlarged(view.pixels[i].cpu(), scale, image_format) for view in views]
        text, tiles = mark(units, views, i, same[i].cpu().numpy(), tiles, scale)
        rows.append((f"photo {name}: {text}", tiles))
    return _contact_sheet(captions, rows)


def _mark_cells(units, views, photo: int, same: np.ndarray, tiles, scale: int):
    levels = [units.lattice(view).level.cpu().numpy() for view in views]
    sides = [round((levels[0] == number).sum() ** 0.5) for number in range(len(units.levels))]
    number = sides.index(min((s for s in sides if s >= FEWEST_CELLS), default=max(sides)))
    match = same[levels[0] == number][:, levels[1] == number]  # cells of a x cells of b
    boxes = [_cell_boxes((level == number).sum(), view.pixels.shape[-1])
             for level, view in zip(levels, views)]  # fmt: skip
    shown = spread_out(boxes[0][:, :2], match, len(COLORS))
    numbered = (
        [(k + 1, boxes[0][row]) for k, row in enumerate(shown)],
        [(k + 1, boxes[1][c]) for k, row in enumerate(shown) for c in match[row].nonzero()[0]],
    )
    marked = [_with_boxes(tile, drawn, scale) for tile, drawn in zip(tiles, numbered)]
    if not shown:
        return "no cell has a match", marked
    cells = f"{match.any(1).sum()} cells of {units.levels[number].upper()}"
    return f"{len(shown)} of {cells} that have a match, which bears the same number", marked


def _cell_boxes(count: int, size: int) -> np.ndarray:
    """XYXY in pixels of a view of the cells of a square map, row by row: count x 4."""
    side = round(count**0.5)
    y, x = np.divmod(np.arange(count), side)
    return np.stack([x, y, x + 1, y + 1], axis=1) * (size / side)


def spread_out(places: np.ndarray, match: np.ndarray, count: int) -> List[int]:
    """Up to ``count`` rows with a match, far from each other, no two with a match in common.

    Args:
        places: R x 2.
        match: R x C bool.
    """
    chosen: List[int] = []
    free, distance = match.any(1), np.full(len(places), np.inf)  # to the nearest chosen one
    while free.any() and len(chosen) < count:
        chosen.append(int(np.where(free, distance, -1).argmax()))
        distance = np.minimum(distance, np.linalg.norm(places - places[chosen[-1]], axis=1))
        free &= ~match[:, match[chosen[-1]]].any(1)
    return sorted(chosen)


def _mark_regions(units, views, photo: int, same: np.ndarray, tiles, scale: int):
    shared = np.unique(same.any(1).nonzero()[0] % units.num)  # labels, on any level
    marked = []
    for view, tile in zip(views, tiles):
        labels = view.regions[photo].cpu().numpy()
        step = tile.width // len(labels)
        tint = np.full((*labels.shape, 3), 128, np.uint8)
        for k, label in enumerate(shared):
            tint[labels == label] = _color(k + 1)
        grey = tile.convert("L").convert("RGB")  # a tint is the same on both views then
        tile = Image.blend(grey, Image.fromarray(tint).resize(tile.size, Image.NEAREST), 0.5)
        draw = ImageDraw.Draw(tile)
        for k, label in enumerate(shared):
            # Deep inside, also where a region is bent or of several parts.
            inside = np.pad((labels == label).astype(np.uint8), 1)
            depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), labels.shape)
            corner = np.clip((np.array([x, y]) + 0.5) * step - 8, 0, tile.width - 20)
            _put_number(draw, corner, k + 1)
        marked.append(tile)
    return f"{len(shared)} regions that both views show", marked


def _contact_sheet(captions: Sequence[str], rows) -> np.ndarray:
    """Captioned columns of pictures; ``rows`` are a caption and a picture a column each."""
    font, small, tiles = _font(14), _font(12), rows[0][1]
    widths = [max(t.width, int(font.getlength(c)) + 1) for t, c in zip(tiles, captions)]
    lefts = [GAP + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    head, row = 2 * GAP + 14, max(tile.height for tile in tiles) + 20 + GAP
    area = sum(widths) + GAP * (len(widths) + 1), head + row * len(rows)
    sheet = Image.new("RGB", area, PAPER)
    draw = ImageDraw.Draw(sheet)
    for left, caption in zip(lefts, captions):
        draw.text((left, GAP), caption, INK, font)
    for i, (caption, tiles) in enumerate(rows):
        draw.text((lefts[0], head + i * row), caption, INK, small)
        for left, tile in zip(lefts, tiles):
            sheet.paste(tile, (left, head + i * row + 20))
    return np.array(sheet)


def _enlarged(image: torch.Tensor, scale: int, image_format: str) -> Image.Image:
    """A 3 x H x W uint8 view as a picture ``scale`` times its size."""
    image = image.flip(0) if image_format == "BGR" else image
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def reconstructions_sheet(pictures, names, image_format: str) -> np.ndarray:
    """A contact sheet: a row a photo, a captioned column a kind of picture.

    Args:
        pictures: a caption and N x 3 x S x S uint8 images a column, see
            :meth:`d2ssl.modeling.methods.PretextMethod.pictures`.
        names: of the N photos.
        image_format: colour order of the images, "RGB" or "BGR".
    Returns:
        H x W x 3 uint8 RGB.
    """
    captions, columns = zip(*pictures)
    scale = max(1, round(256 / columns[0].shape[-1]))
    rows = [
        (f"photo {name}", [_enlarged(image.cpu(), scale, image_format) for image in images])
        for name, *images in zip(names, *columns)
    ]
    return _contact_sheet(captions, rows)


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


def _with_boxes(picture: Image.Image, boxes, scale: int) -> Image.Image:
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
        _put_number(draw, (x, y), number)
    return picture


def _put_number(draw: ImageDraw.ImageDraw, corner: Tuple[float, float], number: int) -> None:
    """A number on a patch of its colour, whose top left corner is given."""
    x, y = corner
    draw.rectangle((x, y, x + _font(12).getlength(str(number)) + 6, y + 15), _color(number))
    ink = (0, 0, 0) if np.dot(_color(number), (0.299, 0.587, 0.114)) > 140 else PAPER
    draw.text((x + 3, y), str(number), ink, _font(12))


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
    photos = decoded(name, listed(name)[:num_photos])
    metadata = MetadataCatalog.get(name)  # of a set that was listed: COCO's loader fills it then
    found = read_predictions(predictions_file(cfg), metadata, min_score)
    return [compare(photo, found.get(photo["image_id"], []), metadata, side) for photo in photos]


@dataclass
class OwnLabels:
    """One photo with what the detector labelled on it."""

    name: str
    sure: int
    unsure: int
    image: np.ndarray  # H x W x 3 uint8 RGB


def show_own_labels(path: str, name: str, num_photos: int = 8, side: int = 480) -> List[OwnLabels]:
    """Photos of a file of :mod:`d2ssl.engine.self_training`, objects in colour with their score and
    what is hidden in training in grey.

    Args:
        name: of the labelled set, for the classes.
    """
    content = read_json(path)
    root, metadata, found = content["info"]["image_root"], MetadataCatalog.get(name), []
    for image in content["images"][:num_photos]:
        rows = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        rows = [{**row, "bbox_mode": BoxMode.XYWH_ABS} for row in rows]
        sure, unsure = ([r for r in rows if r["iscrowd"] == crowd] for crowd in (0, 1))
        photo = shrink(read_photo(os.path.join(root, image["file_name"])), side)
        if unsure:
            photo = paint_over(photo, [r["segmentation"] for r in unsure], HIDDEN)
        size = image["height"], image["width"]
        picture = draw_objects(photo, sure, metadata, side, size)
        found.append(OwnLabels(image["file_name"], len(sure), len(unsure), picture))
    return found


def count_own_labels(path: str) -> Tuple[int, int, int]:
    """Of a file of :mod:`d2ssl.engine.self_training`: photos with an object, photos, objects."""
    content = read_json(path)
    objects = [a["image_id"] for a in content["annotations"] if not a["iscrowd"]]
    return len(set(objects)), len(content["images"]), len(objects)


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


def compare(photo: dict, predictions: List[dict], metadata, side: int) -> Comparison:
    """A photo with its labels on the left, predictions on the right."""
    image, labels = read_photo(photo["file_name"]), photo.get("annotations", [])
    halves = [draw_objects(image, x, metadata, side) for x in (labels, predictions)]
    gap = np.full((halves[0].shape[0], 8, 3), 128, np.uint8)
    return Comparison(
        os.path.basename(photo["file_name"]),
        len(labels),
        len(predictions),
        np.concatenate([halves[0], gap, halves[1]], axis=1),
    )


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
            color = [c / 255 for c in _color(number + 1)]
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
        assigned_colors=[tuple(c / 255 for c in _color(x["category_id"] + 1)) for x in objects],
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
