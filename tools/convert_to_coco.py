#!/usr/bin/env python
"""Write a registered data set as one JSON file in COCO's instances format.

tools/convert_to_coco.py --dataset balloon_train --output balloon_train.json
tools/convert_to_coco.py --dataset "balloon_train@16#seed3" --output balloon_16.json --rle
tools/convert_to_coco.py --register my_sets:register_all --dataset pets_test --output pets.json

Polygons stay polygons, masks without holes become polygons, and masks with holes and crowds
become RLE. Photos without annotations are kept. Photos are not copied: the file names them from
--image-root, and the last line says how Detectron2 loads the two together.
"""

import argparse
import os
import sys
import time

from d2ssl.compat import require_detectron2
from d2ssl.errors import exit_on_error
from d2ssl.options import add_register


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help="a registered set or a part, NAME@16#seed3"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE.json", help="replaced where it is there"
    )
    add_register(parser)
    parser.add_argument(
        "--image-root",
        default="",
        metavar="DIR",
        help="folder that file names start from (default: the deepest that holds all photos)",
    )
    parser.add_argument("--rle", action="store_true", help="write all masks as RLE")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes beside this one, or 0 (default: one a core, 0 for few photos)",
    )
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers {args.workers}: give 0 or more")
    return args


def main(args):
    from d2ssl.data.build import call_register_functions
    from d2ssl.data.convert import convert_to_coco

    start = time.perf_counter()
    call_register_functions(args.register, "--register")
    done = convert_to_coco(args.dataset, args.output, args.image_root, args.rle, args.workers)
    seconds = time.perf_counter() - start
    boxes = done.annotations - done.polygons - done.rles
    kinds = f"{done.polygons} polygons, {done.rles} RLE" + (f", {boxes} boxes" if boxes else "")
    print(
        f"{args.output}: {done.images} images, {done.annotations} annotations ({kinds}) in "
        f"{seconds:.1f} s, {os.path.getsize(args.output) / 1e6:.2f} MB"
    )
    print(f'register_coco_instances("my_set", {{}}, "{args.output}", "{done.image_root}")')


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        main(args)


if __name__ == "__main__":
    sys.exit(run())
