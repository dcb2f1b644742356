import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ssl.data.datasets.imagenette import TITLES, register_imagenette
from d2ssl.errors import D2SSLError

WOOF = {  # ImageNet's own ids
    "n02086240": "Shih-Tzu",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
}
NETTE = {"n01440764": "tench", "n02102040": "English springer", "n03888257": "parachute"}


def put(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (20, 30)).save(folder / name)


def test_imagewang_val_has_some_of_its_classes_and_unsup_none(tmp_path):
    for wnid in (*WOOF, *NETTE):
        put(tmp_path / "train" / wnid, f"{wnid}_1.JPEG", f"{wnid}_2.JPEG")
    for wnid in WOOF:
        put(tmp_path / "val" / wnid, f"{wnid}_3.JPEG")
    put(tmp_path / "unsup", "b.JPEG", "a.JPEG")
    register_imagenette("test_wang", tmp_path)
    train, val = (DatasetCatalog.get(f"test_wang_{split}") for split in ("train", "val"))
    titles = ["tench", *WOOF.values(), "English springer", "parachute"]
    for split in ("train", "val"):
        assert MetadataCatalog.get(f"test_wang_{split}").classes == titles
    assert [entry["category_id"] for entry in train] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [entry["category_id"] for entry in val] == [1, 2, 3]
    assert val[0]["file_name"] == str(tmp_path / "val/n02086240/n02086240_3.JPEG")
    assert DatasetCatalog.get("test_wang_unsup") == [
        {"file_name": str(tmp_path / "unsup" / name), "image_id": i, "height": 30, "width": 20}
        for i, name in enumerate(("a.JPEG", "b.JPEG"))
    ]


def test_a_set_without_unsup_and_with_a_class_of_ones_own(tmp_path):
    put(tmp_path / "train/n01440764", "1.JPEG")
    put(tmp_path / "train/n09999999", "1.JPEG")
    register_imagenette("test_nette", tmp_path)
    assert len(DatasetCatalog.get("test_nette_train")) == 2
    assert MetadataCatalog.get("test_nette_train").classes == ["tench", "n09999999"]
    for split in ("val", "unsup"):
        with pytest.raises(D2SSLError, match=f"{split}: no such folder"):
            DatasetCatalog.get(f"test_nette_{split}")


def test_there_is_one_name_for_each_of_twenty_ids():
    assert len(TITLES) == len(set(TITLES.values())) == 20
