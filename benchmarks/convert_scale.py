#!/usr/bin/env python
"""Time and memory of tools/convert_to_coco.py on sets of growing size, and of reading the result.

    benchmarks/convert_scale.py
    benchmarks/convert_scale.py --sizes 1000 2000 4000 --workers 0

Draws sets in the layout of Open Images (a CSV row and a PNG for each mask, five a photo; one mask
in twenty has a hole), converts each in a process of its own, loads the file with Detectron2's
load_coco_json in another, and prints a table. Wall time depends on what else the machine does;
CPU time, of all processes together, hardly. Peak memory is that of the largest single process:
the main one, and the largest worker (or what the imports start, where that is larger). Needs
about 1 GB of disk for 100 000 annotations.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np

PER_PHOTO = 5
CLASSES = ("/m/0a", "ring"), ("/m/0b", "blob")
CLASSES_FILE = "challenge-2019-classes-description-segmentable.csv"
COLUMNS = {
    "imagelabels": "ImageID,LabelName,Confidence",
    "masks": "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax",
    "bbox": "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf",
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[12500, 25000, 50000, 100000],
        metavar="N",
        help="annotations, in steps of five (default: 12500 25000 50000 100000)",
    )
    parser.add_argument(
        "--photo",
        type=int,
        nargs=2,
        default=(384, 512),
        metavar=("HEIGHT", "WIDTH"),
        help="of photos and masks in pixels (default: 384 512)",
    )
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="one a core")
    parser.add_argument("--folder", default=None, metavar="DIR", help="for the temporary files")
    return parser.parse_args()


def grow(root: str, start: int, stop: int, height: int, width: int) -> None:
    """Add photos number ``start`` to ``stop`` with their masks to the set in ``root``."""
    images, masks = os.path.join(root, "images", "train"), os.path.join(root, "masks", "train")
    os.makedirs(images, exist_ok=True)
    os.makedirs(masks, exist_ok=True)
    with open(os.path.join(root, CLASSES_FILE), "w") as file:
        file.writelines(f"{mid},{name}\n" for mid, name in CLASSES)
    photo = cv2.imencode(".jpg", np.full((height, width, 3), 128, np.uint8))[1].tobytes()
    rows = {name: [] for name in COLUMNS}
    for number in range(start, stop):
        key = f"{number:016x}"[::-1]
        with open(os.path.join(images, f"{key}.jpg"), "wb") as file:
            file.write(photo)
        rng = np.random.RandomState(number)
        for i in range(PER_PHOTO):
            ring = (number * PER_PHOTO + i) % 20 == 0
            mid, _ = CLASSES[0 if ring else 1]
            mask, (x1, y1, x2, y2) = draw(rng, height, width, ring)
            name = f"{key}_{i}.png"
            cv2.imwrite(os.path.join(masks, name), mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            box = f"{x1 / width:.6f},{x2 / width:.6f},{y1 / height:.6f},{y2 / height:.6f}"
            rows["masks"].append(f"{name},{key},{mid},{i},{box}")
            rows["bbox"].append(f"{key},{mid},{box},0")
        rows["imagelabels"] += [f"{key},{mid},1" for mid, _ in CLASSES]
    for name, header in COLUMNS.items():
        with open(os.path.join(root, f"challenge-2019-train-segmentation-{name}.csv"), "a") as file:
            file.writelines(f"{row}\n" for row in ([header] if start == 0 else []) + rows[name])


def draw(rng, height: int, width: int, ring: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """A wavy disc, HxW of 0 and 255, perhaps with a hole; and its box x1, y1, x2, y2."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = rng.uniform(0.05, 0.3) * height * (1 + 0.2 * np.sin(rng.randint(2, 9) * angle))
    x, y = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
    points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 255)
    if ring:
        cv2.circle(mask, (round(x), round(y)), round(0.4 * radius.min()), 0, -1)
    left, top, box_width, box_height = cv2.boundingRect(mask)
    return mask, (left, top, left + box_width, top + box_height)


def measure(function, *args) -> tuple:
    """(result, wall s, CPU s, MB of this process, MB of its largest worker) of a call in a new
    process; what the imports take is in the memory and not in the times."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_measured, function, *args).result()


def _measured(function, *args) -> tuple:
    multiprocessing.set_start_method(None, force=True)  # the usual one for the conversion's own
    import detectron2.data.datasets  # noqa: F401
    import pycocotools.coco  # noqa: F401

    import d2ssl.data.convert  # noqa: F401

    start = time.perf_counter(), _cpu()
    result = function(*args)
    wall, cpu = time.perf_counter() - start[0], _cpu() - start[1]
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return result, wall, cpu, *(resource.getrusage(w).ru_maxrss / 1024 for w in who)


def _cpu() -> float:
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def convert(root: str, output: str, workers: int | None):
    from d2ssl.data.convert import convert_to_coco
    from d2ssl.data.datasets.open_images import register_open_images

    register_open_images("scale", root)
    return convert_to_coco("scale_train", output, num_workers=workers)


def load(file: str, image_root: str) -> int:
    from detectron2.data.datasets import load_coco_json

    return sum(len(d["annotations"]) for d in load_coco_json(file, image_root, "scale_again"))


def main(args) -> None:
    print("                     |  conversion                                          |  loading")
    print("annotations  images  |  wall s   CPU s  ms/ann.  main MB  worker MB  file MB |"
          "  wall s   CPU s      MB", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root, output = os.path.join(folder, "set"), os.path.join(folder, "coco.json")
        photos = 0
        for size in sorted(args.sizes):
            grow(root, photos, size // PER_PHOTO, *args.photo)
            photos = size // PER_PHOTO
            done, wall, cpu, memory, worker = measure(convert, root, output, args.workers)
            again, load_wall, load_cpu, load_memory, _ = measure(load, output, done.image_root)
            assert again == done.annotations == photos * PER_PHOTO
            print(
                f"{done.annotations:11}  {done.images:6}  |  {wall:6.1f}  {cpu:6.1f}  "
                f"{1000 * cpu / done.annotations:7.2f}  {memory:7.0f}  {worker:9.0f}  "
                f"{os.path.getsize(output) / 1e6:7.1f} |  {load_wall:6.2f}  {load_cpu:6.2f}  "
                f"{load_memory:6.0f}", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main(parse_args())
