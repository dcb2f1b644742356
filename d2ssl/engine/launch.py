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
from d2ssl.errors import exit_on_error


def launch(main, num_processes, num_machines=1, machine_rank=0, dist_url="auto", args=()):
    """Call ``main(*args)`` in every process of the run, as Detectron2's ``launch`` does.

    Without CUDA the processes talk through gloo, which Detectron2 v0.6 cannot do.
    """
    world = num_processes * num_machines
    if world == 1:
        main(*args)
        return
    try:
        if torch.cuda.is_available():
            launch_on_gpus(main, num_processes, num_machines, machine_rank, dist_url, args)
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


def _gloo_process(local_rank, main, num_processes, num_machines, machine_rank, dist_url, args):
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_processes * num_machines,
        rank=machine_rank * num_processes + local_rank,
        timeout=datetime.timedelta(minutes=30),
    )
    create_local_process_group(num_processes)
    with exit_on_error():
        main(*args)
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
