import os
import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets import register_balloon
from d2ssl.data.datasets.synthetic import write_balloons
from d2ssl.errors import D2SSLError


@pytest.fixture(autouse=True)
def restore_demo(demo_root):
    yield
    register_balloon("balloon_demo", demo_root / "balloon_demo")


def test_three_sets(demo_root):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    train = DatasetCatalog.get("balloon_demo_train")
    assert len(train) == 8 and len(DatasetCatalog.get("balloon_demo_val")) == 4
    assert all(d["annotations"] for d in train)
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"balloon_demo_{split}")
        assert metadata.thing_classes == ["balloon"] and metadata.evaluator_type == "coco"


def test_unlabeled_has_the_train_photos_and_no_annotations(demo_root):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    unlabeled = DatasetCatalog.get("balloon_demo_unlabeled")
    assert {d["file_name"] for d in unlabeled} == {
        d["file_name"] for d in DatasetCatalog.get("balloon_demo_train")
    }
    assert not any("annotations" in d for d in unlabeled)


def test_another_root(demo_root, tmp_path):
    register_balloon("balloon_demo", tmp_path / "nowhere" / "balloon_demo")  # nothing is read yet
    with pytest.raises(D2SSLError, match="balloon_demo/val: no such folder.*make_balloon_demo"):
        DatasetCatalog.get("balloon_demo_val")
    write_balloons(str(tmp_path / "balloon_demo"), 1, 2, (64, 80))
    register_balloon("balloon_demo", tmp_path / "balloon_demo")
    assert len(DatasetCatalog.get("balloon_demo_val")) == 2
    assert DatasetCatalog.get("balloon_demo_val")[0]["file_name"].startswith(str(tmp_path))


def test_own_set_in_the_same_layout(tmp_path):
    write_balloons(str(tmp_path / "kittens"), 1, 1, (64, 80))
    register_balloon("kittens", tmp_path / "kittens", classes=["kitten"])
    assert MetadataCatalog.get("kittens_train").thing_classes == ["kitten"]
    assert DatasetCatalog.get("kittens_train")[0]["annotations"][0]["category_id"] == 0


def test_evaluator_scores_the_truth_as_perfect(demo_root, tmp_path):
    """Detectron2's evaluator makes its COCO file from the dicts, and agrees with the masks."""
    import numpy as np
    import pycocotools.mask
    import torch
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    register_balloon("balloon_demo", demo_root / "balloon_demo")
    evaluator = COCOEvaluator(
        "balloon_demo_val", ("bbox", "segm"), False, str(tmp_path), use_fast_impl=False
    )
    evaluator.reset()
    for record in DatasetCatalog.get("balloon_demo_val"):
        height, width = record["height"], record["width"]
        masks = []
        for annotation in record["annotations"]:
            rles = pycocotools.mask.frPyObjects(annotation["segmentation"], height, width)
            masks.append(pycocotools.mask.decode(pycocotools.mask.merge(rles)))
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in record["annotations"]]))
        instances.pred_masks = torch.from_numpy(np.stack(masks)).bool()
        instances.scores = torch.ones(len(masks))
        instances.pred_classes = torch.zeros(len(masks), dtype=torch.long)
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100, abs=0.1)
    assert results["segm"]["AP"] == pytest.approx(100, abs=0.1)


def test_builtin_sets_follow_the_environment_and_spare_the_users_own(demo_root):
    program = (
        "from detectron2.data import DatasetCatalog as C\n"
        "C.register('balloon_train', lambda: 'mine')\n"
        "import d2ssl.data.datasets\n"
        "print(len(C.get('balloon_demo_train')), C.get('balloon_train'))\n"
        "print('balloon_demo_unlabeled' in C.list())"
    )
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(demo_root),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["8", "mine", "True"], done.stderr


def test_real_balloon(shared):
    register_balloon("balloon", shared / "data" / "balloon")
    assert len(DatasetCatalog.get("balloon_unlabeled")) == 61
    assert len(DatasetCatalog.get("balloon_val")) == 13
