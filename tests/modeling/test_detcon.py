import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.modeling.conftest import assert_learns
from tests.modeling.test_rlmoco import (
    NUM,
    TEMPERATURE,
    pictures,
    region_means,
    seen_again,
    unit_rows,
)


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Every region of either view against every region of the batch: eq. 1-2, one row at a time.

    One photo is there twice: the one copy's regions are no negatives of the other's.
    """
    model, batch = model_and_batch("DetCon")
    batch[3] = seen_again(batch[1])
    loss = model(batch)["loss_contrast"].item()

    rows, shown = [], []
    for v in (0, 1):
        with torch.no_grad():
            pyramid = model.trunk(pictures(model, batch, v))
        means, there = region_means(pyramid, torch.stack([x["regions"][v] for x in batch]).numpy())
        rows.append(unit_rows(model.method.projector, means))
        shown.append(there)
    everything = [
        (rows[v][n, r], n, v, r)
        for v in (0, 1) for n in range(4) for r in np.flatnonzero(shown[v][n])
    ]  # fmt: skip
    photo = [x["index"] for x in batch]
    expected = 0.0
    for n in range(4):
        losses = []
        for row, _, v, r in (x for x in everything if x[1] == n):
            if not shown[1 - v][n, r]:
                continue
            positive = rows[1 - v][n, r] @ row
            rivals = [
                other @ row
                for other, m, _, s in everything
                # Its photo's other regions on its level, and all of other photos.
                if (s // NUM == r // NUM and s != r if m == n else photo[m] != photo[n])
            ]
            logits = np.array([positive, *rivals]) / TEMPERATURE
            losses.append(np.log(np.exp(logits).sum()) - logits[0])
        expected += np.mean(losses) / 4
    assert loss == pytest.approx(expected, abs=1e-4)


def test_one_region_that_covers_the_photo_is_simclr(model_and_batch):
    one = ["SSL.LEVELS", "['p4']", "SSL.REGIONS.NUM", "1", "SSL.REGIONS.SOURCE", "grid"]
    model, batch = model_and_batch("DetCon", *one)
    whole, _ = model_and_batch("SimCLR", *one)
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(batch), whole(batch))


def test_regions_that_one_view_lacks_have_no_positive_and_absent_ones_are_no_negative(
    model_and_batch,
):
    """Region 5 is in the second view only: a negative of region 0, and no row of the mean."""
    model, batch = model_and_batch("DetCon", "SSL.LEVELS", "['p2']")
    for item in batch:
        item["regions"] = [torch.zeros_like(r) for r in item["regions"]]
        item["regions"][1][:8] = 5
    method, views = model.method, model.see(batch)
    with torch.no_grad():
        a, b = (F.normalize(method.online_rows(view), dim=-1) for view in views)
        loss = model(batch)["loss_contrast"]
    keys = torch.stack([a[:, 0], b[:, 0], b[:, 5]])  # 3 x 4 x D: all regions there are
    rows = []
    for v in (0, 1):
        for n in range(4):
            logits = keys @ keys[v, n] / TEMPERATURE  # 3 x 4
            logits[v, n] = -torch.inf  # itself
            rows.append(logits.logsumexp((0, 1)) - logits[1 - v, n])
    torch.testing.assert_close(loss, torch.stack(rows).mean(), atol=1e-5, rtol=1e-5)


def test_learns(train):
    assert_learns(*train("DetCon"), fall=0.8)
