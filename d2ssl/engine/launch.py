"""One process per GPU, or several processes on a CPU."""

import datetime
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from d2ssl.compat import create_local_process_group
from d2ssl.errors import D2SSLError, exit_on_error

TIMEOUT = datetime.timedelta(hours=12)  # selective search on many photos runs in one process


def launch(
    main, num_processes, num_machines=1, machine_rank=0, dist_url="auto", device="cpu", args=()
):
    """Call ``main(*args)`` in every process of the run, as Detectron2's ``launch`` does.

    On a CPU the processes talk through gloo, which Detectron2 v0.6 cannot do.

    Args:
        device: ``cuda`` (one process a GPU) or ``cpu``.
    Raises:
        D2SSLError: more processes than GPUs, or several machines without an address.
    """
    if num_processes * num_machines <= 1:
        main(*args)
        return
    if num_machines > 1 and dist_url == "auto":
        raise D2SSLError("--num-machines needs --dist-url, e.g. tcp://192.0.2.1:29500")
    if device == "cuda" and num_processes > torch.cuda.device_count():
        raise D2SSLError(
            f"--num-gpus {num_processes}: this machine has {torch.cuda.device_count()}"
        )
    try:
        if device == "cuda":
            launch_on_gpus(
                _one_line_errors, num_processes, num_machines, machine_rank, dist_url,
                args=(main, args), timeout=TIMEOUT,
            )  # fmt: skip
            return
        if dist_url == "auto":
            dist_url = f"tcp://127.0.0.1:{_free_port()}"
        mp.start_processes(
            _gloo_process,
            args=(main, num_processes, num_machines, machine_rank, dist_url, args),
            nprocs=num_processes,
        )
    except mp.ProcessExitedException as error:
        sys.exit(error.exit_code)  # the process has said why


def _one_line_errors(main, args):
    with exit_on_error():
        main(*args)


def _gloo_process(local_rank, main, num_processes, num_machines, machine_rank, dist_url, args):
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_processes * num_machines,
        rank=machine_rank * num_processes + local_rank,
        timeout=TIMEOUT,
    )
    create_local_process_group(num_processes)
    _one_line_errors(main, args)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def distribute(model, find_unused_parameters: bool = False):
    """Wrap in DistributedDataParallel on any device; the model itself in a single process."""
    if comm.get_world_size() == 1:
        return model
    devices = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(
        model,
        device_ids=devices,
        broadcast_buffers=False,
        find_unused_parameters=find_unused_parameters,
    )
