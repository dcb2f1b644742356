import os

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import nn

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.engine.checkpoint import Checkpointer, load_weights
from d2ssl.errors import D2SSLError


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Linear(width, 2)


def test_report_counts_each_tensor_once(tmp_path):
    state = Net().state_dict()
    state["head.weight"] = torch.zeros(3, 4)  # another number of classes
    del state["head.bias"]
    state["extra.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "a.pth")
    net = Net()
    report = load_weights(net, str(tmp_path / "a.pth"))
    assert report.loaded == ["stem.weight", "stem.bias"]
    assert report.missing == ["head.bias"] and report.mismatched == ["head.weight"]
    assert report.unused == ["extra.weight"]
    assert torch.equal(net.stem.weight, state["stem.weight"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "bad.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(D2SSLError, match="bad.pth cannot be loaded") as error:
        load_weights(Net(), str(path))
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(D2SSLError, match="not one tensor fits"):
        load_weights(Net(), str(tmp_path / "a.pth"))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path):
    net = Net()
    checkpointer = Checkpointer(net, str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    class Unwritable:
        def state_dict(self):
            return {"bad": lambda: None}  # fails in the middle of torch.save

    checkpointer.add_checkpointable("bad", Unwritable())
    with pytest.raises(Exception):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]


def test_fpn_with_norm_takes_a_stock_fpns_bias(tiny_cfg, tmp_path):
    """Pretraining puts norms in the FPN; a pretrained FPN must still compute the same."""
    stock = build_model(finetune_cfg(tiny_cfg("SSL.ENABLED", "False")))
    torch.manual_seed(0)
    for module in stock.backbone.modules():
        if isinstance(module, Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    torch.save({"model": stock.state_dict()}, tmp_path / "stock.pth")
    trunk = build_model(pretrain_cfg(tiny_cfg())).trunk
    report = load_weights(trunk, str(tmp_path / "stock.pth"))
    assert "backbone.fpn_output2.norm.bias" in report.loaded
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = stock.backbone.eval()(images), trunk.eval()(images)
    for level in ("p2", "p5"):
        torch.testing.assert_close(got[level], expected[level], rtol=1e-3, atol=1e-3)
