"""Pictures of what a stage is given or has found, as files in a folder or on one page.

The drawing is that of :mod:`d2ssl.report.pictures` and :mod:`d2ssl.report.sheets`; here is chosen
what is drawn.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, BoxMode, Instances
from PIL import Image

from d2ssl.atomic import atomic_open, make_folder
from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.build import build_finetune_loader, build_pretrain_loader
from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.datasets.subset import choose
from d2ssl.data.masks import encode
from d2ssl.data.photos import read_photo, shrink
from d2ssl.engine.auto import resolve_auto
from d2ssl.engine.checkpoint import load_weights
from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods import PretextMethod
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.report import pieces
from d2ssl.report.pictures import (
    SURE,
    beside_predictions,
    describe_labels,
    draw_labels,
    draw_objects,
    read_predictions,
)
from d2ssl.report.sheets import PutPictures


@dataclass
class Shown:
    """A picture: name of its file, what it shows, H x W x 3 uint8 RGB."""

    file: str
    caption: str
    image: np.ndarray


def show_annotations(
    names: Sequence[str], num_photos: int, seed: int | None, side: int
) -> Iterator[Shown]:
    """Photos of registered sets with their labels.

    Args:
        num_photos: of each set, at most.
        seed: of a random choice; None: the first ones.
        side: longer side of a picture in pixels.
    """
    ensure_registered(names)
    for name in names:
        dicts = listed(name)
        chosen = choose(len(dicts), min(num_photos, len(dicts)), seed)
        photos = decoded(name, [dicts[i] for i in chosen])
        metadata = MetadataCatalog.get(name)
        for index, photo in zip(chosen, photos):
            image = draw_labels(photo, read_photo(photo["file_name"]), metadata, side)
            base = os.path.basename(photo["file_name"])
            yield Shown(
                _file_name(name, index, base), f"{base}: {describe_labels(photo, metadata)}", image
            )


def show_predictions(
    name: str,
    path: str,
    num_photos: int,
    seed: int | None,
    side: int,
    min_score: float = SURE,
    by_confidence: bool = False,
) -> Iterator[Shown]:
    """Photos of a set with their labels on the left and predictions on the right.

    Args:
        path: of the predictions, see :func:`d2ssl.report.pictures.read_predictions`.
        seed: of a random choice; None: the first in order.
        by_confidence: in order of the mean score of a photo's predictions, surest first and
            photos without any last; else as the set lists them.
    """
    ensure_registered([name])
    dicts, metadata = listed(name), MetadataCatalog.get(name)
    found = read_predictions(path, metadata, min_score)
    if found and not {entry["image_id"] for entry in dicts} & set(found):
        raise D2SSLError(f"{path}: is about other photos than {name}'s; name the set that it is of")

    def confidence(index: int) -> float:
        scores = [x["score"] for x in found.get(dicts[index]["image_id"], [])]
        return sum(scores) / len(scores) if scores else 0.0

    chosen = range(len(dicts))
    if seed is not None:
        chosen = choose(len(dicts), min(num_photos, len(dicts)), seed)
    if by_confidence:
        chosen = sorted(chosen, key=confidence, reverse=True)
    chosen = list(chosen)[:num_photos]
    for rank, (index, photo) in enumerate(zip(chosen, decoded(name, [dicts[i] for i in chosen]))):
        shown = beside_predictions(photo, found.get(photo["image_id"], []), metadata, side)
        caption = shown.caption
        if shown.num_predictions:
            caption += f" with a mean score of {confidence(index):.0%}"
        yield Shown(
            _file_name(name, rank if by_confidence else index, shown.name), caption, shown.image
        )


def show_views(cfg, num_photos: int, seed: int | None) -> Iterator[Shown]:
    """The views that pretraining draws of photos and, where a method compares parts of them, which
    are the same to its loss.

    Args:
        cfg: the user's config, its data sets registered.
        num_photos: of each of SSL.DATASETS, at most.
        seed: of a random choice; None: the first ones. The views are drawn with SEED.
    """
    stage = pretrain_cfg(resolve_auto(cfg))
    stage.defrost()
    stage.DATASETS.TRAIN = tuple(_part(name, num_photos, seed) for name in cfg.SSL.DATASETS)
    stage.freeze()
    torch.manual_seed(stage.SEED)  # random weights are those that a run would start from
    model = PretextModel(stage)
    method = model.method
    # The network sees the photos only where matches are found by their features.
    if any(type(x).compare is not PretextMethod.compare for x in _methods(method)):
        load_weights(model.trunk, cfg.MODEL.WEIGHTS)
        model.reset_twins()
    loader = build_pretrain_loader(stage, method.views, method.view_pairs, method.needs)
    num_photos *= len(stage.DATASETS.TRAIN)
    trainer = SimpleNamespace(loader=loader, module=model, cfg=stage)
    for name, caption, pictures in (
        ("views", "What the network sees", PutPictures.of_views(trainer, num_photos)),
        ("matches", "What it is told is the same", PutPictures.of_matches(trainer, num_photos)),
    ):
        sheet = pictures.draw()
        if sheet is not None:
            yield Shown(f"{name}.png", caption, sheet)


def show_training(cfg, num_photos: int, seed: int | None, side: int) -> Iterator[Shown]:
    """The first photos that fine-tuning sees, augmented: as they are on the left, and with the
    objects that it is told of on the right.

    Args:
        cfg: the user's config, its data sets registered.
        num_photos: of each of DATASETS.TRAIN, at most.
        seed: of a random choice; None: the first ones. Augmentations are drawn with SEED.
        side: longer side of a picture in pixels.
    """
    stage = finetune_cfg(cfg)
    stage.defrost()
    stage.DATASETS.TRAIN = tuple(_part(name, num_photos, seed) for name in cfg.DATASETS.TRAIN)
    stage.DATALOADER.ASPECT_RATIO_GROUPING = False  # each photo once, and no batches
    stage.freeze()
    stream = build_finetune_loader(stage).stream
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    for position in range(len(stream.dicts)):
        item = stream[position]
        image = item["image"].numpy().transpose(1, 2, 0)
        if stage.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        image = np.ascontiguousarray(image)
        objects = _annotations(item["instances"])
        drawn = draw_objects(image, objects, metadata, side)
        plain = Image.fromarray(shrink(image, side)).resize(drawn.shape[1::-1])
        base = os.path.basename(item["file_name"])
        yield Shown(
            _file_name("training", position, base),
            f"{base}: {pieces.count(len(objects), 'object')}",
            np.concatenate([plain, drawn], axis=1),
        )


def _annotations(instances: Instances) -> list[dict]:
    """What a detector is told of a photo, in the form of a dataset dict's annotations."""
    found = [
        {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(category)}
        for box, category in zip(instances.gt_boxes, instances.gt_classes)
    ]
    for i, annotation in enumerate(found if instances.has("gt_masks") else ()):
        masks = instances.gt_masks
        annotation["segmentation"] = (
            encode(masks.tensor[i].numpy()) if isinstance(masks, BitMasks) else masks.polygons[i]
        )
    return found


def _methods(method: PretextMethod) -> list[PretextMethod]:
    return [module for module in method.modules() if isinstance(module, PretextMethod)]


def _part(name: str, count: int, seed: int | None) -> str:
    if count >= len(listed(name)):
        return name
    return f"{name}@{count}" + ("" if seed is None else f"#seed{seed}")


def _file_name(name: str, number: int, base: str) -> str:
    stem = os.path.splitext(base)[0]
    return f"{name.replace(os.sep, '_')}_{number:05d}_{stem}.jpg"


def write_pictures(output: str, title: str, shown: Iterable[Shown]) -> int:
    """Write pictures as files into the folder ``output``, or as one page where that ends in .html.

    Returns:
        how many.
    """
    count, figures, is_page = 0, [], output.lower().endswith((".html", ".htm"))
    for count, one in enumerate(shown, 1):
        if is_page:
            figures.append(pieces.figure(one.image, one.caption))
            continue
        make_folder(output)
        with atomic_open(os.path.join(output, one.file), "wb") as file:
            kind = "PNG" if one.file.endswith(".png") else "JPEG"
            Image.fromarray(one.image).save(file, kind, quality=90)
    if is_page:
        make_folder(os.path.dirname(output))
        body = [pieces.heading(title), pieces.block("photos", *figures)]
        pieces.write_page(output, title, body)
    return count
