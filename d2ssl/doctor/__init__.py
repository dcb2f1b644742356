"""What ``tools/doctor.py`` finds out: about the installation, and about a file of weights.

installation   needs nothing but Python, and reports what is missing or does not fit
weights        all that can be said about a file, from what a detector would load of it on
attempt        that detector, with the file's weights loaded and run
function       whether the detector computes what a hand-off says that it should
formats        what other files say that they want, or usually want
"""

import contextlib
import shutil
import textwrap
from dataclasses import dataclass
from typing import Iterable

OK, NOTE, WARN, FAIL = "OK", "", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's account."""

    status: str  # OK; NOTE: a fact, neither good nor bad; WARN: worth a look; FAIL: a problem
    name: str
    detail: str
    fix: str = ""  # what to do about it; a row of warnings may share one, under the last


def show(value) -> str:
    """A value of a config, to be read."""
    return '""' if value == "" else str(value)


@contextlib.contextmanager
def one_thread():
    """For networks on tiny pictures: several threads cost more than they bring, on busy cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(findings: Iterable[Finding]) -> str:
    """The findings as plain text, one below the other, wrapped to the terminal."""
    findings = list(findings)
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    # A long config key stands alone on its line rather than pushing all details to the right.
    column = max([len(f.name) for f in findings if len(f.name) <= 16], default=0)
    indent = " " * (2 + 4 + 2 + column + 2)
    lines = []
    for f in findings:
        head = f"  {f.status:<4}  {f.name:<{column}}  "
        if len(head) > len(indent):
            lines.append(head.rstrip())
            head = indent
        for text, first in ((f.detail, head), (f.fix, indent + "-> ")):
            if text:
                rest = indent + "   " * (first is not head)
                lines += textwrap.wrap(
                    text, width, initial_indent=first, subsequent_indent=rest,
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
    return "\n".join(lines)
