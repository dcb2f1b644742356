import os

import pytest

from d2ssl.atomic import atomic_folder, atomic_open
from d2ssl.errors import D2SSLError


def test_new_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "target"
    with atomic_folder(str(target)) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("new")
        assert not target.exists()
    assert (target / "x").read_text() == "new" and os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize(
    "error, seen", [(OSError(28, "disk full"), D2SSLError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_after_an_error_the_old_one_is_there_and_nothing_else(tmp_path, error, seen):
    target = tmp_path / "target"
    target.mkdir()
    (target / "x").write_text("old")
    with pytest.raises(seen), atomic_folder(str(target)) as folder:
        with open(os.path.join(folder, "x"), "w") as f:
            f.write("new")
        raise error
    assert (target / "x").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_after_an_error_no_folder_is_left_above_it(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_folder(str(tmp_path / "mine" / "a" / "b" / "c")):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["mine"] and os.listdir(tmp_path / "mine") == []


def test_replaces(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(str(tmp_path / "target")) as folder:
            os.mkdir(os.path.join(folder, name))
    assert os.listdir(tmp_path / "target") == ["second"] and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("place, message", [("", "no folder"), ("sub", "cannot be written")])
def test_a_file_in_the_folders_place_is_kept(tmp_path, place, message):
    file = tmp_path / "file"
    file.write_text("mine")
    target = str(file / place)
    with pytest.raises(D2SSLError, match=f"{target}: .*{message}.*; take that"):
        with atomic_folder(target, "take that"):
            pytest.fail("began to write")
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["file"]


def test_file_appears_whole_with_the_usual_permissions(tmp_path):
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        with atomic_open(str(path)) as file:
            file.write("new")
            file.flush()
            assert not path.exists()
    finally:
        os.umask(before)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(KeyboardInterrupt), atomic_open(str(path)) as file:
        file.write("newer")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x"]
