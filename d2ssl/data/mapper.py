"""What one photo becomes: views and what is matched in them, or a detector's training example."""

import copy
from typing import Callable, FrozenSet, List, Sequence, Tuple

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from d2ssl.data.masks import encode
from d2ssl.data.pasting import paste
from d2ssl.data.photos import require_proportions, scaled_size
from d2ssl.data.regions import regions_in_view
from d2ssl.data.views import View, cut_out, draw_holes, draw_views, paired_boxes, window_of

CUT_OUT = 0.5  # share of objects that a square is cut out of, on a photo in another look


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


class ScaleJitter(T.Augmentation):
    """Large-scale jitter: a photo larger or smaller, at the size that it has without.

    ``resize`` decides on a size; the photo is scaled to fit it, times a factor drawn uniformly,
    and then cropped at random, or filled up on the right and below. As the size is that of stock
    Detectron2, and not one square for all photos as in Ghiasi et al. (CVPR 2021), an iteration
    costs what it costs in stock, and objects have their stock scale at factor 1.

    Args:
        resize: an augmentation that gives a ``ResizeTransform``, or leaves the photo as it is.
        least, most: range of the factor.
        fill: colour, in the order of the image.
    """

    def __init__(self, resize: T.Augmentation, least: float, most: float, fill: Sequence[float]):
        super().__init__()
        self._init(locals())

    def __call__(self, aug_input) -> T.Transform:
        size = self.resize.get_transform(aug_input.image)
        height, width = aug_input.image.shape[:2]
        if isinstance(size, T.ResizeTransform):
            height, width = size.new_h, size.new_w
        scale = T.ResizeScale(self.least, self.most, height, width)
        # Not FixedSizeCrop: it draws one number for both sides, so two corners are hardly seen.
        crop = T.RandomCrop("absolute", (height, width))
        moved = aug_input.apply_augmentations([scale, crop])
        h, w = aug_input.image.shape[:2]
        fill = _Fill(0, 0, width - w, height - h, w, h, self.fill)
        return moved + aug_input.apply_augmentations([fill])


class _Fill(T.PadTransform):
    """fvcore's padding, in a colour; masks are padded with 0."""

    def apply_image(self, image):
        sides = self.y0, self.y1, self.x0, self.x1
        return cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=self.pad_value)


def paint_over(photo: np.ndarray, masks: Sequence[dict], fill: Sequence[float]) -> np.ndarray:
    """A copy of a photo, H x W x 3 uint8, with RLE masks, all of one size, in one colour."""
    hidden = coco_mask.decode(coco_mask.merge(masks))
    hidden = cv2.resize(hidden, photo.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    painted = photo.copy()
    painted[hidden > 0] = np.rint(fill)
    return painted


def draw_other_look() -> T.Transform:
    """Other colours, and blur in half of all cases, for RGB photos; nothing moves.

    Those of SoCo's views without solarisation. So are learnt what a teacher labelled by K. Sohn et
    al. (STAC, 2020) and Y.-C. Liu et al. ("Unbiased Teacher", ICLR 2021).
    """
    look = View(size=32, blur_p=0.5, solarize_p=0.0).photometric()
    return T.AugInput(np.zeros((1, 1, 3), np.uint8)).apply_augmentations(look)


def shrunk(dataset_dict: dict, short_side: float) -> dict:
    """The dict of an annotated photo with a short side of at most ``short_side`` px: boxes, masks
    and keypoints as the mapper would scale them, once instead of at each step."""
    size = dataset_dict["height"], dataset_dict["width"]
    height, width = scaled_size(*size, short_side)
    if (height, width) == size:
        return dataset_dict
    resize = T.TransformList([T.ResizeTransform(*size, height, width)])
    annotations = []
    for annotation in dataset_dict["annotations"]:
        row = detection_utils.transform_instance_annotations(
            copy.deepcopy(annotation), resize, (height, width)
        )
        if isinstance(row.get("segmentation"), np.ndarray):
            row["segmentation"] = encode(row["segmentation"])
        annotations.append({**row, "bbox": row["bbox"].tolist()})
    return {**dataset_dict, "height": height, "width": width, "annotations": annotations}


class DetectionMapper(DatasetMapper):
    """Detectron2's training mapper on photos that are already decoded and scaled down.

    Boxes and masks are scaled along; augmentations, filters and output are the stock ones, unless
    ``SSL.FINETUNE`` has ``SCALE_JITTER`` or ``COPY_PASTE`` (boxes then follow their masks), or
    ``STRONG``. Photos that the detector labelled itself, which have ``hidden``, go by
    ``SSL.SELF_TRAINING.STRONG`` instead.

    Args:
        mask_format: default: ``INPUT.MASK_FORMAT``; "polygon" takes no run-length coded mask.
        others: photos whose objects ``COPY_PASTE`` takes; the photo itself may be one of them.
    """

    def __init__(
        self,
        cfg,
        read_photo: Callable,
        is_train: bool = True,
        mask_format: str = "",
        others: Sequence[dict] = (),
    ):
        stock = DatasetMapper.from_config(cfg, True)  # True: keep the annotations
        stock["instance_mask_format"] = mask_format or cfg.INPUT.MASK_FORMAT
        options = cfg.SSL.FINETUNE
        self.fill = tuple(cfg.MODEL.PIXEL_MEAN)  # becomes 0 after normalisation
        self.factors = tuple(options.SCALE_JITTER) or (1.0, 1.0)
        self.paste_prob = options.COPY_PASTE
        self.others = others if is_train and self.paste_prob > 0 else ()
        shares = (options.STRONG, cfg.SSL.SELF_TRAINING.STRONG) if is_train else (0.0, 0.0)
        self.strong = dict(zip((False, True), shares))  # by whether the detector labelled it
        self.stock_augmentations = stock["augmentations"]
        if not is_train:
            size, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
            stock["augmentations"] = [T.ResizeShortestEdge(size, most, "choice")] if size else []
        elif options.SCALE_JITTER:
            stock["augmentations"] = self._jittered()
            stock["recompute_boxes"] = cfg.MODEL.MASK_ON  # as stock does when it crops
        # DatasetMapper is @configurable: without a config it takes these arguments.
        super().__init__(**stock)
        self.read_photo = read_photo

    def _jittered(self, size: Sequence[int] = ()) -> List[T.Augmentation]:
        """Stock's augmentations with jitter; ``size`` (height, width): to it, not one drawn."""
        return [
            ScaleJitter(T.Resize(size) if size else a, *self.factors, self.fill)
            if isinstance(a, T.ResizeShortestEdge)
            else a
            for a in self.stock_augmentations
        ]

    def __call__(self, dataset_dict: dict) -> dict:
        share = self.strong["hidden" in dataset_dict]
        strong = share > 0 and np.random.rand() < share  # at 0 nothing is drawn, as in stock
        look = draw_other_look() if strong else T.NoOpTransform()
        image, example = self._augmented(dataset_dict, self.augmentations, look)
        if self.others and np.random.rand() < self.paste_prob:
            image, example["instances"] = self._pasted(image, example["instances"], look)
        if strong:
            boxes = example["instances"].gt_boxes.tensor.numpy()
            image = cut_out(image, boxes, self.fill, CUT_OUT)
        example["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return example

    def _augmented(self, dataset_dict: dict, augmentations: T.Augmentation, look: T.Transform):
        """The augmented photo (H x W x 3 uint8 in the config's order), and its dict with what
        became of the annotations."""
        dataset_dict = copy.deepcopy(dataset_dict)
        photo = self.read_photo(dataset_dict["file_name"])
        height, width = dataset_dict["height"], dataset_dict["width"]
        h, w = photo.shape[:2]
        require_proportions(dataset_dict, h, w)
        photo = look.apply_image(photo)
        if self.image_format == "BGR":
            photo = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)
        hidden = dataset_dict.pop("hidden", None)
        if hidden:
            photo = paint_over(photo, hidden, self.fill)
        scaled = T.AugInput(photo)
        transforms = augmentations(scaled)
        if (h, w) != (height, width):
            transforms = T.TransformList([T.ResizeTransform(height, width, h, w), transforms])
        if "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, scaled.image.shape[:2])
        return scaled.image, dataset_dict

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if all(a.get("iscrowd") for a in dataset_dict["annotations"]):
            # Stock fails where it is to take the boxes from masks, and there is none.
            del dataset_dict["annotations"]
            dataset_dict["instances"] = detection_utils.annotations_to_instances([], image_shape)
            return
        usual = self.instance_mask_format
        if has_rle([dataset_dict]):  # labels of a detector's own, beside others that are polygons
            self.instance_mask_format = "bitmask"
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        self.instance_mask_format = usual

    def _pasted(
        self, image: np.ndarray, instances: Instances, look: T.Transform
    ) -> Tuple[np.ndarray, Instances]:
        """With some objects of another photo, which has a scale, crop and flip of its own and the
        same look; as it was where none of them is in view."""
        other = self.others[np.random.randint(len(self.others))]
        augmentations = T.AugmentationList(self._jittered(image.shape[:2]))
        source, example = self._augmented(other, augmentations, look)
        objects = example["instances"]
        if not len(objects):
            return image, instances
        count = np.random.randint(len(objects)) + 1
        objects = objects[torch.from_numpy(np.random.permutation(len(objects))[:count])]
        size = image.shape[:2]
        # Where there never was an object Detectron2 leaves out the field.
        masks = instances.gt_masks.tensor.numpy() if len(instances) else np.zeros((0, *size), bool)
        image, masks, kept = paste(image, masks, source, objects.gt_masks.tensor.numpy())
        found = Instances(size)
        found.gt_masks = BitMasks(torch.from_numpy(masks))
        found.gt_boxes = found.gt_masks.get_bounding_boxes()
        found.gt_classes = torch.cat([instances.gt_classes[kept], objects.gt_classes])
        return image, found
