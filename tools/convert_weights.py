#!/usr/bin/env python
"""Lay a ResNet that was trained elsewhere under a Detectron2 detector.

    tools/convert_weights.py resnet50.pth --config-file my.yaml --output donor.pth \\
        MODEL.RESNETS.STRIDE_IN_1X1 False
    tools/convert_weights.py moco_v2_800ep_pretrain.pth.tar --onto coco_mask_rcnn.pkl \\
        --config-file my.yaml --output coco_over_moco.pth MODEL.RESNETS.STRIDE_IN_1X1 False

DONOR is a checkpoint of torchvision, timm, MoCo, DenseCL, BYOL, SoCo, lightly and the like, or one
of Detectron2: any file that holds a ResNet by torchvision's or Detectron2's names, under any
prefix. The config stays as it is: colour order and std are folded into the first convolution. A
different mean or stride cannot be folded, and is refused with the key to set. At last the donor's
own network and the detector's are compared on a picture.

exit code: 0 the weights are written; 2 they cannot be, and nothing is
"""

import argparse
import os
import sys

from d2ssl.compat import require_detectron2
from d2ssl.errors import D2SSLError, exit_on_error


def parse_args(argv=None):
    # Before the imports of torch and Detectron2, which take seconds: --help answers at once.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", metavar="DONOR", help=".pth, .pth.tar or .pkl")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the detector's yaml")
    parser.add_argument(
        "--output", required=True, metavar="FILE.pth", help="replaced where it is there"
    )
    parser.add_argument(
        "--onto", default="", metavar="WEIGHTS", help="keep FPN, RPN and heads of this detector"
    )
    parser.add_argument(
        "--prefix", metavar="P", help="of the donor's names, if the file holds several networks"
    )
    usual = "(default: as torchvision; for a Detectron2 file, as it or else the config says)"
    parser.add_argument("--format", choices=["RGB", "BGR"], help=f"what the donor wants {usual}")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            nargs=3,
            type=float,
            metavar=("C1", "C2", "C3"),
            help=f"of pixels from 0 to 255, in the order of --format {usual}",
        )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    args = parser.parse_intermixed_args(argv)
    if not args.output.endswith(".pth"):
        parser.error(f"--output {args.output}: name a .pth file")
    for name, values in (("mean", args.mean), ("std", args.std)):
        if values and (min(values) < 0 or 0 < max(values) < 1 or name == "std" and not min(values)):
            parser.error(f"--{name} {values}: give values for pixels from 0 to 255, e.g. 123.675")
    return args


def main(args):
    import torch

    from d2ssl.atomic import atomic_open, make_folder
    from d2ssl.config import load_cfg
    from d2ssl.engine.convert_weights import FORMAT, MEAN, STD, convert_donor

    if os.path.isdir(args.output):
        raise D2SSLError(f"--output {args.output}: is a folder; name a file in it")
    opts = [*args.opts, "SSL.ENABLED", "False", "MODEL.DEVICE", "cpu"]
    given = {FORMAT: args.format, MEAN: args.mean, STD: args.std}
    content, account = convert_donor(
        args.donor,
        load_cfg(args.config_file, opts),
        args.onto,
        {key: value for key, value in given.items() if value},
        args.prefix,
    )
    make_folder(os.path.dirname(args.output))
    with atomic_open(args.output, "wb") as file:
        torch.save(content, file)
    use = " ".join(["MODEL.WEIGHTS", args.output, *args.opts])
    print(f"{account}\nwritten: {args.output}; use it with {use}")


def run(argv=None):
    args = parse_args(argv)
    with exit_on_error():
        require_detectron2()
        main(args)


if __name__ == "__main__":
    sys.exit(run())
