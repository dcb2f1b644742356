import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from d2ssl.data.datasets import register_image_folder
from d2ssl.data.datasets.catalog import listed
from d2ssl.errors import D2SSLError


def test_photos_of_all_subfolders_in_order(tmp_path):
    for name in ("b.JPG", "a/z.jpeg", "a/deep/x.png", "c.webp", ".hidden.jpg", ".thumbs/t.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    register_image_folder("test_folder", str(tmp_path))
    names = ["a/deep/x.png", "a/z.jpeg", "b.JPG", "c.webp"]
    assert DatasetCatalog.get("test_folder") == [
        {"file_name": str(tmp_path / name), "image_id": i, "height": 30, "width": 20}
        for i, name in enumerate(names)
    ]


def test_linked_folders_count_once_and_do_not_lead_in_a_circle(tmp_path):
    for name in ("outside/x.jpg", "set/own/y.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    links = {"linked": "outside", "own/up": "set", "a/b": "outside"}
    for link, target in links.items():
        (tmp_path / "set" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    register_image_folder("test_folder", str(tmp_path / "set"))
    files = [entry["file_name"] for entry in listed("test_folder")]
    assert files == [str(tmp_path / "set" / name) for name in ("a/b/x.jpg", "own/y.jpg")]


def test_bad_folders_are_named_when_used(tmp_path):
    register_image_folder("test_folder", str(tmp_path / "gone"))
    with pytest.raises(D2SSLError, match="gone: no such folder"):
        DatasetCatalog.get("test_folder")
    (tmp_path / "notes.txt").write_text("no photo")
    register_image_folder("test_folder", tmp_path)
    with pytest.raises(D2SSLError, match="no photo in it"):
        DatasetCatalog.get("test_folder")
    (tmp_path / "bad.jpg").write_text("no photo")
    assert len(listed("test_folder")) == 1  # photos are not opened before they are wanted
    with pytest.raises(D2SSLError, match="bad.jpg: cannot be read"):
        DatasetCatalog.get("test_folder")
