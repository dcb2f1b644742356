#!/usr/bin/env python
"""Look at labels, at what pretraining or fine-tuning sees, or at predictions beside labels.

    tools/visualize_data.py --source annotations --dataset balloon_train --output labels.html
    tools/visualize_data.py --source views --config-file configs/methods/soco.yaml --output views/
    tools/visualize_data.py --source training --config-file configs/ssl_fpn_balloon.yaml \\
        --output training.html SSL.FINETUNE.STRONG 1.0
    tools/visualize_data.py --source predictions --dataset balloon_val --output found.html \\
        --predictions output/ssl_fpn_balloon/finetune/inference/coco_instances_results.json \\
        --sort confidence

--output is a folder for picture files, or one HTML page, which needs no other file, if it ends in
.html. views shows what SSL.METHOD draws and, where it compares cells or regions, which are the same
to its loss; training shows photos as the detector learns from them, beside their objects.

exit code: 0; 2 wrong usage, such as a set or a file that is missing
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
        "--source", required=True, choices=("annotations", "views", "training", "predictions")
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME",
        help="a registered set; may be given several times, but for predictions (views: default "
        "SSL.DATASETS; training: DATASETS.TRAIN)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR|FILE.html", help="folder, or page, to write"
    )
    add_register(parser)
    parser.add_argument(
        "--num-photos", type=int, default=8, metavar="N", help="of each set (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="choose photos at random (default: the first ones)"
    )
    parser.add_argument(
        "--side", type=int, default=640, metavar="PX", help="of a picture (default: %(default)s)"
    )
    views = parser.add_argument_group("views, training")
    views.add_argument("--config-file", default="", metavar="FILE", help="a yaml, see configs/")
    views.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys to override, e.g. SSL.METHOD MoCo"
    )
    found = parser.add_argument_group("predictions")
    found.add_argument(
        "--predictions", default="", metavar="FILE", help="coco_instances_results.json of a run"
    )
    found.add_argument(
        "--min-score",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="predictions below it are not drawn (default: %(default)s)",
    )
    found.add_argument(
        "--sort",
        choices=("file", "confidence"),
        default="file",
        help="as the set lists its photos, or those with the surest predictions first",
    )
    args = parser.parse_intermixed_args(argv)
    if args.source == "predictions" and not (args.predictions and len(args.dataset) == 1):
        parser.error("--source predictions needs --predictions FILE and one --dataset NAME")
    if args.source == "annotations" and not args.dataset:
        parser.error("--source annotations needs --dataset NAME")
    if args.source not in ("views", "training") and args.opts:
        parser.error(f"{args.opts[0]}: keys of a config are for --source views or training")
    if min(args.num_photos, args.side) < 1 or (args.seed or 0) < 0:
        parser.error("--num-photos and --side must be 1 or more, --seed 0 or more")
    return args


def main(args):
    from d2ssl.config import get_key, load_cfg
    from d2ssl.data.build import call_register_functions, register_datasets
    from d2ssl.report import visualize

    call_register_functions(args.register, "--register")
    if args.source == "annotations":
        title = f"Labels of {', '.join(args.dataset)}"
        shown = visualize.show_annotations(args.dataset, args.num_photos, args.seed, args.side)
    elif args.source == "predictions":
        name = args.dataset[0]
        title = f"Labels (left) and predictions (right) in {name}"
        shown = visualize.show_predictions(
            name, args.predictions, args.num_photos, args.seed, args.side, args.min_score,
            by_confidence=args.sort == "confidence",
        )  # fmt: skip
    else:
        key = "SSL.DATASETS" if args.source == "views" else "DATASETS.TRAIN"
        sets = [key, tuple(args.dataset)] if args.dataset else []
        cfg = load_cfg(args.config_file, [*args.opts, *sets])
        register_datasets(cfg)
        title = f"{args.source.capitalize()} of {', '.join(get_key(cfg, key))}"
        if args.source == "views":
            shown = visualize.show_views(cfg, args.num_photos, args.seed)
        else:
            shown = visualize.show_training(cfg, args.num_photos, args.seed, args.side)
    count = visualize.write_pictures(args.output, title, shown)
    print(f"{count} picture{'s' * (count != 1)}: {args.output}")


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        main(args)


if __name__ == "__main__":
    sys.exit(run())
