"""Labels that the detector makes: what becomes one, what is hidden, and that runs stay exact."""

import os
import shutil

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from d2ssl.config import finetune_cfg
from d2ssl.data.build import (
    load_dicts,
    mapper_at_test_size,
    register_datasets,
    unlabeled_photos,
)
from d2ssl.data.datasets import register_balloon, register_coco, register_image_folder
from d2ssl.data.mapper import shrunk
from d2ssl.engine.finetuning import FinetuneTrainer
from d2ssl.engine.launch import launch
from d2ssl.engine.self_training import (
    MirroredAtScales,
    annotations,
    detect,
    label_files,
    read_labels,
    write_labels,
)
from d2ssl.errors import D2SSLError
from d2ssl.pipeline import run
from tests.engine.test_trainer import assert_identical, final_state, run_and_stop_at


def predicted(scores, boxes, masks=True, size=(10, 12)):
    """Instances of class 0 whose masks, where there are any, fill their boxes."""
    found = Instances(size)
    found.scores = torch.tensor(scores)
    found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    found.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    if masks:
        found.pred_masks = torch.zeros(len(scores), *size, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(found.pred_masks, np.array(boxes, int)):
            mask[y1:y2, x1:x2] = True
    return found


@pytest.mark.parametrize("masks", [True, False])
def test_the_unsure_is_marked_without_what_objects_cover(masks):
    boxes = [[0.0, 0, 4, 4], [2.0, 0, 8, 4], [1.0, 1, 3, 3]]
    found = annotations(predicted([0.9, 0.3, 0.2], boxes, masks), score=0.6)
    # The third lies all within the first: nothing is left of it.
    assert [a["iscrowd"] for a in found] == [0, 1]
    object_, unsure = (coco_mask.decode(a["segmentation"]) for a in found)
    assert object_.sum() == 16 and unsure.sum() == 6 * 4 - 2 * 4
    assert not (object_ & unsure).any()
    assert [round(a["score"], 5) for a in found] == [0.9, 0.3]
    assert [a["bbox"] for a in found] == [[0, 0, 4, 4], [4, 0, 4, 4]]  # of the masks, XYWH


def test_the_second_half_of_an_object_is_no_object():
    boxes = [[0.0, 0, 4, 8], [0.0, 0, 4, 10], [0.0, 4, 12, 8]]  # shares covered: 0, 0.8, 1/3
    found = annotations(predicted([0.9, 0.8, 0.7], boxes), score=0.6)
    assert [(round(a["score"], 5), a["iscrowd"]) for a in found] == [(0.9, 0), (0.8, 1), (0.7, 0)]
    (hidden,) = (coco_mask.decode(a["segmentation"]) for a in found if a["iscrowd"])
    assert hidden.sum() == 4 * 2


def test_an_object_in_one_of_another_class_and_a_box_in_a_box():
    boxes = [[0.0, 0, 10, 10], [2.0, 2, 6, 6]]
    found = predicted([0.9, 0.8], boxes)
    found.pred_classes[1] = 1
    assert [a["iscrowd"] for a in annotations(found, 0.6)] == [0, 0]
    assert [a["iscrowd"] for a in annotations(predicted([0.9, 0.8], boxes, False), 0.6)] == [0, 0]


def test_what_has_just_the_score_is_an_object():
    (found,) = annotations(predicted([0.5], [[0.0, 0, 4, 4]]), score=0.5)
    assert found["iscrowd"] == 0


def test_no_predictions():
    assert annotations(predicted([], []), score=0.5) == []


@pytest.mark.parametrize("large", [(128, 96), (240, 180), (75, 100)])
def test_a_mask_that_is_enlarged_for_the_file_comes_back(large):
    """As training shrinks it again; to the pixel."""
    mask = np.zeros((60, 80) if large[0] < large[1] else (80, 60), np.uint8)
    cv2.ellipse(mask, (30, 28), (17, 21), 30, 0, 360, 1, -1)
    found = predicted([0.9], [[0.0, 0, 1, 1]], size=mask.shape)
    found.pred_masks[0] = torch.from_numpy(mask) > 0
    photo = {"height": large[0], "width": large[1]}
    (row,) = annotations(found, 0.6, large)
    (back,) = shrunk({**photo, "annotations": [{**row, "bbox_mode": 1}]}, 60)["annotations"]
    assert coco_mask.decode(row["segmentation"]).shape == large
    assert (coco_mask.decode(back["segmentation"]) == mask).all()


@pytest.fixture
def photos(tiny_cfg):
    register_datasets(tiny_cfg())
    return DatasetCatalog.get("balloon_demo_train")


@pytest.fixture
def labels_file(photos, tmp_path):
    """Of three photos: an object and something unsure; only something unsure; nothing."""
    photos = [{k: v for k, v in d.items() if k != "annotations"} for d in photos[:3]]
    size = photos[0]["height"], photos[0]["width"]
    both = predicted([0.9, 0.3], [[0.0, 0, 30, 20], [40.0, 0, 60, 20]], size=size)
    labels = [annotations(found, 0.6) for found in (both, both[1:], both[:0])]
    file = str(tmp_path / "labels" / "labels_0000002.json")
    write_labels(file, photos, labels, ["balloon"])
    return file, photos


def test_labels_there_and_back(labels_file):
    file, photos = labels_file
    (found,) = read_labels(file, photos, side=1000)
    assert found["file_name"] == photos[0]["file_name"]
    assert (found["height"], found["width"]) == (photos[0]["height"], photos[0]["width"])
    (object_,) = found["annotations"]
    assert object_["bbox"] == [0, 0, 30, 20] and object_["category_id"] == 0
    assert coco_mask.decode(object_["segmentation"])[:20, :30].all()
    (hidden,) = found["hidden"]
    assert coco_mask.area(hidden) == 20 * 20


def test_labels_find_their_photos_in_another_list(labels_file):
    file, photos = labels_file
    (found,) = read_labels(file, photos[::-1], side=1000)
    assert found["file_name"] == photos[0]["file_name"]
    for others in (photos[1:], [{**photos[0], "height": 1}]):
        with pytest.raises(D2SSLError, match="is not among the photos to be labelled") as error:
            read_labels(file, others, side=1000)
        assert photos[0]["file_name"] in str(error.value) and "\n" not in str(error.value)


def test_labels_follow_photos_that_moved(labels_file, tmp_path):
    file, photos = labels_file
    moved = [
        {**photo, "file_name": str(tmp_path / "moved" / os.path.basename(photo["file_name"]))}
        for photo in photos
    ]
    (found,) = read_labels(file, moved[::-1], side=1000)
    assert found["file_name"] == moved[0]["file_name"] and len(found["annotations"]) == 1


def test_labels_are_scaled_with_the_photo(labels_file):
    file, photos = labels_file
    short = min(photos[0]["height"], photos[0]["width"])
    (found,) = read_labels(file, photos, side=short // 2)
    assert (found["height"], found["width"]) == (photos[0]["height"] // 2, photos[0]["width"] // 2)
    (object_,) = found["annotations"]
    mask = coco_mask.decode(object_["segmentation"])
    assert object_["bbox"] == [0, 0, 15, 10] and mask[:10, :15].all() and mask.sum() == 150
    assert coco_mask.area(found["hidden"][0]) == 10 * 10


def test_others_read_the_file(labels_file, tmp_path):
    file, photos = labels_file
    coco = COCO(file)
    assert len(coco.imgs) == 3 and [a["iscrowd"] for a in coco.anns.values()] == [0, 1, 1]
    assert [a["area"] for a in coco.anns.values()] == [600, 400, 400]
    folder = shutil.copytree(coco.dataset["info"]["image_root"], tmp_path / "photos")
    shutil.copy(file, folder)  # beside the photos, as a user would
    register_coco("labelled_by_itself", folder, os.path.basename(file))
    dicts = DatasetCatalog.get("labelled_by_itself")
    assert len(dicts) == 3 and os.path.dirname(dicts[0]["file_name"]) == str(folder)


SELF = ["SSL.ENABLED", "False", "SSL.SELF_TRAINING.ENABLED", "True"]
LOW = ["SSL.SELF_TRAINING.SCORE", "0.06", "SSL.SELF_TRAINING.UNSURE", "0.05"]  # all it finds


def self_cfg(tiny_cfg, *opts, **kwargs):
    cfg = finetune_cfg(tiny_cfg(*SELF, *LOW, *opts, **kwargs))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


# Before the checkpoint, at the resumed iteration, and at both; without masks, and by workers.
@pytest.mark.parametrize(
    "opts",
    [
        ["SSL.SELF_TRAINING.AT", "(0.25,)", "DATALOADER.NUM_WORKERS", "1"],
        ["SSL.SELF_TRAINING.AT", "(0.5,)", "MODEL.MASK_ON", "False"],
        ["SSL.SELF_TRAINING.AT", "(0.25, 0.5)", "SSL.SELF_TRAINING.SCALES", "(0.8, 1.0)"],
    ],
)
def test_resume_is_exact(tiny_cfg, tmp_path, opts):
    whole, parts = (self_cfg(tiny_cfg, *opts, output_dir=tmp_path / d) for d in ("whole", "parts"))
    trainer = FinetuneTrainer(whole)
    assert len(trainer.loader.stream.dicts) == 4
    trainer.train()
    assert len(trainer.loader.stream.dicts) > 4  # else nothing is tested
    run_and_stop_at(FinetuneTrainer(parts), 3)
    resumed = FinetuneTrainer(parts, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert_identical(final_state(whole.OUTPUT_DIR), final_state(parts.OUTPUT_DIR))


def test_a_mirrored_photo_is_labelled_alike(tiny_cfg, photos, tmp_path):
    """Looking at it mirrored, too; and otherwise not."""
    cfg = self_cfg(tiny_cfg)
    model, mapper = FinetuneTrainer(cfg).module, mapper_at_test_size(cfg)

    def found(model, photo):
        (rows,) = detect(model, [photo], mapper, score=0.06, unsure=0.05)
        return rows

    mirrored = {**photos[0], "file_name": str(tmp_path / "mirrored.png")}
    cv2.imwrite(mirrored["file_name"], cv2.imread(photos[0]["file_name"])[:, ::-1])
    both = GeneralizedRCNNWithTTA(cfg, model, MirroredAtScales([1.0]))
    rows, others = found(both, photos[0]), found(both, mirrored)
    assert len(rows) > 5
    scores, other_scores = ([row["score"] for row in found] for found in (rows, others))
    assert other_scores == pytest.approx(scores, abs=1e-3)
    masks = [coco_mask.decode(row["segmentation"]) for row in rows]
    for mask, other in zip(masks, others):
        assert (mask[:, ::-1] != coco_mask.decode(other["segmentation"])).mean() < 0.01
    assert [row["score"] for row in found(model, mirrored)] != pytest.approx(
        [row["score"] for row in found(model, photos[0])], abs=1e-3
    )


def test_detections_that_are_cut_off_are_said(tiny_cfg, photos, caplog):
    cfg = self_cfg(tiny_cfg)
    model, mapper = FinetuneTrainer(cfg).module, mapper_at_test_size(cfg)
    (rows,) = detect(model, photos[:1], mapper, 0.06, 0.05, most=1000)
    assert len(rows) > 5 and "DETECTIONS_PER_IMAGE" not in caplog.text
    model.roi_heads.box_predictor.test_topk_per_image = 5
    detect(model, photos[:1], mapper, 0.06, 0.05, most=5)
    assert "1 photo(s) with 5 detections, as many as TEST.DETECTIONS_PER_IMAGE" in caplog.text


def test_masks_made_small_are_those_of_the_photo(tiny_cfg, photos, tmp_path):
    """Of a photo six times as large, and not square."""
    cfg = self_cfg(tiny_cfg)
    model, mapper = FinetuneTrainer(cfg).module, mapper_at_test_size(cfg)
    torch.nn.init.constant_(model.roi_heads.mask_head.predictor.bias, 9)  # masks fill their boxes
    file, (height, width) = str(tmp_path / "large.png"), (576, 768)
    cv2.imwrite(file, cv2.resize(cv2.imread(photos[0]["file_name"]), (width, height)))
    photo = {"file_name": file, "height": height, "width": width, "image_id": 0}
    (whole,), (small,) = (detect(model, [photo], mapper, 0.06, 0.05, side) for side in (1e9, 96))
    assert len(small) > 5
    by_score = {row["score"]: row for row in whole}
    overlaps = []
    for row in small:
        mask, other = (coco_mask.decode(r["segmentation"]) for r in (row, by_score[row["score"]]))
        assert mask.shape == (height, width)
        overlaps.append((mask & other).sum() / (mask | other).sum())
        blocks = mask.reshape(96, 6, 128, 6)
        assert (blocks.min((1, 3)) == blocks.max((1, 3))).all()  # each pixel became six times six
    assert np.mean(overlaps) > 0.8  # what is left between objects is thin


@pytest.mark.parametrize("limit", [128, 100])  # the long side, a third more than the short one
def test_copies_have_the_sizes_of_the_scales(tiny_cfg, photos, limit):
    cfg = self_cfg(tiny_cfg, "INPUT.MAX_SIZE_TEST", str(limit))
    scales = 1.0, 1.5, 0.5
    copies = MirroredAtScales(scales)(mapper_at_test_size(cfg, scale=1.5)(photos[0]))
    for scale, (plain, mirrored) in zip(scales, zip(copies[::2], copies[1::2])):
        size = mapper_at_test_size(cfg, scale=scale)(photos[0])["image"].shape
        assert plain["image"].shape == mirrored["image"].shape == size
        assert torch.equal(plain["image"].flip(2), mirrored["image"])
        box = np.array([[10.0, 20, 40, 60]])  # of the photo, and back to it
        for example in (plain, mirrored):
            moves = example["transforms"]
            assert np.allclose(moves.inverse().apply_box(moves.apply_box(box)), box, atol=1e-3)


def test_the_labels_change_what_is_learnt(tiny_cfg, tmp_path, caplog):
    cfgs = [
        self_cfg(tiny_cfg, "SSL.SELF_TRAINING.SCORE", score, output_dir=tmp_path / score)
        for score in ("0.06", "1.0")
    ]
    trainers = [FinetuneTrainer(cfg) for cfg in cfgs]
    for trainer in trainers:
        trainer.train()
    some, none = (t.module.state_dict()["backbone.fpn_output2.weight"] for t in trainers)
    assert len(trainers[1].loader.stream.dicts) == 4 and not torch.equal(some, none)
    assert "sure of nothing, so nothing changes" in caplog.text


def label_in_processes(cfg):
    register_balloon("balloon_demo", os.path.join(os.environ["TEST_DEMO_ROOT"], "balloon_demo"))
    FinetuneTrainer(cfg).train()


def test_two_processes_label_as_one(tiny_cfg, tmp_path, demo_root, monkeypatch):
    monkeypatch.setenv("TEST_DEMO_ROOT", str(demo_root))
    files = []
    for count in (1, 2):
        at = ["SSL.SELF_TRAINING.AT", "(0.1,)", "SOLVER.AMP.ENABLED", "False"]  # before the first
        cfg = self_cfg(tiny_cfg, *at, "SOLVER.MAX_ITER", "1", output_dir=tmp_path / str(count))
        launch(label_in_processes, count, args=(cfg,))
        files.append(COCO(os.path.join(cfg.OUTPUT_DIR, "labels_0000000.json")).dataset)
    one, two = files
    assert one["images"] == two["images"] and len(one["images"]) == 4
    assert [a["image_id"] for a in one["annotations"]] == [
        a["image_id"] for a in two["annotations"]
    ]
    boxes = [np.array([a["bbox"] for a in labels["annotations"]]) for labels in files]
    np.testing.assert_allclose(*boxes, atol=0.1)
    assert len(boxes[0])


def test_labelled_photos_are_not_labelled_again(tiny_cfg, tmp_path, caplog):
    """Nor those that the detector is tested or watched on, though they lie in the same folder."""
    caplog.set_level("INFO", logger="d2ssl")
    everything = tmp_path / "everything"
    train, val, part = (set(file_names(f"balloon_demo_{s}")) for s in ("train", "val", "train@4"))
    everything.mkdir()
    for path in train | val:
        (
            everything / f"{os.path.basename(os.path.dirname(path))}_{os.path.basename(path)}"
        ).symlink_to(path)
    register_image_folder("everything", str(everything))
    opts = ["SSL.DATASETS", "('everything',)", "SSL.FINETUNE.DEV_DATASET", "balloon_demo_train@-2"]
    found = {os.path.realpath(d["file_name"]) for d in unlabeled_photos(self_cfg(tiny_cfg, *opts))}
    assert found == train - part - set(file_names("balloon_demo_train@-2")) and len(found) == 2
    cfg = self_cfg(tiny_cfg, "DATASETS.TRAIN", "('balloon_demo_train',)")
    FinetuneTrainer(cfg).train()
    assert "each photo of SSL.DATASETS has labels" in caplog.text


def file_names(name):
    return [os.path.realpath(d["file_name"]) for d in load_dicts([name])]


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SSL.SELF_TRAINING.AT", "(1.5,)"], "AT .1.5.*between 0 and 1"),
        (["SSL.SELF_TRAINING.AT", "()"], "AT"),
        (["SSL.SELF_TRAINING.LABELED", "0.0"], "LABELED 0.0"),
        (["SSL.SELF_TRAINING.SCORE", "0.01"], "UNSURE 0.05 and SCORE 0.01"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3"], "nothing below .*SCORE_THRESH_TEST 0.3"),
        (["SSL.DATASETS", "()"], "SSL.DATASETS is empty.*SELF_TRAINING"),
        (["MODEL.KEYPOINT_ON", "True"], "KEYPOINT_ON False"),
        (["SSL.SELF_TRAINING.SCALES", "(1.0, 0)"], "SCALES .*multiples of the test size"),
        (["SSL.SELF_TRAINING.SCALES", "(1.0,)", "INPUT.MIN_SIZE_TEST", "0"], "MIN_SIZE_TEST"),
        (
            ["SSL.SELF_TRAINING.SCALES", "(1.0,)", "MODEL.META_ARCHITECTURE", "RetinaNet"],
            "SCALES: .* GeneralizedRCNN",
        ),
        (["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"], "TEST.AUG.ENABLED"),
    ],
)
def test_options_that_cannot_be(tiny_cfg, opts, message):
    with pytest.raises(D2SSLError, match=message):
        self_cfg(tiny_cfg, *opts)


def test_the_job_shows_what_was_labelled_and_a_new_one_forgets_it(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*SELF, *LOW, "SSL.SELF_TRAINING.AT", "(0.25, 0.5)")
    run(cfg)
    folder = finetune_cfg(cfg).OUTPUT_DIR
    assert [os.path.basename(f) for f in label_files(folder)] == [
        "labels_0000001.json",
        "labels_0000002.json",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Self-trained Mask R-CNN" in page and "What the detector labelled itself" in page
    assert "of 4 photos, the others were left out; labels_0000002.json has all" in page
    assert page.count(" taken, ") == 2 * 4  # each photo's caption, and for screen readers
    other = tiny_cfg("SSL.ENABLED", "False")
    run(other)
    assert not label_files(folder)
    assert "labelled itself" not in (tmp_path / "out" / "report.html").read_text()
