"""What one photo becomes: views with matched boxes, or a detector's training example."""

import copy
from typing import Callable, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from d2ssl.data.views import View, cut_out, draw_view, paired_boxes
from d2ssl.errors import D2SSLError


def to_tensor(photo: np.ndarray, image_format: str) -> torch.Tensor:
    """H x W x 3 uint8 RGB -> 3 x H x W uint8 in the config's colour order, the only place that is
    decided."""
    if image_format == "BGR":
        photo = photo[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))


class PretextMapper:
    """Draws the views of one photo and the boxes that pairs of them share.

    Args:
        read_photo: file name -> H x W x 3 uint8 RGB.
        views, view_pairs: as the pretext method declares them.
        num_boxes: K, boxes a pair; 0 for methods without boxes.
        fill: RGB value that becomes 0 after normalisation, for cut-outs.
    """

    @configurable
    def __init__(
        self,
        *,
        read_photo: Callable,
        views: Sequence[View],
        view_pairs: Sequence[Tuple[int, int]],
        image_format: str,
        fill: Sequence[float],
        num_boxes: int,
        min_box_size: float,
        box_jitter: float,
    ):
        self.read_photo = read_photo
        self.views, self.view_pairs = list(views), list(view_pairs)
        self.image_format, self.fill = image_format, fill
        self.num_boxes, self.min_box_size, self.box_jitter = num_boxes, min_box_size, box_jitter

    @classmethod
    def from_config(cls, cfg, read_photo, views, view_pairs):
        mean = cfg.MODEL.PIXEL_MEAN
        return {
            "read_photo": read_photo,
            "views": views,
            "view_pairs": view_pairs,
            "image_format": cfg.INPUT.FORMAT,
            "fill": mean[::-1] if cfg.INPUT.FORMAT == "BGR" else mean,
            "num_boxes": cfg.SSL.SOCO.NUM_BOXES,
            "min_box_size": cfg.SSL.SOCO.MIN_BOX_SIZE,
            "box_jitter": cfg.SSL.SOCO.BOX_JITTER,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Detectron2 dict with ``proposal_boxes`` (photo's own pixels) -> see
        :meth:`d2ssl.modeling.methods.base.PretextMethod.forward`."""
        photo = self.read_photo(dataset_dict["file_name"])
        drawn = [draw_view(view, photo) for view in self.views]
        out = {"image_id": dataset_dict["image_id"], "pairs": []}
        if self.view_pairs and self.num_boxes:
            # The photo in memory may be a scaled copy of the one that the boxes were found on.
            proposals = dataset_dict["proposal_boxes"] * np.tile(
                [photo.shape[1] / dataset_dict["width"], photo.shape[0] / dataset_dict["height"]], 2
            )
            out["pairs"] = [self._pair(a, b, drawn, proposals) for a, b in self.view_pairs]
        images = self._cut_out([image for image, _ in drawn], out["pairs"])
        out["views"] = [to_tensor(image, self.image_format) for image in images]
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


class DetectionMapper(DatasetMapper):
    """Detectron2's training mapper on photos that are already decoded and scaled down.

    Boxes and masks are scaled along; augmentations, filters and output are the stock ones.
    """

    def __init__(self, cfg, read_photo: Callable, is_train: bool = True):
        stock = DatasetMapper.from_config(cfg, True)  # True: keep the annotations
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
