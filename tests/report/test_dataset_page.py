"""The page about data sets and the command that writes it."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from d2ssl.config import load_cfg
from d2ssl.data.checks import check_sets
from d2ssl.data.datasets import register_balloon, register_image_folder
from d2ssl.data.datasets.catalog import register_dataset
from d2ssl.report.dataset_page import size_ratio, summary, write_dataset_page
from tests.conftest import REPO

SCRIPT = REPO / "tools" / "check_dataset.py"
SETTINGS = ["SSL.DATASETS", ("any",), "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 200,
            "INPUT.MIN_SIZE_TRAIN", (96,),
            "SSL.INPUT.VIEW_SIZE", 64, "SSL.INPUT.CROP_SCALE", (1.0, 1.0)]  # fmt: skip


@pytest.fixture
def catalog():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def register(folder, name, names=("a.png", "b.png"), change=None, **metadata):
    """Photos of 128 x 96 px with one object of 60 x 60 each."""
    folder.mkdir(exist_ok=True)
    dicts = []
    for i, file in enumerate(names):
        cells = np.random.default_rng(sum(map(ord, file))).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(cells).resize((128, 96), Image.BICUBIC).save(folder / file)
        label = {"bbox": [20, 20, 80, 80], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
                 "segmentation": [[20, 20, 80, 20, 80, 80, 20, 80]]}  # fmt: skip
        dicts.append({"file_name": str(folder / file), "image_id": i, "height": 96, "width": 128,
                      "annotations": [label]})  # fmt: skip
    if change:
        change(dicts)
    register_dataset(name, lambda: dicts, **{"thing_classes": ["ball"], **metadata})


def page_of(tmp_path, *names, opts=()):
    cfg = load_cfg("", [*SETTINGS, *opts])
    size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    sets = check_sets(names, *size, num_workers=0)
    path = tmp_path / "out" / "page.html"
    write_dataset_page(str(path), sets, cfg)
    return path.read_text(), summary(sets, cfg), sets, cfg


def rows_of(page):
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page.split("<tr>")]


def test_a_clean_set(tmp_path, catalog):
    register(tmp_path / "p", "clean_train")
    page, text, (checked,), cfg = page_of(tmp_path, "clean_train")
    assert "Safe to train on" in page and "Safe to train on" in text
    rows = rows_of(page)
    assert ["clean_train", "2", "2", "2", "1", "0", *["128x96"] * 3] in rows
    assert ["ball", "2"] in rows
    # A view of 64 px shows all of the photo: 60 px become 60 * 64 / sqrt(96 * 128) = 34.6.
    assert size_ratio(checked, cfg) == pytest.approx(np.sqrt(96 * 128) / 64)
    assert "1.7 times smaller" in page and "median 35 px against 60 px" in text
    assert "SSL.INPUT.VIEW_SIZE 96, at 2.2 times the pixels" in text
    assert ["in the photo", "60", "60", "60", "0%", "100%", "0%"] in rows
    assert ["P2: 0 to 112 px", "100%", "100%"] in rows
    assert page.count("<img ") == 1 + 2  # a plot and the photos
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "size, said",
    [
        (32, "3.5 times smaller"),  # 60 * 32 / 110.9 = 17.3
        (96, "about as large"),
        (128, "about as large"),
        (224, "2.0 times larger"),
    ],
)
def test_the_mismatch_in_a_sentence(tmp_path, catalog, size, said):
    register(tmp_path / "p", "clean_train")
    _, text, _, _ = page_of(tmp_path, "clean_train", opts=["SSL.INPUT.VIEW_SIZE", size])
    assert said in text and f"in crops of {size} px" in text
    assert ("would be alike with SSL.INPUT.VIEW_SIZE" in text) == (said != "about as large")


def test_without_pretraining(tmp_path, catalog):
    register(tmp_path / "p", "clean_train")
    page, text, _, _ = page_of(tmp_path, "clean_train", opts=["SSL.ENABLED", False])
    assert "retraining" not in page and "retraining" not in text
    assert ["P2: 0 to 112 px", "100%"] in rows_of(page)


def test_findings_are_lines(tmp_path, catalog):
    def twice(dicts):
        dicts[1]["annotations"] *= 2

    register(tmp_path / "p", "one_train", ("a.png", "b.png", "c.png"), twice)
    register(tmp_path / "q", "one_val", ("c.png",))
    page, text, _, _ = page_of(tmp_path, "one_train", "one_val")
    rows = [row for row in rows_of(page) if len(row) == 4]
    leak, double = rows
    assert leak[0] == "error" and leak[1].startswith("the same photo in one_train and one_val")
    assert leak[2].endswith("q/c.png") and leak[3]
    assert double[0] == "warning" and "objects 1 and 2" in double[1] and "p/b.png" in double[2]
    assert "Not safe to train on: 1 error." in page and "Not safe" in text
    assert "error: the same photo in one_train and one_val (1)" in text
    assert text.index("error:") < text.index("warning:")
    # one for the doubled label, two for the photo in both sets; plots; all four photos
    assert page.count("<img ") == 1 + 2 + 2 + 4


def test_it_is_self_contained_and_names_are_escaped(tmp_path, catalog):
    folder = tmp_path / "<u>"
    register(folder, "bad<u>_train", ("<i>&.png", "b.png"),
             lambda dicts: dicts[0]["annotations"][0].update(bbox=[500, 0, 600, 9]),
             thing_classes=["<script>alert(1)</script>"])  # fmt: skip
    page, _, _, _ = page_of(tmp_path, "bad<u>_train")
    assert "<u>" not in page and "<i>" not in page and "<script" not in page
    assert "bad&lt;u&gt;_train" in page and "&lt;i&gt;&amp;.png" in page
    assert "&lt;script&gt;alert(1)" in page
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]{0,30})", page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_many_findings_are_cut_and_counted(tmp_path, catalog):
    def crowded(dicts):
        label = dicts[0]["annotations"][0]
        dicts[0]["annotations"] = [{**label, "bbox": [500, 0, 600, 9]} for _ in range(130)]

    register(tmp_path / "p", "many_train", change=crowded)
    page, text, _, _ = page_of(tmp_path, "many_train")
    assert "30 more: box outside the photo" in page and "box outside the photo (130)" in text


def test_classes_of_photos_and_plain_folders(tmp_path, catalog):
    def change(dicts):
        for i, entry in enumerate(dicts):
            del entry["annotations"]
            entry["category_id"] = i

    register(tmp_path / "p", "kinds_train", change=change, thing_classes=None,
             classes=[f"kind {i}" for i in range(40)])  # fmt: skip
    register_image_folder("pool", str(tmp_path / "p"))
    page, text, _, _ = page_of(tmp_path, "kinds_train", "pool")
    assert "Sizes of objects" not in page and "10 rarer classes" in page
    assert ["kind 1", "1"] in rows_of(page) and "a.png: kind 0" in page
    assert "a.png: no labels" in page and "kind 38, kind 39, in kinds_train" in text


def test_a_set_of_unreadable_photos(tmp_path, catalog):
    register(tmp_path / "p", "broken_train")
    for file in (tmp_path / "p").iterdir():
        file.write_bytes(b"")
    page, _, _, _ = page_of(tmp_path, "broken_train")
    assert "Not safe to train on: 2 errors." in page and "<img alt=" in page


# ---- the command


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Calls the command in this process: (exit code, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("check_dataset_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(*args):
        try:
            code = module.run([str(a) for a in args])
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return call


def test_exit_codes(command, demo_root, tmp_path, catalog):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    code, out, err = command("balloon_demo_train", "balloon_demo_val", "SSL.INPUT.VIEW_SIZE", "64",
                             "--output", tmp_path / "pages")  # fmt: skip
    assert code == 0, out + err
    assert "balloon_demo_train  8" in out and "in crops of 64 px" in out
    page = tmp_path / "pages" / "balloon_demo_train+balloon_demo_val.html"
    assert out.splitlines()[-1] == f"Page: {page}" and page.is_file()
    (tmp_path / "sets_again.py").write_text(
        "from d2ssl.data.datasets import register_balloon as r\n"
        f"def register(): r('again', {str(demo_root / 'balloon_demo')!r})\n"
        "def val():\n"
        "    from detectron2.data import DatasetCatalog as c\n"
        "    from d2ssl.data.datasets import register_dataset\n"
        "    register_dataset('again_test', lambda: c.get('again_train')[:3], "
        "thing_classes=['balloon'])\n"
    )
    code, out, _ = command("again_train", "again_test", "--register", "sets_again:register",
                           "--register", "sets_again:val")  # fmt: skip
    assert code == 1 and "Not safe to train on: 3 errors." in out
    assert (tmp_path / "output" / "check" / "again_train+again_test.html").is_file()


def test_what_the_detector_of_a_config_cannot_learn(command, tmp_path, catalog):
    register(tmp_path / "two", "two", thing_classes=["ball", "box"])
    register(tmp_path / "boxes", "boxes", change=lambda dicts: [
        d["annotations"][0].pop("segmentation") for d in dicts])  # fmt: skip
    yaml = tmp_path / "one_class.yaml"
    yaml.write_text("MODEL: {MASK_ON: True, ROI_HEADS: {NUM_CLASSES: 1}}\n")
    for name, what in (
        ("two", "the detector is built for another number of classes"),
        ("boxes", "no masks for a detector with masks"),
    ):
        code, out, _ = command(name, "--config-file", yaml)
        assert code == 1 and what in out
        assert command(name)[0] == 0  # nobody said which detector


def test_an_output_that_is_a_file_is_one_line(command, tmp_path, catalog):
    register(tmp_path / "photos", "photos")
    (tmp_path / "taken").write_text("")
    code, _, err = command("photos", "--output", tmp_path / "taken")
    assert code == 2 and "taken: cannot be made a folder" in err and "Traceback" not in err


def test_bad_input_is_one_line_and_exit_code_2(command, demo_root, catalog):
    register_balloon("balloon_demo", demo_root / "balloon_demo")
    for args, message in (
        (["nosuch_train"], "not registered"),
        (["balloon_demo_train", "--config-file", "none.yaml"], "no such file"),
        (["balloon_demo_train", "--register", "none:such"], "--register none:such"),
        (["balloon_demo_train", "INPUT.MIN_SIZE_TESTT", "5"], "INPUT.MIN_SIZE_TEST"),
        (["balloon_demo_train", "SSL.METHOD", "Nosuch"], "choose from"),
    ):
        code, out, err = command(*args)
        assert code == 2 and message in err and err.count("error: ") == 1, err
        assert "Traceback" not in err
    code, _, err = command("INPUT.MIN_SIZE_TEST", "512")
    assert code == 2 and "name a data set" in err


def test_help_answers_without_torch():
    code = f"""
import runpy, sys
sys.argv = ["check_dataset.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
finally:
    assert not {{"torch", "detectron2", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "exit code" in done.stdout, done.stderr
