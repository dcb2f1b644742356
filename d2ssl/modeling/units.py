"""What methods compare: the whole image, cells of the pyramid, regions, or boxes.

Each kind gives the same three things, so that a method for one kind works for the others: rows of
features (N photos x R rows x C channels), and for two views of the same photos which of their rows
show the same thing and which surely show different ones.
"""

from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch.nn import functional as F

from d2ssl.errors import D2SSLError
from d2ssl.modeling.trunk import Trunk

Comparison = Tuple[torch.Tensor, torch.Tensor]  # same, different: N x R x R bool each


class Units:
    """Base of all kinds.

    Attributes:
        dim: channels C of a row.
        needs: what the mapper must add to the views.
        reaches: parts of the trunk that the rows depend on.
    """

    needs: frozenset = frozenset()
    reaches: Tuple[str, ...] = ("bottom_up", "fpn")
    dim: int

    @classmethod
    def count(cls, cfg) -> int:
        """R, the number of rows of a photo's view."""
        raise NotImplementedError

    def rows(self, encoding, view) -> torch.Tensor:
        """N x R x C, of a :class:`~d2ssl.modeling.pretext_model.Encoding` of a view."""
        raise NotImplementedError

    def compare(self, a, b) -> Comparison:
        """Which rows of view ``a`` (middle axis) show what rows of view ``b`` (last axis) show, and
        which show something else. Some pairs may be neither."""
        raise NotImplementedError

    def present(self, view) -> torch.Tensor:
        """N x R bool: which rows have anything behind them."""
        return torch.ones(len(view.photos), 1, dtype=torch.bool, device=view.photos.device)


class LevelUnits(Units):
    """Units that are read off feature maps.

    Args:
        channels: {level: channels} of ``SSL.LEVELS``, in their order, see :func:`level_channels`.
    """

    def __init__(self, channels: Dict[str, int]):
        self.levels = tuple(channels)
        self.dim = max(channels.values())
        if not any(level.startswith("p") for level in channels):
            self.reaches = ("bottom_up",)

    @classmethod
    def from_config(cls, cfg, trunk: Trunk):
        return cls(level_channels(trunk, cfg.SSL.LEVELS), **cls.options(cfg))

    @classmethod
    def options(cls, cfg) -> Dict:
        """What a kind is built with besides channels."""
        return {}


class WholeImage(LevelUnits):
    """One row a photo: the average over each level's map, the levels side by side."""

    def __init__(self, channels):
        super().__init__(channels)
        self.dim = sum(channels.values())

    @classmethod
    def count(cls, cfg):
        return 1

    def rows(self, encoding, view):
        pooled = [encoding.pyramid[level].mean((2, 3)) for level in self.levels]
        return torch.cat(pooled, dim=1)[:, None]  # N x 1 x (levels * C)

    def compare(self, a, b):
        same = torch.ones(len(a.photos), 1, 1, dtype=torch.bool, device=a.photos.device)
        return same, ~same


class Cells(LevelUnits):
    """Cells of the levels' maps, matched by where they lie in the photo.

    Args:
        grid: a level with more cells a side than this is averaged down to it, which bounds the
            cost: at 14, a view has 14^2 + 14^2 + 14^2 + 7^2 cells on P2..P5 at 224 px.
        radius: cells of the same level are the same if their centres lie closer than this, as a
            share of the larger of their two diagonals (PixPro, Xie et al., CVPR 2021, eq. 1).

    Cells of the same level whose centres lie further apart than a diagonal are different, and so
    are those of other levels, wherever they lie: each level answers for objects of its own size.
    """

    nearest = False

    def __init__(self, channels, grid: int, radius: float):
        super().__init__(channels)
        _require_one_width(channels)
        self.grid, self.radius = grid, radius

    @classmethod
    def options(cls, cfg):
        return {"grid": cfg.SSL.CELLS.GRID, "radius": cfg.SSL.CELLS.RADIUS}

    @classmethod
    def count(cls, cfg):
        size, grid = cfg.SSL.INPUT.VIEW_SIZE, cfg.SSL.CELLS.GRID
        return sum(min(size >> int(level[-1]), grid) ** 2 for level in cfg.SSL.LEVELS)

    def rows(self, encoding, view):
        return self.as_rows(self.maps(encoding))

    def maps(self, encoding) -> List[torch.Tensor]:
        """N x C x H x W of each level, H and W at most ``grid``."""
        return [_at_most(encoding.pyramid[level], self.grid) for level in self.levels]

    @staticmethod
    def as_rows(maps: List[torch.Tensor]) -> torch.Tensor:
        """The cells of all maps, row by row: N x R x C."""
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)

    def compare(self, a, b):
        here, there = self.lattice(a), self.lattice(b)
        diagonal = torch.maximum(here.diagonals[:, :, None], there.diagonals[:, None])  # N x R x R
        # By differences: through a matrix product the near ones would be off by up to a pixel.
        mode = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(here.centres, there.centres, compute_mode=mode) / diagonal
        one_level = here.level[:, None] == there.level  # R x R
        same = one_level & (distance < self.radius)
        if self.nearest:
            same &= distance == distance.masked_fill(~one_level, torch.inf).amin(2, keepdim=True)
        return same, ~one_level | (distance > 1)

    def lattice(self, view) -> "Lattice":
        """Where the cells of a view lie in each photo."""
        size, parts = view.pixels.shape[-1], []
        for number, level in enumerate(self.levels):
            side = min(size >> int(level[-1]), self.grid)
            parts.append(cell_lattice(view.windows, side, number))
        centres, diagonals, level = zip(*parts)
        return Lattice(torch.cat(centres, 1), torch.cat(diagonals, 1), torch.cat(level))


class NearestCells(Cells):
    """Of the cells that would be the same, only the nearest is."""

    nearest = True


class Lattice(NamedTuple):
    """centres: N x R x 2 (x, y) in pixels of the photo; diagonals: N x R in the same unit; level:
    R, which of the levels a cell is of."""

    centres: torch.Tensor
    diagonals: torch.Tensor
    level: torch.Tensor


def cell_lattice(windows: torch.Tensor, side: int, number: int = 0) -> Lattice:
    """The cells, row by row, of a side x side map of views with edges at ``windows``, N x 4."""
    start, end = windows[:, None, :2], windows[:, None, 2:]  # N x 1 x 2
    place = (torch.arange(side, device=windows.device) + 0.5) / side
    y, x = torch.meshgrid(place, place, indexing="ij")
    share = torch.stack([x, y], dim=-1).view(1, -1, 2)
    diagonal = ((end - start) / side).norm(dim=-1)  # N x 1
    level = torch.full((side * side,), number, device=windows.device)
    return Lattice(start + (end - start) * share, diagonal.expand(-1, side * side), level)


class Regions(LevelUnits):
    """Averages of each level's map over the regions that a segmentation of the photo gives."""

    needs = frozenset({"regions"})

    def __init__(self, channels, num: int):
        super().__init__(channels)
        _require_one_width(channels)
        self.num = num

    @classmethod
    def options(cls, cfg):
        return {"num": cfg.SSL.REGIONS.NUM}

    @classmethod
    def count(cls, cfg):
        return len(cfg.SSL.LEVELS) * cfg.SSL.REGIONS.NUM

    def rows(self, encoding, view):
        means = []
        for level, mask in zip(self.levels, self._masks(view)):
            cells = encoding.pyramid[level].flatten(2).transpose(1, 2)  # N x cells x C
            # The whole view stands in for an absent region: zeros would count in the batch
            # statistics of a head, and would look to the collapse meter like something else.
            mask = mask | ~mask.any(2, keepdim=True)
            share = mask / mask.sum(2, keepdim=True)
            means.append(share.to(cells.dtype) @ cells)  # N x num x C
        return torch.cat(means, dim=1)

    def compare(self, a, b):
        present_a, present_b = self.present(a)[:, :, None], self.present(b)[:, None]
        number = torch.arange(present_a.shape[1], device=a.regions.device)
        level, label = number // self.num, number % self.num
        both = present_a & present_b
        same = both & (number[:, None] == number)
        return same, both & (level[:, None] == level) & (label[:, None] != label)

    def present(self, view) -> torch.Tensor:
        """N x (levels * num) bool: which regions have a cell in the view."""
        return torch.cat([mask.any(2) for mask in self._masks(view)], dim=1)

    def _masks(self, view) -> List[torch.Tensor]:
        """For each level N x num x cells bool: which cells are of which region."""
        masks = []
        for level in self.levels:
            side = view.pixels.shape[-1] >> int(level[-1])
            labels = F.interpolate(
                view.regions[:, None].float(), (side, side), mode="nearest-exact"
            )
            masks.append(F.one_hot(labels.flatten(1).long(), self.num).transpose(1, 2).bool())
        return masks


class Boxes(Units):
    """Proposals that two views share, through the detector's own box pooler and box head."""

    needs = frozenset({"boxes"})
    reaches = ("bottom_up", "fpn", "box_head")

    def __init__(self, dim: int):
        self.dim = dim

    @classmethod
    def from_config(cls, cfg, trunk):
        return cls(trunk.box_dim)

    def rows(self, encoding, view):
        return encoding.box_features(view.boxes)

    def compare(self, a, b):
        ids_a, ids_b = a.box_ids[:, :, None], b.box_ids[:, None]
        valid = (ids_a >= 0) & (ids_b >= 0)
        return valid & (ids_a == ids_b), valid & (ids_a != ids_b)


def level_channels(trunk: Trunk, levels: Sequence[str]) -> Dict[str, int]:
    """{level: channels} for levels such as ``res5`` or ``p3``.

    Raises:
        D2SSLError: no level, or one that this trunk lacks.
    """
    backbone = trunk.backbone
    shapes = {**backbone.bottom_up.output_shape(), **backbone.output_shape()}
    known = [name for name in shapes if name != "p6"]  # P6 is P5, subsampled
    for level in levels or ["(none)"]:
        if level not in known:
            raise D2SSLError(f"SSL.LEVELS {level}: choose from {', '.join(known)}")
    return {level: shapes[level].channels for level in levels}


def _require_one_width(channels: Dict[str, int]) -> None:
    if len(set(channels.values())) > 1:
        raise D2SSLError(
            f"SSL.LEVELS {', '.join(channels)} differ in channels and share one head; name levels "
            "of the FPN, or one stage"
        )


def _at_most(feature_map: torch.Tensor, grid: int) -> torch.Tensor:
    if feature_map.shape[-1] <= grid:
        return feature_map
    return F.adaptive_avg_pool2d(feature_map, grid)
