import copy

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets import ensure_registered, register_dataset
from d2ssl.data.datasets.catalog import class_names, content_hash, set_metadata
from d2ssl.errors import D2SSLError


def test_registering_again_replaces_and_reads_nothing_before_use():
    calls = []
    register_dataset("test_catalog", lambda: calls.append(1) or [1], thing_classes=["a"])
    register_dataset("test_catalog", lambda: calls.append(2) or [2], thing_classes=["a"])
    assert calls == []
    assert DatasetCatalog.get("test_catalog") == [2] and calls == [2]
    assert MetadataCatalog.get("test_catalog").thing_classes == ["a"]
    register_dataset("test_catalog", list, thing_classes=["b"])
    assert MetadataCatalog.get("test_catalog").thing_classes == ["b"]


def test_parts_follow_a_set_that_is_registered_anew():
    register_dataset("test_anew", lambda: [{"image_id": 1}], lambda d: {**d, "by": "old"},
                     thing_classes=["old"])  # fmt: skip
    ensure_registered(["test_anew@1"])
    assert DatasetCatalog.get("test_anew@1") == [{"image_id": 1, "by": "old"}]
    register_dataset("test_anew", lambda: [{"image_id": 2}], thing_classes=["new"])
    assert "test_anew@1" not in DatasetCatalog.list()
    ensure_registered(["test_anew@1"])
    assert DatasetCatalog.get("test_anew@1") == [{"image_id": 2}]
    assert MetadataCatalog.get("test_anew@1").thing_classes == ["new"]


def test_metadata_that_are_known_late_may_change():
    register_dataset("test_late", list)
    set_metadata("test_late", thing_classes=["a"])
    set_metadata("test_late", thing_classes=["a", "b"], mids=["x"])
    assert MetadataCatalog.get("test_late").thing_classes == ["a", "b"]
    assert MetadataCatalog.get("test_late").mids == ["x"]


def test_classes_are_a_list_of_different_names():
    assert class_names(("cat", "dog")) == ["cat", "dog"]
    with pytest.raises(D2SSLError, match="classes is 'dog'; give a list of names"):
        class_names("dog")
    with pytest.raises(D2SSLError, match="has a name twice"):
        class_names(["a", "b", "a"])


DICTS = [
    {
        "file_name": "a.jpg",
        "image_id": 0,
        "height": 4,
        "width": 6,
        "annotations": [{"bbox": [0, 1, 2, 3], "segmentation": [[0.5, 1.5, 2.5]]}],
    },
    {"file_name": "b.jpg", "image_id": 1, "height": 4, "width": 6},
]


def change(path, value):
    dicts = copy.deepcopy(DICTS)
    target = dicts
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return dicts


@pytest.mark.parametrize(
    "path, value",
    [
        ((0, "annotations", 0, "bbox", 2), 2.25),
        ((0, "annotations", 0, "segmentation", 0, 1), 1.75),
        ((0, "annotations"), []),
        ((1, "file_name"), "c.jpg"),
        ((1, "height"), 5),
        ((1, "annotations"), []),
    ],
)
def test_hash_of_labels_follows_each_change(path, value):
    assert content_hash(change(path, value)) != content_hash(DICTS)
    assert content_hash(DICTS[::-1]) != content_hash(DICTS)


def test_hash_of_labels_depends_on_content_only():
    same = copy.deepcopy(DICTS)
    same[0]["annotations"][0]["bbox"] = np.array([0, 1, 2, 3])
    same[0] = dict(reversed(same[0].items()))
    assert content_hash(same) == content_hash(DICTS)
    assert len(content_hash(DICTS)) == 16
    # A run-length mask holds bytes.
    rle = change((0, "annotations", 0, "segmentation"), {"counts": b"\x12\xff", "size": [4, 6]})
    assert content_hash(rle) == content_hash(copy.deepcopy(rle)) != content_hash(DICTS)
