"""What a run leaves in the folder of a stage, and what becomes of it when the stage starts over."""

import glob
import os
from typing import List

from detectron2.utils import comm

from d2ssl.engine.self_training import label_files


def begun(folder: str) -> bool:
    """Whether there is a checkpoint to go on from."""
    return os.path.isfile(os.path.join(folder, "last_checkpoint"))


def left(folder: str) -> List[str]:
    """What an earlier run left there that would be taken for this one's. Its checkpoints would
    not."""
    pictures = ["matches.png", "reconstructions.png"]  # not every method has them
    names = ["metrics.json", "last_checkpoint", "results.json", *pictures]
    names += [f"model_{name}.pth" for name in ("pretrained", "result", "best")]
    paths = [os.path.join(glob.escape(folder), name) for name in
             [*names, "events.out.tfevents.*"]]  # fmt: skip
    return [*label_files(folder), *(path for pattern in paths for path in glob.glob(pattern))]


def clear(folder: str) -> None:
    """A stage starts over; each process of a distributed run calls it. Not before all that can be
    refused is accepted: a typing error must not cost the earlier run."""
    for path in left(folder) if comm.is_main_process() else ():
        os.remove(path)
    comm.synchronize()
