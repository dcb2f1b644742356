"""tools/install_detectron2.py: its patch, and Detectron2 as it installs it, without d2ssl."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from d2ssl.compat import has_compiled_ops
from tests.conftest import REPO

SCRIPT = REPO / "tools" / "install_detectron2.py"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_stock(code: str, tmp_path: Path) -> str:
    """Run `code` in a process that never imports d2ssl; return what it printed."""
    code = textwrap.dedent(code) + "\nimport sys; assert 'd2ssl' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ---- the patch, on a made-up tree


def test_patch_replaces_what_it_lists_and_nothing_else(installer, tmp_path):
    (tmp_path / "a.py").write_text("x = np.int\ny = np.int32\nz = np.int(3)\n")
    installer.apply_patch(tmp_path, [("a.py", 2, "np.int", "int", "gone")])
    assert (tmp_path / "a.py").read_text() == "x = int\ny = np.int32\nz = int(3)\n"


@pytest.mark.parametrize("count", [1, 3])
def test_patch_stops_where_the_number_of_matches_differs(installer, tmp_path, count):
    (tmp_path / "a.py").write_text("old, old\n")
    with pytest.raises(installer.InstallError, match=rf"a\.py: 'old' occurs 2 times.*{count}"):
        installer.apply_patch(tmp_path, [("a.py", count, "old", "new", "reason")])
    assert (tmp_path / "a.py").read_text() == "old, old\n"


def test_patch_stops_where_a_file_is_missing(installer, tmp_path):
    with pytest.raises(installer.InstallError, match="b.py"):
        installer.apply_patch(tmp_path, [("b.py", 1, "old", "new", "reason")])


# ---- stopping and doing nothing


def test_a_wrong_hash_stops(installer, tmp_path):
    path = tmp_path / "p.tar.gz"
    path.write_bytes(b"abc")
    # the published SHA-256 test vector for "abc"
    good = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    installer.check_hash(path, good)
    with pytest.raises(installer.InstallError, match="p.tar.gz: sha256 is ba7816bf.*expected 5d2e"):
        installer.check_hash(path)


def test_main_stops_at_a_wrong_hash_with_one_line(installer, tmp_path, monkeypatch, capsys):
    def download(folder):
        path = Path(folder, "pb1-detectron2-0.6.tar.gz")
        path.write_bytes(b"abc")
        return path

    monkeypatch.setattr(installer, "download", download)
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installer, "run_pip", lambda *args, **kw: pytest.fail("pip was called"))
    assert installer.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "sha256" in captured.err


def test_an_index_without_the_package_gives_one_line(installer, tmp_path, monkeypatch):
    """Also shows that pip's own settings decide where to look."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(installer.InstallError, match="pip download failed.*pb1") as error:
        installer.download(tmp_path / "folder")
    assert "\n" not in str(error.value)


def test_where_detectron2_is_present_nothing_is_done():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("detectron2 is already installed")
    assert done.stdout.count("\n") == 1


def test_an_old_python_stops_with_one_line(installer, monkeypatch, capsys):
    monkeypatch.setattr(installer, "MIN_PYTHON", (99, 0))
    assert installer.main([]) == 2
    assert capsys.readouterr().err == "install_detectron2: Python 99.0 or newer is needed\n"


# ---- Detectron2 as installed


def test_stock_mask_rcnn_trains_and_infers_without_d2ssl(tmp_path):
    run_stock(
        """
        import torch
        from detectron2 import model_zoo
        from detectron2.modeling import build_model
        from detectron2.structures import BitMasks, Boxes, Instances
        from detectron2.utils.events import EventStorage

        torch.manual_seed(0)
        cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        model = build_model(cfg)

        masks = torch.zeros(1, 64, 64, dtype=torch.bool)
        masks[0, 10:40, 10:40] = True
        labels = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[10.0, 10, 40, 40]])),
                           gt_classes=torch.tensor([3]), gt_masks=BitMasks(masks))
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
        batch = [{"image": image, "instances": labels}] * 2

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        before = model.backbone.fpn_output2.weight.detach().clone()
        with EventStorage():
            losses = model(batch)
        assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg",
                               "loss_mask"}
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
        optimizer.step()
        assert not torch.equal(before, model.backbone.fpn_output2.weight)

        model.eval()
        with torch.no_grad():
            found = model([{"image": image, "height": 64, "width": 64}])[0]["instances"]
        assert len(found) > 0 and found.pred_masks.shape[1:] == (64, 64)
        """,
        tmp_path,
    )


def test_the_coco_evaluator_needs_no_compiled_operators(tmp_path):
    """A perfect prediction scores 100, and asking for the fast implementation does no harm."""
    out = run_stock(
        """
        import numpy as np, torch
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.evaluation import COCOEvaluator
        from detectron2.structures import Boxes, BoxMode, Instances

        record = dict(file_name="a.png", image_id=1, height=64, width=64, annotations=[
            dict(bbox=[8, 8, 40, 40], bbox_mode=BoxMode.XYXY_ABS, category_id=0, iscrowd=0,
                 segmentation=[[8, 8, 40, 8, 40, 40, 8, 40]])])
        DatasetCatalog.register("toy", lambda: [record])
        MetadataCatalog.get("toy").thing_classes = ["square"]
        evaluator = COCOEvaluator("toy", output_dir="out", use_fast_impl=True)
        evaluator.reset()
        masks = torch.zeros(1, 64, 64, dtype=torch.bool)
        masks[0, 8:40, 8:40] = True
        found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])),
                          scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]),
                          pred_masks=masks)
        evaluator.process([record], [{"instances": found}])
        result = evaluator.evaluate()
        print("AP", round(result["bbox"]["AP"], 2), round(result["segm"]["AP"], 2))
        """,
        tmp_path,
    )
    assert "AP 100.0 100.0" in out


def test_what_v06_asks_of_other_libraries_is_there(tmp_path):
    """One call into each place that the patch repairs and that the tests above do not reach."""
    run_stock(
        """
        import numpy as np, torch
        from detectron2.data.build import print_instances_class_histogram
        from detectron2.data.transforms import ExtentTransform
        from detectron2.structures import PolygonMasks
        from detectron2.utils.collect_env import collect_env_info
        from detectron2.utils.visualizer import Visualizer
        import detectron2.projects.deeplab, detectron2.projects.point_rend
        import detectron2.evaluation

        image = np.full((8, 8, 3), 7, np.uint8)
        assert (ExtentTransform((0, 0, 8, 8), (4, 4)).apply_image(image) == 7).all()
        masks = PolygonMasks([[np.array([1.0, 1, 5, 1, 5, 5])]])
        assert masks.nonempty().tolist() == [True]
        assert masks.crop_and_resize(torch.tensor([[0.0, 0, 8, 8]]), 8).dtype == torch.bool
        print_instances_class_histogram([{"annotations": [{"category_id": 0}]}], ["thing"])
        assert "detectron2" in collect_env_info()
        drawn = Visualizer(image, scale=8).draw_binary_mask(np.eye(8, dtype=np.uint8), color="red")
        assert drawn.get_image().shape == (64, 64, 3)
        """,
        tmp_path,
    )


def test_the_stand_in_names_what_is_missing():
    spec = importlib.util.find_spec("detectron2._C")
    if spec is None or not spec.origin.endswith(".py"):
        pytest.skip("this Detectron2 was not installed by tools/install_detectron2.py")
    from detectron2 import _C

    assert not has_compiled_ops()
    with pytest.raises(RuntimeError, match="_C.box_iou_rotated is not compiled.*README"):
        _C.box_iou_rotated
