import itertools
import math

import pytest

from d2ssl.config import AUTO_KEYS, get_key, load_cfg
from d2ssl.engine import auto
from d2ssl.engine.auto import resolve_auto
from d2ssl.errors import D2SSLError

PHOTOS = ["SSL.DATASETS", "('photos',)"]


@pytest.fixture
def resolve(monkeypatch):
    """Callable: number of photos and overrides -> (batch, lr, momentum, queue)."""

    def run(photos, *opts):
        monkeypatch.setattr(auto, "count_photos", lambda names: photos)
        cfg = resolve_auto(load_cfg(opts=[*PHOTOS, *opts]))
        assert cfg.is_frozen()
        return tuple(get_key(cfg, key) for key in AUTO_KEYS)

    return run


@pytest.mark.parametrize(
    "photos, batch, momentum, queue",
    [
        (8, 4, 1 - 1 / 100, 4),
        (16, 4, 1 - 1 / 100, 8),
        (61, 16, 1 - 1 / 100, 32),
        (1000, 64, 1 - 1 / (25 * 1000 / 64), 512),
        (118000, 64, 0.999, 65536),
    ],
)
def test_values_by_size(resolve, photos, batch, momentum, queue):
    lr = 0.02 * math.sqrt(batch / 16)
    assert resolve(photos) == pytest.approx((batch, lr, momentum, queue))
    assert batch & (batch - 1) == queue & (queue - 1) == 0  # powers of two


@pytest.mark.parametrize("photos", [2, 3, 5, 7, 8, 16, 33, 61, 250, 1000, 5011, 118000, 1281167])
def test_what_holds_for_any_size(resolve, photos):
    batch, lr, momentum, queue = resolve(photos)
    assert 4 <= batch <= 64 and lr > 0 and 0.99 <= momentum <= 0.999
    assert queue <= min(photos, 65536)
    assert queue >= min(batch, photos)
    if 16 <= photos <= 65536:
        assert photos / 2 / math.sqrt(2) <= queue <= photos / 2 * math.sqrt(2)


@pytest.mark.parametrize(
    "method, queue, similarities",
    [
        # 224 px: 14^2 + 14^2 + 14^2 + 7^2 = 637 cells, of which 8 are sent; batches of 64 photos.
        (["SSL.METHOD", "PLMoCo"], 128, 2 * 637 * 8),  # each view finds the other
        (["SSL.METHOD", "PLMoCo", "SSL.QUEUE.SYMMETRIC", "False"], 256, 637 * 8),
        (["SSL.METHOD", "PLMoCoPlus"], 128, 2 * (637 * 8 + 1)),
        (["SSL.METHOD", "DenseCL"], 256, 2 * (637 * 4 + 1)),  # a key a level
        (["SSL.METHODS", '[["SoCo", 1.0], ["RLMoCo", 1.0]]'], 2048, 2 * 4 * 16 * 8),
        (["SSL.METHOD", "MoCo"], 32768, 1),
    ],
)
def test_similarities_with_the_queue_fit_into_memory(resolve, method, queue, similarities):
    """The largest power of two that keeps a batch's within half a GB, of half of 65536 photos."""
    opts = ["SSL.QUEUE.KEYS_PER_PHOTO", "8", *method]
    assert resolve(65536, *opts)[3] == queue
    assert 64 * similarities * queue * 4 <= 2**29
    assert queue == 32768 or 64 * similarities * 2 * queue * 4 > 2**29
    assert resolve(61, *opts)[3] == 32  # few photos are not concerned
    assert resolve(65536, *opts, "SSL.QUEUE.SIZE", "20000")[3] == 20000  # nor who says a number


@pytest.mark.parametrize(
    "optimizer, batch, lr",
    [("SGD", 16, 0.02), ("SGD", 64, 0.04), ("AdamW", 16, 2e-4), ("LARS", 256, 1.0)],
)
def test_lr_by_the_square_root_of_the_batch(resolve, optimizer, batch, lr):
    opts = ["SSL.SOLVER.OPTIMIZER", optimizer, "SSL.SOLVER.IMS_PER_BATCH", str(batch)]
    assert resolve(1000, *opts)[:2] == pytest.approx((batch, lr))


def test_given_values_stay_and_the_others_follow_them(resolve):
    given = dict(zip(AUTO_KEYS, (32, 0.3, 0.5, 20)))
    assert resolve(61, *(str(x) for pair in given.items() for x in pair)) == (32, 0.3, 0.5, 20)
    # A large batch: the queue holds one at least, but not more photos than there are.
    batch, lr, momentum, queue = resolve(61, "SSL.SOLVER.IMS_PER_BATCH", "128")
    assert (batch, queue) == (128, 61)
    assert (lr, momentum) == pytest.approx((0.02 * math.sqrt(8), 0.99))
    assert resolve(61, "SSL.SOLVER.IMS_PER_BATCH", "48")[3] == 48


def test_a_queue_larger_than_the_set_is_one_line(resolve):
    with pytest.raises(D2SSLError, match="SSL.QUEUE.SIZE 62: the data set has 61 photos") as error:
        resolve(61, "SSL.QUEUE.SIZE", "62", "SSL.METHOD", "MoCo")
    assert "\n" not in str(error.value)
    assert resolve(62, "SSL.QUEUE.SIZE", "62", "SSL.METHOD", "MoCo")[3] == 62
    assert resolve(61, "SSL.QUEUE.SIZE", "62", "SSL.METHOD", "SoCo")[3] == 62  # it has none


@pytest.mark.parametrize("several", [False, True])
def test_one_photo_is_not_told_from_others(resolve, several):
    def run(name, photos=1):
        opts = ["SSL.METHODS", f'[["SoCo", 1.0], ["{name}", 1.0]]'] if several else []
        return resolve(photos, *(opts or ["SSL.METHOD", name]))

    for name in ("SimCLR", "MoCo", "DenseCL", "PLMoCoPlus"):
        with pytest.raises(D2SSLError, match=f"^{name} learns by .* SSL.DATASETS") as error:
            run(name)
        alone = str(error.value).partition("choose from ")[2].split(", ")
        assert name not in alone and {"SoCo", "DetCon", "RLMoCo", "Inpainting"} < set(alone)
        assert "\n" not in str(error.value)
        run(name, photos=2)
    for name in ("BYOL", "PLMoCo", "Colorization"):
        run(name)


def test_what_was_filled_in_is_logged(resolve, caplog):
    caplog.set_level("INFO", "d2ssl")
    resolve(61, "SSL.MOMENTUM", "0.9")
    assert [m for m in caplog.messages if "auto" in m] == [
        "SSL.SOLVER.IMS_PER_BATCH auto: 16, for 61 photos",
        "SSL.SOLVER.BASE_LR auto: 0.02, for 61 photos",
        "SSL.QUEUE.SIZE auto: 32, for 61 photos",
    ]


def test_without_pretraining_nothing_is_looked_up(monkeypatch):
    monkeypatch.setattr(auto, "count_photos", lambda names: 1 / 0)
    cfg = load_cfg(opts=["SSL.ENABLED", "False"])
    assert resolve_auto(cfg) is cfg


@pytest.mark.parametrize("key, number", zip(AUTO_KEYS, (32, 0.3, 0.5, 20)))
def test_auto_and_numbers_replace_one_another(tmp_path, key, number):
    """The default, a yaml, then the command line: each may say either."""
    nodes = key.split(".")

    def load(in_yaml, *opts):
        lines = [f"{'  ' * i}{name}:" for i, name in enumerate(nodes)]
        file = tmp_path / "run.yaml"
        file.write_text("\n".join(lines) + f" {in_yaml}\n")
        return get_key(load_cfg(str(file), [*PHOTOS, *opts]), key)

    assert get_key(load_cfg(opts=PHOTOS), key) == "auto"
    assert load("auto") == load(number, key, "auto") == load("auto", key, "auto") == "auto"
    assert load(number) == load("auto", key, str(number)) == load(1, key, str(number)) == number


@pytest.mark.parametrize(
    "key, value",
    [
        *itertools.product(AUTO_KEYS, ["0", "-1", "'fast'", "[4]", "True", "float('nan')"]),
        ("SSL.SOLVER.IMS_PER_BATCH", "16.0"),
        ("SSL.QUEUE.SIZE", "2.5"),
        ("SSL.MOMENTUM", "1.01"),
        ("SSL.SOLVER.BASE_LR", "1e999"),
    ],
)
def test_anything_else_is_refused(key, value):
    with pytest.raises(D2SSLError, match=key) as error:
        load_cfg(opts=[*PHOTOS, key, value])
    assert "\n" not in str(error.value) and "auto" in str(error.value)
