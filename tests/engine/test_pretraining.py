import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.modeling.fingerprint import relative_difference
from tests.engine.test_trainer import donor


@pytest.mark.parametrize(
    "opts",
    [
        ["SSL.METHOD", "Colorization"],
        ["SSL.METHOD", "Inpainting", "SSL.HOLES.SHARE", "0.5"],
        ["SSL.METHODS", '[["MoCo", 1.0], ["Inpainting", 1.0]]'],
    ],
)
def test_loaded_norms_are_calibrated_on_what_the_method_gives_the_trunk(tiny_cfg, tmp_path, opts):
    """In training mode, where batch statistics count, the function is still the loaded net's."""
    weights = ["MODEL.WEIGHTS", donor(tiny_cfg, tmp_path), "SSL.FPN_NORM", ""]
    trainer = PretrainTrainer(pretrain_cfg(tiny_cfg(*opts, *weights)))
    model, given = trainer.module.eval(), []
    hook = model.trunk.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model([trainer.loader.stream[i] for i in range(4)])  # the photos of the calibration
    hook.remove()
    trunk, images = model.trunk, torch.cat(given)
    with torch.no_grad():
        before, now = trunk.eval()(images), trunk.train()(images)
    assert relative_difference(now["res5"], before["res5"]) < 1e-3
