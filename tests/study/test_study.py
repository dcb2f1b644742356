"""From the dry run to the answer, with its processes, on a small drawn data set."""

import csv
import json

import pytest


def lines(text, word):
    return [line for line in text.splitlines() if word in line]


def test_from_the_dry_run_to_the_answer(study):
    """One test, since each step goes on from the one before."""
    out = study.folder / "out"
    process = study("--dry-run")
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(lines(process.stdout, "labels, subset 0, seed 0")) == 6
    assert "7 tasks, 7 to run, 2 at a time: about" in process.stdout
    assert not (out / "runs").exists()
    timing = json.loads((out / "timing.json").read_text())
    assert len(timing) == 2 and all(t["iteration"] > 0 for t in timing.values())

    (study.folder / "victim").touch()
    process = study()
    assert process.returncode == 0, process.stderr[-3000:]
    died = lines(process.stdout, "failed")
    assert died and "its process died" in died[0]
    assert study("--report-only").returncode == 0
    assert "its process died" in (out / "study.html").read_text()  # recorded, not hidden

    process = study()  # what died is tried again, the rest is not
    assert process.returncode == 0, process.stderr[-3000:]
    assert not lines(process.stdout, "failed") and "7 tasks, " in process.stdout
    content = json.loads((out / "study.json").read_text())
    assert not content["failed"] and len(content["runs"]) == 6
    by_arm = {(r["arm"], r["budget"]): r for r in content["runs"]}
    rows = list(csv.DictReader((out / "runs.csv").open()))
    for row in rows:
        run = by_arm[row["arm"], int(row["budget"])]
        assert float(row["segm AP"]) == run["ap"]["segm"] and not row["failed"]
    # The page is one file, and the bulk of a run is removed.
    page = (out / "study.html").read_text()
    assert "soco with 3 labels" in page and 'src="http' not in page
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("curve", "differences"))
    for arm in ("scratch", "soco", "longer"):
        assert f"tools/train_net.py --config-file out/final/{arm}.yaml" in page
        assert (out / "final" / f"{arm}.yaml").is_file()
    assert not list(out.glob("runs/**/*.pth"))
    assert [p.name for p in out.glob("pretraining/**/*.pth")] == ["model_pretrained.pth"]
    # AP from the matches is that of Detectron2's evaluator on the test set.
    for run in content["runs"]:
        place = f"runs/{run['arm']}/{run['budget']}/subset0-seed0/finetune"
        kept = json.loads((out / place / "results.json").read_text())["results"]
        for what in ("segm", "bbox"):
            assert run["ap"][what] == pytest.approx(kept[what]["AP"] or 0, abs=1e-6)
        names = [json.loads(x) for x in (out / place / "metrics.json").read_text().splitlines()]
        tested = [row["iteration"] for row in names if "segm/AP" in row or "bbox/AP" in row]
        assert len(tested) <= 1  # on the test set once
        assert [point[0] for point in run["curve"]][-1] == run["iterations"]
    # The compute-matched arm spends pretraining's time, the others do not.
    spent = [t["iteration"] for t in timing.values()]
    assert by_arm["longer", 3]["iterations"] in {4 + round(2 * a / b) for a in spent for b in spent}
    assert by_arm["scratch", 3]["iterations"] == by_arm["soco", 3]["iterations"] == 4

    before = (out / "study.html").stat().st_mtime
    process = study("--report-only")
    assert process.returncode == 0 and (out / "study.html").stat().st_mtime > before
