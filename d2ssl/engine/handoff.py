"""From the pretraining checkpoint to weights that stock Detectron2 fine-tunes."""

import logging
import os
from typing import Dict, List

import torch
from detectron2.modeling import build_model

from d2ssl.atomic import atomic_open
from d2ssl.config import finetune_cfg, method_title, pretrain_cfg, pretrained_path, stock_cfg
from d2ssl.data.build import calibration_batches, count_photos
from d2ssl.engine.checkpoint import Checkpointer, fitting, load_weights
from d2ssl.engine.environment import versions
from d2ssl.engine.weights_file import get
from d2ssl.modeling import norm
from d2ssl.modeling.donors import COUNTER
from d2ssl.modeling.fingerprint import fingerprint, probe_image, relative_difference
from d2ssl.modeling.pretext_model import PretextModel
from d2ssl.modeling.trunk import pretrain_part_of

logger = logging.getLogger("d2ssl")


def provenance(cfg) -> Dict:
    """How the weights came about, and the conventions they only work under; plain values."""
    pretrain, model = pretrain_cfg(cfg), cfg.MODEL
    return {
        "method": method_title(cfg),
        "initial_weights": os.path.basename(model.WEIGHTS) or "random",
        "datasets": list(cfg.SSL.DATASETS),
        "num_photos": count_photos(cfg.SSL.DATASETS),
        "iterations": pretrain.SOLVER.MAX_ITER,
        "photos_per_iteration": pretrain.SOLVER.IMS_PER_BATCH,
        "seed": cfg.SEED,
        "versions": versions(),
        "config": {key: get(cfg, key) for key in CONVENTIONS},
    }


# The config keys that change what weights compute without changing any tensor's shape, or that
# say which network they are for.
CONVENTIONS = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.RESNETS.NORM",
    "MODEL.RESNETS.RES5_DILATION",
    "MODEL.FPN.NORM",
    "MODEL.FPN.FUSE_TYPE",
    "MODEL.FPN.OUT_CHANNELS",
    "MODEL.ROI_BOX_HEAD.NAME",
    "MODEL.ROI_BOX_HEAD.NUM_FC",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
)


def hand_off(cfg) -> str:
    """Turn the last pretraining checkpoint into ``model_pretrained.pth`` and ``stock.yaml``.

    Norm statistics are recomputed at fine-tuning resolution, norms frozen, those of the FPN folded
    into its convolutions. Whatever else ``MODEL.WEIGHTS`` held for the detector (RPN, mask head)
    is passed on; what was neither trained nor loaded is left out. One process is enough.

    Args:
        cfg: the user's config.
    Returns:
        path of ``model_pretrained.pth``. It holds ``model``, tensors by stock names, and
        ``d2ssl``: provenance, the probe image and the fingerprint of the network on it.
    """
    pretrain, finetune = pretrain_cfg(cfg), finetune_cfg(cfg)
    pretext = PretextModel(pretrain).to(cfg.MODEL.DEVICE)
    checkpointer = Checkpointer(pretext, pretrain.OUTPUT_DIR)
    checkpointer.load_report(checkpointer.get_checkpoint_file())

    trunk = pretext.trunk
    batches = calibration_batches(cfg, cfg.SSL.DATASETS, cfg.SSL.CALIBRATION_PHOTOS)
    detector = build_model(finetune).eval()
    # The box head has no such pass: it keeps the statistics of pretraining.
    norm.recalibrate(trunk.backbone, lambda b: trunk(detector.preprocess_image(b).tensor), batches)
    trunk.roi_heads.box_pooler = detector.roi_heads.box_pooler  # it was scaled for the views
    probe = probe_image()
    trained = fingerprint(trunk.backbone, trunk.roi_heads, finetune, probe)

    norm.freeze(trunk.backbone.bottom_up)
    if finetune.MODEL.FPN.NORM == "":
        norm.fold(trunk.backbone)
    report = load_weights(detector, cfg.MODEL.WEIGHTS, *fitting(finetune))
    received = report.loaded
    parts = [p for p in cfg.SSL.TRAIN if p in pretext.method.reaches]
    state = {
        name: value
        for name, value in trunk.state_dict().items()
        if pretrain_part_of(name) in parts and not name.endswith(COUNTER)
    }
    detector.load_state_dict(state, strict=False)
    values = fingerprint(detector.backbone, detector.roi_heads, finetune, probe)
    _check_same(trained, values, parts)

    everything = detector.state_dict()
    names = [k for k in everything if k in state or k in received]
    content = {
        "model": {k: everything[k].detach().cpu().clone() for k in names},
        "d2ssl": {
            **provenance(cfg),
            "trained": parts,
            "loss_range": list(pretext.method.loss_range),
            "after": methods_of(report.record),
            "probe": probe,
            "fingerprint": values,
        },
    }
    if report.classes:
        content["thing_classes"] = report.classes
    path = pretrained_path(cfg)
    with atomic_open(path, "wb") as file:
        torch.save(content, file)
    with atomic_open(os.path.join(os.path.dirname(path), "stock.yaml"), "w") as file:
        file.write(stock_cfg(cfg).dump())
    logger.info("Handed off %d tensors of %s: %s", len(names), ", ".join(parts), path)
    return path


def read_record(path: str) -> Dict:
    """What a hand-off says of itself, and how many ``tensors`` it holds, which are not read.

    Empty where there is no such file.
    """
    if not os.path.isfile(path):
        return {}
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {**content.get("d2ssl", {}), "tensors": len(content["model"])}


def methods_of(record: Dict) -> List[str]:
    """The methods that made weights, one after the other; none where they are no hand-off."""
    return [*record.get("after", []), *filter(None, [record.get("method")])]


def _check_same(trained: Dict, handed: Dict, parts) -> None:
    """The stock detector must compute what the pretrained trunk does, as far as it was handed."""
    for name, value in handed.items():
        if name == "box_head" and "box_head" not in parts or name[0] == "p" and "fpn" not in parts:
            continue
        difference = relative_difference(value, trained[name])
        if not difference < 1e-3:
            raise RuntimeError(
                f"hand-off changed {name} by {difference:.2g}: a bug in d2ssl, please report it"
            )
