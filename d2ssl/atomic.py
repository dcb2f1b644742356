"""Folders that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator


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
