"""tools/doctor.py and d2ssl.doctor, on a hand-off made at small size."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from d2ssl.config import load_cfg, stock_cfg
from d2ssl.doctor import FAIL, NOTE, OK, WARN, Finding, installation, table, weights
from d2ssl.doctor.formats import describe_format
from d2ssl.engine import handoff
from d2ssl.engine.checkpoint import conventions_of
from d2ssl.errors import D2SSLError
from d2ssl.modeling.fingerprint import fingerprint, probe_image
from d2ssl.modeling.norm import refuse_uncalibrated
from tests.conftest import REPO

SCRIPT = REPO / "tools" / "doctor.py"
# ResNet-18, and narrow wherever a key can say so: a detector is built in a blink.
SMALL = [
    "SSL.ENABLED", "False", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
]  # fmt: skip
FPN_AND_BODY = ("backbone.",)
ALL_PARTS = ("backbone.", "roi_heads.box_head.")


def config(*opts):
    return load_cfg(str(REPO / "configs" / "Base-MaskRCNN-FPN.yaml"), [*SMALL, *opts])


def randomise_norms(model):
    """Statistics and affine parts that differ from one another, like measured ones."""
    for name, buffer in model.state_dict().items():
        if name.endswith("running_var") or name.endswith("norm.weight"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean") or name.endswith("norm.bias"):
            buffer.uniform_(-0.3, 0.3)


def write_handoff(folder: Path, cfg, prefixes=ALL_PARTS, change=lambda state: None) -> str:
    """A file as ``engine/handoff.py`` writes it, from random weights; ``change`` comes after."""
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    with torch.no_grad():
        randomise_norms(model)
    probe = probe_image()
    values = fingerprint(model.backbone, model.roi_heads, cfg, probe)
    state = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(prefixes)}
    change(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handoff, "count_photos", lambda names: 13)
        record = handoff.provenance(cfg)
    trained = ["bottom_up", "fpn", "box_head"][: 1 + len(prefixes)]
    record.update(trained=trained, probe=probe, fingerprint=values)
    path = folder / "model_pretrained.pth"
    torch.save({"model": state, "d2ssl": record}, path)
    (folder / "stock.yaml").write_text(stock_cfg(cfg).dump())
    return str(path)


@pytest.fixture(scope="module")
def handed(tmp_path_factory) -> str:
    return write_handoff(tmp_path_factory.mktemp("handoff"), config())


def function(path, *opts, config_file=""):
    """The findings of the last section."""
    return weights.check_weights(path, config_file, opts)[-1][1]


def failed(findings):
    return [f.name for f in findings if f.status == FAIL]


def text(findings):
    return " | ".join(f"{f.name} {f.detail} {f.fix}" for f in findings)


# ---- the hand-off under a config


def test_a_hand_off_agrees_under_its_own_stock_yaml(handed):
    sections = weights.check_weights(handed)
    everything = [f for _, findings in sections for f in findings]
    assert not [f for f in everything if f.status in (WARN, FAIL)], text(everything)
    (agrees,) = sections[-1][1]
    assert agrees.detail == "res2 res3 res4 res5 p2 p3 p4 p5 box_head"
    assert "13 of" in text(sections[0][1]) and "SoCo" in text(sections[0][1])
    assert "rpn not in the file" in text(sections[1][1])


MEAN, STD = "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"


@pytest.mark.parametrize(
    "key, value, level, was",
    [
        ("INPUT.FORMAT", "RGB", "res2", "BGR"),
        (MEAN, "[123.675, 116.28, 103.53]", "res2", "[103.53, 116.28, 123.675]"),
        (STD, "[57.375, 57.12, 58.395]", "res2", "[1.0, 1.0, 1.0]"),
        ("MODEL.RESNETS.NORM", "GN", "res2", "FrozenBN"),
        ("MODEL.RESNETS.NORM", "", "res2", "FrozenBN"),
        ("MODEL.FPN.NORM", "GN", "p2", '""'),
        ("MODEL.FPN.FUSE_TYPE", "avg", "p2", "sum"),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", "1", "box_head", "2"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "box_head", "ROIAlignV2"),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2", "box_head", "0"),
    ],
)
def test_a_single_broken_convention_is_named_and_only_it(handed, key, value, level, was):
    findings = function(handed, key, value)
    assert failed(findings) == [key], text(findings)
    finding = next(f for f in findings if f.status == FAIL)
    shown = value or '""'
    assert finding.detail.startswith(f"is {shown}, the weights want {was}: {level} differs by ")
    assert finding.detail.endswith(f"with {was} all values agree")
    assert f"set {key}" in finding.fix


def test_the_stride_is_named(tmp_path):
    """Only a bottleneck, as in ResNet-50, has a 1x1 convolution to stride in."""
    wide = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32",
            "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
            "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"]  # fmt: skip
    path = write_handoff(tmp_path, config(*wide), FPN_AND_BODY)
    findings = function(path, "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    assert failed(findings) == ["MODEL.RESNETS.STRIDE_IN_1X1"]
    assert "res3 differs by" in text(findings)  # res2 has no stride
    assert "box_head: the file does not hold" in text(findings)
    # A width that no convention records is read off the shapes:
    findings = function(path, "MODEL.RESNETS.WIDTH_PER_GROUP", "64")
    assert failed(findings) == ["MODEL.RESNETS.WIDTH_PER_GROUP"]


def test_two_broken_conventions_are_both_named(handed):
    findings = function(
        handed, "INPUT.FORMAT", "RGB", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool",
        "MODEL.RESNETS.NORM", "BN",
    )  # fmt: skip
    assert failed(findings) == ["INPUT.FORMAT", "MODEL.ROI_BOX_HEAD.POOLER_TYPE"]
    # A norm that is the same in eval mode is no culprit, but it is mentioned.
    notes = [f for f in findings if f.status == NOTE]
    assert "with all of these set, all values agree" in text(notes)
    assert "MODEL.RESNETS.NORM is BN, was FrozenBN" in text(notes)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_a_batch_norm_computes_the_same_in_eval_mode(handed, norm):
    findings = function(handed, "MODEL.RESNETS.NORM", norm)
    assert [f.status for f in findings] == [OK, NOTE], text(findings)
    assert f"MODEL.RESNETS.NORM is {norm}" in text(findings)


@pytest.mark.parametrize(
    "opts, culprits",
    [
        (["MODEL.FPN.OUT_CHANNELS", "64"], ["MODEL.FPN.OUT_CHANNELS"]),
        (["MODEL.RESNETS.DEPTH", "34"], ["MODEL.RESNETS.DEPTH"]),
        (
            ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"],
            ["MODEL.RESNETS.DEPTH", "MODEL.RESNETS.RES2_OUT_CHANNELS"],
        ),
        (["MODEL.ROI_BOX_HEAD.FC_DIM", "64"], ["MODEL.ROI_BOX_HEAD.FC_DIM"]),
        (["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "5"], ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"]),
        # cannot be built: an FPN wants levels that halve
        (["MODEL.RESNETS.RES5_DILATION", "2"], ["MODEL.RESNETS.RES5_DILATION"]),
    ],
)
def test_a_network_of_another_shape_is_named(handed, opts, culprits):
    assert sorted(failed(function(handed, *opts))) == sorted(culprits)


def test_a_four_conv_head_that_loads_into_two_fc_by_name_is_named(tmp_path):
    """SoCo's head: its fc1 fits the stock head's fc1, and computes something else there."""
    soco = ["MODEL.ROI_BOX_HEAD.NUM_CONV", "4", "MODEL.ROI_BOX_HEAD.NUM_FC", "1",
            "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.NORM", "BN"]  # fmt: skip
    path = write_handoff(tmp_path, config(*soco))
    assert not failed(function(path))
    stock = ["MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NUM_FC", "2",
             "MODEL.ROI_BOX_HEAD.NORM", ""]  # fmt: skip
    sections = weights.check_weights(path, "", stock)
    assert sorted(failed(sections[-1][1])) == [
        "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC",
    ]  # fmt: skip
    warned = text(f for f in sections[1][1] if f.status == WARN)
    assert "box head" in warned and "roi_heads.box_head.fc2" in warned
    assert "box_head.conv1" in warned  # in the file and not used


def test_only_what_the_file_hands_on_is_compared(tmp_path):
    path = write_handoff(tmp_path, config(), FPN_AND_BODY)
    findings = function(path, "MODEL.ROI_BOX_HEAD.NUM_FC", "1")
    assert not failed(findings) and findings[0].detail.endswith("p5")


def test_a_detector_without_that_box_head_is_compared_as_far_as_it_goes(tmp_path):
    path = write_handoff(tmp_path, config(), FPN_AND_BODY)
    cascade = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
               "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]  # fmt: skip
    findings = function(path, *cascade)
    assert findings[0].status == OK and findings[0].detail.endswith("p5")
    assert failed(function(path, *cascade, "INPUT.FORMAT", "RGB")) == ["INPUT.FORMAT"]


def test_a_detector_without_a_pyramid_is_no_crash(handed):
    findings = function(
        handed, "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES",
        "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 64]]",
    )  # fmt: skip
    assert failed(findings) == ["the network"] and "no feature pyramid" in text(findings)


def test_altered_tensors_are_told_from_a_convention(tmp_path):
    def change(state):
        state["backbone.bottom_up.res4.0.conv1.weight"] *= 1.2

    path = write_handoff(tmp_path, config(), change=change)
    findings = function(path)
    assert failed(findings) == ["tensors"]
    assert "the tensors themselves differ from those that were fingerprinted" in text(findings)
    assert "res2 res3 still agree; so look from res4 on" in text(findings)
    findings = function(path, "INPUT.FORMAT", "RGB")
    assert failed(findings) == ["tensors"]
    assert "INPUT.FORMAT is RGB, was BGR" in text(f for f in findings if f.status == WARN)


def test_tensors_that_were_removed_are_listed(tmp_path):
    path = write_handoff(
        tmp_path, config(), change=lambda state: state.pop("roi_heads.box_head.fc2.weight")
    )
    findings = function(path)
    assert failed(findings) == ["box_head"]
    assert "roi_heads.box_head.fc2.weight" in text(findings)


# ---- files without a fingerprint


def save(path: Path, content) -> str:
    torch.save(content, path)
    return str(path)


def test_names_of_torchvision_and_moco_must_be_converted(tmp_path):
    base = str(REPO / "configs" / "Base-MaskRCNN-FPN.yaml")
    kernel = torch.ones(64, 64, 1, 1)
    for name, content in (
        ("resnet.pth", {"layer1.0.conv1.weight": kernel}),
        ("moco.pth.tar", {"state_dict": {"module.encoder_q.layer1.0.conv1.weight": kernel}}),
        ("vissl.torch", {"base_model": {"trunk": {"layer1.0.conv1.weight": kernel}}}),
    ):
        _, (_, loads), (_, known) = weights.check_weights(
            save(tmp_path / name, content), base, SMALL
        )
        assert failed(loads) == ["nothing"]
        assert failed(known) == ["names"] and "tools/convert_weights.py" in text(known)
        warned = [f.name for f in known if f.status == WARN]
        assert warned[0] == "INPUT.FORMAT" and "MODEL.RESNETS.STRIDE_IN_1X1" in warned
        assert "usually" in text(known)  # a hint, not a fact


def test_what_a_trained_detector_says_it_was_made_with(tmp_path):
    content = {"model": {"res2.0.conv1.weight": torch.rand(64)}}
    content["conventions"] = conventions_of(config())
    known = describe_format(content, config())
    assert [(f.status, f.name) for f in known] == [(NOTE, "made with"), (OK, "config")]
    assert "INPUT.FORMAT BGR" in text(known)
    # A ResNet-18 has no 1x1 convolution with a stride.
    other = config("INPUT.FORMAT", "RGB", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    known = describe_format(content, other)
    assert failed(known) == ["INPUT.FORMAT"] and "set INPUT.FORMAT BGR" in text(known)


def test_norms_that_were_folded_or_never_measured_are_told(tmp_path):
    names = [f"res2.0.conv1.norm.{name}" for name in ("weight", "bias")]
    folded = {name: torch.rand(64) for name in names}
    found = describe_format({"model": folded}, config())
    assert "folded" in text(found) and "wrong for training BN" in text(found)
    found = describe_format({"model": folded}, config("MODEL.RESNETS.NORM", "BN"))
    assert [f.status for f in found if f.name == "norms"] == [WARN]

    statistics = {"running_mean": torch.zeros(64), "running_var": torch.ones(64) - 1e-5}
    random = {**folded, **{f"res2.0.conv1.norm.{k}": v for k, v in statistics.items()}}
    assert "never measured" in text(describe_format({"model": random}, config()))
    random["res2.0.conv1.norm.running_mean"] = torch.rand(64)
    assert "never measured" not in text(describe_format({"model": random}, config()))


def test_random_weights_under_frozen_norms_are_noticed(tmp_path):
    cfg = config()
    model = build_model(cfg)
    with pytest.raises(D2SSLError):
        refuse_uncalibrated(model)
    path = save(tmp_path / "random.pth", {"model": model.state_dict()})
    (tmp_path / "stock.yaml").write_text(stock_cfg(cfg).dump())
    _, (_, loads), (_, known) = weights.check_weights(path)
    assert "normalises nothing" in text(loads) and "never measured" in text(known)


def test_imagenet_weights_of_detectron2(shared):
    path = str(shared / "weights" / "R-50-MSRA-fp16.pkl")
    if not os.path.isfile(path):
        pytest.skip(f"no {path}")
    base = str(REPO / "configs" / "Base-MaskRCNN-FPN.yaml")
    _, (_, loads), (_, known) = weights.check_weights(path, base)
    assert [f.name for f in loads if f.status == OK] == ["stem", "res2", "res3", "res4", "res5"]
    assert not [f for f in loads + known if f.status in (WARN, FAIL)]
    rgb = ["INPUT.FORMAT", "RGB", "MODEL.RESNETS.NORM", ""]
    _, (_, loads), (_, known) = weights.check_weights(path, base, rgb)
    assert [f.name for f in known if f.status == WARN] == ["INPUT.FORMAT"]
    assert [f.name for f in loads if f.status == WARN] == ["not used"]  # the norms


# ---- the installation


def test_this_installation_is_fine():
    findings = installation.check_installation()
    assert not failed(findings), text(findings)
    assert {"torch", "torchvision", "cv2", "detectron2", "Mask R-CNN"} <= {f.name for f in findings}


def test_every_package_that_is_needed_is_looked_at():
    text = (REPO / "setup.py").read_text()
    needed = re.findall(r'^        "([\w-]+)>=', text, re.M)
    assert "scipy" in needed and len(needed) > 15
    known = {name for _, name in installation.PACKAGES}
    known |= {"torch", "torchvision", "opencv-python-headless"}
    assert set(needed) == known


def test_torchvision_that_does_not_fit_names_the_one_that_does(monkeypatch):
    import torchvision

    def missing(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    (finding,) = installation.check_torchvision()
    assert finding.status == FAIL and "nms does not exist" in finding.detail
    assert "torchvision==0.21.*" in finding.fix  # the pair of 2.6 in PyTorch's release table


def test_pairs_of_torch_and_torchvision():
    table_of_releases = {"2.0.1": "0.15", "2.3.0": "0.18", "2.5.1+cu124": "0.20", "2.12.1": "0.27"}
    for version, series in table_of_releases.items():
        assert installation.torchvision_for(version) == series


def test_opencv_installed_twice_is_a_warning(monkeypatch):
    monkeypatch.setattr(installation, "_version", lambda name: "4.9")
    (finding,) = installation.check_opencv()
    assert finding.status == WARN and "opencv-contrib-python" in finding.fix


def test_a_check_that_raises_is_a_finding():
    def broken():
        raise RuntimeError("first line\nsecond line")

    (finding,) = installation._guarded("thing", broken)
    assert finding == Finding(FAIL, "thing", "RuntimeError: first line", finding.fix)


def test_tested_range_reads_the_metadata(monkeypatch):
    requires = ["torch<2.13,>=2.3", "opencv-python-headless<6,>=4.6", 'pytest<9; extra == "test"']
    monkeypatch.setattr(installation.importlib.metadata, "requires", lambda name: requires)
    assert installation.tested_range("torch") == "<2.13,>=2.3"
    assert installation.tested_range("torchvision") == ""
    assert installation._package("torch", "2.4.1+cpu").status == OK
    finding = installation._package("torch", "2.13.0+cpu")
    assert finding.status == WARN and 'pip install "torch<2.13,>=2.3"' in finding.fix


# ---- the command


def run(*args, code="", cwd=None):
    command = [sys.executable, "-c", code] if code else [sys.executable, str(SCRIPT), *args]
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, PYTHONPATH=path)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_command_on_a_broken_config(handed):
    done = run(handed, "INPUT.FORMAT", "RGB")
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout and "-> set INPUT.FORMAT BGR" in done.stdout
    assert done.stdout.endswith("1 problem.\n") and "Traceback" not in done.stderr
    assert "\033" not in done.stdout and max(map(len, done.stdout.splitlines())) < 200


@pytest.fixture
def command(capsys):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("doctor_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*args):
        try:
            code = module.main([str(a) for a in args])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def test_exit_code_0_where_all_agrees(command, handed):
    code, out, err = command(handed)
    assert code == 0 and out.endswith("No problem found.\n") and err == ""


def test_wrong_usage_is_one_line_and_exit_code_2(command, handed, tmp_path):
    text_file = tmp_path / "text.pth"
    text_file.write_text("no checkpoint")
    empty = save(tmp_path / "empty.pth", {"model": {}})
    foreign = save(tmp_path / "foreign.pth", {"model": {"a": torch.ones(1)}, "opt": Path("x")})
    alone = save(tmp_path / "alone.pth", {"model": {"a": torch.ones(1)}})
    for args, message in (
        ([tmp_path / "none.pth"], "none.pth: no such file"),
        ([text_file], "not a checkpoint"),
        ([empty], "no tensors"),
        ([foreign], "PosixPath"),
        ([alone], "--config-file"),
        ([handed, "INPUT.FORMATT", "RGB"], "INPUT.FORMAT"),
        ([handed, "INPUT.FORMAT"], "config"),
        ([handed, "--config-file", tmp_path / "none.yaml"], "no such file"),
    ):
        code, out, err = command(*args)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err


def test_help_answers_without_torch():
    code = f"""
import runpy, sys
sys.argv = ["doctor.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    assert not {{"torch", "detectron2", "numpy"}} & set(sys.modules)
"""
    done = run(code=code)
    assert done.returncode == 0 and "exit code" in done.stdout, done.stderr


def test_a_missing_detectron2_is_one_line_among_the_others():
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find_spec(name, *a)
sys.argv = ["doctor.py"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = run(code=code)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("  FAIL")]
    assert len(lines) == 1 and "not installed" in lines[0], done.stdout
    assert "tools/install_detectron2.py" in done.stdout and "1 problem." in done.stdout


def test_table_keeps_a_column_and_wraps():
    findings = [
        Finding(OK, "short", "fine"),
        Finding(FAIL, "A.VERY.LONG.KEY.OF.A.CONFIG", "word " * 40, "set it"),
    ]
    lines = table(findings).splitlines()
    assert lines[0] == "  OK    short  fine"
    assert lines[1] == "  FAIL  A.VERY.LONG.KEY.OF.A.CONFIG"
    assert lines[2].startswith("               word word") and lines[-1].endswith("-> set it")
    assert all(len(line) <= 100 for line in lines)
