#!/usr/bin/env python
"""Pretrain a detector's ResNet + FPN on unlabelled photos, fine-tune Mask R-CNN, evaluate.

tools/train_net.py --config-file configs/ssl_fpn_balloon.yaml
tools/train_net.py --config-file ... --resume
tools/train_net.py --config-file ... --eval-only \\
    MODEL.WEIGHTS output/ssl_fpn_balloon/finetune/model_result.pth
tools/train_net.py --config-file ... SSL.ENABLED False SOLVER.MAX_ITER 1000 SOLVER.STEPS "(800,)"
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
    parser.add_argument("--config-file", default="", metavar="FILE", help="a yaml, see configs/")
    parser.add_argument(
        "--stage",
        choices=("pretrain", "finetune", "all"),
        default="all",
        help="which of the enabled stages run now (default: all)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoints in OUTPUT_DIR, exactly",
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST"
    )
    add_register(parser, ", called after those of SSL.REGISTER")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine: one a GPU, or N on a CPU (default: 1)",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="RANK")
    parser.add_argument(
        "--dist-url", default="auto", metavar="URL", help="e.g. tcp://192.0.2.1:29500"
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys to override, e.g. SEED 1"
    )
    return parser.parse_intermixed_args(argv)


def main(args, cfg):
    from d2ssl import pipeline

    if args.eval_only:
        return pipeline.evaluate_only(cfg)
    return pipeline.run(cfg, args.stage, args.resume)


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        from d2ssl.config import load_cfg
        from d2ssl.engine.launch import launch

        cfg = load_cfg(args.config_file, args.opts)
        cfg.defrost()  # an override SSL.REGISTER would replace those of the yaml
        cfg.SSL.REGISTER = (*cfg.SSL.REGISTER, *args.register)
        cfg.freeze()
        launch(
            main,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            device=cfg.MODEL.DEVICE,
            args=(args, cfg),
        )


if __name__ == "__main__":
    sys.exit(run())
