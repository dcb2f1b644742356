"""What is read of data sets, when, and what of them contradicts a detector."""

from types import SimpleNamespace

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from d2ssl.config import finetune_cfg, load_cfg, pretrain_cfg
from d2ssl.data.build import (
    build_finetune_loader,
    build_pretrain_loader,
    check_classes,
    check_dev,
    count_photos,
    detection_sets,
    load_dicts,
    load_photos,
    unlabeled_photos,
)
from d2ssl.data.datasets import ensure_registered, register_dataset
from d2ssl.data.views import View
from d2ssl.errors import D2SSLError


@pytest.fixture
def register(tmp_path):
    """Callable: name, classes -> a set of two photos whose labels take decoding; counts these."""
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for file in files:
        Image.new("RGB", (30, 20)).save(file)
    made = []

    def run(name, *classes):
        seen = SimpleNamespace(decoded=0)

        def decode(entry):
            seen.decoded += 1
            return {**entry, "height": 20, "width": 30, "annotations": []}

        dicts = [{"file_name": file, "image_id": i} for i, file in enumerate(files)]
        register_dataset(name, lambda: dicts, decode, thing_classes=[*classes])
        made.append(name)
        return seen

    yield run
    for name in made:
        DatasetCatalog.remove(name)


def test_masks_are_read_only_where_they_are_wanted(register):
    seen = register("lazy", "cat")
    ensure_registered(["lazy@1"])
    assert count_photos(["lazy"]) == 2
    photos = load_photos(["lazy"])
    assert [sorted(photo) for photo in photos] == [["file_name", "height", "image_id", "width"]] * 2
    assert (photos[0]["height"], photos[0]["width"]) == (20, 30) and seen.decoded == 0
    assert len(load_dicts(["lazy@1"])) == 1 and seen.decoded == 1


@pytest.mark.parametrize("others", [["DATASETS.TRAIN"], ["DATASETS.TEST"]])
def test_no_checkpoint_is_chosen_on_photos_that_are_learnt_or_tested_on(tiny_cfg, others):
    """Whatever the set is called; the demo's others have photos of their own."""
    opts = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    for key in others:
        opts[opts.index(key) + 1] = "('balloon_demo_val',)"
    for dev, message in (("balloon_demo_val@3", "has 3 photo"), ("balloon_demo_val", "of balloon")):
        with pytest.raises(D2SSLError, match=message):
            check_dev(tiny_cfg(*opts, "SSL.FINETUNE.DEV_DATASET", dev))
    check_dev(tiny_cfg(*opts, "SSL.FINETUNE.DEV_DATASET", "balloon_demo_train"))
    check_dev(tiny_cfg(*opts))


def test_a_photo_of_two_sets_is_pretrained_on_once(tiny_cfg, caplog):
    names = "balloon_demo_train@4", "balloon_demo_train"
    cfg = tiny_cfg("SSL.DATASETS", str(names))
    with caplog.at_level("INFO", "d2ssl"):
        stream = build_pretrain_loader(pretrain_cfg(cfg), [View(32)], [], frozenset()).stream
    files = [d["file_name"] for d in stream.dicts]
    assert len(set(files)) == len(files) == count_photos(names) == 8
    assert "4 photos are in SSL.DATASETS more than once" in caplog.text
    assert len(unlabeled_photos(cfg)) == 4


def test_a_size_that_is_not_the_photos_is_refused_before_training(tiny_cfg):
    """As of photos that EXIF turns, whose labels are for the picture as it is stored."""

    def load():
        return [
            {**d, "height": d["width"], "width": d["height"]}
            for d in DatasetCatalog.get("balloon_demo_train")
        ]

    register_dataset("turned", load, thing_classes=["balloon"])
    cfg = tiny_cfg("SSL.DATASETS", "('turned',)", "DATASETS.TRAIN", "('turned',)")
    for build in (
        lambda: build_pretrain_loader(pretrain_cfg(cfg), [View(32)], [], frozenset()),
        lambda: build_finetune_loader(finetune_cfg(cfg)),
    ):
        with pytest.raises(D2SSLError, match="says 96 x 128, the photo has other proportions"):
            build()
    DatasetCatalog.remove("turned")


def test_sizes_that_are_not_said_are_read(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    entry = {"file_name": str(tmp_path / "a.png"), "image_id": 0, "annotations": []}
    register_dataset("unsized", lambda: [entry])
    assert load_dicts(["unsized"]) == [{**entry, "height": 20, "width": 30}]
    DatasetCatalog.remove("unsized")


def config(train, test, num_classes, *opts):
    return load_cfg(opts=[
        "DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes), "SSL.ENABLED", "False", *opts,
    ])  # fmt: skip


def test_one_list_of_classes(register):
    register("pets_train", "cat", "dog")
    register("pets_test", "cat", "dog")
    register("dogs_test", "dog")
    good = config("pets_train", "pets_test@1", 2)
    check_classes(good, detection_sets(good))
    check_classes(good, good.DATASETS.TEST, ["cat", "dog"])
    for cfg, weights, message in (
        (config("pets_train", "dogs_test", 2), [],
         "classes differ: cat, dog of pets_train, dog of dogs_test; register sets with the same"),
        (config("pets_train", "pets_test", 2, "SSL.FINETUNE.DEV_DATASET", "dogs_test"), [],
         "classes differ: cat, dog of pets_train, dog of dogs_test"),
        (good, ["dog", "cat"], "classes differ: dog, cat of the weights, cat, dog of pets_train"),
        (config("pets_train", "pets_test", 80), [],
         r"NUM_CLASSES is 80, and pets_train has 2 classes \(cat, dog\); set it to 2"),
    ):  # fmt: skip
        with pytest.raises(D2SSLError, match=message) as error:
            check_classes(cfg, detection_sets(cfg), weights)
        assert "\n" not in str(error.value)
