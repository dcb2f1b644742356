import torch

from d2ssl.modeling.queue import KeyQueue


def rows(*values):
    """Keys that can be told apart: value, -value."""
    return torch.tensor([[float(v), -float(v)] for v in values])


def held(queue):
    """{first number of a key: its photo} of the places in use."""
    used = queue.photos >= 0
    return dict(zip(queue.keys[used, 0].tolist(), queue.photos[used].tolist()))


def test_it_starts_empty():
    queue = KeyQueue(4, 2)
    assert not queue.others(torch.tensor([0, -1, 5])).any()
    queue.push(rows(1), torch.tensor([0]))
    assert queue.others(torch.tensor([0, 7])).sum(1).tolist() == [0, 1]


def test_the_newest_are_kept():
    queue = KeyQueue(5, 2)
    everything = []
    for first in range(0, 27, 3):  # 3 does not divide 5
        keys = list(range(first, first + 3))
        queue.push(rows(*keys), torch.tensor([10 + k for k in keys]))
        everything += keys
        assert held(queue) == {k: 10 + k for k in everything[-5:]}


def test_more_keys_than_places():
    queue = KeyQueue(3, 2)
    queue.push(rows(1, 2), torch.tensor([1, 2]))
    queue.push(rows(*range(10, 17)), torch.arange(10, 17))
    assert held(queue) == {14: 14, 15: 15, 16: 16}
    queue.push(rows(20), torch.tensor([20]))
    assert held(queue) == {15: 15, 16: 16, 20: 20}


def test_only_other_photos_are_met():
    queue = KeyQueue(6, 2)
    queue.push(rows(1, 2, 3, 4), torch.tensor([8, 9, -1, 8]))  # the third is for nobody
    assert queue.others(torch.tensor([8, 9, 3])).int().tolist() == [
        [0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0],
    ]  # fmt: skip


def test_it_is_saved_with_the_model():
    queue, other = KeyQueue(4, 2), KeyQueue(4, 2)
    queue.push(rows(1, 2, 3), torch.tensor([1, 2, 3]))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.push(rows(4, 5), torch.tensor([4, 5]))
        assert held(q) == {2: 2, 3: 3, 4: 4, 5: 5}


def test_keys_have_no_history():
    queue = KeyQueue(4, 2)
    keys = rows(1, 2).requires_grad_()
    queue.push(keys.bfloat16(), torch.tensor([1, 2]))
    assert not queue.keys.requires_grad and queue.keys.dtype == torch.float32
