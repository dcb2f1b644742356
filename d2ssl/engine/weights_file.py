"""What a file of weights holds, whoever wrote it, and which config keys its tensors speak for."""

import os
import pickle
import re
from typing import Dict, Iterator, Tuple

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from d2ssl.compat import command_line_allowed
from d2ssl.config import get_key
from d2ssl.errors import D2SSLError

# What torchvision's ResNets want, and all that were pretrained in its code: MoCo and its kin.
TORCHVISION = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}


def read(path: str) -> Dict:
    """The content of a checkpoint, on the CPU.

    Args:
        path: of a file, or an address that Detectron2 knows (detectron2://..., https://...), which
            is downloaded once.

    Raises:
        D2SSLError: no such file, or not a checkpoint.
    """
    if "://" in path:
        try:
            path = PathManager.get_local_path(path)
        except Exception as error:  # whatever its handler raises
            raise D2SSLError(f"{path}: {' '.join(str(error).split())}") from error
    if not os.path.isfile(path):
        raise D2SSLError(f"{path}: no such file")
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = pickle.load(file, encoding="latin1")  # as Detectron2 does
        else:
            with command_line_allowed():
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise D2SSLError(
                f"{path}: holds Python objects besides tensors ({found.group(1)}), which torch "
                "does not load by default; if you trust its source, save its tensors alone"
            ) from error
        raise D2SSLError(f"{path}: not a checkpoint; name a .pth or .pkl file") from error
    if not isinstance(content, dict) or not dict(flat(content)):
        raise D2SSLError(f"{path}: not a checkpoint: there are no tensors by name in it")
    return content


def flat(content: Dict, path: str = "") -> Iterator[Tuple[str, torch.Tensor]]:
    """(dotted path, tensor) of dicts within dicts; an optimizer's, which count from 0, left out."""
    for name, value in content.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, dict):
            yield from flat(value, f"{path}{name}.")
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            yield path + name, torch.as_tensor(value)


def tensors_of(content: Dict) -> Dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, wherever its format keeps them."""
    for key in ("model", "state_dict", "model_state", "blobs"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return dict(flat(content))


def get(cfg, key: str):
    """The value of a dotted key, tuples as lists; KeyError where this Detectron2 has none."""
    value = get_key(cfg, key)
    return list(value) if isinstance(value, tuple) else value


def differing_keys(cfg, wanted: Dict) -> Dict:
    """The part of ``wanted`` that a config contradicts."""
    differing = {}
    for key, value in wanted.items():
        value = list(value) if isinstance(value, tuple) else value
        try:
            if get(cfg, key) != value:
                differing[key] = value
        except KeyError:  # a key of another version of Detectron2
            continue
    return differing


def conventions_in(content: Dict) -> Dict:
    """The config keys that a file of d2ssl says it was made under, with their values; of others'
    files none."""
    record = content.get("d2ssl")
    said = content.get("conventions", record.get("config") if isinstance(record, dict) else None)
    return said or {}


def other_conventions(cfg, said: Dict) -> Dict:
    """Those of :func:`conventions_in` that no tensor shows and that a config contradicts."""
    keys = [key for key in TORCHVISION if key in said]
    if cfg.MODEL.RESNETS.DEPTH < 50:  # there is no 1x1 convolution with a stride
        keys = [key for key in keys if key != "MODEL.RESNETS.STRIDE_IN_1X1"]
    return differing_keys(cfg, {key: said[key] for key in keys})


# (blocks in res2, res3, res4, res5; whether they have three convolutions) -> DEPTH
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


def structure_of(tensors: Dict[str, torch.Tensor]) -> Dict[str, int]:
    """The config keys that tensors by Detectron2's names speak for, as far as they are there."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def shape(suffix: str):
        return next((s for n, s in shapes.items() if n == suffix or n.endswith("." + suffix)), None)

    found = {}
    stem, conv2 = shape("stem.conv1.weight"), shape("res2.0.conv2.weight")
    if stem and conv2:
        conv3 = shape("res2.0.conv3.weight")  # the shallow ResNets have two convolutions
        stages = re.findall(r"\bres([2-5])\.\d+\.conv1\.weight\b", " ".join(shapes))
        blocks = tuple(stages.count(stage) for stage in "2345")
        if (blocks, bool(conv3)) in _DEPTHS:
            found["MODEL.RESNETS.DEPTH"] = _DEPTHS[blocks, bool(conv3)]
        found["MODEL.RESNETS.STEM_OUT_CHANNELS"] = stem[0]
        found["MODEL.RESNETS.RES2_OUT_CHANNELS"] = (conv3 or conv2)[0]
        found["MODEL.RESNETS.NUM_GROUPS"] = conv2[0] // conv2[1]
        found["MODEL.RESNETS.WIDTH_PER_GROUP"] = conv2[1]
    for layer, key in (("fc1", "FC_DIM"), ("conv1", "CONV_DIM")):
        weight = shape(f"box_head.{layer}.weight")
        if weight:
            found[f"MODEL.ROI_BOX_HEAD.{key}"] = weight[0]
    return found


def quoted(value) -> str:
    """A value of a config as it is typed in a shell."""
    return f'"{value}"' if isinstance(value, (list, tuple)) or value == "" else str(value)


def settings(values: Dict) -> str:
    """Keys of a config with their values, in words."""
    return ", ".join(f"{key} {quoted(value)}" for key, value in values.items())
