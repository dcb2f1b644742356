"""Each fault, on a small set that has exactly that one; and a set that has none."""

import copy

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from test_copies import picture

from d2ssl.data.checks import ERROR, NOTE, WARNING, check_sets
from d2ssl.data.datasets import register_balloon, register_image_folder
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.data.masks import encode
from d2ssl.errors import D2SSLError

SQUARE = [[20, 20, 80, 20, 80, 80, 20, 80]]


def label(**changes):
    clean = {"bbox": [20, 20, 80, 80], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
             "segmentation": SQUARE}  # fmt: skip
    return {**clean, **changes}


@pytest.fixture
def make(tmp_path):
    """Callable: registers photos of 128 x 96 px, each with two objects, under a name."""
    before = set(DatasetCatalog.list())

    def register(name="things_train", seeds=(0, 1, 2), change=None, decode=None, **metadata):
        folder = tmp_path / name
        folder.mkdir()
        dicts = []
        for i, seed in enumerate(seeds):
            file = str(folder / f"{seed}.png")
            picture(seed).save(file)
            ring = label(category_id=1, bbox=[90, 10, 120, 50],
                         segmentation=[[90, 10, 120, 10, 120, 50, 90, 50]])  # fmt: skip
            dicts.append({"file_name": file, "image_id": i, "height": 96, "width": 128,
                          "annotations": [label(), ring]})  # fmt: skip
        dicts = copy.deepcopy(dicts)
        if change:
            change(dicts)
        metadata = {"thing_classes": ["ball", "ring"], **metadata}
        register_dataset(name, lambda: copy.deepcopy(dicts), decode, **metadata)
        return dicts

    yield register
    for name in set(DatasetCatalog.list()) - before:
        register_dataset(name, list)  # forgets the decoder
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def check(*names, **options):
    return check_sets(names, min_size=96, max_size=200, num_workers=0, **options)


def found(*names, **options):
    return [x for one in check(*names, **options) for x in one.findings]


def test_a_clean_set_has_no_finding(make):
    make()
    make("things_val", seeds=(3, 4))
    train, val = check("things_train", "things_val", shown=2)
    assert train.findings == val.findings == []
    assert (train.kind, train.is_test, val.is_test) == ("objects", False, True)
    assert train.class_counts() == [3, 3]
    sides, areas, sizes = train.objects()
    assert sides == pytest.approx([60, np.sqrt(30 * 40)] * 3)
    assert areas.tolist() == [3600, 1200] * 3 and (sizes == (96, 128)).all()
    assert [x.picture is not None for x in train.looks] == [True, True, False]
    assert found("things_train", "things_val", test=["things_train"]) == []


def first(**changes):
    """A change of the first object of the second photo."""
    return lambda dicts: dicts[1]["annotations"].__setitem__(0, label(**changes))


def of_photo(**changes):
    return lambda dicts: dicts[1].update(changes)


def append(**changes):
    return lambda dicts: dicts[1]["annotations"].append(label(**changes))


OTHER_SIZE = encode(np.ones((128, 96), bool))
FAULTS = {
    "line": (first(segmentation=[[20, 20, 80, 20, 50, 20]]), ERROR, "empty mask"),
    "rle of nothing": (first(segmentation=encode(np.zeros((96, 128)))), ERROR, "empty mask"),
    "rle of another size": (first(segmentation=OTHER_SIZE), ERROR, "mask cannot be read"),
    "far": (first(segmentation=[[20, 20, 1e9, 20, 20, 80]]), ERROR, "mask cannot be read"),
    "nan": (first(segmentation=[[20, 20, np.nan, 20, 20, 80]]), ERROR, "mask cannot be read"),
    "two points": (first(segmentation=[[20, 20, 80, 80]]), ERROR, "mask cannot be read"),
    "no width": (first(bbox=[80, 20, 80, 80]), ERROR, "box without an area"),
    "corners swapped": (first(bbox=[80, 80, 20, 20]), ERROR, "box without an area"),
    "box of nan": (first(bbox=[20, 20, np.nan, 80]), ERROR, "box without an area"),
    "no box": (first(bbox=None), ERROR, "box without an area"),
    "three numbers": (first(bbox=[20, 20, 80]), ERROR, "box without an area"),
    "outside": (first(bbox=[130, 20, 180, 80]), ERROR, "box outside the photo"),
    "reaches out": (
        first(bbox=[-30, 20, 80, 80], segmentation=[[-30, 20, 80, 20, 80, 80, -30, 80]]),
        WARNING, "box reaches out of the photo",
    ),
    "apart": (first(bbox=[90, 60, 120, 90]), ERROR, "mask and box lie apart"),
    "larger": (first(bbox=[20, 20, 100, 80]), WARNING, "mask and box disagree"),
    "twice": (append(), WARNING, "object labelled twice"),
    "box twice": (
        lambda dicts: [d.update(annotations=[label(segmentation=None), label(segmentation=[]),
                                             label(category_id=1, bbox=[90, 10, 120, 50],
                                                   segmentation=None)][: 3 if i == 1 else 4])
                       if i == 1 else [a.update(segmentation=None) for a in d["annotations"]]
                       for i, d in enumerate(dicts)],
        WARNING, "object labelled twice",
    ),
    "tiny": (
        append(bbox=[2, 2, 8, 9], segmentation=[[2, 2, 8, 2, 8, 9, 2, 9]]),
        NOTE, "object under 8 px in fine-tuning",
    ),
    "unknown class": (first(category_id=2), ERROR, "class that does not exist"),
    "class below 0": (first(category_id=-1), ERROR, "class that does not exist"),
    "no class": (first(category_id=None), ERROR, "class that does not exist"),
    "no label": (of_photo(annotations=[]), NOTE, "photo without a label"),
    "turned": (
        of_photo(height=128, width=96, annotations=[label()]),
        ERROR, "photo has another size than its labels say",
    ),
    "no mask": (first(segmentation=None), ERROR, "object without a mask"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(make, fault):
    change, severity, what = FAULTS[fault]
    dicts = make(change=change)
    (finding,) = found("things_train")
    assert (finding.severity, finding.what) == (severity, what)
    assert finding.file == dicts[1]["file_name"] and finding.fix
    assert ("EXIF" in finding.fix) == (fault == "turned")


NO_FAULTS = {
    "other class in the same place": append(category_id=1),
    "half of it": append(bbox=[20, 20, 80, 50], segmentation=[[20, 20, 80, 20, 80, 50, 20, 50]]),
    "box a little off": first(bbox=[17, 20, 83, 80]),
    "box up to the edge": first(bbox=[-0.6, 20, 80, 80],
                                segmentation=[[-0.6, 20, 80, 20, 80, 80, -0.6, 80]]),
    "xywh": first(bbox=[20, 20, 60, 60], bbox_mode=BoxMode.XYWH_ABS),
    "rle": first(segmentation=encode(np.pad(np.ones((60, 60)), ((20, 16), (20, 48))))),
    "small but not tiny": append(bbox=[2, 2, 11, 11], segmentation=[[2, 2, 11, 2, 11, 11, 2, 11]]),
    "size not said": lambda dicts: [dicts[1].pop(key) for key in ("height", "width")],
}  # fmt: skip


@pytest.mark.parametrize("case", NO_FAULTS)
def test_what_is_no_fault(make, case):
    make(change=NO_FAULTS[case])
    assert found("things_train") == []


def test_findings_about_a_set(make):
    make(change=append(iscrowd=1, segmentation=None), thing_classes=["ball", "ring", "ghost"])
    crowds, ghost = found("things_train")
    assert (crowds.severity, crowds.what) == (NOTE, "crowds") and crowds.detail.startswith("1 ")
    assert (ghost.severity, ghost.what) == (WARNING, "classes without a label")
    assert ghost.detail == "ghost, in things_train"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"GIF89"])
def test_a_photo_that_cannot_be_read(make, damage):
    dicts = make()
    file = dicts[2]["file_name"]
    with open(file, "rb") as f:
        content = f.read()
    with open(file, "wb") as f:
        f.write(damage(content))
    (finding,) = found("things_train")
    assert (finding.severity, finding.what) == (ERROR, "photo cannot be read")
    assert finding.file == file and "save it again" in finding.fix and file not in finding.detail


def fail_on_the_second(entry):
    if entry["image_id"] == 1:
        raise D2SSLError("masks/1.png: cannot be read; restore the file")
    return entry


def test_labels_that_cannot_be_read(make):
    dicts = make(decode=fail_on_the_second)
    (finding,) = found("things_train")
    assert (finding.severity, finding.what) == (ERROR, "labels cannot be read")
    assert finding.file == dicts[1]["file_name"]
    assert (finding.detail, finding.fix) == ("masks/1.png: cannot be read", "restore the file")


def test_a_photo_twice_in_a_set(make, tmp_path):
    dicts = make(seeds=(0, 1, 2, 3))
    picture(1).resize((96, 72), Image.LANCZOS).save(dicts[3]["file_name"], "JPEG", quality=70)
    kinds = {x.what: x for x in found("things_train")}
    twice = kinds.pop("photo twice in a set")
    assert (twice.severity, twice.file) == (WARNING, dicts[3]["file_name"])
    assert twice.other == dicts[1]["file_name"]
    assert list(kinds) == ["photo has another size than its labels say"]
    make("listed_train", change=lambda dicts: dicts.append(dicts[0]))
    (finding,) = found("listed_train")
    assert finding.what == "photo twice in a set" and finding.detail == "listed twice"


def severities(*names, **options):
    return [(x.severity, x.what.split(" in ")[0].rstrip(",")) for x in found(*names, **options)]


def test_the_same_photo_in_two_sets(make, tmp_path):
    make()
    dicts = make("things_val", seeds=(1, 5))
    train, val = check("things_train", "things_val")
    (finding,) = val.findings
    assert train.findings == [] and finding.severity == ERROR
    assert finding.what == "the same photo in things_train and things_val"
    assert finding.file == dicts[0]["file_name"]
    assert finding.other.endswith("things_train/1.png")
    # Sets whose names say nothing are taken for splits; the config may say which one tests.
    make("things_one"), make("things_two", seeds=(2, 8))
    assert severities("things_one", "things_two") == [(ERROR, "the same photo")]
    assert (
        severities("things_one", "things_train", test=["things_one"])
        == [(ERROR, "the same photo")] * 3
    )
    both = severities("things_one", "things_train", test=["things_one", "things_train"])
    assert both == [(WARNING, "test or dev sets that share photos")]
    # Two parts of a training set, and a part of a set:
    known = severities("things_val", "things_one", "things_two")
    assert known == [(ERROR, "the same photo"), (NOTE, "sets that share photos")]
    assert severities("things_one", "things_one@2") == [(NOTE, "sets that share photos")]


def test_unlabelled_photos(make, tmp_path):
    make(), make("things_val", seeds=(3, 4))
    register_image_folder("pool", str(tmp_path / "things_train"))
    (checked,) = check("pool")
    assert checked.kind == "" and checked.findings == []
    assert severities("things_train", "things_val", "pool") == [(NOTE, "sets that share photos")]
    MetadataCatalog.get("pool").set(thing_classes=["cat"])  # of no label: they need not agree
    register_image_folder("more", str(tmp_path / "things_train"))
    assert severities("pool", "more") == [(NOTE, "sets that share photos")]
    register_image_folder("tested", str(tmp_path / "things_val"))
    assert (
        severities("things_val", "tested") == [(WARNING, "the same photo, once without labels")] * 2
    )


def test_sets_with_other_classes(make):
    make(), make("things_val", seeds=(3, 4), thing_classes=["ring", "ball"])
    assert severities("things_train", "things_val") == [(ERROR, "sets with different classes")]


def test_classes_of_photos(make, tmp_path):
    def change(dicts):
        for i, entry in enumerate(dicts):
            del entry["annotations"]
            entry["category_id"] = (0, 1, 0)[i]

    make(change=change, thing_classes=None, classes=["ball", "ring"])
    (checked,) = check("things_train")
    assert (checked.kind, checked.findings) == ("photo", [])
    assert checked.class_counts() == [2, 1]
    make("wrong_train", change=change, thing_classes=None, classes=["ball"])
    assert severities("wrong_train") == [(ERROR, "class that does not exist")]


def test_classes_of_pixels(make, tmp_path):
    def change(dicts):
        for i, entry in enumerate(dicts):
            del entry["annotations"]
            ids = np.full((96, 128), 255, np.uint8)
            ids[:9] = i
            path = str(tmp_path / f"labels{i}.png")
            Image.fromarray(ids if i != other else ids[:50]).save(path)
            entry["sem_seg_file_name"] = path

    other = None
    classes = {"thing_classes": None, "ignore_label": 255}
    make(change=change, stuff_classes=["a", "b", "c"], **classes)
    (checked,) = check("things_train")
    assert (checked.kind, checked.findings) == ("pixels", [])
    assert checked.class_counts() == [1, 1, 1]
    make("few_train", change=change, stuff_classes=["a", "b"], **classes)
    assert severities("few_train") == [(ERROR, "class that does not exist")]
    other = 0
    make("cut_train", change=change, stuff_classes=["a", "b", "c"], **classes)
    assert (ERROR, "labels cannot be read") in severities("cut_train")


def test_several_processes_find_the_same(make):
    make(change=FAULTS["twice"][0])
    (alone,) = check_sets(["things_train"], 96, 200, num_workers=0)
    (together,) = check_sets(["things_train"], 96, 200, num_workers=2)
    assert together.findings == alone.findings and len(alone.findings) == 1
    assert together.labels == alone.labels
    assert [x.hash for x in together.looks] == [x.hash for x in alone.looks]


def test_bad_input(make):
    make(), make("none_train", change=lambda dicts: dicts.clear())
    with pytest.raises(D2SSLError, match="empty"):
        check("none_train")
    with pytest.raises(D2SSLError, match="did you mean 'things_train'"):
        check("thing_train")


def test_real_sets_are_safe(shared):
    root = shared / "data" / "balloon"
    register_balloon("real_balloon", str(root))
    names = ["real_balloon_train@12", "real_balloon_val@6"]
    for one in check_sets(names, 512, 800, num_workers=0):
        assert not [x for x in one.findings if x.severity == ERROR]
