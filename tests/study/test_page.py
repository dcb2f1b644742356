"""The page of made-up results, in its text."""

import html
import json
import re

import pytest

from d2ssl.study import plots
from d2ssl.study.findings import Results, findings, gain
from d2ssl.study.page import markdown, write_study
from d2ssl.study.plan import Run, plan
from d2ssl.study.yaml_file import read_study
from tests.conftest import REPO
from tests.study.made_up import CLEAR, ap_of, result_of


@pytest.fixture
def page(write_yaml, tmp_path):
    """Callable: {(arm, budget): outcomes} -> the page as a reader sees it, without pictures."""

    def write(table, **keys):
        curve = keys.pop("curve", ((2, 1.0, 2.0), (4, 5.0, 6.0)))
        keys = {"SUBSETS": 3, "BUDGETS": [3, 6], **keys}
        study = read_study(write_yaml(**keys), output=str(tmp_path / "out"))
        results, outcomes, left = Results(study), {}, {k: list(v) for k, v in table.items()}
        for task in plan(study, {"longer": 8}):
            outcomes[task] = None
            if isinstance(task, Run) and left.get((task.arm, task.budget)):
                outcome = left[task.arm, task.budget].pop(0)
                outcomes[task] = {"device": "a CPU", **result_of(task, outcome, curve)}
                results.add(outcomes[task])
        found = findings(study, results, {"soco": 30.0})
        path = write_study(study, results, found, outcomes, "tools/study.py")
        text = re.sub(r"<(style|img)[^>]*>(.*?</style>)?", "", open(path).read(), flags=re.S)
        return html.unescape(re.sub(r"<[^>]+>", " ", text))

    return write


def test_a_clear_answer_comes_first(page):
    text = page(CLEAR)
    assert text.index("soco with 3 labels: pays.") < text.index("AP over labels")
    assert "runs are still to come" not in text and "Runs that failed" not in text
    assert "On average still rising by more than 1 AP at the last step: scratch with 3" in text


def test_the_answer_can_be_pasted(page, tmp_path):
    page(CLEAR)
    table, answers = (tmp_path / "out" / "study.md").read_text().split("\n\n")
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
    assert head == ["segm AP", "3 labels", "6 labels"]
    assert [row[0] for row in rows] == ["scratch", "soco", "longer"]
    mean = sum(map(ap_of, CLEAR["soco", 3])) / 3
    assert rows[1][1].startswith(f"{mean:.1f} [")
    assert answers.startswith("- **soco with 3 labels: pays.** +49.5 [")


def test_failures_are_shown_whatever_else_there_is(page):
    only = page({("soco", 3): ["the loss became infinite"]})
    assert "Not one run is finished yet." in only
    assert "soco, 3 labels, subset 0, seed 0" in only and "the loss became infinite" in only
    beside = page({**CLEAR, ("soco", 3): ["the loss became infinite"] * 3})
    assert "3 runs of soco failed and none is finished" in beside


def test_a_curve_of_one_point_is_a_curve(page):
    text = page(CLEAR, curve=[(4, 5.0, 6.0)])
    assert "Who converges" in text and "no photo is left for it" not in text
    assert "Who converges" not in page(CLEAR, curve=[])


def test_each_arm_is_in_the_legend(monkeypatch):
    """Also one that is not in the first panel."""
    seen = []
    legend = plots.Figure.legend
    monkeypatch.setattr(
        plots.Figure, "legend",
        lambda self, handles, labels, **kwargs: (
            seen.extend(labels), legend(self, list(handles), list(labels), **kwargs)
        ),
    )  # fmt: skip
    points = [(1, 2.0), (2, 3.0)]
    lines = {3: {"b": points, "d": []}, 6: {"b": points, "a": points}}
    assert plots.plot_panels(lines, ["a", "b", "c"], "x", "y")
    assert seen == ["a", "b"]


def test_no_two_arms_look_alike():
    names = [f"arm{i}" for i in range(14)]  # as configs/study/story.yaml has
    assert len({tuple(look.values()) for look in plots.looks(names).values()}) == 14


def committed(study):
    return json.loads((REPO / f"docs/results/{study}.json").read_text())


@pytest.mark.parametrize(
    "study, page",
    [
        ("balloon_study", "README.md"),
        ("self_training", "docs/experiments.md"),
        ("self_training_pennfudan", "docs/experiments.md"),
        ("pennfudan_choice", "docs/experiments.md"),
    ],
)
def test_the_docs_say_what_the_committed_study_does(study, page):
    assert markdown(committed(study)) in (REPO / page).read_text()


def test_the_readmes_table_of_what_paid():
    studies = committed("self_training"), committed("self_training_pennfudan")

    def ap(budgets):
        cells = [
            next(c for c in study["cells"] if (c["arm"], c["budget"]) == ("imagenet", budget))
            for study, budget in zip(studies, budgets)
        ]
        return [f"{cell['segm']['mean']:.1f}" for cell in cells]

    def over(arm):
        found = [
            next(d["segm"] for d in study["differences"] if (d["arm"], d["budget"]) == (arm, 16))
            for study in studies
        ]
        return [f"{gain(estimate)} ({estimate['units']})" for estimate in found]

    rows = {
        "this yaml's fine-tuning": ap((16, 16)),
        "Detectron2's own instead": over("stock"),
        "with self-training on the other photos": over("imagenet+self"),
        "all 61 or 136 labelled": ap((61, 136)),
    }
    text = (REPO / "README.md").read_text()
    for name, values in rows.items():
        assert f"| {name} | {' | '.join(values)} |" in text
