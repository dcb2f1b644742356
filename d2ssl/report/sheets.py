"""Contact sheets of what pretraining sees, what it takes for the same and what it makes of it."""

import os
from typing import Dict, List, Sequence, Tuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from PIL import Image, ImageDraw, ImageFont

from d2ssl.atomic import atomic_open
from d2ssl.data.views import View
from d2ssl.modeling.units import Cells, Regions
from d2ssl.report.pictures import COLORS, color_of

INK, PAPER, GAP = (40, 44, 52), (255, 255, 255), 12
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
    def of_views(cls, trainer, num_photos: int = 6) -> "PutPictures":
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
            tint[labels == label] = color_of(k + 1)
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
        draw.rectangle(frame, outline=color_of(number), width=2)
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
    draw.rectangle((x, y, x + _font(12).getlength(str(number)) + 6, y + 15), color_of(number))
    ink = (0, 0, 0) if np.dot(color_of(number), (0.299, 0.587, 0.114)) > 140 else PAPER
    draw.text((x + 3, y), str(number), ink, _font(12))


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
