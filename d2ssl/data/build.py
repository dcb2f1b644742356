"""From the names in a config to loaders: the one place where data sets are looked up."""

import functools
import importlib
import logging
import math
import os
import sys
from typing import Dict, FrozenSet, List, Sequence, Set

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from d2ssl.compat import available_cores
from d2ssl.data.cache import default_cache_dir
from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.catalog import decoded, listed
from d2ssl.data.loader import StreamLoader
from d2ssl.data.mapper import DetectionMapper, PretextMapper, has_rle, shrunk
from d2ssl.data.photos import PhotoStore, add_size, map_photos, read_photo, require_proportions
from d2ssl.data.proposals import attach_proposals
from d2ssl.data.regions import attach_regions
from d2ssl.data.sampling import build_order, evenly
from d2ssl.data.views import photo_side
from d2ssl.errors import D2SSLError

logger = logging.getLogger("d2ssl")


def register_datasets(cfg) -> None:
    """Call the user's register functions, then check every name that the config uses.

    Raises:
        D2SSLError: a module or function that is not there, or an unknown data set.
    """
    call_register_functions(cfg.SSL.REGISTER)
    ensure_registered(dataset_names(cfg))


def call_register_functions(entries: Sequence[str], option: str = "SSL.REGISTER") -> None:
    """Call the user's functions, each given as ``my_module:my_function``.

    Modules are looked for as Python does, and then in the current folder.

    Args:
        option: where the user wrote them, for the message.

    Raises:
        D2SSLError: a module or function that is not there.
    """
    if entries and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for entry in entries:
        module, _, function = entry.partition(":")
        try:
            register = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise D2SSLError(
                f"{option} {entry}: {error}; write my_module:my_function, with the module in "
                "this folder or on PYTHONPATH"
            ) from error
        register()


def dataset_names(cfg) -> List[str]:
    """Every data set that the enabled stages of a config use."""
    unlabeled = cfg.SSL.ENABLED or cfg.SSL.SELF_TRAINING.ENABLED
    return [*detection_sets(cfg), *(cfg.SSL.DATASETS if unlabeled else ())]


def detection_sets(cfg) -> List[str]:
    """Those that the detector is trained and tested on."""
    dev = cfg.SSL.FINETUNE.DEV_DATASET
    return [*cfg.DATASETS.TRAIN, *([dev] if dev else []), *cfg.DATASETS.TEST]


def load_dicts(names: Sequence[str]) -> List[dict]:
    """The dataset dicts of several sets, one after another; an empty set is an error."""
    rows = [row for name in _registered(names) for row in decoded(name, _rows(name))]
    return [_sized(row) for row in rows]


def load_photos(names: Sequence[str]) -> List[dict]:
    """The same without annotations, so that no mask file is read."""
    keys = ("file_name", "image_id", "height", "width")
    rows = [row for name in _registered(names) for row in _rows(name)]
    photos = [{key: row[key] for key in keys if key in row} for row in rows]
    return [_sized(photo) for photo in photos]


def _sized(row: dict) -> dict:
    return row if "height" in row and "width" in row else add_size(row)


def count_photos(names: Sequence[str]) -> int:
    """How many photos several sets have together, each counted once."""
    return len(each_once([row for name in _registered(names) for row in _rows(name)]))


def each_once(rows: List[dict]) -> List[dict]:
    """The first row of each photo: with a second one it would be a negative of itself."""
    first: Dict[str, dict] = {}
    for row in rows:
        first.setdefault(os.path.realpath(row["file_name"]), row)
    return [*first.values()]


def _registered(names: Sequence[str]) -> Sequence[str]:
    ensure_registered(names)
    return names


def _rows(name: str) -> List[dict]:
    rows = listed(name)
    if not rows:
        raise D2SSLError(f"{name}: the data set is empty")
    return rows


def check_classes(cfg, names: Sequence[str], weights: Sequence[str] = ()) -> None:
    """What a detector learns and what it is tested on must be the same classes.

    Args:
        names: of the sets.
        weights: names of the classes that loaded weights are for, where they say so.

    Raises:
        D2SSLError: sets with different classes, or other classes than the detector is built for.
    """
    known = {"the weights": list(weights)}
    for name in _registered(names):
        _rows(name)  # COCO's loader and others fill the metadata only now
        known[name] = list(MetadataCatalog.get(name).get("thing_classes") or [])
    known = {name: classes for name, classes in known.items() if classes}
    if not known:
        return
    (first, classes), *others = known.items()
    for other, found in others:
        if found != classes:
            raise D2SSLError(
                f"classes differ: {', '.join(classes)} of {first}, {', '.join(found)} of {other}; "
                "register sets with the same classes in the same order, classes=[...]"
            )
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(classes) != count:
        raise D2SSLError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {count}, and {first} has {len(classes)} classes "
            f"({', '.join(classes[:5])}{', ...' * (len(classes) > 5)}); set it to {len(classes)}"
        )


def check_dev(cfg) -> None:
    """The photos that a checkpoint is chosen on are neither learnt nor tested on.

    Raises:
        D2SSLError: naming the sets that share photos.
    """
    dev = cfg.SSL.FINETUNE.DEV_DATASET
    if not dev:
        return
    chosen_on = _photos_of(dev)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        shared = len(chosen_on & _photos_of(name))
        if shared:
            raise D2SSLError(
                f"SSL.FINETUNE.DEV_DATASET {dev} has {shared} photo(s) of {name}: AP of a "
                "checkpoint chosen on them is overstated; name another set"
            )


def _photos_of(name: str) -> Set[str]:
    _registered([name])
    return {os.path.realpath(row["file_name"]) for row in _rows(name)}


def cache_dir(cfg) -> str:
    """Where proposals are kept between runs."""
    return os.path.expanduser(cfg.SSL.PROPOSALS.CACHE_DIR or default_cache_dir())


def _store(cfg, dicts: List[dict], short_side: float) -> PhotoStore:
    store = PhotoStore(short_side, max_bytes=int(cfg.SSL.CACHE_GB * 2**30))
    sizes = store.preload([d["file_name"] for d in dicts], available_cores())
    for d in dicts:
        require_proportions(d, *sizes[d["file_name"]])
    return store


def build_pretrain_loader(cfg, views, view_pairs, needs: FrozenSet[str]) -> StreamLoader:
    """Views of the photos of ``cfg.DATASETS.TRAIN`` (a :func:`~d2ssl.config.pretrain_cfg`).

    ``views``, ``view_pairs`` and ``needs`` are those of
    :class:`~d2ssl.data.mapper.PretextMapper`.
    """
    # Annotations are never read, unless the proposals are made of them.
    from_labels = "boxes" in needs and cfg.SSL.PROPOSALS.SOURCE == "annotations"
    rows = (load_dicts if from_labels else load_photos)(cfg.DATASETS.TRAIN)
    dicts = each_once(rows)
    if len(dicts) < len(rows):
        logger.info("%d photos are in SSL.DATASETS more than once", len(rows) - len(dicts))
    store = _store(cfg, dicts, photo_side(views))
    if "boxes" in needs:
        dicts = _first_process_first(lambda: with_proposals(cfg, dicts))
    if "regions" in needs:
        regions = cfg.SSL.REGIONS
        # Cheap enough for every process to find them for itself, at the same time.
        workers = max(1, available_cores() // comm.get_world_size())
        dicts = attach_regions(dicts, regions.SOURCE, regions.NUM, read_photo, workers)
    dicts = [{k: v for k, v in d.items() if k != "annotations"} for d in dicts]
    mapper = PretextMapper(cfg, store.get, views, view_pairs, needs)
    solver, workers = cfg.SOLVER, cfg.DATALOADER.NUM_WORKERS
    return StreamLoader(dicts, mapper, solver.IMS_PER_BATCH, cfg.SEED, workers)


def with_proposals(cfg, dicts: List[dict]) -> List[dict]:
    """Dataset dicts with the boxes that ``SSL.PROPOSALS`` asks for."""
    proposals = cfg.SSL.PROPOSALS
    return attach_proposals(
        dicts,
        proposals.SOURCE,
        read_photo,
        cache_dir(cfg),
        num_workers=available_cores(),
        min_scale=proposals.MIN_SCALE,
        max_scale=proposals.MAX_SCALE,
        max_aspect=proposals.MAX_ASPECT,
    )


def build_finetune_loader(cfg) -> StreamLoader:
    """Labelled photos of ``cfg.DATASETS.TRAIN`` through Detectron2's own augmentations, in the
    order of ``DATALOADER.SAMPLER_TRAIN``."""
    dicts = load_dicts(cfg.DATASETS.TRAIN)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        labelled = [d for d in dicts if any(not a.get("iscrowd") for a in d.get("annotations", []))]
        if not labelled:
            raise D2SSLError(f"{', '.join(cfg.DATASETS.TRAIN)}: not one photo has an annotation")
        if len(labelled) < len(dicts):
            logger.info("%d photos without annotation left out", len(dicts) - len(labelled))
        dicts = labelled
    side = training_side(cfg)
    dicts = _with_small_masks(dicts, side) if cfg.MODEL.MASK_ON else dicts
    later = unlabeled_photos(cfg) if cfg.SSL.SELF_TRAINING.ENABLED else []
    store = _store(cfg, dicts + later, side)
    # What is left of a covered object is pixels.
    masks = "bitmask" if cfg.SSL.FINETUNE.COPY_PASTE > 0 else mask_format(cfg, dicts)
    mapper = DetectionMapper(cfg, store.get, mask_format=masks, others=dicts)
    later, share = None, cfg.SSL.FINETUNE.AUGMENT_UNTIL
    if share < 1:
        stock = DetectionMapper(_with_stock_augmentation(cfg), store.get, mask_format=masks)
        later = round(share * cfg.SOLVER.MAX_ITER), stock
    loading, batch_size = cfg.DATALOADER, cfg.SOLVER.IMS_PER_BATCH
    return StreamLoader(
        dicts,
        mapper,
        batch_size,
        cfg.SEED,
        loading.NUM_WORKERS,
        build_order(cfg, dicts),
        one_shape=loading.ASPECT_RATIO_GROUPING,
        later=later,
    )


def _with_stock_augmentation(cfg):
    """As it is once ``SSL.FINETUNE.AUGMENT_UNTIL`` has come."""
    cfg = cfg.clone()
    cfg.defrost()
    options = cfg.SSL.FINETUNE
    options.SCALE_JITTER, options.COPY_PASTE, options.STRONG = (), 0.0, 0.0
    cfg.freeze()
    return cfg


def _with_small_masks(dicts: List[dict], side: float) -> List[dict]:
    """Photos with run-length codes at the size that they are trained at: these are decoded at each
    step, which takes long at the size of the photo. Crowds, of which nothing is learnt, go."""
    large = [i for i, d in enumerate(dicts) if has_rle([d]) and min(d["height"], d["width"]) > side]
    bare = [
        {**dicts[i], "annotations": [a for a in dicts[i]["annotations"] if not a.get("iscrowd")]}
        for i in large
    ]
    small = map_photos(functools.partial(shrunk, short_side=side), bare, "masks")
    found = dict(zip(large, small))
    return [found.get(i, d) for i, d in enumerate(dicts)]


def training_side(cfg) -> float:
    """The short side of a photo that fine-tuning needs at most, in pixels; infinite where it cuts
    crops out of the photo before it scales them, or does not scale it."""
    if cfg.INPUT.CROP.ENABLED or 0 in cfg.INPUT.MIN_SIZE_TRAIN:
        return math.inf
    return math.ceil(max(cfg.INPUT.MIN_SIZE_TRAIN) * max([1.0, *cfg.SSL.FINETUNE.SCALE_JITTER]))


def unlabeled_photos(cfg) -> List[dict]:
    """The photos of ``SSL.DATASETS`` that nobody labelled, without annotations: none that the
    detector is trained, tested, or watched on, whatever its set is called."""
    names = _registered(detection_sets(cfg))
    labeled = {os.path.realpath(d["file_name"]) for name in names for d in _rows(name)}
    photos = each_once(load_photos(cfg.SSL.DATASETS))
    return [d for d in photos if os.path.realpath(d["file_name"]) not in labeled]


def mask_format(cfg, dicts: List[dict]) -> str:
    """``INPUT.MASK_FORMAT``, or "bitmask" where masks are such that "polygon" cannot hold them."""
    if not (cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon" and has_rle(dicts)):
        return cfg.INPUT.MASK_FORMAT
    logger.info("INPUT.MASK_FORMAT bitmask in place of polygon: some masks are RLE (with holes)")
    return "bitmask"


def build_validation_batches(cfg, names: Sequence[str], limit: int = 64) -> List[List[dict]]:
    """Up to ``limit`` annotated photos at test size, one a batch, held in memory."""
    dicts = [d for d in load_dicts(names) if d.get("annotations")]
    mapper = mapper_at_test_size(cfg, mask_format(cfg, dicts))
    return [[mapper(d)] for d in evenly(dicts, limit)]


def calibration_batches(cfg, names: Sequence[str], limit: int, size: int = 16) -> List[List[dict]]:
    """Up to ``limit`` photos at test size, in batches of about ``size`` crops of equal sides.

    Statistics that a batch is normalised with must come from several photos: with one photo a
    batch, each would be whitened by itself, and what differs between photos would be lost. Equal
    sides, multiples of 32, keep padding out of the statistics.
    """
    mapper = mapper_at_test_size(cfg)
    dicts = evenly(load_photos(names), limit)
    images = [mapper(d)["image"] for d in dicts]
    count = math.ceil(len(images) / size)
    groups = [
        images[len(images) * i // count : len(images) * (i + 1) // count] for i in range(count)
    ]
    return [[{"image": crop} for crop in _equal_crops(group)] for group in groups]


def _equal_crops(images: List[torch.Tensor]) -> List[torch.Tensor]:
    height, width = (max(32, min(i.shape[a] for i in images) // 32 * 32) for a in (1, 2))
    tops = [max(0, i.shape[1] - height) // 2 for i in images]
    lefts = [max(0, i.shape[2] - width) // 2 for i in images]
    return [i[:, t : t + height, x : x + width] for i, t, x in zip(images, tops, lefts)]


def mapper_at_test_size(cfg, mask_format: str = "", scale: float = 1.0) -> DetectionMapper:
    """A photo at test size, times ``scale``, as the detector is given it then, its annotations
    with it."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        cfg.INPUT[key] = round(scale * cfg.INPUT[key])
    return DetectionMapper(cfg, read_photo, is_train=False, mask_format=mask_format)


def _first_process_first(compute):
    """Let one process fill the cache that the others then read."""
    if comm.get_world_size() == 1 or comm.is_main_process():
        result = compute()
        comm.synchronize()
        return result
    comm.synchronize()
    return compute()
