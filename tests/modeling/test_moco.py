import numpy as np
import pytest
import torch

from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import PLAIN, WAYS, info_nce, maps_of, photo_rows, through, unit


def moco_loss(model, method, batch, queue, size, temperature, ways=WAYS):
    """Eq. 1 for each photo of the batch; ``queue``, a list of (photo, key), is moved on."""
    query, key = (
        [unit(through(head, photo_rows(maps_of(model, batch, v, twin))))[:, 0] for v in (0, 1)]
        for head, twin in ((method.projector, False), (method.projector_twin, True))
    )
    photos = [item["index"] for item in batch]
    queue[:] = [*queue, *zip(photos, key[1])][-size:]
    return np.mean([
        info_nce(q, k, [old for other, old in queue if other != photo], temperature)
        for a, b in ways for q, k, photo in zip(query[a], key[b], photos)
    ])  # fmt: skip


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Two batches with a queue for six photos: the second still meets two keys of the first. One
    photo is there twice, in a batch and over both, and is never its own negative."""
    model, first = model_and_batch("MoCo", "SSL.QUEUE.SIZE", "6", "SSL.TEMPERATURE", "0.3")
    first[3]["index"] = first[1]["index"]
    second = [{**item, "index": 9 * n, "views": item["views"][::-1]}
              for n, item in enumerate(first)]  # fmt: skip
    second[0]["index"] = first[2]["index"]
    queue = []
    for batch in (first, second):
        expected = moco_loss(model, model.method, batch, queue, size=6, temperature=0.3)
        assert expected > 0.5  # negatives from the first step on
        assert model(batch)["loss_contrast"].item() == pytest.approx(expected, abs=1e-4)


def test_one_way_as_in_the_paper(model_and_batch):
    model, batch = model_and_batch("MoCo", "SSL.QUEUE.SYMMETRIC", "False")
    expected = moco_loss(model, model.method, batch, [], size=4, temperature=0.2, ways=[(0, 1)])
    assert model(batch)["loss_contrast"].item() == pytest.approx(expected, abs=1e-4)


def test_the_queue_holds_the_twins_normalised_keys(model_and_batch):
    model, batch = model_and_batch("MoCo", "SSL.QUEUE.SIZE", "6")
    with torch.no_grad():  # so that twin and trunk differ
        model.trunk_twin.backbone.fpn_output3.weight.mul_(-1)
    key = unit(through(model.method.projector_twin, photo_rows(maps_of(model, batch, 1, True))))
    model(batch)
    queue = model.method.queue
    np.testing.assert_allclose(queue.keys[:4], key[:, 0], atol=1e-5)
    assert queue.photos.tolist() == [item["index"] for item in batch] + [-1, -1]


def test_the_twin_lags(model_and_batch):
    model, _ = model_and_batch("MoCo")
    trunk, twin, method = model.trunk.backbone, model.trunk_twin.backbone, model.method
    learning = [*trunk.parameters(), *method.projector.parameters()]
    twins = [*twin.parameters(), *method.projector_twin.parameters()]
    before = [q.clone() for q in twins]
    with torch.no_grad():
        for p in learning:
            p += 1
    model.move_twins(0.9)
    for q, then in zip(twins, before):
        torch.testing.assert_close(q, then + 0.1)


def test_learns(train):
    assert_learns(*train("MoCo", *PLAIN), fall=0.4)
