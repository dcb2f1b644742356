#!/usr/bin/env python
"""Check the installation, or what a file of weights would really do in a detector.

    tools/doctor.py
    tools/doctor.py output/demo/pretrain/model_pretrained.pth
    tools/doctor.py model_pretrained.pth --config-file my_mask_rcnn.yaml INPUT.FORMAT RGB

With WEIGHTS it loads them as stock Detectron2 does into the detector of the config (any plain
Detectron2 yaml, or one of d2ssl's) and says what loads and, for a hand-off of d2ssl, whether the
network still computes what it did, and if not, which key of the config is to blame.

exit code: 0 no problem (a WARN is none); 1 a problem was found (FAIL); 2 wrong usage, such as a
file that is missing or not a checkpoint, or a config key that does not exist
"""

import argparse
import logging
import sys
import warnings

from d2ssl.compat import require_detectron2
from d2ssl.doctor import FAIL, WARN, table
from d2ssl.errors import exit_on_error


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="?", default="", metavar="WEIGHTS", help=".pth or .pkl")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="the detector's yaml (default: the stock.yaml beside WEIGHTS)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    args = parser.parse_intermixed_args(argv)
    if args.config_file and not args.weights:
        parser.error("--config-file needs WEIGHTS")
    return args


def examine(args):
    """[(heading, findings)]."""
    warnings.simplefilter("ignore")  # what libraries deprecate in one another is not for users
    if not args.weights:
        from d2ssl.doctor.installation import check_installation

        return [("Installation", check_installation())]
    require_detectron2()
    for name in ("fvcore", "detectron2"):  # what they say on loading is said better below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from d2ssl.doctor.weights import check_weights

    return check_weights(args.weights, args.config_file, args.opts)


def main(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        sections = examine(args)
    for heading, findings in sections:
        print(f"{heading}\n{table(findings)}\n")
    statuses = [finding.status for _, findings in sections for finding in findings]
    problems, warnings = statuses.count(FAIL), statuses.count(WARN)
    counts = [f"{n} {word}{'s' * (n > 1)}" for n, word in
              ((problems, "problem"), (warnings, "warning")) if n]  # fmt: skip
    print(" and ".join(counts) + "." if counts else "No problem found.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
