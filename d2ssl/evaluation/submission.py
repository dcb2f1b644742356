"""
From predictions to the CSV that the Open Images Challenge 2019 takes on Kaggle.

A row for every photo: ``ImageID,ImageWidth,ImageHeight,PredictionString``, where the last is
``label score mask label score mask ...`` and empty where nothing was found. A label is a MID such
as ``/m/01g317``; a mask is COCO's compressed RLE, deflated (zlib) and written in base64. The same
format, with an example, at
https://www.kaggle.com/competitions/open-images-2019-instance-segmentation/overview/evaluation
"""

import base64
import heapq
import os
import zlib
from collections.abc import Iterator, Sequence

import ijson
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from d2ssl.atomic import atomic_open
from d2ssl.data.datasets.catalog import listed
from d2ssl.data.photos import photo_size
from d2ssl.errors import D2SSLError

HEADER = "ImageID,ImageWidth,ImageHeight,PredictionString\n"


def write_submission(
    dataset_name: str,
    predictions: str,
    output: str,
    score_threshold: float = 0.1,
    max_detections: int = 8,
) -> tuple[int, int]:
    """
    Write the CSV, complete or not at all.

    The predictions, which may be larger than memory, are read one by one, and the best of each
    photo are kept.

    Args:
        dataset_name: a registered set with ``mids`` in its metadata, such as
            :func:`~d2ssl.data.datasets.open_images.register_open_images` makes.
        predictions: ``coco_instances_results.json`` as Detectron2's COCOEvaluator writes it.
        score_threshold: least score, 0..1.
        max_detections: most detections of a photo; the best ones are kept.

    Returns:
        Numbers of photos and of detections written.

    Raises:
        D2SSLError: a set without MIDs, predictions that are damaged, without masks or of another
            set, or an output that cannot be written.
    """
    if not 0 <= score_threshold <= 1 or max_detections < 1:
        raise D2SSLError(
            f"score threshold {score_threshold}, {max_detections} detections a photo: give 0..1 "
            "and 1 or more"
        )
    photos = {entry["image_id"]: entry for entry in listed(dataset_name)}
    mids = getattr(MetadataCatalog.get(dataset_name), "mids", None)
    if mids is None:
        raise D2SSLError(
            f"data set {dataset_name!r}: has no labels (MIDs) of Open Images; name a set of "
            "register_open_images"
        )
    best = {image_id: [] for image_id in photos}  # heaps, the worst first
    try:
        with atomic_open(output) as file:
            for number, prediction in enumerate(_read_predictions(predictions)):
                image_id, score, mid, mask = _check(prediction, photos, mids, predictions, number)
                if score < score_threshold:
                    continue
                heapq.heappush(best[image_id], (score, -number, mid, mask))  # of equals the first
                if len(best[image_id]) > max_detections:
                    heapq.heappop(best[image_id])
            file.write(HEADER)
            for image_id, photo in tqdm(photos.items(), "writing", unit="photo", disable=None):
                file.write(_row(photo, sorted(best[image_id], reverse=True), predictions))
    except OSError as error:
        raise D2SSLError(f"{output}: cannot be written ({error.strerror})") from error
    return len(photos), sum(map(len, best.values()))


def encode_mask(counts: str) -> str:
    """COCO's compressed RLE ``counts`` -> the challenge's text for a mask."""
    return base64.b64encode(zlib.compress(counts.encode("ascii"), zlib.Z_BEST_COMPRESSION)).decode()


def _row(photo: dict, kept: Sequence[tuple], source: str) -> str:
    # Left to the set's decoder, which would read all true masks as well.
    height, width = photo_size(photo["file_name"])
    words = []
    for score, _, mid, mask in kept:
        if mask["size"] != [height, width]:
            raise D2SSLError(
                f"{source}: a mask of {mask['size'][1]}x{mask['size'][0]} on "
                f"{photo['file_name']}, which is {width}x{height}; predict on this set again"
            )
        words += [mid, f"{score:.6g}", encode_mask(mask["counts"])]
    stem = os.path.splitext(os.path.basename(photo["file_name"]))[0]
    return f"{stem},{width},{height},{' '.join(words)}\n"


def _check(
    prediction: dict, photos: dict, mids: Sequence[str], source: str, number: int
) -> tuple[int, float, str, dict]:
    """image_id, score, label and mask of a prediction that can be right."""
    where = f"{source}: prediction {number}"
    try:
        image_id, category_id = prediction["image_id"], prediction["category_id"]
        score, mask = prediction["score"], prediction["segmentation"]
        counts, size = mask["counts"], mask["size"]
    except (KeyError, TypeError) as error:
        raise D2SSLError(
            f"{where} is not complete ({type(error).__name__}: {error}); give the "
            "coco_instances_results.json of a detector with masks"
        ) from error
    if not isinstance(score, float | int) or not 0 <= score <= 1:
        raise D2SSLError(f"{where} has score {score!r}; give 0..1")
    if not isinstance(counts, str) or not counts.isascii() or not isinstance(size, list):
        raise D2SSLError(f"{where} has a mask that is not COCO's compressed RLE; predict again")
    if image_id not in photos:
        raise D2SSLError(f"{where} is of image {image_id}, which is not in the set; name its set")
    if not isinstance(category_id, int) or not 0 <= category_id < len(mids):
        raise D2SSLError(
            f"{where} has category {category_id}, of {len(mids)} in the set; name the set that the "
            "detector was trained for"
        )
    return image_id, score, mids[category_id], mask


def _read_predictions(path: str) -> Iterator[dict]:
    """Elements of a JSON list, read piece by piece, with a progress bar."""
    damaged = f"{path}: not a JSON list, or cut short; predict again"
    bar = {"desc": "reading", "unit": "B", "unit_scale": True, "disable": None}
    try:
        with open(path, "rb") as file:
            if not file.read(64).lstrip().startswith(b"["):
                raise D2SSLError(damaged)
            file.seek(0)
            with tqdm.wrapattr(file, "read", total=os.path.getsize(path), **bar) as read:
                yield from ijson.items(read, "item", use_float=True)
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise D2SSLError(f"{path}: cannot be read ({error.strerror})") from error
    except ijson.JSONError as error:
        raise D2SSLError(damaged) from error
