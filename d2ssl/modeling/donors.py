"""Find a ResNet in a file of weights, whoever wrote it, and say it in Detectron2's names."""

import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from d2ssl.errors import D2SSLError

# Whose names a ResNet has: those of its first convolution and of the first block's, after any
# prefix. "Sequential": the children of a torchvision ResNet by number, as lightly keeps them.
LAYOUTS = {
    "torchvision": ("conv1.weight", "layer1.0.conv1.weight"),
    "Sequential": ("0.weight", "4.0.conv1.weight"),
    "Detectron2": ("stem.conv1.weight", "res2.0.conv1.weight"),
}
COUNTER = "num_batches_tracked"  # of steps; enters no computation
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_BODY = re.compile(r"(conv1|bn1|layer[1-4]|stem\.conv\d|res[2-5])\.")
# The copy of a network that follows another one, by the names that it goes by.
_TWIN = re.compile(r"momentum|teacher|target|twin|(^|[._])(ema|key|k|m)([._]|$)")


@dataclass(frozen=True)
class Donor:
    """A ResNet that was found in a file."""

    layout: str  # one of LAYOUTS
    prefix: str  # of its names
    tensors: Dict[str, torch.Tensor]  # fp32; Sequential's by torchvision's names
    unused: List[str]  # what else there was

    @property
    def state(self) -> Dict[str, torch.Tensor]:
        """By Detectron2's names, from ``stem.`` and ``res2.`` on."""
        return {detectron2_name(name): value for name, value in self.tensors.items()}


def detectron2_name(name: str) -> str:
    """``layer1.0.bn2.bias`` becomes ``res2.0.conv2.norm.bias``; Detectron2's own names stay."""
    name = re.sub(r"^(conv|bn)1\.", r"stem.\g<0>", name)
    name = re.sub(r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def networks_in(names) -> Dict[str, str]:
    """prefix -> layout of each ResNet that tensors by these names are."""
    names, found = set(names), {}
    for layout, (stem, block) in LAYOUTS.items():
        prefixes = [n.removesuffix(stem) for n in names if f".{n}".endswith(f".{stem}")]
        found.update({prefix: layout for prefix in prefixes if prefix + block in names})
    return dict(sorted(found.items()))


def find_donor(tensors: Dict[str, torch.Tensor], prefix: Optional[str] = None) -> Donor:
    """The ResNet among tensors; of an online network and its momentum twin, the online one.

    Args:
        prefix: of its names; None: find it.
    Raises:
        D2SSLError: there is none, or there are several that could be meant.
    """
    layouts = networks_in(tensors)
    listed = ", ".join(p or '""' for p in layouts)
    if not layouts:
        raise D2SSLError(
            "no ResNet in it: under no prefix is there a conv1.weight with a layer1.0.conv1.weight,"
            f" but {some([*tensors])}; name a ResNet's weights"
        )
    if prefix is not None and prefix not in layouts:
        raise D2SSLError(f'no ResNet under --prefix "{prefix}"; choose from {listed}')
    online = [p for p in layouts if not _TWIN.search(p)] or [*layouts]
    names = {p: _body(tensors, p, layouts[p]) for p in (online if prefix is None else [prefix])}
    nets = {p: {new: tensors[old].float() for old, new in names[p].items()} for p in names}
    chosen, *others = nets
    if not all(_equal(nets[chosen], nets[p]) for p in others):
        raise D2SSLError(f"several ResNets in it; choose one with --prefix from {listed}")
    unused = [n for n in tensors if n not in names[chosen] and not n.endswith(COUNTER)]
    return Donor(layouts[chosen], chosen, nets[chosen], unused)


def _body(names, prefix: str, layout: str) -> Dict[str, str]:
    """name in the file -> name in the network, of what lies between picture and res5."""
    inner = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    if layout == "Sequential":
        inner = {n: re.sub(r"^\d+", lambda m: _CHILDREN.get(m[0], m[0]), inner[n]) for n in inner}
    return {n: i for n, i in inner.items() if _BODY.match(i) and not i.endswith(COUNTER)}


def _equal(a: Dict, b: Dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def some(names: List[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def fold(weight: torch.Tensor, flip: bool, std: Sequence[float], new_std: Sequence[float]):
    """A first convolution for pictures that are normalised differently.

    (x - mean) / std times w is (x - mean) / new_std times w * new_std / std. The mean must be the
    same: around the picture there are zeros, and no weight could turn them into another value.

    Args:
        weight: C x 3 x k x k.
        flip: colours will come in the opposite order.
        std, new_std: of three colours each, both in the order in which they will come.
    """
    weight = weight.flip(1) if flip else weight
    ratio = torch.tensor(new_std, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    return (weight.double() * ratio.view(1, 3, 1, 1)).to(weight.dtype)


def torchvision_features(tensors: Dict[str, torch.Tensor], images: torch.Tensor) -> Dict:
    """What torchvision's ResNet of these tensors computes in eval mode: res2..res5.

    Args:
        images: N x 3 x H x W, normalised.
    Raises:
        D2SSLError: they are not a ResNet of torchvision's.
    """
    blocks = [len({n.split(".")[1] for n in tensors if n.startswith(f"layer{number}.")})
              for number in range(1, 5)]  # fmt: skip
    block = Bottleneck if "layer1.0.conv3.weight" in tensors else BasicBlock
    width, per_group = tensors["layer1.0.conv2.weight"].shape[:2]
    try:
        net = ResNet(block, blocks, groups=width // per_group, width_per_group=per_group)
        net.fc = nn.Identity()
        net.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise D2SSLError(f"is not a ResNet as torchvision builds it: {reason}") from error
    net.eval()
    x, values = net.maxpool(net.relu(net.bn1(net.conv1(images)))), {}
    for number in range(1, 5):
        x = values[f"res{number + 1}"] = getattr(net, f"layer{number}")(x)
    return values
