import json

import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.errors import D2SSLError
from d2ssl.modeling.methods.moco import MoCo
from d2ssl.modeling.pretext_model import PretextModel
from tests.modeling.conftest import assert_learns
from tests.modeling.test_rlmoco import part_twins

# Boxes on three views, a queue and a twin on two, a decoder on one.
SEVERAL = [["PLMoCo", 0.5], ["SoCo", 1], ["Colorization", 2.0]]


def several(*members):
    return ["SSL.METHODS", json.dumps(members)]


def test_loss_is_the_weighted_sum_of_the_members_run_alone(model_and_batch, tiny_cfg):
    model, batch = model_and_batch("SoCo", *several(*SEVERAL))
    part_twins(model)
    expected, low, high = {}, 0.0, 0.0
    for (name, weight), member in zip(SEVERAL, model.method.methods):
        alone = PretextModel(pretrain_cfg(tiny_cfg("SSL.METHOD", name, "SSL.PRECISION", "fp32")))
        alone.train().trunk.load_state_dict(model.trunk.state_dict())
        if alone.method.uses_twin:
            alone.trunk_twin.load_state_dict(model.trunk_twin.state_dict())
        alone.method.load_state_dict(member.state_dict())
        torch.manual_seed(0)  # the same cells enter PLMoCo's queue
        for part, loss in alone(batch).items():
            expected[f"loss_{name.lower()}_{part.removeprefix('loss_')}"] = weight * loss
        low += weight * alone.method.loss_range[0]
        high += weight * alone.method.loss_range[1]
    torch.manual_seed(0)
    losses = model(batch)
    assert losses.keys() == expected.keys() and len(losses) == 4
    torch.testing.assert_close(losses, expected)
    assert model.method.loss_range == pytest.approx((low, high))


def test_the_trunk_runs_once_a_view_for_all(model_and_batch):
    """SoCo's three views, of which BYOL and PLMoCo take two; the twin sees each once as well."""
    model, batch = model_and_batch("SoCo", *several(["BYOL", 1.0], ["SoCo", 1.0], ["PLMoCo", 1.0]))
    seen = {"trunk": [], "trunk_twin": []}
    for name, images in seen.items():
        getattr(model, name).backbone.register_forward_hook(
            lambda module, args, out, images=images: images.append(args[0])
        )
    sum(model(batch).values()).backward()
    views = [model.normalize(torch.stack([x["views"][v] for x in batch])) for v in range(3)]
    for images in seen.values():
        assert len(images) == 3
        for view in views:
            assert sum(x.shape == view.shape and torch.equal(x, view) for x in images) == 1


@pytest.mark.parametrize("names", [["MoCo", "SoCo"], ["SoCo", "MoCo"], ["BYOL", "RLMoCo", "SoCo"]])
def test_views_are_those_of_the_member_that_draws_most(tiny_cfg, names):
    alone = {n: PretextModel(pretrain_cfg(tiny_cfg("SSL.METHOD", n))).method for n in names}
    method = PretextModel(pretrain_cfg(tiny_cfg(*several(*((n, 1.0) for n in names))))).method
    assert method.views == alone["SoCo"].views
    assert set(method.view_pairs) == {(0, 1), (0, 2)}
    assert method.needs == set().union(*(m.needs for m in alone.values()))
    assert set(method.reaches) == {"bottom_up", "fpn", "box_head"} and method.uses_twin


@pytest.mark.parametrize(
    "members, message",
    [
        ([["SoCo", 1.0], ["Soco", 1.0]], "SSL.METHODS Soco: choose from BYOL, Colorization"),
        ([["SoCo", 1.0], ["SoCo", 0.5]], "name each method once"),
        ([["SoCo", 1.0], ["MoCo", -1.0]], "a weight above 0"),
        ([["SoCo", 1.0], ["MoCo", 0]], "a weight above 0"),
        ([["SoCo"]], "write pairs"),
        (["SoCo", "MoCo"], "write pairs"),
    ],
)
def test_what_cannot_be_combined_is_one_line(tiny_cfg, members, message):
    with pytest.raises(D2SSLError, match=message) as error:
        PretextModel(pretrain_cfg(tiny_cfg("SSL.METHODS", json.dumps(members))))
    assert "\n" not in str(error.value)


def test_more_views_than_are_drawn_is_one_line(tiny_cfg):
    class OneView(MoCo):
        @classmethod
        def draws(cls, cfg):
            return super().draws(cfg)[:1]

    cfg = pretrain_cfg(tiny_cfg("SSL.METHOD", "MoCo"))
    trunk = PretextModel(cfg).trunk
    with pytest.raises(D2SSLError, match="OneView needs 2 views of a photo and is given 1$"):
        OneView(cfg, trunk)


def test_learns(train):
    """Falls by more than any one member could alone, while all of them keep their spread."""
    members = ["BYOL", 1.0], ["PLMoCo", 0.5]
    trainer, losses = train("SoCo", *several(*members))
    assert_learns(trainer, losses, fall=0.5, spread=0.2)
