import copy

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets import fingerprint, register_dataset


def test_registering_again_replaces_and_reads_nothing_before_use():
    calls = []
    register_dataset("test_catalog", lambda: calls.append(1) or [1], thing_classes=["a"])
    register_dataset("test_catalog", lambda: calls.append(2) or [2], thing_classes=["a"])
    assert calls == []
    assert DatasetCatalog.get("test_catalog") == [2] and calls == [2]
    assert MetadataCatalog.get("test_catalog").thing_classes == ["a"]
    register_dataset("test_catalog", list, thing_classes=["b"])
    assert MetadataCatalog.get("test_catalog").thing_classes == ["b"]


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
def test_fingerprint_follows_each_change(path, value):
    assert fingerprint(change(path, value)) != fingerprint(DICTS)
    assert fingerprint(DICTS[::-1]) != fingerprint(DICTS)


def test_fingerprint_depends_on_content_only():
    same = copy.deepcopy(DICTS)
    same[0]["annotations"][0]["bbox"] = np.array([0, 1, 2, 3])
    same[0] = dict(reversed(same[0].items()))
    assert fingerprint(same) == fingerprint(DICTS)
    assert len(fingerprint(DICTS)) == 16
    # A run-length mask holds bytes.
    rle = change((0, "annotations", 0, "segmentation"), {"counts": b"\x12\xff", "size": [4, 6]})
    assert fingerprint(rle) == fingerprint(copy.deepcopy(rle)) != fingerprint(DICTS)
