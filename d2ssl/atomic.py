"""Files and folders that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from d2ssl.errors import D2SSLError


def make_folder(path: str) -> None:
    """Make a folder where it is missing.

    Raises:
        D2SSLError: it cannot be made.
    """
    try:
        os.makedirs(path or os.curdir, exist_ok=True)
    except OSError as error:
        raise D2SSLError(
            f"{path}: cannot be made a folder ({error.strerror}); name another"
        ) from error


@contextlib.contextmanager
def atomic_open(path: str, mode: str = "w") -> Iterator[IO]:
    """A temporary file beside ``path``, open for writing, that becomes ``path`` at the end.

    After an exception ``path`` is as it was, and the temporary file is gone.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def atomic_folder(target: str) -> Iterator[str]:
    """
    A temporary folder beside ``target`` that becomes ``target`` when the block ends well.

    A folder that was there before is replaced; after an exception it is as it was, and the
    temporary one is gone.
    """
    parent = os.path.dirname(os.path.abspath(target))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.", dir=parent)
    made, replaced = os.path.join(temporary, "new"), os.path.join(temporary, "old")
    try:
        os.mkdir(made)  # unlike mkdtemp's, with the user's usual permissions
        yield made
        if os.path.lexists(target):
            os.rename(target, replaced)
        try:
            os.rename(made, target)
        except OSError:
            if os.path.lexists(replaced):
                os.rename(replaced, target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
