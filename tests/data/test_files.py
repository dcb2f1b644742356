import os

import pytest

from d2ssl.data.datasets.files import Notes, locate
from d2ssl.errors import D2SSLError


@pytest.mark.skipif(os.sep == "\\", reason="there it is no part of a name")
def test_backslashes_of_windows(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/0.jpg", "a\\1.jpg", "a/1.jpg"):
        (tmp_path / name).touch()
    names = ["a\\0.jpg", "a\\1.jpg", "a/1.jpg"]  # the second is there under this very name
    expected = [str(tmp_path / name) for name in ("a/0.jpg", "a\\1.jpg", "a/1.jpg")]
    assert locate(str(tmp_path), names, "labels.json") == expected
    for name, message in (("..\\0.jpg", "outside"), ("a\\2.jpg", "1 of 1 photos are missing")):
        with pytest.raises(D2SSLError, match=message):
            locate(str(tmp_path), [name], "labels.json")


def test_what_was_mended_is_said_once(caplog):
    for _ in range(3):  # a set is read again at each use
        notes = Notes("labels.json")
        notes.add("photos have no region", "a.png"), notes.add("photos have no region", "b.png")
        notes.log()
    assert caplog.messages == ["labels.json: 2 photos have no region (first: a.png)"]
