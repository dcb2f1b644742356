import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from d2ssl.config import pretrain_cfg
from d2ssl.modeling.pretext_model import PretextModel
from tests.modeling.conftest import assert_learns
from tests.modeling.written_out import PLAIN, info_nce, maps_of, photo_rows, through, unit


def test_loss_equals_the_paper_written_out(model_and_batch):
    """Eq. 1 for each of the 2N rows. One photo is there twice: its copies are no negatives."""
    model, batch = model_and_batch("SimCLR", "SSL.TEMPERATURE", "0.3")
    batch[3]["index"] = batch[0]["index"]
    z = [unit(through(model.method.projector, photo_rows(maps_of(model, batch, v))))[:, 0]
         for v in (0, 1)]  # fmt: skip
    photos = [item["index"] for item in batch]
    losses = [
        info_nce(
            z[v][n],
            z[1 - v][n],
            [z[w][m] for w in (0, 1) for m in range(4) if photos[m] != photos[n]],
            temperature=0.3,
        )
        for v in (0, 1)
        for n in range(4)
    ]
    assert model(batch)["loss_contrast"].item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_copies_of_one_photo_have_nothing_to_tell_apart(model_and_batch):
    model, batch = model_and_batch("SimCLR")
    loss = model([{**item, "index": 3} for item in batch])["loss_contrast"]
    loss.backward()
    assert loss == 0
    assert all(p.grad.abs().sum() == 0 for p in model.method.parameters())


def test_masks_lie_where_the_rows_lie(tiny_cfg, model_and_batch):
    """On a GPU that need not be there: fake tensors know their device and shape, not values."""
    _, batch = model_and_batch("SimCLR")
    cfg = pretrain_cfg(tiny_cfg("SSL.METHOD", "SimCLR"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = PretextModel(cfg)
        loss = model(batch)["loss_contrast"]
    assert loss.is_cuda


def test_learns(train):
    assert_learns(*train("SimCLR", *PLAIN, "SSL.SOLVER.BASE_LR", "0.01"), fall=0.6)
