"""Both trainers on real (small) detectors: exactness of resume and of processes, and what moves."""

import copy
import os

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from d2ssl.config import finetune_cfg, pretrain_cfg
from d2ssl.data.build import build_validation_batches
from d2ssl.engine.finetuning import FinetuneTrainer
from d2ssl.engine.launch import launch
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.errors import D2SSLError
from d2ssl.modeling.fingerprint import relative_difference
from d2ssl.report.plots import read_metrics, series


def final_state(output_dir):
    return torch.load(os.path.join(output_dir, "model_final.pth"), weights_only=True)


def flat(state, prefix=""):
    """Nested containers -> {path: tensor or value}."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}


def assert_identical(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


class Stop(Exception):
    pass


def run_and_stop_at(trainer, iteration):
    """Training that dies in the middle of an iteration, as a killed process does."""
    forward = trainer.run_step

    def run_step():
        if trainer.iter == iteration:
            raise Stop
        forward()

    trainer.run_step = run_step
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize(
    "stage_cfg, trainer_class, opts",
    [
        (pretrain_cfg, PretrainTrainer, []),
        (pretrain_cfg, PretrainTrainer, ["SSL.SOLVER.OPTIMIZER", "LARS"]),
        (finetune_cfg, FinetuneTrainer, ["SSL.FINETUNE.EMA_DECAY", "0.9"]),
    ],
)
def test_resume_is_exact(tiny_cfg, tmp_path, stage_cfg, trainer_class, opts):
    whole, parts = (
        stage_cfg(
            tiny_cfg("SSL.ENABLED", str(stage_cfg is pretrain_cfg), *opts, output_dir=tmp_path / d)
        )
        for d in ("whole", "parts")
    )
    os.makedirs(whole.OUTPUT_DIR), os.makedirs(parts.OUTPUT_DIR)
    trainer_class(whole).train()
    run_and_stop_at(trainer_class(parts), 3)
    resumed = trainer_class(parts, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert_identical(final_state(whole.OUTPUT_DIR), final_state(parts.OUTPUT_DIR))


DEV = "balloon_demo_train@-4"


@pytest.fixture
def evaluated(monkeypatch):
    """Names of the sets as they are evaluated: each gets an AP known beforehand, 1 lower than the
    one before; the first 49 for masks and 50 for boxes."""
    names = []

    def evaluate(cls, cfg, model):
        names.extend(cfg.DATASETS.TEST)
        ap = 50.0 - len(names)
        return {"bbox": {"AP": ap + 1, "AP50": 90.0}, "segm": {"AP": ap, "AP50": 90.0}}

    monkeypatch.setattr(FinetuneTrainer, "test", classmethod(evaluate))
    return names


def dev_cfg(tiny_cfg, *opts):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "SSL.FINETUNE.DEV_DATASET", DEV, *opts))
    os.makedirs(cfg.OUTPUT_DIR)
    return cfg, os.path.join(cfg.OUTPUT_DIR, "metrics.json")


def test_with_a_dev_set_the_test_set_is_evaluated_once(tiny_cfg, evaluated, monkeypatch):
    losses_on = []

    def batches(cfg, names):
        losses_on.append(list(names))
        return build_validation_batches(cfg, names, limit=1)

    monkeypatch.setattr("d2ssl.engine.finetuning.build_validation_batches", batches)
    cfg, metrics = dev_cfg(tiny_cfg, "TEST.EVAL_PERIOD", "1")
    run_and_stop_at(FinetuneTrainer(cfg), 2)
    assert evaluated == [DEV] * 2
    trainer = FinetuneTrainer(cfg, resume=True)
    trainer.train()
    assert evaluated == [DEV] * 4 + ["balloon_demo_val"]
    assert trainer.last_results["segm"]["AP"] == 45.0
    assert losses_on == [[DEV]] * 2  # as built, and as resumed

    metrics = read_metrics(metrics)
    assert series(metrics, "dev/segm/AP") == ([0, 1, 2, 3], [49.0, 48.0, 47.0, 46.0])
    assert series(metrics, "dev/bbox/AP") == ([0, 1, 2, 3], [50.0, 49.0, 48.0, 47.0])
    assert series(metrics, "segm/AP") == ([4], [45.0])
    assert series(metrics, "val_total_loss")[0] == [0, 1, 2, 3]


def test_no_evaluation_is_lost_between_two_writes(tiny_cfg, evaluated):
    cfg, metrics = dev_cfg(
        tiny_cfg, "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "60", "SSL.FINETUNE.VAL_LOSS", "False"
    )  # by its length alone, such a run is written every 3 iterations
    trainer = FinetuneTrainer(cfg)
    trainer.run_step = lambda: None
    trainer.train()
    assert series(read_metrics(metrics), "dev/segm/AP")[0] == list(range(1, 60, 2))
    assert evaluated.count("balloon_demo_val") == 1


def test_a_dev_set_without_a_test_set(tiny_cfg, evaluated):
    cfg, metrics = dev_cfg(tiny_cfg, "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "3")
    trainer = FinetuneTrainer(cfg)
    trainer.train()
    assert evaluated == [DEV] * 2 and trainer.last_results == {}
    assert series(read_metrics(metrics), "val_total_loss")[0] == [2]


def train_in_processes(cfg):
    from d2ssl.data.datasets import register_balloon

    register_balloon("balloon_demo", os.path.join(os.environ["TEST_DEMO_ROOT"], "balloon_demo"))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    PretrainTrainer(cfg).train()


def test_two_processes_equal_one(tiny_cfg, tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("TEST_DEMO_ROOT", str(demo_root))
    states = []
    for count in (1, 2):
        cfg = tiny_cfg(
            "SSL.PRECISION", "fp32", "SSL.SOLVER.MAX_ITER", "2", output_dir=tmp_path / str(count)
        )
        launch(train_in_processes, count, args=(pretrain_cfg(cfg),))
        states.append(final_state(pretrain_cfg(cfg).OUTPUT_DIR)["model"])
    one, two = states
    assert one.keys() == two.keys()
    for name in one:
        # Rounding alone: norms over few cells enlarge it.
        torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=1e-3, msg=name)


def test_pretraining_moves_trunk_and_twins(tiny_cfg):
    cfg = pretrain_cfg(tiny_cfg("SSL.MOMENTUM", "0.5"))
    trainer = PretrainTrainer(cfg)
    method = trainer.module
    online, twin = method.trunk.state_dict(), method.trunk_twin.state_dict()
    assert all(torch.equal(online[k], twin[k]) for k in online)
    before = copy.deepcopy(online)
    trainer.train()
    after, twin = method.trunk.state_dict(), method.trunk_twin.state_dict()
    for name in ("backbone.bottom_up.stem.conv1.weight", "backbone.fpn_output2.weight",
                 "backbone.fpn_lateral5.weight", "roi_heads.box_head.fc1.weight"):  # fmt: skip
        moved = (after[name] - before[name]).norm()
        lag = (after[name] - twin[name]).norm()
        assert moved > 0 and 0 < lag < moved, name  # the twin follows, behind


@pytest.mark.parametrize("part", ["bottom_up", "fpn", "box_head"])
def test_only_named_parts_learn(tiny_cfg, part, tmp_path):
    weights = donor(tiny_cfg, tmp_path)
    cfg = pretrain_cfg(tiny_cfg("SSL.TRAIN", f"['{part}']", "MODEL.WEIGHTS", weights))
    trainer = PretrainTrainer(cfg)
    before = copy.deepcopy(trainer.module.trunk.state_dict())
    trainer.train()
    after = trainer.module.trunk.state_dict()
    prefixes = {"bottom_up": "backbone.bottom_up", "fpn": "backbone.fpn", "box_head": "roi_heads"}
    for name, value in after.items():
        learns = name.startswith(prefixes[part])
        if learns and name.endswith(("conv1.weight", "lateral5.weight", "fc1.weight")):
            assert not torch.equal(value, before[name]), name
        if not learns:
            assert torch.equal(value, before[name]), name


def donor(tiny_cfg, tmp_path):
    """A file of detector weights with frozen norms that fit their convolutions only roughly."""
    cfg = tiny_cfg("SSL.ENABLED", "False", "SOLVER.MAX_ITER", "1", output_dir=tmp_path / "donor")
    cfg = finetune_cfg(cfg)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = FinetuneTrainer(cfg)
    torch.manual_seed(0)
    for module in trainer.module.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean += (
                0.2 * module.running_var.sqrt() * torch.randn(module.num_features)
            )
            module.running_var *= torch.rand(module.num_features) + 0.5
    path = str(tmp_path / "donor.pth")
    torch.save({"model": trainer.module.state_dict()}, path)
    return path


def test_loaded_norms_start_with_the_statistics_of_the_frozen_net(tiny_cfg, tmp_path):
    """Against moments gathered here, from the stock frozen detector on the trainer's own views."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    cfg = tiny_cfg("MODEL.WEIGHTS", donor(tiny_cfg, tmp_path), "SSL.CALIBRATION_PHOTOS", "8",
                   "SSL.FPN_NORM", "")  # fmt: skip
    stock = build_model(finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))).eval()
    DetectionCheckpointer(stock).load(cfg.MODEL.WEIGHTS)
    trainer = PretrainTrainer(pretrain_cfg(cfg))
    method = trainer.module
    assert trainer.loaded_parts == {"BOTTOM_UP", "FPN", "BOX_HEAD"}

    seen = []
    deep = stock.backbone.bottom_up.res4[1].conv2.norm
    deep.register_forward_pre_hook(lambda m, x: seen.append(x[0].transpose(0, 1).flatten(1)))
    batch = [trainer.loader.stream[i] for i in range(8)]
    with torch.no_grad():
        outputs = [stock.backbone(view.images) for view in method.see(batch)]
    values = torch.cat(seen, 1).double()  # channels x everything that passes, three views
    live = method.trunk.backbone.bottom_up.res4[1].conv2.norm
    torch.testing.assert_close(live.running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-4)
    expected = values.var(1, correction=0)
    torch.testing.assert_close(live.running_var.double(), expected, rtol=1e-4, atol=1e-4)
    assert (live.running_mean - deep.running_mean).norm() > 0.1 * deep.running_mean.norm()
    method.trunk.eval()  # and the function is still the stock detector's
    with torch.no_grad():
        pyramid = method.trunk(method.see(batch)[0].images)
    assert relative_difference(pyramid["p3"], outputs[0]["p3"]) < 1e-4


def test_lr_of_loaded_parts_starts_low_and_meets_the_schedule(tiny_cfg, tmp_path):
    weights = donor(tiny_cfg, tmp_path)
    cfg = pretrain_cfg(
        tiny_cfg(
            "MODEL.WEIGHTS",
            weights,
            "SSL.SOLVER.LOADED_LR_FACTOR",
            "0.1",
            "SSL.SOLVER.WARMUP_ITERS",
            "0",
            "SSL.SOLVER.MAX_ITER",
            "100",
            "SSL.SOLVER.LR_FACTOR.FPN",
            "0.5",
        )  # fmt: skip
    )
    trainer = PretrainTrainer(cfg)
    main = [trainer.lr_multiple("HEADS", i) for i in range(100)]
    loaded = [trainer.lr_multiple("BOTTOM_UP", i) for i in range(100)]
    expected_main = [(1 + np.cos(np.pi * i / 100)) / 2 for i in range(100)]
    rise = [0.1 + 0.9 * (1 - np.cos(np.pi * i / 100)) / 2 for i in range(100)]
    np.testing.assert_allclose(main, expected_main, atol=1e-6)
    np.testing.assert_allclose(loaded, np.minimum(expected_main, rise), atol=1e-6)
    assert trainer.lr_multiple("FPN", 10) == pytest.approx(loaded[10] / 2)


def test_unfreezing_at_an_iteration(tiny_cfg):
    cfg = finetune_cfg(
        tiny_cfg(
            "SSL.ENABLED",
            "False",
            "SSL.FINETUNE.FROZEN_PARTS",
            "('RES4', 'FPN')",
            "SSL.FINETUNE.UNFREEZE_ITER",
            "2",
            "SOLVER.MAX_ITER",
            "3",
        )  # fmt: skip
    )
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = FinetuneTrainer(cfg)
    names = {"RES4": "backbone.bottom_up.res4.0.conv1.weight", "FPN": "backbone.fpn_output3.weight",
             "RES5": "backbone.bottom_up.res5.0.conv1.weight"}  # fmt: skip
    history, step = [], trainer.run_step

    def run_step():
        before = {k: trainer.module.get_parameter(n).clone() for k, n in names.items()}
        step()
        history.append(
            {
                k: not torch.equal(before[k], trainer.module.get_parameter(n))
                for k, n in names.items()
            }
        )

    trainer.run_step = run_step
    trainer.train()
    assert [h["RES5"] for h in history] == [True, True, True]
    assert [h["RES4"] for h in history] == [h["FPN"] for h in history] == [False, False, True]


def test_averaged_weights_are_the_exponential_average(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "SSL.FINETUNE.EMA_DECAY", "0.6"))
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = FinetuneTrainer(cfg)
    name = "backbone.fpn_output2.weight"
    expected, step = [trainer.module.get_parameter(name).detach().clone()], trainer.run_step

    def run_step():
        step()
        decay = min(0.6, (1 + trainer.iter) / (10 + trainer.iter))
        now = trainer.module.get_parameter(name).detach()
        expected[0] = decay * expected[0] + (1 - decay) * now

    trainer.run_step = run_step
    trainer.train()
    raw = trainer.module.get_parameter(name).detach().clone()
    saved = torch.load(trainer.save_weights("model_result"), weights_only=True)["model"][name]
    torch.testing.assert_close(saved, expected[0])
    assert torch.equal(trainer.module.get_parameter(name), raw) and not torch.equal(raw, saved)


def test_random_frozen_stages_are_refused(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False", "MODEL.BACKBONE.FREEZE_AT", "2"))
    with pytest.raises(D2SSLError, match="FREEZE_AT 2 would freeze random weights"):
        FinetuneTrainer(cfg)


def test_random_norms_are_calibrated_or_refused(tiny_cfg):
    cfg = finetune_cfg(tiny_cfg("SSL.ENABLED", "False"))
    norms = [
        m
        for m in FinetuneTrainer(cfg).module.backbone.modules()
        if isinstance(m, FrozenBatchNorm2d)
    ]
    assert norms and all((m.running_mean != 0).any() for m in norms)
    cfg = tiny_cfg("SSL.ENABLED", "False", "SSL.FINETUNE.CALIBRATE_NORMS", "never")
    with pytest.raises(D2SSLError, match="mean 0 and variance 1"):
        FinetuneTrainer(finetune_cfg(cfg))


def test_pretraining_has_no_frozen_norm(tiny_cfg):
    trunk = PretrainTrainer(pretrain_cfg(tiny_cfg())).module.trunk
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in trunk.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in trunk.modules()) == 20 + 8  # R18, FPN
    assert all(p.requires_grad for p in trunk.parameters())


def test_a_batch_too_small_for_batch_statistics(tiny_cfg):
    with pytest.raises(D2SSLError, match="need 2 or more"):
        PretrainTrainer(pretrain_cfg(tiny_cfg("SSL.SOLVER.IMS_PER_BATCH", "1")))
    with pytest.raises(D2SSLError, match="SSL.METHOD Soko: choose from .*SoCo"):
        PretrainTrainer(pretrain_cfg(tiny_cfg("SSL.METHOD", "Soko")))


@pytest.mark.parametrize(
    "parts, left",
    [
        (["fpn", "box_head"], "bottom_up"),
        (["box_head"], "bottom_up"),
        (["bottom_up", "box_head"], "fpn"),
    ],
)
def test_random_parts_below_what_learns_are_refused(tiny_cfg, parts, left):
    with pytest.raises(D2SSLError, match=f"SSL.TRAIN leaves {left} at random weights"):
        PretrainTrainer(pretrain_cfg(tiny_cfg("SSL.TRAIN", str(parts))))
