import numpy as np
import pytest
import torch

from d2ssl.losses.cosine import matched_cosine_loss


def reference(query, key, match):
    """SoCo's eq. 3, written from the paper in float64."""
    query = query / np.linalg.norm(query, axis=-1, keepdims=True)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    per_image = [
        (match[n] * (query[n] @ key[n].T)).sum() / max(match[n].sum(), 1) for n in range(len(query))
    ]
    return -2 * np.mean(per_image)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 4, 8)), rng.normal(size=(3, 5, 8)), rng.random((3, 4, 5)) < 0.4


def test_equals_the_paper(rows):
    query, key, match = rows
    loss = matched_cosine_loss(torch.tensor(query), torch.tensor(key), torch.tensor(match))
    assert loss.item() == pytest.approx(reference(query, key, match), abs=1e-6)


def test_bounds(rows):
    query = torch.tensor(rows[0])
    match = torch.eye(4, dtype=torch.bool).expand(3, 4, 4)
    assert matched_cosine_loss(query, 3 * query, match).item() == pytest.approx(-2)
    assert matched_cosine_loss(query, -query, match).item() == pytest.approx(2)
    shuffled = match[:, torch.tensor([1, 2, 3, 0])]
    assert matched_cosine_loss(query, query, shuffled).item() > -1


def test_an_image_without_match_gets_no_gradient(rows):
    query = torch.tensor(rows[0], requires_grad=True)
    key = torch.tensor(rows[0], requires_grad=True)
    match = torch.zeros(3, 4, 4, dtype=torch.bool)
    match[0, 0, 1] = True
    matched_cosine_loss(query, key, match).backward()
    assert query.grad[0, 0].abs().sum() > 0
    assert query.grad[1:].abs().sum() == 0
    assert key.grad is None  # targets are not trained


def test_fp32_inside_autocast(rows):
    query, key, match = (torch.tensor(x) for x in rows)
    exact = matched_cosine_loss(query.float(), key.float(), match)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matched_cosine_loss(query.float(), key.float(), match) == exact
        assert matched_cosine_loss(query.bfloat16(), key.float(), match).dtype == torch.float32
