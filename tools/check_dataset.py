#!/usr/bin/env python
"""Look at data sets before training on them: damaged photos, wrong labels, the same photo twice.

    tools/check_dataset.py balloon_train balloon_val
    tools/check_dataset.py my_train my_val --register my_sets:register_all --config-file my.yaml
    tools/check_dataset.py my_photos INPUT.MIN_SIZE_TEST 512 SSL.INPUT.VIEW_SIZE 320

Any registered sets; several are compared with one another, as the splits of one. A set is taken
for a test set if the config tests on it, or by a name such as my_val or my_test. The account is
one HTML page that needs no other file, and a short one in the terminal. The config says how large
photos are in fine-tuning and in pretraining; without one the defaults hold.

exit code: 0 safe to train on (warnings and notes are none the less worth reading); 1 not safe, as
an error was found: photos that cannot be read, photos both in a training and in a test set, labels
that cannot be right; 2 wrong usage, such as a set or a file that is missing
"""

import argparse
import itertools
import os
import re
import sys

from d2ssl.compat import require_detectron2
from d2ssl.errors import exit_on_error
from d2ssl.options import add_register


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s NAME [NAME ...] [options] [KEY VALUE ...]",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NAME, KEY VALUE",
        help="registered data sets, and then config keys to override, e.g. INPUT.MIN_SIZE_TEST 512",
    )
    add_register(parser)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a yaml, see configs/")
    parser.add_argument(
        "--output", default="output/check", metavar="DIR", help="folder of the page (%(default)s)"
    )
    args = parser.parse_intermixed_args(argv)
    is_key = re.compile(r"SEED|OUTPUT_DIR|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+").fullmatch
    args.names = list(itertools.takewhile(lambda word: not is_key(word), args.words))
    args.names, args.opts = list(dict.fromkeys(args.names)), args.words[len(args.names) :]
    if not args.names:
        parser.error("name a data set")
    return args


def main(args):
    from d2ssl.config import load_cfg
    from d2ssl.data.build import call_register_functions
    from d2ssl.data.checks import ERROR, check_sets, compare_with_detector
    from d2ssl.modeling.methods import method_class
    from d2ssl.report.dataset_page import summary, write_dataset_page

    cfg = load_cfg(args.config_file, ["SSL.DATASETS", tuple(args.names), *args.opts])
    method_class(cfg)  # an unknown name is refused before all photos are read
    call_register_functions(cfg.SSL.REGISTER)
    call_register_functions(args.register, "--register")
    size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    judged_by = [*cfg.DATASETS.TEST, cfg.SSL.FINETUNE.DEV_DATASET]
    sets = check_sets(args.names, *size, test=judged_by)
    if args.config_file:
        compare_with_detector(sets, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON)
    name = re.sub(r"[^\w.@#+-]+", "_", "+".join(args.names))[:100]
    path = os.path.join(args.output, f"{name}.html")
    write_dataset_page(path, sets, cfg)
    print(f"{summary(sets, cfg)}\nPage: {path}")
    return int(any(finding.severity == ERROR for one in sets for finding in one.findings))


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        return main(args)


if __name__ == "__main__":
    sys.exit(run())
