"""Train a system on many processes, one per GPU: the loop of ``train.py`` with networks that average gradients.

    python train_dist.py --dataset_name horse2zebra --multi_gpu_flag True --port_num 12355
    python train_dist.py --dataset_name horse2zebra --n_procs 2 --device cpu
    torchrun --nproc_per_node 8 train_dist.py --dataset_name horse2zebra

Started alone it spawns the ranks; under ``torchrun`` (one machine or several) it joins the group made there.
"""

from __future__ import annotations

import utils
from utils import InputError

import argparse
import copy
import inspect
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import train
from checkpoints import SAVED_MODELS
from options import build_system, parse_options
from systems import System

TIMEOUT = timedelta(hours=1)  # how long ranks wait for rank 0, which saves and draws
MEETING = timedelta(minutes=5)  # how long ranks wait for one another at the start
GRACE = 30  # seconds that ranks have to end after one of them has failed
# Broadcasting buffers at each of the several calls of one step would change tensors that the backward pass still
# needs. torch has renamed the switch.
KNOWN = inspect.signature(DistributedDataParallel).parameters
SWITCH = "forward_sync_buffers" if "forward_sync_buffers" in KNOWN else "broadcast_buffers"
OWN_BUFFERS: dict[str, Any] = {SWITCH: False}


def boolean(text: str) -> bool:
    """argparse's ``type=bool`` would read "False" as true."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return values[text.lower()]


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("processes (ignored under torchrun, which has its own)").add_argument
    add("--multi_gpu_flag", type=boolean, default=True, help="one process per GPU; False trains in a single process")
    add("--port_num", type=int, default=12355, help="TCP port of this machine where the processes meet")
    n_procs = "processes to start; 0: one per GPU, or one on the CPU without GPUs; with --resume as many as before"
    add("--n_procs", type=int, default=0, help=n_procs)


def distribute(system: System) -> System:
    """A twin of ``system`` whose networks average their gradients over all ranks.

    It shares every network and buffer with ``system``, which is not wrapped: sheets and checkpoints use it on one rank
    and under plain names. Every network starts from rank 0's weights. On CUDA BatchNorm sees the batch of all ranks,
    for which it waits for the device in every layer (for the CPU see ``check_batch_norm``).
    """
    twin = copy.copy(system)
    twin._modules = dict(system._modules)  # the copy would share this table, and wrap the networks of both
    for name in system.trained():
        network = system.get_submodule(name)
        device = next(network.parameters()).device
        for buffer in network.buffers():  # torch 2.11 does not synchronise them
            dist.broadcast(buffer, 0)
        ids = [device] if device.type == "cuda" else None
        if ids:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place, so also in ``system``
        setattr(twin, name, DistributedDataParallel(network, device_ids=ids, **OWN_BUFFERS))
    return twin


def join(
    options: argparse.Namespace,
    rank: int,
    local_rank: int,
    world_size: int,
    init_method: str,
    tell: Callable[[Exception], None] = lambda error: None,
) -> int:
    """Be one rank: join the group, train, leave it. Returns what ``train.train`` returns.

    ``tell`` takes an error before the group breaks and the other ranks fail because of that.
    """
    if pick_kind(options) == "cuda":
        device = options.device if ":" in options.device else f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # ranks agree through gloo without waiting for the GPU
    else:
        device, backend = "cpu", "gloo"
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    spawner = multiprocessing.parent_process()  # known even if it has gone already
    parent = os.getppid() if spawner is None else spawner.pid
    store, rank, world_size = next(iter(dist.rendezvous(init_method, rank, world_size, timeout=MEETING)))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store over restarts, and in it the addresses of ranks that have gone. Only on one machine
        # do all ranks know the same number of restarts.
        store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            prepare_together(options, rank, local_rank)
        lock = utils.lock_folder(SAVED_MODELS / options.name) if rank == 0 else nullcontext()
        # To the very end: Ctrl-C can reach a rank twice, from the terminal and from ``launch``. The second one must not
        # end a rank that has saved already and is leaving the group. Ranks whose launcher was killed stop as well.
        with train.explain_out_of_memory(options), lock, utils.StopSignals(parent=parent) as listening:
            utils.barrier()  # another process may have saved while rank 0 waited for the lock
            number = train.train(options, distribute, device, listening)
            dist.destroy_process_group()
            return number
    except Exception as error:
        tell(error)
        raise  # without leaving the group: NCCL would wait for the others, who wait for this one


def prepare_together(options: argparse.Namespace, rank: int, local_rank: int) -> None:
    """``train.prepare_run`` once on every machine. An error on one of them ends all; only rank 0 prints it."""
    problem = None
    if local_rank == 0:
        try:
            train.prepare_run(options)
        except (InputError, OSError) as error:
            problem = str(error)
    problems: list[str | None] = [None] * utils.world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise InputError(found) if rank == 0 else SystemExit(2)


def spawned(rank: int, options: argparse.Namespace, world_size: int, reports: SimpleQueue) -> None:
    """Report (rank, the signal that ended the run early), or (rank, what failed)."""

    def tell(error: Exception) -> None:
        expected = isinstance(error, (InputError, OSError))
        reports.put((rank, utils.one_line(error) if expected else traceback.format_exc()))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the group stands; ``launch`` hands it on as SIGTERM
    with utils.outlets():
        number = join(options, rank, rank, world_size, f"tcp://127.0.0.1:{options.port_num}", tell)
    if number:
        reports.put((rank, number))


def pick_kind(options: argparse.Namespace) -> str:
    """ "cuda" or "cpu", without touching a GPU, which would leave every process's context on the first one."""
    kind = options.device.partition(":")[0]
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind != "cpu" and not (kind == "cuda" and torch.cuda.is_available()):
        raise InputError(f"--device {options.device}: not usable here by many processes, expected cuda, cpu or auto")
    return kind


def count_processes(options: argparse.Namespace) -> int:
    """How many ranks to start here. Raises InputError for more than there are GPUs."""
    if options.n_procs < 0:
        raise InputError(f"--n_procs {options.n_procs}: expected at least 0")
    if not options.multi_gpu_flag:
        if options.n_procs > 1:
            raise InputError(f"--n_procs {options.n_procs} with --multi_gpu_flag False: expected 1, or the flag True")
        return 1
    if ":" in options.device and options.n_procs != 1:
        raise InputError(f"--device {options.device} names one device; expected cuda or cpu, or --n_procs 1 with it")
    gpus = torch.cuda.device_count() if pick_kind(options) == "cuda" else 0
    n_procs = options.n_procs
    if options.resume and not n_procs and (found := checkpoints.find_run(options.name)) is not None:
        n_procs = found["processes"]  # as many as before
    if gpus and n_procs > gpus:
        raise InputError(f"--n_procs {n_procs}: this machine has {gpus} GPU(s), one process each")
    if not gpus and not n_procs:
        print("no GPU here: one process on the CPU (--n_procs N starts more)", file=sys.stderr)
    return n_procs or gpus or 1


def check_batch_norm(options: argparse.Namespace, world_size: int) -> None:
    """Raise InputError where BatchNorm would see each rank's own share of the batch."""
    if world_size > 1 and pick_kind(options) == "cpu":
        with torch.device("meta"):
            system = build_system(options)
        if any(isinstance(module, nn.BatchNorm2d) for module in system.modules()):
            raise InputError(
                f"--system {options.system} has BatchNorm, whose statistics {world_size} processes can share only on "
                "CUDA (SyncBatchNorm), expected one process on the CPU"
            )


def check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"--port_num {port}: cannot be used; expected 1024 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(f"--port_num {port}: cannot be used ({error}); choose another, 1024 to 65535") from error


def launch(options: argparse.Namespace) -> int:
    """Spawn the ranks and wait for them, handing signals on. Raises InputError when one of them fails.

    Returns 0, or the number of the signal that ended the run early.
    """
    world_size = count_processes(options)
    check_batch_norm(options, world_size)
    check_port(options.port_num)
    train.prepare_run(options)
    reports = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(spawned, (options, world_size, reports), world_size, join=False)
    told, deadline = False, math.inf
    heard: list[tuple[int, int | str]] = []  # the reports, in their order
    with utils.StopSignals(train.SAVING) as stop:
        try:
            while not ranks.join(timeout=0.5, grace_period=GRACE):
                if stop.signal is not None and not told:
                    told = True
                    for process in ranks.processes:
                        process.terminate()  # SIGTERM: save and leave
                heard += drain(reports)
                if deadline == math.inf and any(is_failure(report) for report in heard):
                    deadline = time.monotonic() + GRACE
                if time.monotonic() > deadline:  # the failed rank should have ended by now
                    for process in ranks.processes:
                        process.kill()
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            failures = [*filter(is_failure, heard + drain(reports))]  # the first to fail need not be the first to end
            if stop.signal is not None:  # the ranks could not save
                rank, reason = failures[0] if failures else (error.error_index, "")
                print(f"stopped; rank {rank} ended before it had saved{reason and f': {reason}'}", file=sys.stderr)
                return stop.signal
            if isinstance(error, mp.ProcessRaisedException) or time.monotonic() > deadline:
                rank, reason = failures[0] if failures else (error.error_index, str(error))
                raise InputError(f"rank {rank} failed, all ranks ended: {reason}") from error
            how = error.signal_name or f"exit code {error.exit_code}"
            saved = checkpoints.CheckpointFiles(SAVED_MODELS / options.name).exist()
            go_on = "--resume goes on" if saved else "nothing was saved yet"
            raise InputError(f"rank {error.error_index} died ({how}); all ranks ended; {go_on}") from error
    return stop.signal or next((n for _, n in heard + drain(reports) if isinstance(n, int)), 0)


def drain(reports: SimpleQueue) -> list[tuple[int, int | str]]:
    """What the ranks have reported since (see ``spawned``), in that order."""
    return [reports.get() for _ in iter(reports.empty, True)]


def is_failure(report: tuple[int, int | str]) -> bool:
    return isinstance(report[1], str)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = parse_options(argv, add_launch_flags)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return utils.exit_status(launch(options))
        rank, local_rank, size = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        check_batch_norm(options, size)
        if ":" in options.device and size > 1:
            raise InputError(f"--device {options.device} names one device, found {size} processes; expected cuda")
        try:
            return utils.exit_status(join(options, rank, local_rank, size, "env://"))
        except (InputError, OSError) as error:
            if local_rank:  # for the first, ``run_script`` tells it
                print(f"train_dist.py: error on rank {rank}: {utils.one_line(error)}", file=sys.stderr)
            raise

    return utils.run_script("train_dist.py", work)


if __name__ == "__main__":
    sys.exit(main())
