import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2ssl.engine.hooks import spread
from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import rows_to_be_sent

ONE_WAY = ["SSL.QUEUE.SYMMETRIC", "False"]  # MoCo's and PLMoCo's tests have both ways
LEVELS, NUM, TEMPERATURE = ("p2", "p3", "p4", "p5"), 16, 0.2


def region_means(pyramid, regions):
    """Loops over photos, levels, labels and cells: N x 64 x C means, and N x 64, which regions the
    view shows. The mean over all cells stands for the others: a head's batch statistics see it."""
    count, side = len(regions), regions.shape[1]
    means = np.zeros((count, len(LEVELS), NUM, pyramid["p2"].shape[1]))
    shown = np.zeros(means.shape[:3], dtype=bool)
    for n in range(count):
        for i, level in enumerate(LEVELS):
            cells = pyramid[level][n].detach().double().numpy()  # C x H x W
            size = cells.shape[1]
            centre = [int((k + 0.5) * side / size) for k in range(size)]
            for label in range(NUM):
                inside = [
                    cells[:, y, x]
                    for y in range(size)
                    for x in range(size)
                    if regions[n, centre[y], centre[x]] == label
                ]
                shown[n, i, label] = bool(inside)
                means[n, i, label] = np.mean(inside, axis=0) if inside else cells.mean((1, 2))
    rows = len(LEVELS) * NUM
    return means.reshape(count, rows, -1), shown.reshape(count, rows)


def unit_rows(head, rows):
    """A head on N x R x C rows, all at once (batch statistics): unit vectors, N x R x D."""
    with torch.no_grad():
        out = head(torch.from_numpy(rows).float().flatten(0, 1))
    return F.normalize(out.double(), dim=1).numpy().reshape(*rows.shape[:2], -1)


def pictures(model, batch, view):
    return model.normalize(torch.stack([x["views"][view] for x in batch]))


def part_twins(model):
    """As after some steps: at the start twins are copies, and nobody sees which of the two ran."""
    with torch.no_grad():
        for _, twin in model.twins():
            for parameter in twin.parameters():
                parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)


def seen_again(item):
    """The same photo another time, its two views exchanged."""
    swapped = {k: item[k][::-1] for k in ("views", "regions") if k in item}
    return {**item, **swapped, "windows": item["windows"].flip(0)}


def test_loss_equals_the_definition_written_out(model_and_batch):
    """A region of the first view, the same region of the second, and as negatives the photo's other
    regions on its level and what the queue holds of other photos. One photo is there twice."""
    model, earlier = model_and_batch("RLMoCo", *ONE_WAY, "SSL.QUEUE.SIZE", "8")
    part_twins(model)
    batch = [*earlier[:3], seen_again(earlier[1])]
    queue, method = [], model.method  # of (unit vector, photo), the oldest first
    for items in (earlier, batch):
        sent = rows_to_be_sent(64, 8)
        loss = model(items)["loss_contrast"].item()
        first, second = (torch.stack([x["regions"][v] for x in items]).numpy() for v in (0, 1))
        with torch.no_grad():
            online = model.trunk(pictures(model, items, 0))
            momentum = model.trunk_twin(pictures(model, items, 1))
        query, shown_a = region_means(online, first)
        key, shown_b = region_means(momentum, second)
        query, key = unit_rows(method.projector, query), unit_rows(method.projector_twin, key)
        queue += [
            (key[n, r], x["index"]) if shown_b[n, r] else None
            for n, x in enumerate(items) for r in sent
        ]  # fmt: skip
    assert len(queue) == 64 and None in queue

    expected = 0.0
    for n, item in enumerate(batch):
        others = [k for k, photo in filter(None, queue) if photo != item["index"]]
        rows = []
        for r in np.flatnonzero(shown_a[n] & shown_b[n]):
            rivals = [key[n, m] for m in np.flatnonzero(shown_b[n])
                      if m // NUM == r // NUM and m != r]  # fmt: skip
            logits = np.array([key[n, r], *rivals, *others]) @ query[n, r] / TEMPERATURE
            rows.append(np.log(np.exp(logits).sum()) - logits[0])
        expected += np.mean(rows) / len(batch)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_regions_that_a_view_does_not_show_take_no_part(model_and_batch):
    """Labels that no cell has change nothing, nor does a region that only one view shows."""
    options = [*ONE_WAY, "SSL.LEVELS", "['p2']", "SSL.QUEUE.KEYS_PER_PHOTO", "16"]
    model, batch = model_and_batch("RLMoCo", *options)
    for item in batch:
        item["regions"] = [torch.zeros_like(r) for r in item["regions"]]
        item["regions"][1][:8] = 5  # the first view has region 0 only
    method = model.method
    views = model.see(batch)
    with torch.no_grad():
        query, key = method.online_rows(views[0]), method.momentum_rows(views[1])
        positive = F.cosine_similarity(query[:, 0], key[:, 0])
        rival = F.cosine_similarity(query[:, 0], key[:, 5])
        loss = model(batch)["loss_contrast"]
    held = method.queue.photos >= 0
    assert held.sum() == 8  # of each photo's 16 regions the two that are there
    others = [
        [F.cosine_similarity(q, k, dim=0) for k, photo in
         zip(method.queue.keys[held], method.queue.photos[held]) if photo != item["index"]]
        for q, item in zip(query[:, 0], batch)
    ]  # fmt: skip
    logits = torch.stack([positive, rival, *torch.tensor(others).T], dim=1) / TEMPERATURE
    torch.testing.assert_close(loss, -logits.log_softmax(1)[:, 0].mean(), atol=1e-5, rtol=1e-5)


def test_the_collapse_meter_is_not_misled_by_regions_that_are_absent(model_and_batch):
    """All cells of a level alike: so are all regions, and none differs for not being there."""
    model, batch = model_and_batch("RLMoCo", "SSL.LEVELS", "['p5']")
    norm = model.trunk.backbone.fpn_output5.norm
    torch.nn.init.zeros_(norm.weight), torch.nn.init.normal_(norm.bias)
    model(batch)
    assert not model.method.units.present(model.see(batch)[0]).all()
    assert spread(model.method.embedding) < 0.01


def test_learns(train):
    assert_learns(*train("RLMoCo"), fall=0.2)
