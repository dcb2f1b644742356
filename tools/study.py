#!/usr/bin/env python
"""Does it pay? Arms x labelled budgets x subsets x seeds, and one page that answers.

tools/study.py --config-file configs/study/balloon.yaml --dry-run      the runs, and how long
tools/study.py --config-file configs/study/balloon.yaml
tools/study.py --config-file configs/study/balloon.yaml SEEDS 3 \\
    SOLVER.MAX_ITER 800 SOLVER.STEPS "(640,)"
tools/study.py --config-file configs/study/balloon.yaml --cluster slurm --jobs 16 \\
    --slurm partition=gpu --slurm cpus_per_task=8 --slurm mem=16GB

The same command goes on where it was stopped; what is done is not done again. A run that diverged
is recorded and not tried again, one whose process died is. In the folder of --output:

study.html       the answer, with tables, curves and pictures; one file
study.md         it as a table and sentences
study.json       all numbers, with the command, the versions and what each detection matched
runs.csv         a row a run
curve.png        AP over labels
differences.png  with and without, of each repeat and in the mean
final/           for each arm a config that trains it on all labels
runs/ARM/BUDGET/subsetS-seedN/      log.txt, config.yaml, finetune/metrics.json of a run
pretraining/ARM/seedN/              shared by the runs that start from it
"""

import argparse
import shlex
import signal
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
        "--config-file", required=True, metavar="FILE", help="the study's yaml, see configs/study"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs and how long they will take, from a short timing on this machine",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the page from what is done, run nothing"
    )
    parser.add_argument(
        "--output", default="", metavar="DIR", help="default: output/study/<name of the yaml>"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="processes at a time (default: one a GPU; on a CPU one a core, as memory allows); on "
        "SLURM, jobs that may be queued",
    )
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what each SLURM job asks for, e.g. partition=gpu, mem=16GB, time=600 (minutes; "
        "default: a day); may be given several times",
    )
    add_register(parser, ", called after those of SSL.REGISTER")
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="override keys of the study (SEEDS 3, BUDGETS [8,16]), or config keys of all arms",
    )
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 0:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    if args.slurm and args.cluster != "slurm":
        parser.error("--slurm needs --cluster slurm")
    for word in args.slurm:
        if "=" not in word:
            parser.error(f"--slurm {word}: write KEY=VALUE")
    pairs = (word.split("=", 1) for word in args.slurm)
    args.slurm = {key: int(value) if value.isdecimal() else value for key, value in pairs}
    return args


def main(args, command):
    from d2ssl.study.conduct import Conductor, launcher
    from d2ssl.study.yaml_file import read_study

    slurm = None if args.cluster == "local" else args.slurm
    study = read_study(
        args.config_file, args.opts, args.output, args.register, elsewhere=slurm is not None
    )
    if args.report_only:
        print(f"Answer: {Conductor(study, command).write()}")
        return
    jobs = launcher(study, args.jobs, slurm)
    conductor = Conductor(study, command, jobs.call, jobs.threads)
    if args.dry_run:
        print(conductor.table(jobs.at_once, jobs.threads))
    else:
        conductor.run(jobs)


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        words = sys.argv[1:] if argv is None else argv
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Each is as Ctrl-C: the jobs are stopped, too. They are by SIGINT, so it must not be
            # ignored, as it is behind & in a script; SIGHUP may be, by nohup.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        try:
            main(args, shlex.join(["tools/study.py", *words]))
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from here.", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    sys.exit(run())
