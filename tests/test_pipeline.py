"""The command line, as a user types it, on a small drawn data set."""

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys

import cv2
import pytest

from tests.conftest import CONFIGS, REPO, TINY


@pytest.fixture(scope="module")
def train_net(demo_root, tmp_path_factory):
    """Callable: arguments -> finished process of tools/train_net.py in an empty folder."""
    folder = tmp_path_factory.mktemp("work")
    env = {**os.environ, "DETECTRON2_DATASETS": str(demo_root), "PYTHONPATH": str(REPO),
           "D2SSL_CACHE": str(folder / "cache")}  # fmt: skip

    def run(*args, config=CONFIGS / "demo.yaml"):
        command = [sys.executable, str(REPO / "tools/train_net.py"), "--config-file", str(config)]
        return subprocess.run(
            [*command, *args], env=env, cwd=folder, capture_output=True, text=True, timeout=500
        )

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole_job(train_net):
    """The job from photos to AP; returns its output folder."""
    process = train_net(*TINY, "OUTPUT_DIR", "whole", "TEST.EVAL_PERIOD", "2")
    assert process.returncode == 0, process.stderr[-3000:]
    return train_net.folder / "whole"


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_what_the_job_leaves(whole_job):
    for name in (
        "config.yaml",
        "report.html",
        "pretrain/model_pretrained.pth",
        "pretrain/views.png",
        "pretrain/stock.yaml",
        "finetune/model_result.pth",
        "finetune/metrics.json",
    ):
        assert (whole_job / name).stat().st_size > 0, name
    ap = results(whole_job / "finetune")
    assert 0 <= ap["segm"]["AP"] <= 100 and 0 <= ap["bbox"]["AP50"] <= 100
    lines = [json.loads(x) for x in (whole_job / "finetune/metrics.json").read_text().splitlines()]
    seen = set().union(*lines)
    assert {"total_loss", "val_total_loss", "segm/AP", "lr"} <= seen
    assert not list(whole_job.rglob("*.tmp"))


def test_eval_only_gives_the_reported_result(whole_job, train_net):
    weights = whole_job / "finetune/model_result.pth"
    process = train_net(
        "--eval-only", *TINY, "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", "evaluated"
    )
    assert process.returncode == 0, process.stderr[-3000:]
    again = results(train_net.folder / "evaluated")
    reported = results(whole_job / "finetune")
    assert again["segm"] == reported["segm"] and again["bbox"] == reported["bbox"]


def test_the_readmes_way_to_use_the_detector(whole_job, demo_root):
    text = (REPO / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import cv2\n.*?)```", text, re.DOTALL)
    code = code.replace("output/ssl_fpn_balloon", str(whole_job))
    photo = next((demo_root / "balloon_demo" / "val").glob("*.jpg"))
    names: dict = {}
    exec(code.replace("photo.jpg", str(photo)), names)
    found = names["found"]
    assert found.has("pred_masks") and len(found) == (found.scores > 0.9).sum()
    assert found.image_size == cv2.imread(str(photo)).shape[:2]


def test_eval_only_under_another_convention_is_refused(whole_job, train_net):
    weights = str(whole_job / "finetune/model_result.pth")
    process = train_net("--eval-only", *TINY, "MODEL.WEIGHTS", weights, "INPUT.FORMAT", "RGB",
                        "OUTPUT_DIR", "refused")  # fmt: skip
    assert process.returncode == 2 and "were made with INPUT.FORMAT BGR" in process.stderr
    assert not (train_net.folder / "refused" / "results.json").exists()


def test_resume_of_a_finished_job_repeats_nothing(whole_job, train_net):
    checkpoint = whole_job / "pretrain/model_final.pth"
    before = checkpoint.stat().st_mtime_ns
    process = train_net("--resume", *TINY, "OUTPUT_DIR", "whole", "TEST.EVAL_PERIOD", "2")
    assert process.returncode == 0, process.stderr[-3000:]
    assert checkpoint.stat().st_mtime_ns == before


def test_two_processes_on_a_cpu(train_net):
    process = train_net(
        "--num-gpus", "2", *TINY, "OUTPUT_DIR", "two", "SSL.SOLVER.MAX_ITER", "2",
        "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)", "TEST.AUG.ENABLED", "True",
        "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "96",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    found = results(train_net.folder / "two/finetune")
    assert found.keys() == {"bbox", "segm", "bbox_TTA", "segm_TTA"}


@pytest.mark.parametrize(
    "args, message",
    [
        (["SSL.METOD", "SoCo"], "SSL.METOD does not exist; the nearest is SSL.METHOD"),
        (["DATASETS.TRAIN", "('balloon_demo_trian@4',)"], "did you mean 'balloon_demo_train@4'"),
        (["MODEL.WEIGHTS", "absent.pkl"], "absent.pkl cannot be loaded"),
        (["--stage", "finetune"], "run --stage pretrain first"),
        (["--eval-only", "MODEL.WEIGHTS", ""], "--eval-only needs MODEL.WEIGHTS"),
        (["--num-gpus", "2", "SSL.SOLVER.IMS_PER_BATCH", "5"], "use a multiple of 2"),
        (["SSL.REGISTER", "('no_such_module:f',)"], "SSL.REGISTER no_such_module:f"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train_net, args, message):
    options = [a for a in args if a.startswith("--") or a in ("finetune", "2")]
    rest = [a for a in args if a not in options]
    process = train_net(*options, *TINY, "OUTPUT_DIR", "bad", *rest)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, process.stderr[-3000:]
    assert errors and message in errors[0]
    assert "Traceback" not in process.stderr
    assert not (train_net.folder / "bad/pretrain/model_final.pth").exists()


def test_a_part_that_is_not_registered(tiny_cfg):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    with pytest.raises(D2SSLError, match="BACKBONE.NAME foo: choose from .*build_resnet_fpn_back"):
        pipeline.set_up(tiny_cfg("MODEL.BACKBONE.NAME", "foo"))


def test_help_needs_no_torch():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPO / "tools/train_net.py"), "--help"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert process.returncode == 0 and "--eval-only" in process.stdout
    assert " torch" not in process.stderr


def test_register_adds_to_the_config(monkeypatch):
    import d2ssl.engine.launch

    spec = importlib.util.spec_from_file_location("train_net", REPO / "tools/train_net.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    seen = []
    monkeypatch.setattr(d2ssl.engine.launch, "launch", lambda *_, args, **__: seen.append(args[1]))
    demo = ["--config-file", str(CONFIGS / "demo.yaml")]
    script.run([*demo, "SSL.REGISTER", "('a:b',)", "--register", "c:d", "SEED", "3",
                "--register", "e:f"])  # fmt: skip
    script.run([*demo, "SEED", "4"])
    assert [cfg.SSL.REGISTER for cfg in seen] == [("a:b", "c:d", "e:f"), ()]
    assert [cfg.SEED for cfg in seen] == [3, 4] and all(cfg.is_frozen() for cfg in seen)


def test_a_new_pretraining_is_not_answered_with_an_old_detector(tiny_cfg, tmp_path):
    """Run A is whole; run B stops after pretraining and is resumed: B must fine-tune anew."""
    import torch

    from d2ssl import pipeline

    final = tmp_path / "out/finetune/model_final.pth"
    pipeline.run(tiny_cfg())
    first = torch.load(final, weights_only=True)["model"]
    b = tiny_cfg("SEED", "5")
    pipeline.run(b, stage="pretrain")
    pipeline.run(b, resume=True)
    second = torch.load(final, weights_only=True)["model"]
    name = "proposal_generator.rpn_head.conv.weight"
    assert not torch.equal(first[name], second[name])
    assert json.loads((tmp_path / "out/finetune/results.json").read_text())["seed"] == 5
    lines = (tmp_path / "out/finetune/metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == sorted(set(iterations))  # of one run


@pytest.mark.parametrize(
    "stage, of",
    [
        ("pretrain", "pretrain/model_pretrained.pth"),
        ("pretrain", "finetune/model_result.pth"),
        ("finetune", "finetune/model_result.pth"),
        ("all", "pretrain/model_pretrained.pth"),
        ("all", "finetune/model_result.pth"),
    ],
)
def test_no_run_removes_the_weights_it_is_to_start_from(tiny_cfg, tmp_path, stage, of):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    left = [tmp_path / "out" / name for name in ("pretrain/model_pretrained.pth",
            "finetune/model_result.pth", "finetune/metrics.json")]  # fmt: skip
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    cfg = tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "out" / of), "SSL.ENABLED", stage != "finetune")
    with pytest.raises(D2SSLError, match="an earlier run's, which would be removed; name another"):
        pipeline.run(cfg, stage=stage)
    assert all(path.exists() for path in left)


def test_what_is_refused_costs_nothing_of_an_earlier_run(tiny_cfg, tmp_path):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    def left():
        files = (path for path in (tmp_path / "out").rglob("*.*") if path.is_file())
        said = ("log.txt", "events.out")  # a resumed run may say that it tried
        return {p: p.read_bytes() for p in files if not p.name.startswith(said)}

    pipeline.run(tiny_cfg())
    before = left()
    assert {"model_pretrained.pth", "model_result.pth"} <= {path.name for path in before}
    fine, missing = ["SSL.ENABLED", "False"], ["MODEL.WEIGHTS", str(tmp_path / "no.pth")]
    for opts, resume in (
        (missing, False),
        ([*fine, *missing], False),
        ([*fine, "SEED", "5"], True),
        ([*fine, "DATASETS.TRAIN", "('balloon_demo_train@6',)"], True),
    ):
        with pytest.raises(D2SSLError):
            pipeline.run(tiny_cfg(*opts), resume=resume)
        assert left() == before, opts


@pytest.mark.parametrize(
    "opts, said",
    [
        (["SEED", "5"], "SEED 0"),
        (
            ["DATASETS.TRAIN", "('balloon_demo_train@6',)"],
            "DATASETS.TRAIN .*balloon_demo_train@4.*",
        ),
    ],
)
def test_fine_tuning_is_not_resumed_as_anothers(tiny_cfg, opts, said):
    """Its AP would be reported as that of other labels, or of another seed."""
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    cfg = tiny_cfg("SSL.ENABLED", "False", "DATASETS.TEST", "()")
    pipeline.run(cfg)
    pipeline.run(cfg, resume=True)
    with pytest.raises(D2SSLError, match=f"finetune holds a run of another config .{said}.; give"):
        pipeline.run(tiny_cfg("SSL.ENABLED", "False", "DATASETS.TEST", "()", *opts), resume=True)


def test_fine_tuning_starts_from_the_hand_off_that_the_config_says(tiny_cfg):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    pipeline.run(tiny_cfg(), stage="pretrain")
    for opts, said in (
        (["SSL.METHOD", "SimSiam"], "SSL.METHOD SoCo"),
        (["SSL.DATASETS", "('balloon_demo_train@6',)"], "SSL.DATASETS .*balloon_demo_unlabeled"),
        (["SSL.SOLVER.MAX_ITER", "6"], "SSL.SOLVER.MAX_ITER 4"),
    ):
        with pytest.raises(D2SSLError, match=f"pretrained.pth was pretrained with {said}"):
            pipeline.run(tiny_cfg(*opts), stage="finetune")
    pipeline.run(tiny_cfg("SEED", "5", "DATASETS.TEST", "()"), stage="finetune")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty: name a set with labels, or give"),
        (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH 0 cannot be shared"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "RetinaNet: pretraining is for GeneralizedRCNN"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "PanopticFPN: pretraining is for"),
        (
            ["SSL.FINETUNE.DEV_DATASET", "balloon_demo_train@2"],
            r"has 2 photo\(s\) of balloon_demo_t",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_not_pretrained(tiny_cfg, tmp_path, opts, message):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    with pytest.raises(D2SSLError, match=message):
        pipeline.run(tiny_cfg(*opts))
    assert not (tmp_path / "out/pretrain").exists()


def test_an_evaluation_on_nothing_says_so(tiny_cfg):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    with pytest.raises(D2SSLError, match="--eval-only needs DATASETS.TEST"):
        pipeline.evaluate_only(tiny_cfg("MODEL.WEIGHTS", "a.pth", "DATASETS.TEST", "()"))


def test_a_run_resumed_at_its_end_hands_off_its_own_weights(tiny_cfg, tmp_path, monkeypatch):
    """Run A is whole; run B is stopped after a checkpoint, and resumed to end there."""
    import torch

    from d2ssl import pipeline
    from d2ssl.engine.pretraining import PretrainTrainer
    from d2ssl.errors import D2SSLError

    def stop(trainer):
        if trainer.iter == 3:
            raise KeyboardInterrupt
        run_step(trainer)

    run_step, folder = PretrainTrainer.run_step, tmp_path / "out/pretrain"
    pipeline.pretrain(tiny_cfg())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PretrainTrainer, "run_step", stop)
        pipeline.pretrain(tiny_cfg("SEED", "5"))
    assert (folder / "model_final.pth").is_file()  # the older run's, which a refusal must not cost
    with pytest.raises(D2SSLError, match="holds 2 iterations, and MAX_ITER is 1: give as many"):
        pipeline.pretrain(tiny_cfg("SEED", "5", "SSL.SOLVER.MAX_ITER", "1"), resume=True)
    pipeline.pretrain(tiny_cfg("SEED", "5", "SSL.SOLVER.MAX_ITER", "2"), resume=True)
    b, handed = (
        torch.load(folder / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("0000001", "pretrained")
    )
    name = "backbone.bottom_up.stem.conv1.weight"
    assert torch.equal(handed[name], b[f"trunk.{name}"])

    weights = str(folder / "model_pretrained.pth")
    with pytest.raises(D2SSLError, match="would be removed; name another OUTPUT_DIR"):
        pipeline.pretrain(tiny_cfg("MODEL.WEIGHTS", weights))
    assert os.path.exists(weights)


def test_resume_goes_on_to_a_later_end(tiny_cfg, tmp_path):
    import torch

    from d2ssl import pipeline

    pipeline.run(tiny_cfg(), stage="pretrain")
    pipeline.run(tiny_cfg("SSL.SOLVER.MAX_ITER", "6"), stage="pretrain", resume=True)
    path = tmp_path / "out/pretrain"
    assert torch.load(path / "model_final.pth", weights_only=True)["iteration"] == 5
    assert torch.load(path / "model_pretrained.pth", weights_only=True)["d2ssl"]["iterations"] == 6


def test_resume_under_another_config_is_refused(tiny_cfg, tmp_path):
    """By the hand-off, and by the checkpoint where there is none yet."""
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    pipeline.run(tiny_cfg(), stage="pretrain")
    colour, width = ["INPUT.FORMAT", "RGB"], ["MODEL.FPN.OUT_CHANNELS", "64"]
    photos, was = ["SSL.DATASETS", "('balloon_demo_train@6',)"], ".*balloon_demo_unlabeled.*"
    for opts, said in (
        (["SEED", "5"], "SEED 0"),
        (["SSL.METHOD", "SimSiam"], "SSL.METHOD SoCo"),
        (photos, f"SSL.DATASETS {was}"),
        (colour, "INPUT.FORMAT BGR"),
    ):
        with pytest.raises(D2SSLError, match=f"pretrain holds a run of another config .{said}.; "):
            pipeline.run(tiny_cfg(*opts), stage="pretrain", resume=True)
    os.remove(tmp_path / "out/pretrain/model_pretrained.pth")
    for opts, said in (
        (colour, " .INPUT.FORMAT BGR."),
        (photos, f" .SSL.DATASETS {was}."),
        (width, ""),
    ):
        other = tiny_cfg(*opts, "SSL.SOLVER.MAX_ITER", "6")
        with pytest.raises(D2SSLError, match=f"holds a run of another config{said}; give the same"):
            pipeline.run(other, stage="pretrain", resume=True)


def test_a_checkpoint_that_is_damaged_says_so(tiny_cfg, tmp_path):
    from d2ssl import pipeline
    from d2ssl.errors import D2SSLError

    pipeline.run(tiny_cfg(), stage="pretrain")
    path = tmp_path / "out/pretrain/model_final.pth"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(D2SSLError, match="zip archive"):
        pipeline.run(tiny_cfg("SSL.SOLVER.MAX_ITER", "6"), stage="pretrain", resume=True)


def test_pretraining_is_gone_before_the_hand_off(tiny_cfg, monkeypatch):
    """With its model, optimizer and workers."""
    from d2ssl import pipeline
    from d2ssl.engine.pretraining import PretrainTrainer
    from d2ssl.modeling.pretext_model import PretextModel

    left = []

    def hand_off(cfg):
        kinds = PretextModel, PretrainTrainer
        left.extend(o for o in gc.get_objects() if type(o) in kinds)

    monkeypatch.setattr(pipeline, "hand_off", hand_off)
    pipeline.pretrain(tiny_cfg())
    assert not left


def test_augmented_evaluation(tiny_cfg, tmp_path, monkeypatch):
    """One copy of a photo, as it is: what the detector finds without it, in bf16 as well."""
    from d2ssl import pipeline
    from d2ssl.engine.finetuning import FinetuneTrainer

    opts = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.MAX_SIZE", "128"]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]  # it has hardly learnt
    once = [*opts, "TEST.AUG.FLIP", "False", "SSL.ENABLED", "False", "SOLVER.AMP.ENABLED", "True"]
    trained = pipeline.run(tiny_cfg(*once))
    folder = tmp_path / "out/finetune"
    assert results(folder).keys() == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    usual, augmented = (
        json.loads((folder / name / "coco_instances_results.json").read_text())
        for name in ("inference", "inference_TTA")
    )
    assert len(usual) > 20
    assert [found["score"] for found in augmented] == [found["score"] for found in usual]
    for ours, theirs in zip(augmented, usual):
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
    assert "Masks, augmented (TTA)" in (tmp_path / "out/report.html").read_text()
    weights = ["MODEL.WEIGHTS", str(folder / "model_result.pth")]
    ap = trained["bbox_TTA"]["AP"]
    assert ap > 0
    weights += ["TEST.EXPECTED_RESULTS", f'[["bbox_TTA", "AP", {ap}, 1e-9]]']
    again = tiny_cfg(*once, *weights, output_dir=tmp_path / "again")
    assert str(pipeline.evaluate_only(again)) == str(trained)
    with pytest.raises(SystemExit, match="1"):
        pipeline.evaluate_only(tiny_cfg(*once, *weights, "TEST.AUG.FLIP", "True"))

    os.remove(folder / "results.json")  # what comes before it is kept, whatever becomes of it
    monkeypatch.setattr(FinetuneTrainer, "test_with_tta", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.finetune(tiny_cfg(*once), resume=True)
    assert results(folder).keys() == {"bbox", "segm"}


def test_evaluation_needs_no_unlabelled_photos(tiny_cfg, tmp_path):
    from d2ssl import pipeline

    pipeline.run(tiny_cfg("SSL.ENABLED", "False"), stage="finetune")
    (events,) = (tmp_path / "out/finetune").glob("events.out.tfevents.*")
    weights = str(tmp_path / "out/finetune/model_result.pth")
    cfg = tiny_cfg("MODEL.WEIGHTS", weights).clone()
    cfg.defrost()
    cfg.SSL.DATASETS = ("nowhere",)
    assert "bbox" in pipeline.evaluate_only(cfg)
    pipeline.run(tiny_cfg("SSL.ENABLED", "False"), stage="finetune")
    assert not events.exists()  # curves start over, too


def test_two_test_sets(tiny_cfg, tmp_path):
    from d2ssl import pipeline

    pipeline.run(
        tiny_cfg(
            "SSL.ENABLED", "False", "DATASETS.TEST", "('balloon_demo_val', 'balloon_demo_train@4')"
        )
    )
    found = results(tmp_path / "out/finetune")
    assert set(found) == {"balloon_demo_val", "balloon_demo_train@4"}
