from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets.catalog import listed
from d2ssl.data.datasets.groceries import (
    FREIBURG_CLASSES,
    register_freiburg_groceries,
    register_grocery_store,
)
from d2ssl.errors import D2SSLError

# Published labels: they are not in alphabetical order.
FREIBURG_LABELS = {"BEANS": 15, "CANDY": 0, "FISH": 24, "JUICE": 1, "TOMATO_SAUCE": 23, "WATER": 21}

CLASSES_CSV = """\
Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),\
Iconic Image Path (str)
Golden-Delicious,0,Apple,0,/iconic/Golden-Delicious.jpg
Granny-Smith,1,Apple,0,/iconic/Granny-Smith.jpg
Avocado,2,Avocado,1,/iconic/Avocado.jpg
"""
STORE_LIST = """\
train/Fruit/Avocado/Avocado_001.jpg, 2, 1
train/Fruit/Apple/Granny-Smith/Granny-Smith_001.jpg, 1, 0
"""


def put(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30)).save(root / name)


@pytest.fixture
def freiburg(tmp_path):
    """Two photos a class; the train list names the first twice, the test list the second."""
    lists = {"train0": [], "test0": []}
    for name, label in FREIBURG_LABELS.items():
        first, second = (f"{name}/{name}{i:04d}.png" for i in (0, 7))
        put(tmp_path / "images", first)
        put(tmp_path / "images", second)
        lists["train0"] += [f"{first} {label}"]
        lists["test0"] += [f"{second} {label}"]
    (tmp_path / "splits").mkdir()
    for name, lines in lists.items():
        lines = lines + lines[:2] if name == "train0" else lines
        (tmp_path / f"splits/{name}.txt").write_text("\n".join(lines) + "\n")
    register_freiburg_groceries("test_freiburg", tmp_path)
    return tmp_path


def test_freiburg_takes_the_published_labels_and_each_photo_once(freiburg):
    for split, number in (("train0", 0), ("test0", 7)):
        assert DatasetCatalog.get(f"test_freiburg_{split}") == [
            {
                "file_name": str(freiburg / f"images/{name}/{name}{number:04d}.png"),
                "image_id": i,
                "category_id": label,
                "height": 30,
                "width": 20,
            }
            for i, (name, label) in enumerate(FREIBURG_LABELS.items())
        ]
    classes = MetadataCatalog.get("test_freiburg_test4").classes
    assert {name: classes.index(name) for name in FREIBURG_LABELS} == FREIBURG_LABELS
    assert len(set(classes)) == len(FREIBURG_CLASSES) == 25
    unlabeled = DatasetCatalog.get("test_freiburg_unlabeled")
    assert len(unlabeled) == 12 and "category_id" not in unlabeled[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("BEANS/BEANS0000.png", "'BEANS/BEANS0000.png' is not 'CLASS/PHOTO.png LABEL'"),
        ("BEANS/BEANS0000.png fifteen", "is not 'CLASS/PHOTO.png LABEL'"),
        ("BEER/BEER0000.png 15", "is not 'CLASS/PHOTO.png LABEL'"),
        ("BEANS/BEANS0000.png 0", "should have the label 15"),
        ("BEANS/BEANS9999.png 15", "1 of 2 photos are missing, the first is .*BEANS9999.png"),
        ("BEANS/../../secret.png 15", "lies outside"),
    ],
)
def test_freiburg_list_that_cannot_be_right(freiburg, line, message):
    (freiburg / "splits/test0.txt").write_text(f"BEANS/BEANS0007.png 15\n{line}\n")
    with pytest.raises(D2SSLError, match=f"splits/test0.txt: .*{message}"):
        DatasetCatalog.get("test_freiburg_test0")


def test_freiburg_that_is_not_there(freiburg, tmp_path):
    with pytest.raises(D2SSLError, match="splits/train1.txt: no such file"):
        DatasetCatalog.get("test_freiburg_train1")
    (freiburg / "splits/test0.txt").write_text("\n")
    with pytest.raises(D2SSLError, match="names no photo"):
        DatasetCatalog.get("test_freiburg_test0")
    register_freiburg_groceries("test_freiburg", tmp_path / "gone")
    for split in ("train0", "unlabeled"):
        with pytest.raises(D2SSLError, match="gone/images: no such folder"):
            DatasetCatalog.get(f"test_freiburg_{split}")


@pytest.fixture
def store(tmp_path):
    (tmp_path / "classes.csv").write_text(CLASSES_CSV)
    (tmp_path / "train.txt").write_text(STORE_LIST)
    for line in STORE_LIST.splitlines():
        put(tmp_path, line.split(",")[0])
    register_grocery_store("test_store", tmp_path)
    return tmp_path


def test_store_has_fine_and_coarse_classes(store):
    avocado, apple = DatasetCatalog.get("test_store_train")
    assert avocado == {
        "file_name": str(store / "train/Fruit/Avocado/Avocado_001.jpg"),
        "image_id": 0,
        "category_id": 2,
        "coarse_category_id": 1,
        "height": 30,
        "width": 20,
    }
    assert (apple["category_id"], apple["coarse_category_id"]) == (1, 0)
    metadata = MetadataCatalog.get("test_store_train")
    assert metadata.classes == ["Golden-Delicious", "Granny-Smith", "Avocado"]
    assert metadata.coarse_classes == ["Apple", "Avocado"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("train/a.jpg, 2", "'train/a.jpg, 2' is not 'path, fine id, coarse id'"),
        ("train/a.jpg, two, 1", "is not 'path, fine id, coarse id'"),
        ("train/a.jpg, 3, 1", "has ids that classes.csv does not have together"),
        ("train/a.jpg, 2, 0", "has ids that classes.csv does not have together"),
        ("train/a.jpg, 2, 1", "1 of 3 photos are missing, the first is .*train/a.jpg"),
        ("../a.jpg, 2, 1", "lies outside"),
        (STORE_LIST.splitlines()[0], "is listed twice"),
    ],
)
def test_store_list_that_cannot_be_right(store, line, message):
    (store / "train.txt").write_text(f"{STORE_LIST}{line}\n")
    with pytest.raises(D2SSLError, match=f"train.txt: .*{message}"):
        DatasetCatalog.get("test_store_train")


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("Class ID (int),Coarse", "Id,Coarse", r"has no column Class ID \(int\)"),
        ("Smith,1", "Smith,one", "Granny-Smith has an id that is no number"),
        ("Smith,1", "Smith,0", "Granny-Smith has an id of another class"),
        ("Avocado,1", "Avocado,0", "Avocado has an id of another class"),
        ("Smith,1", "Smith,9", "lacks some ids from 0 to 9"),
        ("Avocado,2,Avocado,1,/iconic/Avocado.jpg", "Avocado,2", "is cut short"),
    ],
)
def test_store_classes_that_cannot_be_right(store, before, after, message):
    assert CLASSES_CSV.count(before) == 1
    (store / "classes.csv").write_text(CLASSES_CSV.replace(before, after))
    with pytest.raises(D2SSLError, match=f"classes.csv: .*{message}"):
        DatasetCatalog.get("test_store_train")


def test_store_that_is_not_there(store):
    with pytest.raises(D2SSLError, match="val.txt: no such file"):
        DatasetCatalog.get("test_store_val")
    (store / "classes.csv").unlink()
    with pytest.raises(D2SSLError, match="classes.csv: no such file"):
        DatasetCatalog.get("test_store_train")
    register_grocery_store("test_store", store / "gone")
    with pytest.raises(D2SSLError, match="gone: no such folder"):
        DatasetCatalog.get("test_store_train")


@pytest.mark.parametrize("split, photos", [("train", 1425), ("test", 844)])
def test_real_store(shared, split, photos):
    register_grocery_store("real_store", str(shared / "data" / "grocery_store"))
    dicts = listed(f"real_store_{split}")
    metadata = MetadataCatalog.get(f"real_store_{split}")
    assert len(dicts) == photos
    assert len(metadata.classes) == 81 and len(metadata.coarse_classes) == 43
    for entry in dicts:
        # Photos lie in a folder of their class, and that in one of the coarse class, if another.
        fine, coarse = Path(entry["file_name"]).parts[-2], Path(entry["file_name"]).parts[-3]
        assert metadata.classes[entry["category_id"]] == fine
        title = metadata.coarse_classes[entry["coarse_category_id"]]
        assert coarse in (title, "Fruit", "Vegetables")
