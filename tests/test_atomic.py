import os

import pytest

from d2ssl.atomic import atomic_folder


def test_new_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "target"
    with atomic_folder(str(target)) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("new")
        assert not target.exists()
    assert (target / "x").read_text() == "new" and os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_one_is_there_and_nothing_else(tmp_path, error):
    target = tmp_path / "target"
    target.mkdir()
    (target / "x").write_text("old")
    with pytest.raises(error), atomic_folder(str(target)) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("new")
        raise error
    assert (target / "x").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_replaces(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(str(tmp_path / "target")) as folder:
            os.mkdir(os.path.join(folder, name))
    assert os.listdir(tmp_path / "target") == ["second"] and os.listdir(tmp_path) == ["target"]
