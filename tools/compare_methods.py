#!/usr/bin/env python
"""Pretrain several methods for the same number of photo views, and compare what came of it.

tools/compare_methods.py configs/methods/*.yaml --seeds 0 1 2 --views 4096 --output output/methods
tools/compare_methods.py configs/methods/soco.yaml configs/methods/moco.yaml --heldout my_test \\
    --register my_photos:register_all MODEL.WEIGHTS "" SSL.INPUT.VIEW_SIZE 128

A run that is finished is not repeated when the command is given again; one that failed is.
In the folder of --output:

comparison.md               the table: loss, retrieval, cost per view, collapse
comparison.json             all numbers, with command and versions
gains.svg                   gain in retrieval with its interval
losses.svg                  loss curves
METHOD/seedN/result.json    one run; log.txt and pretrain/metrics.json beside it
"""

import argparse
import glob
import itertools
import os
import shlex
import sys
from pathlib import Path

from d2ssl.compat import require_detectron2
from d2ssl.errors import exit_on_error
from d2ssl.options import add_register

METHODS = Path(__file__).resolve().parents[1] / "configs" / "methods"


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [FILE.yaml ...] [options] [KEY VALUE ...]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE.yaml, KEY VALUE",
        help="a config for each method (default: all in configs/methods), and config keys to "
        "override in all of them, e.g. MODEL.RESNETS.DEPTH 18",
    )
    parser.add_argument(
        "--seeds", nargs="+", default=["0"], metavar="N", help="runs of each method (default: 0)"
    )
    parser.add_argument(
        "--views",
        type=int,
        default=4096,
        metavar="N",
        help="photo views a run, the same for all methods: a method with two views of 16 photos "
        "in an iteration has N / 32 iterations (default: 4096)",
    )
    parser.add_argument(
        "--heldout",
        default="",
        metavar="NAME",
        help="data set whose boxes are to be found again (default: DATASETS.TEST)",
    )
    add_register(parser)
    parser.add_argument("--output", default="output/methods", metavar="DIR", help="%(default)s")
    args = parser.parse_intermixed_args(argv)
    # --seeds takes all words up to the next option, so overrides behind it are among them.
    seeds = list(itertools.takewhile(str.isdecimal, args.seeds))
    if not seeds:
        parser.error(f"--seeds {args.seeds[0]}: give numbers of 0 or more")
    words = args.words + args.seeds[len(seeds) :]
    args.seeds = list(map(int, seeds))
    args.files = [word for word in words if word.endswith((".yaml", ".yml"))]
    args.opts = [word for word in words if not word.endswith((".yaml", ".yml"))]
    return args


def main(args, command):
    from d2ssl.data.build import call_register_functions
    from d2ssl.evaluation import compare
    from d2ssl.evaluation.retrieval import BoxRetrieval
    from d2ssl.report.comparison import write_comparison

    files = args.files or sorted(glob.glob(str(METHODS / "*.yaml")))
    call_register_functions(args.register, "--register")
    runs = compare.plan(files, args.opts, args.seeds, args.views, args.output, args.heldout)
    task = BoxRetrieval(runs[0].cfg, runs[0].cfg.DATASETS.TEST)
    results = [compare.finished(run) for run in runs]
    known = len(runs) - results.count(None)
    print(
        f"{len(runs)} runs, {known} of them finished before; "
        f"{task.num_boxes:.0f} boxes in {task.num_photos} held-out photos"
    )

    def keep():
        asked = {"command": command, "overrides": args.opts, "photo_views": args.views}
        write_comparison(args.output, compare.comparison(runs, results, task, **asked))

    for i, run in enumerate(runs):
        if results[i] is None:
            results[i] = compare.execute(run, task)
            print(compare.progress(runs, results, i), flush=True)
            keep()  # the table of what is known can be read meanwhile
    keep()
    print(f"Table: {os.path.join(args.output, 'comparison.md')}")


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        words = sys.argv[1:] if argv is None else argv
        main(args, shlex.join(["tools/compare_methods.py", *words]))


if __name__ == "__main__":
    sys.exit(run())
