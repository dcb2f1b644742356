"""Files and folders that appear complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
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
def atomic_folder(target: str, fix: str = "name another") -> Iterator[str]:
    """
    A temporary folder beside ``target`` that becomes ``target`` when the block ends well.

    A folder that was there before is replaced; after an exception it is as it was, and the
    temporary one is gone, with the folders above it that were made for it.

    Args:
        fix: what to do where it cannot be written, for the message.

    Raises:
        D2SSLError: ``target`` is a file, or it or what the block makes cannot be written.
    """
    if os.path.lexists(target) and not os.path.isdir(target):
        raise D2SSLError(f"{target}: exists and is no folder; {fix}")
    parent, name = os.path.split(os.path.abspath(target))
    above = [Path(parent), *Path(parent).parents]
    new = [folder for folder in above if not os.path.exists(folder)]
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.", dir=parent, ignore_cleanup_errors=True
        ) as temporary:
            made, replaced = os.path.join(temporary, "new"), os.path.join(temporary, "old")
            os.mkdir(made)  # unlike the temporary one, with the user's usual permissions
            yield made
            if os.path.lexists(target):
                os.rename(target, replaced)
            try:
                os.rename(made, target)
            except OSError:
                if os.path.lexists(replaced):
                    os.rename(replaced, target)
                raise
    except OSError as error:
        reason = error.strerror or error
        raise D2SSLError(f"{target}: cannot be written ({reason}); {fix}") from error
    finally:
        if not os.path.lexists(target):
            for folder in new:
                with contextlib.suppress(OSError):  # never made, or others use it by now
                    folder.rmdir()
