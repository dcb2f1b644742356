import math

import numpy as np
import pytest
import torch
from lightly.loss import DetConSLoss, NTXentLoss

from d2ssl.losses.contrastive import cosines, info_nce_bound, info_nce_loss


def reference(similarity, positive, negative, temperature):
    """SupCon's eq. 2 (one positive: SimCLR's eq. 1), written from the paper in float64."""
    photos = []
    for sim, pos, neg in zip(similarity, positive, negative):  # R x M each
        rows = []
        for s, p, n in zip(sim, pos, neg):
            if p.any():
                everything = sum(math.exp(x / temperature) for x in s[p | n])
                logs = [math.log(math.exp(x / temperature) / everything) for x in s[p]]
                rows.append(-sum(logs) / len(logs))
        photos.append(sum(rows) / len(rows) if rows else 0.0)
    return sum(photos) / len(photos)


def random_case(photos=3, rows=4, keys=7, seed=0):
    rng = np.random.default_rng(seed)
    role = rng.random((photos, rows, keys))
    return rng.uniform(-1, 1, role.shape), role < 0.2, role > 0.4  # the rest takes no part


def own_photo(photos, rows=1):
    """N x 1 x (N rows) bool: which of all photos' rows, photo by photo, are the photo's own."""
    photo = torch.arange(photos)
    return photo[:, None, None] == photo.repeat_interleave(rows)[None, None]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_paper(seed, temperature):
    case = random_case(seed=seed)
    positive = case[1]
    assert (positive.sum(-1) > 1).any() and (positive.sum(-1) == 0).any()  # the case is general
    loss = info_nce_loss(*map(torch.tensor, case), temperature)
    assert loss.item() == pytest.approx(reference(*case, temperature), rel=1e-5)


def test_masks_broadcast():
    similarity, _, _ = random_case()
    positive = torch.zeros(7, dtype=torch.bool)
    positive[2:4] = True
    negative = (torch.arange(3) > 0)[:, None, None]  # also where positive: counted once
    full = [m.expand(3, 4, 7).numpy() for m in (positive, negative)]
    loss = info_nce_loss(torch.tensor(similarity), positive, negative, 0.2)
    assert loss.item() == pytest.approx(reference(similarity, *full, 0.2), rel=1e-5)


def test_cosines():
    rng = np.random.default_rng(0)
    query, own, shared = (rng.normal(size=s) for s in [(2, 3, 5), (2, 4, 5), (6, 5)])

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    of_own = [[[cosine(q, k) for k in own[n]] for q in query[n]] for n in range(2)]
    of_shared = [[[cosine(q, k) for k in shared] for q in query[n]] for n in range(2)]
    query = torch.tensor(query)
    np.testing.assert_allclose(cosines(query, torch.tensor(own)), of_own, atol=1e-6)
    np.testing.assert_allclose(cosines(query, torch.tensor(shared)), of_shared, atol=1e-6)


def test_bounds():
    keys, temperature = 6, 0.1
    one = torch.eye(keys, dtype=torch.bool)[None]
    best = torch.where(one, 1.0, -1.0)
    least = math.log(1 + (keys - 1) * math.exp(-2 / temperature))
    bound = info_nce_bound(keys, temperature)
    assert info_nce_loss(best, one, ~one, temperature).item() == pytest.approx(least, abs=1e-6)
    assert info_nce_loss(-best, one, ~one, temperature).item() == pytest.approx(bound)
    collapsed = info_nce_loss(torch.ones(1, keys, keys), one, ~one, temperature)
    assert collapsed.item() == pytest.approx(math.log(keys))
    three = one | one.roll(1, -1) | one.roll(2, -1)
    best = torch.where(three, 1.0, -1.0)
    assert info_nce_loss(best, three, ~three, temperature).item() == pytest.approx(math.log(3))
    assert info_nce_bound(5, 1e-3) == pytest.approx(2000 + math.log(4))
    assert info_nce_bound(1, temperature) == pytest.approx(0, abs=1e-12)


def test_identical_views_and_shuffled_pairs():
    rows = torch.tensor(np.random.default_rng(0).normal(size=(2, 5, 32)))
    one = torch.eye(5, dtype=torch.bool)
    similarity = cosines(rows, rows)
    assert info_nce_loss(similarity, one, ~one, 0.07).item() < 0.01
    shuffled = one.roll(1, 0)
    assert info_nce_loss(similarity, shuffled, ~shuffled, 0.07).item() > math.log(5)


@pytest.mark.parametrize("negatives", [True, False])
def test_a_photo_without_positive_counts_zero_and_gets_no_gradient(negatives):
    rng = np.random.default_rng(0)
    query = torch.tensor(rng.normal(size=(3, 4, 8)), requires_grad=True)
    keys = torch.tensor(rng.normal(size=(3, 6, 8)), requires_grad=True)
    with torch.no_grad():
        query[0, 3] = keys[0, 5] = 0  # an empty region and an empty place
    positive = torch.zeros(3, 4, 6, dtype=torch.bool)
    positive[0, 0, 0] = positive[0, 1, 2] = True
    negative = torch.zeros_like(positive)
    negative[0, 0, 1:5] = True  # row 1 has a positive only
    negative[1:] = negatives
    alone = info_nce_loss(cosines(query[:1], keys[:1]), positive[:1], negative[:1], 0.1)
    loss = info_nce_loss(cosines(query, keys), positive, negative, 0.1)
    assert loss.item() == pytest.approx(alone.item() / 3) and loss > 0
    with torch.autograd.set_detect_anomaly(True):  # raises where NaN is on the way
        loss.backward()
    assert query.grad[0, 0].norm() > 1e-3 and keys.grad[0, 0].norm() > 1e-3
    assert query.grad[0, 1:].abs().sum() == 0 and query.grad[1:].abs().sum() == 0
    assert keys.grad[0, 5].abs().sum() == 0 and keys.grad[1:].abs().sum() == 0

    similarity = torch.zeros(3, 4, 6, requires_grad=True)
    nothing = info_nce_loss(similarity, positive & False, negative, 0.1)
    nothing.backward()
    assert nothing == 0 and similarity.grad.abs().sum() == 0


def test_simclr_equals_lightly():
    """Two views of a photo as its two rows, all rows of the batch as keys, gradients as well."""
    rng = np.random.default_rng(0)
    views = [torch.tensor(rng.normal(size=(6, 16)), dtype=torch.float32) for _ in range(2)]
    theirs = [v.clone().requires_grad_() for v in views]
    expected = NTXentLoss(temperature=0.2)(*theirs)
    expected.backward()

    ours = [v.clone().requires_grad_() for v in views]
    rows = torch.stack(ours, 1)  # N x 2 x D
    row = torch.arange(12)
    itself = row.view(6, 2, 1) == row  # N x 2 x 2N
    same_photo = own_photo(6, rows=2)
    loss = info_nce_loss(
        cosines(rows, rows.flatten(0, 1)), same_photo & ~itself, ~same_photo, temperature=0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs):
        assert b.grad.norm() > 1e-3
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_moco_equals_lightly():
    """The photo's own key, then a queue; the last place of ours is still empty."""
    rng = np.random.default_rng(0)
    query, key, queue = (
        torch.tensor(rng.normal(size=(n, 16)), dtype=torch.float32) for n in (4, 4, 9)
    )
    moco = NTXentLoss(temperature=0.07, memory_bank_size=(9, 16))
    moco.memory_bank.bank = torch.nn.functional.normalize(queue, dim=-1)
    expected = moco(query, key).item()

    rows, own = query[:, None], key[:, None]  # N x 1 x D
    queue = torch.cat([queue, torch.zeros(1, 16)])
    similarity = torch.cat([cosines(rows, own), cosines(rows, queue)], -1)
    place = torch.arange(1 + 10)
    loss = info_nce_loss(similarity, place == 0, (place > 0) & (place < 10), temperature=0.07)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_detcon_equals_lightly():
    """
    Three regions a view, two of them in both views. lightly adds its two directions and divides
    each by all N x 3 rows; here all rows of both views that have a positive, N x 4, share one mean.
    So lightly's sum is larger by 4 N / 3 N. (With a region repeated within a view lightly also
    divides a row by its number of repeats; here none is.)
    """
    photos, regions = 4, 3
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.normal(size=(photos, regions, 16)), dtype=torch.float32) for _ in "ab")
    names_a = torch.tensor([[0, 1, 2], [5, 3, 4], [2, 0, 1], [7, 8, 9]])
    names_b = torch.tensor([[2, 0, 6], [3, 0, 5], [1, 2, 8], [8, 1, 7]])
    expected = DetConSLoss(temperature=0.1, gather_distributed=False)(a, b, names_a, names_b)

    rows = torch.cat([a, b], 1)  # N x 6 x D, both views of a photo
    name = torch.cat([names_a, names_b], 1)
    row = torch.arange(name.numel())
    itself = row.view(photos, -1, 1) == row  # N x 6 x 6N
    same = own_photo(photos, rows=6) & (name[..., None] == name.flatten())
    loss = info_nce_loss(cosines(rows, rows.flatten(0, 1)), same & ~itself, ~same, temperature=0.1)
    assert loss.item() * 4 / 3 == pytest.approx(expected.item(), rel=1e-5)


def test_fp32_inside_autocast():
    similarity, positive, negative = map(torch.tensor, random_case())
    rounded = similarity.bfloat16()
    exact = info_nce_loss(rounded.float(), positive, negative, 0.1)
    rows = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, 16))).bfloat16()
    exact_cosines = cosines(rows.float(), rows.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce_loss(rounded, positive, negative, 0.1)
        assert loss.dtype == torch.float32 and loss == exact
        assert cosines(rows, rows).dtype == torch.float32
        assert torch.equal(cosines(rows, rows), exact_cosines)
