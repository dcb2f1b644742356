"""Reading annotation files of any family, with one clear line where they cannot be right."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.utils.logger import log_first_n

from d2ssl.errors import D2SSLError

logger = logging.getLogger("d2ssl.data")


def read_text(path: str) -> str:
    """
    A text file in UTF-8, with or without a byte order mark.

    Raises:
        D2SSLError: missing, unreadable, or not text.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise D2SSLError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise D2SSLError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def read_json(path: str) -> Any:
    """
    What a JSON file holds.

    Raises:
        D2SSLError: as :func:`read_text`, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise D2SSLError(
            f"{path}: not valid JSON ({error}); it may be cut short, export it again"
        ) from error


def read_lines(path: str) -> list[str]:
    """Stripped lines of a text file, empty ones left out; see :func:`read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_csv(path: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """
    Rows of a CSV file with a header, one after another.

    Args:
        columns: that must be there; others may be.

    Raises:
        D2SSLError: missing or unreadable file, a column that is not there, or a row that is cut
            short.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            absent = [c for c in columns if c not in (rows.fieldnames or ())]
            if absent:
                raise D2SSLError(
                    f"{path}: has no column {', '.join(absent)}; is it the right file?"
                )
            for row in rows:
                if any(row[column] is None for column in columns):
                    raise D2SSLError(f"{path}: line {rows.line_num} is cut short; get it again")
                yield row
    except FileNotFoundError as error:
        raise D2SSLError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise D2SSLError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise D2SSLError(f"{path}: not a CSV file in UTF-8 ({error}); get it again") from error


def require_folder(path: str, how: str) -> None:
    """
    Raises:
        D2SSLError: ``path`` is no folder; ``how`` says what to do about it.
    """
    if not os.path.isdir(path):
        raise D2SSLError(f"{path}: no such folder; {how}")


def locate(root: str, names: Iterable[str], source: str, what: str = "photo") -> list[str]:
    """
    Paths of the files that an annotation file names, in their order.

    Windows' backslashes stand between folders where there is no file of the name as given.

    Args:
        root: folder that the names start from.
        source: the file that names them, for the message.
        what: they are, for the message.

    Raises:
        D2SSLError: a name that leaves ``root``, one that is there twice, or a missing file.
    """
    files = []
    for name in names:
        if "\\" in name and not os.path.isfile(os.path.join(root, name)):
            name = name.replace("\\", "/")
        normal = os.path.normpath(name)
        if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
            raise D2SSLError(
                f"{source}: {what} {name!r} lies outside {root}; move it there and give its path "
                "from there"
            )
        files.append(os.path.join(root, normal))
    if len(set(files)) < len(files):
        repeated = Counter(files).most_common(1)[0][0]
        raise D2SSLError(f"{source}: {repeated} is listed twice; merge the two entries")
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise D2SSLError(
            f"{source}: {len(missing)} of {len(files)} {what}s are missing, the first is "
            f"{missing[0]}; restore them or take them out of the list"
        )
    return files


class Notes:
    """Counts what was mended, so that the log gets one line a kind and not one a case, and none
    again when the set is read again."""

    def __init__(self, source: str):
        self.source = source
        self.cases: dict[str, list[str]] = {}

    def add(self, kind: str, where: str) -> None:
        """``kind`` reads on from a number: "photos have no region"."""
        self.cases.setdefault(kind, []).append(where)

    def log(self) -> None:
        for kind, cases in self.cases.items():
            message = f"{self.source}: {len(cases)} {kind} (first: {cases[0]})"
            log_first_n(logging.WARNING, message, key="message", name=logger.name)
