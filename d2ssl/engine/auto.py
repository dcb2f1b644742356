"""Values that are set to "auto": what suits a data set of this size."""

import logging
import math

from d2ssl.config import AUTO, AUTO_KEYS, get_key, set_key
from d2ssl.data.build import count_photos
from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods import PRETEXT_REGISTRY, method_class

logger = logging.getLogger("d2ssl")

# Of a batch with the queue: half a GB in fp32, and a loss holds several of that size.
MOST_SIMILARITIES = 2**27


def resolve_auto(cfg):
    """The user's config with a number for each "auto" of pretraining, frozen; each is logged.

    - batch: a quarter of the photos as a power of two, 4 to 64, so that a batch seldom holds a
      photo twice. 61 photos: 16.
    - lr: by the square root of the batch (Krizhevsky 2014; PixPro's authors below 1024): SGD 0.02
      and AdamW 2e-4 at 16, LARS 1.0 at 256.
    - momentum: the twin averages over the last 25 passes through the photos, 100 to 1000
      iterations. 61 photos: 0.99; large sets: 0.999 as in MoCo.
    - queue: half the photos as a power of two, at least a batch; more would only be older keys
      of the same few photos. At most 65536, and for cells and regions, of which each photo sends
      several, no more than memory holds (MOST_SIMILARITIES). 61 photos: 32.

    Raises:
        D2SSLError: an unknown method, one that learns nothing from a single photo where there is
            one, or a queue for more photos than there are.
    """
    if not cfg.SSL.ENABLED:
        return cfg
    photos, method = count_photos(cfg.SSL.DATASETS), method_class(cfg)
    if photos == 1:
        _require_enough_with_one(cfg)
    resolved = cfg.clone()
    resolved.defrost()

    def fill(key: str, value) -> None:
        if get_key(resolved, key) == AUTO:
            set_key(resolved, key, value)
            logger.info("%s auto: %g, for %d photos", key, value, photos)

    solver = resolved.SSL.SOLVER
    fill("SSL.SOLVER.IMS_PER_BATCH", min(64, max(4, power_of_two(photos / 4))))
    batch = solver.IMS_PER_BATCH
    lr_at_16 = {"SGD": 0.02, "AdamW": 2e-4, "LARS": 0.25}[solver.OPTIMIZER]
    fill("SSL.SOLVER.BASE_LR", lr_at_16 * math.sqrt(batch / 16))
    horizon = min(1000, max(100, 25 * photos / batch))  # iterations
    fill("SSL.MOMENTUM", 1 - 1 / horizon)
    cost = method.queue_cost(resolved) * batch
    most = min(65536, photos, power_of_two_in(MOST_SIMILARITIES / max(cost, 1)))
    fill("SSL.QUEUE.SIZE", min(most, max(batch, power_of_two(photos / 2))))
    if cost and resolved.SSL.QUEUE.SIZE > photos:
        raise D2SSLError(
            f"SSL.QUEUE.SIZE {resolved.SSL.QUEUE.SIZE}: the data set has {photos} photos, and the "
            f'queue would hold old keys of the same ones; give at most {photos}, or "auto"'
        )
    assert not any(get_key(resolved, key) == AUTO for key in AUTO_KEYS)
    resolved.freeze()
    return resolved


def _require_enough_with_one(cfg) -> None:
    alone = [name for name, method in PRETEXT_REGISTRY if not method.needs_others]
    names = [name for name, _ in cfg.SSL.METHODS] or [cfg.SSL.METHOD]
    for name in names:
        if name not in alone:
            raise D2SSLError(
                f"{name} learns by telling photos apart, and SSL.DATASETS has a single one; add "
                f"photos, or choose from {', '.join(sorted(alone))}"
            )


def power_of_two(value: float) -> int:
    """The power of two nearest to a value on the scale of logarithms, at least 1."""
    return 2 ** round(math.log2(max(value, 1)))


def power_of_two_in(value: float) -> int:
    """The largest power of two that is not above a value, at least 1."""
    return 2 ** math.floor(math.log2(max(value, 1)))
