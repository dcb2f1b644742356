#!/usr/bin/env python
"""Turn a detector's predictions into the CSV of the Open Images Challenge 2019 (Kaggle).

    tools/write_submission.py --register my_sets:register_all --dataset open_images_test \\
        --predictions output/inference/coco_instances_results.json --output submission.csv

my_sets.py registers the data set that was predicted on:

    from d2ssl.data.datasets import register_open_images

    def register_all():
        register_open_images("open_images", "/path/to/data")

The CSV has a row for every photo of the set, also where nothing was found. It is written complete
or not at all.
"""

import argparse
import sys

from d2ssl.compat import require_detectron2
from d2ssl.errors import exit_on_error
from d2ssl.options import add_register


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help="the set that was predicted on"
    )
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="FILE",
        help="coco_instances_results.json as Detectron2's evaluators write it",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the CSV to write")
    add_register(parser)
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.1,
        metavar="X",
        help="leave out detections of a lower score. AP compares scores only with one another, so "
        "that a low one does no harm and may find an object: 0.2 has scored better than 0.3. Still "
        "less than the default mostly makes the file longer (default: %(default)s)",
    )
    parser.add_argument(
        "--max-detections",
        type=int,
        default=8,
        metavar="N",
        help="best detections of a photo to keep; Kaggle's evaluation has timed out on files with "
        "many more (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        from d2ssl.data.build import call_register_functions
        from d2ssl.data.datasets import ensure_registered
        from d2ssl.evaluation.submission import write_submission

        call_register_functions(args.register, "--register")
        ensure_registered([args.dataset])
        photos, detections = write_submission(
            args.dataset, args.predictions, args.output, args.score_threshold, args.max_detections
        )
    print(f"{args.output}: {detections} detections in {photos} photos")


if __name__ == "__main__":
    sys.exit(main())
