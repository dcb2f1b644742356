"""What one photo becomes: views and what is matched in them, or a detector's training example."""

import copy
from typing import Callable, FrozenSet, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from d2ssl.data.regions import regions_in_view
from d2ssl.data.views import View, cut_out, draw_holes, draw_views, paired_boxes, window_of
from d2ssl.errors import D2SSLError


def to_tensor(photo: np.ndarray, image_format: str) -> torch.Tensor:
    """H x W x 3 uint8 RGB -> 3 x H x W uint8 in the config's colour order, the only place that is
    decided."""
    if image_format == "BGR":
        photo = photo[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))


class PretextMapper:
    """Draws the views of one photo, and what a pretext method needs to know of them.

    Args:
        read_photo: file name -> H x W x 3 uint8 RGB.
        views, view_pairs: as the pretext method declares them.
        needs: which of "boxes" (that pairs of views share), "regions" and "holes" are made.
        fill: RGB value that becomes 0 after normalisation, for cut-outs.
        num_boxes: K, boxes a pair.
        hole_share, hole_size: see :func:`~d2ssl.data.views.draw_holes`.
    """

    @configurable
    def __init__(
        self,
        *,
        read_photo: Callable,
        views: Sequence[View],
        view_pairs: Sequence[Tuple[int, int]],
        needs: FrozenSet[str],
        image_format: str,
        fill: Sequence[float],
        num_boxes: int,
        min_box_size: float,
        box_jitter: float,
        hole_share: float,
        hole_size: float,
    ):
        self.read_photo = read_photo
        self.views, self.view_pairs, self.needs = list(views), list(view_pairs), needs
        self.image_format, self.fill = image_format, fill
        self.num_boxes, self.min_box_size, self.box_jitter = num_boxes, min_box_size, box_jitter
        self.hole_share, self.hole_size = hole_share, hole_size

    @classmethod
    def from_config(cls, cfg, read_photo, views, view_pairs, needs):
        mean = cfg.MODEL.PIXEL_MEAN
        return {
            "read_photo": read_photo,
            "views": views,
            "view_pairs": view_pairs,
            "needs": needs,
            "image_format": cfg.INPUT.FORMAT,
            "fill": mean[::-1] if cfg.INPUT.FORMAT == "BGR" else mean,
            "num_boxes": cfg.SSL.SOCO.NUM_BOXES,
            "min_box_size": cfg.SSL.SOCO.MIN_BOX_SIZE,
            "box_jitter": cfg.SSL.SOCO.BOX_JITTER,
            "hole_share": cfg.SSL.HOLES.SHARE,
            "hole_size": cfg.SSL.HOLES.SIZE,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: Detectron2's; with ``proposal_boxes`` (N x 4 XYXY in the photo's own
                pixels) if boxes are needed, with ``regions`` (see
                :func:`~d2ssl.data.regions.attach_regions`) if regions are.

        Returns:
            ``image_id``; ``views``, a list of 3 x size x size uint8 images in the config's colour
            order; ``windows``, V x 4 float32, see :func:`~d2ssl.data.views.window_of`; ``pairs``,
            for each of ``view_pairs`` a dict of ``boxes`` (two K x 4 float32 XYXY in pixels of the
            views) and ``ids`` (K, -1 where the views share nothing), empty without boxes.
            With regions ``regions``, for each view its size/4 x size/4 int64 labels: the cells of
            P2. With holes ``holes``, for each view 1 x size x size bool, True where the picture
            is to be filled in; ``views`` are whole.
        """
        photo = self.read_photo(dataset_dict["file_name"])
        drawn = draw_views(self.views, photo)
        windows = [window_of(move, v.size) for v, (_, move) in zip(self.views, drawn)]
        out = {
            "image_id": dataset_dict["image_id"],
            "windows": torch.as_tensor(np.stack(windows), dtype=torch.float32),
            "pairs": [],
        }
        if "boxes" in self.needs:
            # The photo in memory may be a scaled copy of the one that the boxes were found on.
            proposals = dataset_dict["proposal_boxes"] * np.tile(
                [photo.shape[1] / dataset_dict["width"], photo.shape[0] / dataset_dict["height"]], 2
            )
            out["pairs"] = [self._pair(a, b, drawn, proposals) for a, b in self.view_pairs]
        images = self._cut_out([image for image, _ in drawn], out["pairs"])
        out["views"] = [to_tensor(image, self.image_format) for image in images]
        if "regions" in self.needs:
            out["regions"] = [
                torch.from_numpy(
                    regions_in_view(dataset_dict["regions"], window, photo.shape, view.size // 4)
                )
                for view, window in zip(self.views, windows)
            ]
        # Drawn last, so that views and boxes are the same whether or not holes are needed.
        if "holes" in self.needs:
            out["holes"] = [draw_holes(v.size, self.hole_share, self.hole_size) for v in self.views]
        return out

    def _pair(self, a: int, b: int, drawn, proposals) -> dict:
        boxes_a, boxes_b, ids = paired_boxes(
            proposals,
            drawn[a][1],
            drawn[b][1],
            self.views[a].size,
            self.views[b].size,
            k=self.num_boxes,
            min_size=self.min_box_size,
            jitter=self.box_jitter,
        )
        boxes = [torch.as_tensor(x, dtype=torch.float32) for x in (boxes_a, boxes_b)]
        return {"boxes": boxes, "ids": torch.as_tensor(ids)}

    def _cut_out(self, images: List[np.ndarray], pairs: List[dict]) -> List[np.ndarray]:
        for (a, b), pair in zip(self.view_pairs, pairs):
            for view, boxes in zip((a, b), pair["boxes"]):
                p = self.views[view].cutout_p
                if p > 0:
                    images[view] = cut_out(images[view], boxes.numpy(), self.fill, p)
        return images


def has_rle(dataset_dicts: Sequence[dict]) -> bool:
    """Whether a mask is run-length coded, as those with holes are; crowds are never learnt from."""
    annotations = (a for d in dataset_dicts for a in d.get("annotations", ()))
    return any(
        isinstance(a.get("segmentation"), dict) and not a.get("iscrowd") for a in annotations
    )


class DetectionMapper(DatasetMapper):
    """Detectron2's training mapper on photos that are already decoded and scaled down.

    Boxes and masks are scaled along; augmentations, filters and output are the stock ones.

    Args:
        mask_format: default: ``INPUT.MASK_FORMAT``; "polygon" takes no run-length coded mask.
    """

    def __init__(self, cfg, read_photo: Callable, is_train: bool = True, mask_format: str = ""):
        stock = DatasetMapper.from_config(cfg, True)  # True: keep the annotations
        stock["instance_mask_format"] = mask_format or cfg.INPUT.MASK_FORMAT
        if not is_train:
            size, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
            stock["augmentations"] = [T.ResizeShortestEdge(size, most, "choice")] if size else []
        # DatasetMapper is @configurable: without a config it takes these arguments.
        super().__init__(**stock)
        self.read_photo = read_photo

    def __call__(self, dataset_dict: dict) -> dict:
        dataset_dict = copy.deepcopy(dataset_dict)
        photo = self.read_photo(dataset_dict["file_name"])
        height, width = dataset_dict["height"], dataset_dict["width"]
        h, w = photo.shape[:2]
        if abs(h * width - w * height) > 2 * max(height, width):
            raise D2SSLError(
                f"{dataset_dict['file_name']}: the annotation says {width} x {height}, the photo "
                "has other proportions; correct the annotation, or the photo's EXIF orientation"
            )
        if self.image_format == "BGR":
            photo = photo[:, :, ::-1]
        scaled = T.AugInput(np.ascontiguousarray(photo))
        transforms = self.augmentations(scaled)
        if (h, w) != (height, width):
            transforms = T.TransformList([T.ResizeTransform(height, width, h, w), transforms])
        image = scaled.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict
