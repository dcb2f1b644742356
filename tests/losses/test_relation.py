import numpy as np
import pytest
import torch

from d2ssl.losses.relation import difference_alignment_loss


def reference(query, key, match):
    """Every pair of differences one by one, in float64."""
    photos = []
    for q, k, m in zip(query, key, match):
        q = q / np.linalg.norm(q, axis=-1, keepdims=True)
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        pairs = [(q[i], k[m[i]].mean(0)) for i in range(len(q)) if m[i].any()]
        cosines = []
        for i, (a, t) in enumerate(pairs):
            for j, (b, u) in enumerate(pairs):
                if i != j:
                    d, e = a - b, t - u
                    length = np.linalg.norm(d) * np.linalg.norm(e)
                    cosines.append(d @ e / length if length else 0.0)  # the same match twice
        photos.append(-np.mean(cosines) if cosines else 0.0)
    return np.mean(photos)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 6, 8)), rng.normal(size=(4, 5, 8)), rng.random((4, 6, 5)) < 0.2


def test_equals_all_pairs(rows):
    query, key, match = rows
    match[3] = False
    match[3, 1, :2] = True  # a single matched row
    per_row = match[:3].sum(-1)
    assert (per_row > 1).any() and (per_row == 0).any()  # the case is general
    loss = difference_alignment_loss(*map(torch.tensor, rows))
    assert loss.item() == pytest.approx(reference(query, key, match), abs=1e-6)


def unit(*degrees):
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], -1)


def test_bounds():
    match = torch.eye(3, dtype=torch.bool)[None]
    query = unit(20.0, 50.0, 140.0)[None]
    # Same directions between the rows, whatever their length and however far the views are apart.
    assert difference_alignment_loss(query, 3 * query, match).item() == pytest.approx(-1, abs=1e-5)
    # Turned by half a circle, every difference points back; by a quarter, aside.
    turned = unit(200.0, 230.0, 320.0)[None]
    assert difference_alignment_loss(query, turned, match).item() == pytest.approx(1, abs=1e-5)
    aside = unit(110.0, 140.0, 230.0)[None]
    assert difference_alignment_loss(query, aside, match).item() == pytest.approx(0, abs=1e-5)


def test_shuffled_pairs_do_not_reach_the_bound():
    rng = np.random.default_rng(0)
    key = torch.tensor(rng.normal(size=(2, 20, 32)))
    key = key / key.norm(dim=-1, keepdim=True)
    query = key + 0.05 * torch.tensor(rng.normal(size=(2, 20, 32)))
    match = torch.eye(20, dtype=torch.bool).expand(2, 20, 20)
    aligned = difference_alignment_loss(query, key, match).item()
    shuffled = difference_alignment_loss(query, key, match[:, torch.randperm(20)]).item()
    assert -1 <= aligned < -0.9 and shuffled > -0.3


def test_collapse_gains_nothing():
    """Rows that are all the same, as targets or as queries."""
    rng = np.random.default_rng(0)
    spread, same = torch.tensor(rng.normal(size=(2, 6, 8))), torch.ones(2, 6, 8)
    match = torch.eye(6, dtype=torch.bool).expand(2, 6, 6)
    for query, key in ((same, spread), (spread, same), (same, -same)):
        query = query.clone().requires_grad_()
        loss = difference_alignment_loss(query, key, match)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-2) and query.grad.isfinite().all()


def test_photos_without_two_matches_count_zero_and_get_no_gradient(rows):
    query = torch.tensor(rows[0], requires_grad=True)
    key = torch.tensor(rows[1], requires_grad=True)
    match = torch.zeros(4, 6, 5, dtype=torch.bool)
    match[0, :3] = torch.tensor(rows[2][0, :3]) | torch.eye(3, 5, dtype=torch.bool)
    match[1, 2, :3] = True  # one row with several matches is no pair
    alone = difference_alignment_loss(query[:1], key[:1], match[:1])
    loss = difference_alignment_loss(query, key, match)
    assert loss.item() == pytest.approx(alone.item() / 4, rel=1e-5) and loss != 0
    assert difference_alignment_loss(query[1:], key[1:], match[1:]).item() == pytest.approx(0)
    loss.backward()
    assert (query.grad[0, :3].norm(dim=-1) > 1e-4).all()
    assert query.grad[0, 3:].abs().sum() == 0 and query.grad[1:].abs().sum() == 0
    assert key.grad is None  # targets are not trained


def test_fp32_inside_autocast(rows):
    query, key = (torch.tensor(x).bfloat16() for x in rows[:2])
    match = torch.tensor(rows[2])
    exact = difference_alignment_loss(query.float(), key.float(), match)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = difference_alignment_loss(query, key, match)
    assert loss.dtype == torch.float32 and loss == exact
