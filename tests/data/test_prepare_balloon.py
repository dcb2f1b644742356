"""datasets/prepare_balloon.py, with small files in place of the real ones."""

import importlib.util
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from d2ssl.errors import D2SSLError

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "prepare_balloon.py"
FILES = {
    "train/a_k.jpg": b"photo a",
    "train/via_region_data.json": b"{}",
    "val/b.jpg": b"photo b",
    "val/via_region_data.json": b"{ }",
}


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_balloon", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CHECKSUM", module.checksum(FILES))
    return module


def write_folder(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def write_zip(file, files=FILES, prefix="balloon/"):
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in files.items():
            opened.writestr(prefix + name, content)
    return str(file)


def found(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_from_folder(script, tmp_path):
    source = write_folder(tmp_path / "source", {**FILES, "train/notes.txt": b"", "x.jpg": b""})
    assert script.prepare(str(tmp_path / "root"), source) == str(tmp_path / "root/balloon")
    assert found(tmp_path / "root") == {f"balloon/{k}": v for k, v in FILES.items()}
    # The folder above balloon/ will do as well, and a set that is in place needs no source.
    script.prepare(str(tmp_path / "root2"), str(tmp_path / "root"))
    script.prepare(str(tmp_path / "root2"))
    assert found(tmp_path / "root2") == found(tmp_path / "root")


def test_from_zip(script, tmp_path):
    extra = {**FILES, "train/.DS_Store": b"x", "../__MACOSX/train/._a_k.jpg": b"x"}
    with pytest.raises(D2SSLError, match="not the published Balloon set .5 of"):
        script.prepare(str(tmp_path / "root"), write_zip(tmp_path / "b.zip", extra))
    del extra["../__MACOSX/train/._a_k.jpg"]
    archive = write_zip(tmp_path / "b.zip", extra)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("__MACOSX/balloon/train/._a_k.jpg", b"x")
    script.prepare(str(tmp_path / "root"), archive)
    assert found(tmp_path / "root/balloon") == FILES


@pytest.mark.parametrize("evil", ["../../evil.jpg", "../../../train/evil.jpg", "/train/evil.jpg"])
def test_zip_that_climbs_out(script, tmp_path, evil):
    archive = write_zip(tmp_path / "deep.zip", {**FILES, evil: b"evil"}, prefix="")
    root = tmp_path / "x" / "y" / "root"
    if evil == "../../evil.jpg":  # matches nothing that belongs to the set
        script.prepare(str(root), archive)
    else:
        with pytest.raises(D2SSLError, match="not the published"):
            script.prepare(str(root), archive)
    assert not list(tmp_path.rglob("evil*")) and not Path("/train/evil.jpg").exists()


@pytest.mark.parametrize("change", [{"train/a_k.jpg": b"other"}, {"val/c.jpg": b"more"}])
def test_other_content_is_refused_and_nothing_written(script, tmp_path, change):
    for source in (
        write_folder(tmp_path / "source", {**FILES, **change}),
        write_zip(tmp_path / "b.zip", {**FILES, **change}),
    ):
        with pytest.raises(D2SSLError, match="is not the published Balloon set"):
            script.prepare(str(tmp_path / "root"), source)
    assert not (tmp_path / "root").exists()


def test_files_cannot_swap_names_or_borders(script):
    a = {"train/a.jpg": b"1", "train/b.jpg": b"2"}
    assert script.checksum(a) != script.checksum({"train/a.jpg": b"2", "train/b.jpg": b"1"})
    assert script.checksum({"train/a.jpg": b"12"}) != script.checksum({"train/a.jpg1": b"2"})
    assert script.checksum(a) == script.checksum(dict(reversed(a.items())))


def test_users_own_folder_is_not_overwritten(script, tmp_path):
    write_folder(tmp_path / "root/balloon", {"train/mine.jpg": b"mine"})
    with pytest.raises(D2SSLError, match="root/balloon: is not the published.*move it away"):
        script.prepare(str(tmp_path / "root"), write_folder(tmp_path / "source"))
    assert found(tmp_path / "root/balloon") == {"train/mine.jpg": b"mine"}


@pytest.mark.parametrize("file", ["root/balloon", "root"])
def test_users_own_file_is_not_overwritten(script, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(D2SSLError, match="root/balloon: .*; name another"):
        script.prepare(str(tmp_path / "root"), write_folder(tmp_path / "source"))
    assert (tmp_path / file).read_text() == "mine"


def test_nothing_is_downloaded_for_a_folder_that_cannot_be_written(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "URL", (tmp_path / "never_asked_for.zip").as_uri())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(D2SSLError, match="root/balloon: cannot be written"):
        script.prepare(str(tmp_path / "file" / "root"))


def test_damaged_or_missing_source(script, tmp_path):
    with pytest.raises(D2SSLError, match="gone.zip: no such folder or zip"):
        script.prepare(str(tmp_path / "root"), str(tmp_path / "gone.zip"))
    whole = Path(write_zip(tmp_path / "b.zip")).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:200])
    with pytest.raises(D2SSLError, match="b.zip: is no intact zip"):
        script.prepare(str(tmp_path / "root"), str(tmp_path / "b.zip"))
    flipped = whole.replace(b"photo a", b"photo x")  # the directory's CRC no longer fits
    (tmp_path / "b.zip").write_bytes(flipped)
    with pytest.raises(D2SSLError, match="b.zip: is no intact zip"):
        script.prepare(str(tmp_path / "root"), str(tmp_path / "b.zip"))
    assert not (tmp_path / "root").exists()


def test_download(script, tmp_path, monkeypatch):
    archive = Path(write_zip(tmp_path / "b.zip"))
    monkeypatch.setattr(script, "URL", archive.as_uri())
    script.prepare(str(tmp_path / "root"))
    assert found(tmp_path / "root/balloon") == FILES
    monkeypatch.setattr(script, "URL", (tmp_path / "gone.zip").as_uri())
    with pytest.raises(D2SSLError, match="gone.zip: cannot be downloaded .*--from"):
        script.prepare(str(tmp_path / "root2"))
    assert not (tmp_path / "root2").exists()


def test_command_line(tmp_path):
    start = time.monotonic()
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    run = {"capture_output": True, "text": True, "env": environment}
    helped = subprocess.run([sys.executable, str(SCRIPT), "--help"], **run)
    assert helped.returncode == 0 and "--from" in helped.stdout
    options = ["--root", str(tmp_path / "root"), "--from", str(tmp_path / "gone")]
    failed = subprocess.run([sys.executable, str(SCRIPT), *options], **run)
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert time.monotonic() - start < 10  # torch is not imported for this


def test_real_set_has_the_published_checksum(shared):
    spec = importlib.util.spec_from_file_location("prepare_balloon_real", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.checksum(module._read_folder(str(shared / "data/balloon"))) == module.CHECKSUM
