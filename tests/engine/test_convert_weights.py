"""tools/convert_weights.py: the network under the detector computes what the donor does."""

import argparse
import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional

from d2ssl.config import load_cfg
from d2ssl.doctor import FAIL, OK, weights
from d2ssl.engine import convert_weights
from d2ssl.engine.weights_file import TORCHVISION
from d2ssl.errors import D2SSLError
from d2ssl.modeling.donors import find_donor, fold
from tests.conftest import REPO

SCRIPT = REPO / "tools" / "convert_weights.py"
BASE = str(REPO / "configs" / "Base-MaskRCNN-FPN.yaml")
SMALL = [
    "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
]  # fmt: skip
DEPTH = {
    18: ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    50: ["MODEL.RESNETS.STRIDE_IN_1X1", "False"],
}
# Detectron2's usual colours, and torchvision's.
COLOURS = {
    "BGR": [],
    "RGB": ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]",
            "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def nets():
    """depth -> torchvision's ResNet with random weights and statistics."""
    torch.manual_seed(0)
    made = {18: torchvision.models.resnet18(), 50: torchvision.models.resnet50()}
    for net in made.values():
        for name, value in net.eval().state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                value.uniform_(-0.3, 0.3)
    return made


@pytest.fixture(scope="module")
def photo(demo_root):
    """3 x 96 x 128 uint8 RGB; its sides are multiples of 32, so that nothing is padded."""
    picture = Image.open(sorted((demo_root / "balloon_demo" / "train").glob("*.jpg"))[0])
    return functional.pil_to_tensor(picture.convert("RGB"))


def donor_values(net, photo, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """res2..res5 of torchvision's network on torchvision's terms: pixels in 0..1."""
    levels = {f"layer{i}": f"res{i + 1}" for i in range(1, 5)}
    with torch.no_grad():
        images = functional.normalize(photo / 255, mean, std)[None]
        return create_feature_extractor(net, levels)(images)


def detector_values(path, photo, *opts):
    """res2..res5 of a stock detector that loaded a file as stock Detectron2 does."""
    cfg = load_cfg(BASE, ["SSL.ENABLED", "False", "MODEL.DEVICE", "cpu", *SMALL, *opts])
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(path))
    image = photo.flip(0) if cfg.INPUT.FORMAT == "BGR" else photo
    with torch.no_grad():
        images = model.preprocess_image([{"image": image.float()}])
        assert images.tensor.shape[2:] == photo.shape[1:]
        return model.backbone.bottom_up(images.tensor)


def assert_same(got, expected):
    assert list(got) == ["res2", "res3", "res4", "res5"]
    for name in got:
        difference = (got[name] - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, f"{name} {difference}"


def save(path, content) -> str:
    torch.save(content, path)
    return str(path)


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def like_moco(state):
    twin = {name: value + 1 for name, value in state.items()}
    heads = {"module.encoder_q.fc.0.weight": torch.rand(8, 8), "module.queue": torch.rand(2, 2)}
    tensors = {**under("module.encoder_k.", twin), **under("module.encoder_q.", state), **heads}
    return {"epoch": 800, "arch": "resnet", "state_dict": tensors}


def like_soco(state):
    model = {**under("module.encoder.", state), "module.neck.conv.weight": torch.rand(2)}
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.1}]}
    options = argparse.Namespace(arch="resnet", output_dir="out")  # as its script saves them
    return {"opt": options, "model": model, "optimizer": optimizer}


def like_lightly(state):
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = [(name.partition("."), value) for name, value in state.items() if "fc" not in name]
    tensors = {f"backbone.{numbers[first]}.{rest}": v for (first, _, rest), v in split}
    return {"state_dict": {**tensors, **under("backbone_momentum.", like_moco(state))}}


FILES = {
    "torchvision": lambda state: state,
    "MoCo": like_moco,
    "DenseCL": lambda state: {"state_dict": under("encoder_q.0.", state)},
    "SoCo": like_soco,
    "lightly": like_lightly,
    "fp16": lambda state: {n: v.half() if v.is_floating_point() else v for n, v in state.items()},
}


@pytest.fixture
def command(capsys):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("convert_weights_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(donor, output, *args):
        args = [donor, "--config-file", BASE, "--output", output, *SMALL, *args]
        try:
            code = module.run([str(a) for a in args])
        except SystemExit as error:
            code = error.code
        return (code or 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    "depth, file, colours",
    [
        *((18, file, "BGR") for file in FILES),
        (18, "torchvision", "RGB"),
        (50, "torchvision", "BGR"),
        (50, "SoCo", "RGB"),
    ],
)
def test_the_detector_computes_what_the_donor_does(
    command, nets, photo, tmp_path, depth, file, colours
):
    donor = save(tmp_path / "donor.pth.tar", FILES[file](nets[depth].state_dict()))
    output, opts = tmp_path / "new" / "out.pth", [*DEPTH[depth], *COLOURS[colours]]
    code, out, err = command(donor, output, *opts)
    assert (code, err) == (0, ""), err
    assert f"ResNet-{depth}" in out and "checked: res2..res5 equal to " in out
    assert ("INPUT.FORMAT RGB to BGR" in out) == (colours == "BGR")
    assert "optimizer" not in out  # its tensors are no network's
    expected = donor_values(nets[depth], photo)
    if file == "fp16":
        expected = donor_values(nets[depth].half().float(), photo)
    assert_same(detector_values(output, photo, *opts), expected)
    content = torch.load(output, weights_only=True)
    assert all(name.startswith("backbone.bottom_up.") for name in content["model"])
    assert os.listdir(output.parent) == ["out.pth"]


def test_what_the_donor_wants_can_be_given(command, nets, photo, tmp_path):
    """Caffe's way: BGR, mean alone; the config stays RGB with a std."""
    donor = save(tmp_path / "donor.pth", nets[18].state_dict())
    opts = [*DEPTH[18], *COLOURS["RGB"]]
    given = ["--format", "BGR", "--mean", "103.53", "116.28", "123.675", "--std", "1", "1", "1"]
    code, out, err = command(donor, tmp_path / "out.pth", *given, *opts)
    assert code == 0, err
    mean = [m / 255 for m in (103.53, 116.28, 123.675)]
    expected = donor_values(nets[18], photo.flip(0), mean, [1 / 255] * 3)
    assert_same(detector_values(tmp_path / "out.pth", photo, *opts), expected)
    # Colours alone: mean and std are torchvision's, in the order of BGR.
    code, out, err = command(donor, tmp_path / "out.pth", "--format", "BGR", *opts)
    assert code == 0, err
    expected = donor_values(nets[18], photo.flip(0), (0.406, 0.456, 0.485), (0.225, 0.224, 0.229))
    assert_same(detector_values(tmp_path / "out.pth", photo, *opts), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda weight, flip, std, new: fold(weight, False, std, new),
        lambda weight, flip, std, new: fold(weight, flip, std, std),
        lambda weight, flip, std, new: fold(weight, flip, std[::-1], new),
    ],
    ids=["no permutation", "no std", "std in the wrong order"],
)
def test_a_mistake_in_the_conversion_would_be_noticed(monkeypatch, command, nets, tmp_path, wrong):
    monkeypatch.setattr(convert_weights, "fold", wrong)
    donor = save(tmp_path / "donor.pth", nets[18].state_dict())
    code, _, err = command(donor, tmp_path / "out.pth", *DEPTH[18])
    assert code == 2 and "would compute something else under this config, res2 differs by" in err
    assert os.listdir(tmp_path) == ["donor.pth"]


def test_a_wrong_stride_would_be_noticed(monkeypatch, command, nets, tmp_path):
    monkeypatch.setattr(convert_weights, "_refuse_misfit", lambda *args: None)
    donor = save(tmp_path / "donor.pth", nets[50].state_dict())
    code, _, err = command(donor, tmp_path / "out.pth", "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    assert code == 2 and "would compute something else under this config, res3 differs by" in err


def test_heads_of_a_detector_are_kept(command, nets, photo, tmp_path):
    """With predictors for other classes and their names; its own ResNet is gone."""
    opts = [*SMALL, *DEPTH[18], "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    torch.manual_seed(1)
    cfg = load_cfg(BASE, ["SSL.ENABLED", "False", "MODEL.DEVICE", "cpu", *opts])
    state = build_model(cfg).state_dict()
    heads = {n: v for n, v in state.items() if not n.startswith("backbone.bottom_up.")}
    file = {
        **state,
        "backbone.bottom_up.stem.fc.weight": torch.rand(2),
        "pixel_mean": torch.rand(3),
    }
    onto = save(tmp_path / "detector.pth", {"model": file, "thing_classes": ["a", "b", "c"]})
    donor = save(tmp_path / "donor.pth", like_moco(nets[18].state_dict()))
    output = tmp_path / "out.pth"
    code, out, err = command(donor, output, "--onto", onto, *DEPTH[18])
    assert code == 0, err
    assert "FPN         16 loaded     0 missing" in out
    content = torch.load(output, weights_only=True)
    assert content["thing_classes"] == ["a", "b", "c"]
    kept = {n: v for n, v in content["model"].items() if not n.startswith("backbone.bottom_up.")}
    assert kept.keys() == heads.keys() and all(torch.equal(kept[n], heads[n]) for n in heads)
    assert_same(detector_values(output, photo, *DEPTH[18]), donor_values(nets[18], photo))

    before = output.read_bytes()
    save(tmp_path / "wide.pth", {"model": state})
    body = {n: v for n, v in state.items() if n.startswith("backbone.bottom_up.")}
    save(tmp_path / "body.pth", {"model": body})
    for name, change, message in (
        ("wide.pth", ["MODEL.FPN.OUT_CHANNELS", "32"], "lateral2.weight is 16x64x1x1, the config"),
        ("none.pth", [], "none.pth: no such file"),
        ("body.pth", [], "no FPN, RPN or head in it"),
    ):
        code, _, err = command(donor, output, "--onto", tmp_path / name, *DEPTH[18], *change)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert output.read_bytes() == before


def test_onto_a_detector_at_an_address(command, nets, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    cfg = load_cfg(BASE, ["SSL.ENABLED", "False", "MODEL.DEVICE", "cpu", *SMALL, *DEPTH[18]])
    state = build_model(cfg).state_dict()
    (tmp_path / "web").mkdir()
    save(tmp_path / "web" / "detector.pth", {"model": state})
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    donor, output = save(tmp_path / "donor.pth", nets[18].state_dict()), tmp_path / "out.pth"
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = command(donor, output, "--onto", f"{address}/detector.pth", *DEPTH[18])
        missing = command(donor, output, "--onto", f"{address}/none.pth", *DEPTH[18])
        server.shutdown()
    assert found[0] == 0, found
    name = "backbone.fpn_lateral2.weight"
    assert torch.equal(torch.load(output, weights_only=True)["model"][name], state[name])
    line = missing[2].splitlines()[-1]  # above it are a progress bar and the server's words
    assert missing[0] == 2 and line.startswith("error: http") and "none.pth: HTTP Error 404" in line


# ---- what is refused


def without(state, *endings):
    return {name: value for name, value in state.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "set MODEL.RESNETS.STRIDE_IN_1X1 False"),
        (
            ["MODEL.PIXEL_MEAN", "[102.98, 115.95, 122.77]"],
            'set MODEL.PIXEL_MEAN "[103.53, 116.28, 123.675]"',
        ),
        (["INPUT.FORMAT", "RGB"], 'set MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]"'),
        (["MODEL.RESNETS.DEPTH", "101"], "set MODEL.RESNETS.DEPTH 50"),
        (DEPTH[18], "set MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 256"),
        (
            ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"],
            "set MODEL.RESNETS.NUM_GROUPS 1 MODEL.RESNETS.WIDTH_PER_GROUP 64",
        ),
        (["MODEL.RESNETS.NORM", "GN"], "set MODEL.RESNETS.NORM FrozenBN"),
        (["MODEL.RESNETS.RES5_DILATION", "2"], "the config's detector cannot be built"),
        (["--prefix", "backbone."], '--prefix "backbone."; choose from ""'),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key_to_set(command, nets, tmp_path, opts, message):
    donor = save(tmp_path / "donor.pth", nets[50].state_dict())
    code, out, err = command(donor, tmp_path / "out.pth", *DEPTH[50], *opts)
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("error: ") and message in err
    assert os.listdir(tmp_path) == ["donor.pth"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, "running_mean", "running_var"), "no running statistics"),
        (lambda s: without(s, "layer3.1.bn2.running_var"), "lacks: res4.1.conv2.norm.running_var"),
        (lambda s: {**s, "layer1.0.se.fc.weight": s["fc.weight"]}, "res2.0.se.fc.weight"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"][..., 2:5, 2:5]}, "stem.conv1.weight"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"] * float("nan")}, "res2 differs by nan"),
        (lambda s: {"fc.weight": s["fc.weight"]}, "no ResNet in it"),
        (lambda s: {**under("a.", s), **under("b.", {n: v + 1 for n, v in s.items()})}, "several"),
        (lambda s: {"model": {}}, "no tensors"),
    ],
)
def test_a_donor_that_cannot_be_laid_under_is_one_line(command, nets, tmp_path, change, message):
    donor = save(tmp_path / "donor.pth", change(nets[18].state_dict()))
    code, out, err = command(donor, tmp_path / "out.pth", *DEPTH[18])
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == ["donor.pth"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--output", "out.pkl"], "name a .pth file"),
        (["--mean", "0.485", "0.456", "0.406"], "from 0 to 255"),
        (["--std", "0.229", "0.224", "0.225"], "from 0 to 255"),
        (["--std", "58", "57", "0"], "from 0 to 255"),
        (["--format", "GRAY"], "GRAY"),
        (["--output", "."], "name a .pth file"),
        (["MODEL.RESNETS.DEPHT", "18"], "MODEL.RESNETS.DEPTH"),
    ],
)
def test_wrong_usage(command, tmp_path, args, message):
    code, out, err = command(tmp_path / "donor.pth", tmp_path / "out.pth", *args)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_help_answers_without_torch():
    code = f"""
import runpy, sys
sys.argv = ["convert_weights.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    assert not {{"torch", "detectron2", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0 and "exit code" in done.stdout, done.stderr


# ---- files of Detectron2, and of d2ssl


def test_a_file_of_detectron2_is_taken_as_the_config_says(command, nets, photo, tmp_path):
    """With or without the detector's prefix; what the conventions are is not to be found out."""
    state = find_donor(nets[18].state_dict()).state
    expected = donor_values(nets[18], photo)
    opts = [*DEPTH[18], *COLOURS["RGB"]]
    for prefix in ("", "backbone.bottom_up."):
        content = {"model": {n: v.numpy() for n, v in under(prefix, state).items()}}
        content.update({"__author__": "somebody", "matching_heuristics": True})
        with open(tmp_path / "donor.pkl", "wb") as file:
            pickle.dump(content, file)
        code, out, err = command(tmp_path / "donor.pkl", tmp_path / "out.pth", *opts)
        assert code == 0 and "not checked: a Detectron2 file" in out, err
        assert "folded into the first convolution: nothing" in out
        assert_same(detector_values(tmp_path / "out.pth", photo, *opts), expected)
    # What is given is folded as for any other:
    given = ["--format", "RGB", "--std", "58.395", "57.12", "57.375"]
    # So is what d2ssl wrote into a trained detector's file.
    content = {"model": under(prefix, state), "conventions": TORCHVISION}
    trained = save(tmp_path / "model_result.pth", content)
    for donor, options in ((tmp_path / "donor.pkl", given), (trained, [])):
        code, out, err = command(donor, tmp_path / "out.pth", *options, *DEPTH[18])
        assert code == 0 and "INPUT.FORMAT RGB to BGR" in out, err
        assert_same(detector_values(tmp_path / "out.pth", photo, *DEPTH[18]), expected)


def test_caffe2s_names_are_those_that_detectron2_reads(nets):
    branch = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    kinds = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    state, blobs = find_donor(nets[50].state_dict()).state, {}
    for name, value in state.items():
        *place, kind = name.replace(".norm.", ".").split(".")
        norm = f"bn_{kinds[kind]}" if ".norm." in name else "w"
        blob = "_".join([*place[:2], branch[place[2]]]) if len(place) == 3 else "conv1"
        blob = "res_conv1" if blob == "conv1" and norm != "w" else blob
        blobs[f"{blob}_{norm}"] = value.numpy()
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w", "res5_2_branch2c_bn_riv"} <= set(
        blobs
    )
    found = convert_weights.read_tensors({"blobs": {**blobs, "conv1_w_momentum": blobs["conv1_w"]}})
    donor = find_donor(found)
    assert donor.layout == "Detectron2" and donor.state.keys() == state.keys()
    assert all(torch.equal(donor.state[name], state[name]) for name in state)


def test_imagenet_weights_of_detectron2(command, shared, photo, tmp_path):
    path = shared / "weights" / "R-50-MSRA-fp16.pkl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    code, out, err = command(path, tmp_path / "out.pth")
    assert code == 0 and "265 tensors taken" in out, err
    got = detector_values(tmp_path / "out.pth", photo)
    assert_same(got, detector_values(path, photo))  # as Detectron2's own loader reads it


def test_a_file_with_a_fingerprint_is_compared_with_it(command, nets, photo, tmp_path):
    """Convert for one config, and what came out for another."""
    donor = save(tmp_path / "donor.pth", nets[18].state_dict())
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    assert command(donor, first, *DEPTH[18])[0] == 0
    opts = [*DEPTH[18], *COLOURS["RGB"]]
    code, out, err = command(first, second, *opts)
    assert code == 0 and "INPUT.FORMAT BGR to RGB" in out, err
    assert "checked: res2..res5 equal to " in out
    assert_same(detector_values(second, photo, *opts), donor_values(nets[18], photo))
    assert torch.load(second)["d2ssl"]["after"] == ["donor donor.pth"]
    content = torch.load(first)
    content["model"]["backbone.bottom_up.res3.0.conv1.weight"] *= 1.2
    torch.save(content, first)
    code, _, err = command(first, second, *opts)
    assert code == 2 and "res3 differs by" in err


# ---- the doctor on what was written


def test_the_doctor_names_the_key_that_is_wrong(command, nets, tmp_path):
    donor, output = save(tmp_path / "r50.pth", like_moco(nets[50].state_dict())), tmp_path / "o.pth"
    assert command(donor, output, *DEPTH[50])[0] == 0

    def findings(*opts):
        sections = weights.check_weights(str(output), BASE, [*SMALL, *DEPTH[50], *opts])
        return sections[0][1], sections[-1][1]

    origin, function = findings()
    details = {finding.name: finding.detail for finding in origin}
    assert details["method"].startswith("donor r50.pth, torchvision's names under state_dict.")
    assert "INPUT.FORMAT RGB" in details["donor wants"] and "equal to" in details["function"]
    assert [(f.status, f.detail) for f in function] == [(OK, "res2 res3 res4 res5")]
    for key, value in (("MODEL.RESNETS.STRIDE_IN_1X1", "True"), ("INPUT.FORMAT", "RGB")):
        failed = [f.name for f in findings(key, value)[1] if f.status == FAIL]
        assert failed == [key]
    assert not [f for f in findings("MODEL.FPN.FUSE_TYPE", "avg")[1] if f.status == FAIL]

    content = torch.load(output)
    del content["model"]["backbone.bottom_up.res4.0.conv1.weight"]
    torch.save(content, output)
    assert [f.name for f in findings()[1] if f.status == FAIL] == ["bottom_up"]


def test_a_network_without_a_pyramid_is_refused(nets, tmp_path):
    donor = save(tmp_path / "donor.pth", nets[18].state_dict())
    cfg = load_cfg(BASE, [
        "SSL.ENABLED", "False", "MODEL.DEVICE", "cpu", *DEPTH[18], "MODEL.BACKBONE.NAME",
        "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES",
        "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES",
        "[[32, 64]]",
    ])  # fmt: skip
    with pytest.raises(D2SSLError, match="build_resnet_backbone has no feature pyramid"):
        convert_weights.convert_donor(donor, cfg)
