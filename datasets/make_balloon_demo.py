#!/usr/bin/env python
"""Draw the embedded data set: balloon scenes with masks, no download."""

import argparse
import os


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        default=os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")),
        help="folder of data sets; writes ROOT/balloon_demo (default: $DETECTRON2_DATASETS, "
        "else datasets)",
    )
    parser.add_argument("--num-train", type=int, default=61, help="train photos (default 61)")
    parser.add_argument("--num-val", type=int, default=13, help="val photos (default 13)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(240, 320),
        metavar=("HEIGHT", "WIDTH"),
        help="of a landscape photo in pixels (default 240 320); a third stands upright",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides all that is drawn")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()

    from d2ssl.data.datasets.synthetic import write_balloons
    from d2ssl.errors import exit_on_error

    folder = os.path.join(args.root, "balloon_demo")
    with exit_on_error():
        write_balloons(folder, args.num_train, args.num_val, tuple(args.size), args.seed)
        print(f"{folder}: balloon_demo_train, balloon_demo_val and balloon_demo_unlabeled")
