"""What the tests of several methods need to write a paper out: rows, pairs and InfoNCE, in float64.

The trunk and the heads are called one by one with plain tensors; the rest is NumPy.
"""

import numpy as np
import torch

from tests.modeling.test_units import centres_and_diagonals

GRID = ["SSL.CELLS.GRID", "4"]
SIDES = (4, 4, 4, 2)  # cells a side of P2..P5 of a view of 64 px, with this grid: 52 in all
LEVEL = np.repeat(range(4), [side**2 for side in SIDES])
# Photos keep their colours, so that a few steps on a few photos suffice to tell them apart.
PLAIN = [
    "SSL.INPUT.COLOR_JITTER_PROB", "0.0", "SSL.INPUT.GRAY_PROB", "0.0",
    "SSL.INPUT.SOLARIZE_PROB", "0.0",
]  # fmt: skip


def maps_of(model, batch, view, twin=False):
    """P2..P5 of a view of all photos."""
    trunk = model.trunk_twin if twin else model.trunk
    pyramid = trunk(model.normalize(torch.stack([x["views"][view] for x in batch])))
    return [pyramid[level] for level in ("p2", "p3", "p4", "p5")]


def photo_rows(maps):
    """The levels' means side by side: N x 1 x 4C."""
    return torch.cat([m.mean((2, 3)) for m in maps], dim=1)[:, None]


def cell_rows(maps):
    """The means over blocks that make SIDES, row by row: N x 52 x C."""
    blocks = [m.unflatten(3, (side, -1)).unflatten(2, (side, -1)) for m, side in zip(maps, SIDES)]
    return torch.cat([b.mean((3, 5)).flatten(2).mT for b in blocks], dim=1)


def through(head, rows):
    """A head on the rows of all photos at once (batch statistics)."""
    return head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


def numbers(rows):
    return rows.detach().double().numpy()


def unit(rows):
    rows = numbers(rows) if isinstance(rows, torch.Tensor) else rows
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cell_pairs(item, nearest=False, views=(0, 1)):
    """Which cells of the first view and of the second are the same, and which are apart."""
    here, there = (centres_and_diagonals(item["windows"][v], SIDES) for v in views)
    share = np.array([
        [np.hypot(x - u, y - v) / max(d, e) if i == j else np.inf for j, u, v, e in there]
        for i, x, y, d in here
    ])  # fmt: skip
    same = share < 0.7
    if nearest:
        same &= share == share.min(1, keepdims=True)
    return same, share > 1


def info_nce(row, positives, negatives, temperature):
    """-log of each positive's share among all, its mean; rows and keys have length 1."""
    odds = [np.exp(np.reshape(k, (-1, len(row))) @ row / temperature)
            for k in (positives, negatives)]  # fmt: skip
    return np.mean(-np.log(odds[0] / (odds[0].sum() + odds[1].sum())))


def rows_to_be_sent(rows, keys):
    """Which of a photo's rows the next batch will send to the queue; seeds what draws them."""
    torch.manual_seed(3)
    sent = torch.randperm(rows)[:keys].tolist()
    torch.manual_seed(3)
    return sent


WAYS = ((0, 1), (1, 0))  # each view finds the other


def mean_of(values):
    """Of a photo without any, 0."""
    return np.mean(values) if len(values) else 0.0


def out_of_sight(item):
    """An item whose views show nothing in common."""
    windows = item["windows"].clone()
    windows[1] += 1000
    return {**item, "windows": windows}
