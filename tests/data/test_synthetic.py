import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
import pytest

from d2ssl.data.datasets import synthetic
from d2ssl.data.datasets.synthetic import draw_scene, trace, write_balloons
from d2ssl.data.datasets.via import load_via_json
from d2ssl.errors import D2SSLError

SIZE = (96, 128)
DATASETS = Path(__file__).resolve().parents[2] / "datasets"


def rasterize(annotations, size):
    mask = np.zeros(size, bool)
    for annotation in annotations:
        rles = pycocotools.mask.frPyObjects(annotation["segmentation"], *size)
        mask |= pycocotools.mask.decode(pycocotools.mask.merge(rles)).astype(bool)
    return mask


def load(root, split):
    return load_via_json(str(root / split / "via_region_data.json"), str(root / split))


def content(root):
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(root.rglob("*"))
        if f.is_file()
    }


def test_layout_counts_and_variety(demo_root, caplog):
    root = demo_root / "balloon_demo"
    train, val = load(root, "train"), load(root, "val")
    assert (len(train), len(val)) == (8, 4)
    assert not caplog.records  # nothing to mend in our own annotations
    sizes = [(d["height"], d["width"]) for d in train]
    assert sizes.count((96, 128)) == 6 and sizes.count((128, 96)) == 2
    assert all(1 <= len(d["annotations"]) <= 8 for d in train + val)
    files = {hash for name, hash in content(root).items() if name.endswith(".jpg")}
    assert len(files) == 12  # no picture twice, in train or val


def test_one_seed_draws_one_set(tmp_path, demo_root):
    write_balloons(str(tmp_path / "again"), 8, 4, SIZE)
    assert content(tmp_path / "again") == content(demo_root / "balloon_demo")
    write_balloons(str(tmp_path / "other"), 8, 4, SIZE, seed=1)
    pictures = set(content(tmp_path / "other").values())
    assert not pictures & set(content(demo_root / "balloon_demo").values())


def test_more_photos_keep_the_first_ones(tmp_path, demo_root):
    write_balloons(str(tmp_path / "more"), 3, 1, SIZE)
    large = content(demo_root / "balloon_demo")
    small = content(tmp_path / "more")
    assert all(large[name] == small[name] for name in small if name.endswith(".jpg"))


def test_polygons_cover_the_pixels_that_were_painted(monkeypatch, tmp_path):
    """
    Independent of the drawing's own masks: the same scenes drawn twice with the balloons in
    other colours differ exactly where a balloon is seen.
    """
    draw_colour = synthetic.balloon_colour  # called all the same, so that the draws stay in step
    monkeypatch.setattr(synthetic, "_draw_post", lambda generator, canvas: None)
    for dye in (0, 255):
        monkeypatch.setattr(
            synthetic, "balloon_colour", lambda g, dye=dye: (draw_colour(g), (dye,) * 3)[1]
        )
        write_balloons(str(tmp_path / str(dye)), 12, 1, SIZE)
    for dark, bright in zip(load(tmp_path / "0", "train"), load(tmp_path / "255", "train")):
        assert dark["annotations"] == bright["annotations"]
        pictures = [cv2.imread(d["file_name"]).astype(int) for d in (dark, bright)]
        painted = np.abs(pictures[0] - pictures[1]).max(axis=2) > 45
        annotated = rasterize(dark["annotations"], painted.shape)
        overlap = (painted & annotated).sum() / (painted | annotated).sum()
        assert overlap > 0.85, dark["file_name"]


def test_each_polygon_tells_its_own_balloon():
    for seed in range(6):
        image, masks = draw_scene(np.random.RandomState(seed), SIZE)
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        assert sum(mask.astype(int) for mask in masks).max() == 1  # each pixel has one owner
        for mask in masks:
            outline = trace(mask)
            assert 3 <= len(outline) <= 40
            polygon = {"segmentation": [(outline + 0.5).ravel().tolist()]}
            seen = cv2.resize(mask.astype(np.float32), SIZE[::-1], interpolation=cv2.INTER_AREA)
            seen = seen >= 0.5
            told = rasterize([polygon], SIZE)
            assert (seen & told).sum() / (seen | told).sum() > 0.75  # small ones are 14 pixels
            if seen.sum() > 500:
                assert (seen & told).sum() / (seen | told).sum() > 0.92


def test_trace_of_a_disc():
    y, x = np.mgrid[:200, :200] + 0.5
    disc = (x - 100) ** 2 + (y - 80) ** 2 < 60**2  # in the photo: centre 50, 40, radius 30
    outline = trace(disc) + 0.5
    distance = np.linalg.norm(outline - [50, 40], axis=1)
    assert np.abs(distance - 30).max() < 1.0
    assert 10 <= len(outline) <= 40


def test_second_call_does_nothing_and_other_arguments_rewrite(tmp_path):
    root = tmp_path / "demo"
    write_balloons(str(root), 1, 1, SIZE)
    before = root.stat().st_mtime_ns, content(root)
    write_balloons(str(root), 1, 1, SIZE)
    assert (root.stat().st_mtime_ns, content(root)) == before
    write_balloons(str(root), 2, 1, SIZE)
    assert len(load(root, "train")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(D2SSLError, match="not written by this program"):
        write_balloons(str(tmp_path), 1, 1, SIZE)
    with pytest.raises(D2SSLError, match="mine.txt: exists and is no folder"):
        write_balloons(str(tmp_path / "mine.txt"), 1, 1, SIZE)
    assert content(tmp_path).keys() == {"mine.txt"}


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw_scene(*args)

    monkeypatch.setattr(synthetic, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_balloons(str(tmp_path / "demo"), 3, 1, SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [(0, 1, SIZE), (1, 0, SIZE), (1, 1, (32, 200)), (1, 1, SIZE, -1)]
)
def test_arguments_out_of_range(tmp_path, arguments):
    with pytest.raises(D2SSLError, match="at least|seed"):
        write_balloons(str(tmp_path / "demo"), *arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path):
    command = [sys.executable, str(DATASETS / "make_balloon_demo.py"), "--root", str(tmp_path)]
    options = ["--num-train", "2", "--num-val", "1", "--size", "96", "128"]
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run(command + options, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "balloon_demo_train" in done.stdout, done.stderr
    assert len(load(tmp_path / "balloon_demo", "train")) == 2
