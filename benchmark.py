"""Measure how fast this machine takes a training step, beside the textbook step.

    python benchmark.py                                       # a training step, optimisations switched on in turn
    python benchmark.py --sizes 256 --batch_sizes 1 4 8 16    # for a GPU
    python benchmark.py --memory --systems attentiongan cyclegan --sizes 128 256
    python benchmark.py --systems ugatit --light              # other flags are those of train.py
    python benchmark.py --inference --batch_sizes 1 16
    python benchmark.py --loader --dataset_name horse2zebra

Every variant has a process of its own, and therefore a peak of memory of its own. The processes keep living and take
turns round by round: when the machine becomes slower, or has other work, all variants suffer alike. The tables go to
the terminal. With ``--out docs/speed`` they also go to ``docs/speed.json`` and into ``docs/speed.md``, where the tables
of other machines and other flags stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
import utils
from datasets import BUILT_IN, EpochSampler, make_loader, normalise
from models import NOISE
from prepare import draw_built_in
from record import write_block
from systems import SYSTEMS, System, TwoWay, Weights
from utils import InputError

MATMUL = 4096  # side of the matrices whose product tells the machine's own rate
MIB = 2**20
PREFETCHED = 2  # batches that each process of a DataLoader has ready

# ----------------------------------------------------------------------------------------------------------
#  The textbook step
# ----------------------------------------------------------------------------------------------------------


class TextbookPool:
    """The replay buffer of the reference projects: a list of pictures, which are handed in one by one."""

    def __init__(self, size: int):
        self.size = size
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        handed = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
                handed.append(image)
            elif torch.rand(()) < 0.5:
                slot = int(torch.randint(self.size, ()))
                handed.append(self.images[slot])
                self.images[slot] = image.clone()
            else:
                handed.append(image)
        return torch.stack(handed)


class Textbook:
    """The step of CycleGAN and AttentionGAN as the reference projects take it.

    Six generator calls and a discriminator call for every term, targets made anew, ``requires_grad`` switched off and
    on, PyTorch's default Adam, and every loss fetched for the log. The networks and the mathematics are ours: the
    weights after a step are those of ``train.training_step``.
    """

    def __init__(self, system: TwoWay, optimizers: Mapping[str, torch.optim.Optimizer]):
        self.system, self.optimizers = system, optimizers
        self.pools = {side: TextbookPool(system.pool_A.size) for side in "AB"}
        self.mse, self.l1 = nn.MSELoss(), nn.L1Loss()

    def judge(self, discriminator: nn.Module, images: Tensor, real: bool) -> Tensor:
        (logits,) = discriminator(images)
        return self.mse(logits, torch.full_like(logits, float(real)))

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        system, weights = self.system, self.system.weights
        G_AB, G_BA, D_A, D_B = system.G_AB, system.G_BA, system.D_A, system.D_B
        real_A, real_B = batch["A"], batch["B"]
        fake_B, fake_A = G_AB(real_A).image, G_BA(real_B).image
        recovered_A, recovered_B = G_BA(fake_B).image, G_AB(fake_A).image

        for discriminator in (D_A, D_B):
            discriminator.requires_grad_(False)
        losses = {
            "identity_A": weights.identity * self.l1(G_BA(real_A).image, real_A),
            "identity_B": weights.identity * self.l1(G_AB(real_B).image, real_B),
            "G_AB": self.judge(D_B, fake_B, True),
            "G_BA": self.judge(D_A, fake_A, True),
            "cycle_A": weights.cyc * self.l1(recovered_A, real_A),
            "cycle_B": weights.cyc * self.l1(recovered_B, real_B),
        }
        self.optimizers["G"].zero_grad()
        sum(losses.values()).backward()
        self.optimizers["G"].step()

        for discriminator in (D_A, D_B):
            discriminator.requires_grad_(True)
        self.optimizers["D"].zero_grad()
        for side, discriminator, fake in (("A", D_A, fake_A), ("B", D_B, fake_B)):
            pooled = self.pools[side].query(fake)
            loss = 0.5 * (self.judge(discriminator, batch[side], True) + self.judge(discriminator, pooled, False))
            loss.backward()
            losses[f"D_{side}"] = loss
        self.optimizers["D"].step()
        return {name: loss.item() for name, loss in losses.items()}


def has_textbook(system: System) -> bool:
    """Whether ``Textbook`` has the system's terms: those of CycleGAN and AttentionGAN II, without further ones."""
    return (
        isinstance(system, TwoWay)
        and system.weights == Weights(cyc=system.weights.cyc, identity=system.weights.identity)
        and bool(system.weights.identity)
        and system.attn_disc == "none"
    )


# ----------------------------------------------------------------------------------------------------------
#  What is timed
# ----------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """One way to do the work. ``kind``: "textbook", "step" (ours), "inference", "matmul" (this machine's own rate)."""

    name: str
    kind: str = "step"
    precision: str = "float32"
    fused: bool = True
    channels_last: bool = False
    compile: bool = False


def ladder(kind: str, device: torch.device, with_textbook: bool) -> list[Variant]:
    """From the textbook step to all that ``train.py`` does here, one optimisation more each time."""
    variants = []
    if kind == "step":
        if with_textbook:
            variants.append(Variant("textbook, float32", "textbook", fused=False))
        variants.append(Variant("calls batched, no waiting", fused=False))
    variants.append(Variant("+ fused Adam" if kind == "step" else "float32", kind))
    if utils.pick_layout(device) == torch.channels_last:
        variants.append(variants[-1]._replace(name="+ channels_last", channels_last=True))
    if utils.has_bf16(device):
        variants.append(variants[-1]._replace(name="+ bf16", precision="bf16"))
    variants.append(variants[-1]._replace(name="+ compile", compile=True))
    return variants


def make_work(variant: Variant, options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """What is timed, on random pictures that are on the device already."""
    if variant.kind == "matmul":
        dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as PyTorch's convolutions by default
        a, b = (torch.randn(MATMUL, MATMUL, device=device, dtype=dtype) for _ in range(2))
        return lambda: a @ b
    options.precision, options.compile = variant.precision, variant.compile
    system, optimizers, autocast = train.set_up(options, device)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    system.to(memory_format=layout)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = variant.fused or None
    shape = options.batch_size, options.channels, options.img_height, options.img_width
    batch = {side: (torch.rand(shape, device=device) * 2 - 1).contiguous(memory_format=layout) for side in "AB"}
    if variant.kind == "textbook":
        book = Textbook(system, optimizers)
        return lambda: book.step(batch)
    if variant.kind == "step":
        return lambda: train.training_step(system, optimizers, autocast, batch)
    generator = system.get_submodule(next(iter(system.generators.values())))

    @torch.no_grad()
    def translate() -> Tensor:
        with autocast():
            return generator(batch["A"]).image

    return translate


def count_flop(kind: str, options: argparse.Namespace) -> int:
    """Floating-point operations of convolutions and matrix products in one turn, counted without doing them."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        system = train.build_system(options)
        shape = options.batch_size, options.channels, options.img_height, options.img_width
        batch = {side: torch.zeros(shape) for side in "AB"}
        if kind == "inference":
            with torch.no_grad():
                system.get_submodule(next(iter(system.generators.values())))(batch["A"])
        else:
            fakes = system(batch)
            for turn in system.turns:
                loss = torch.stack(list(turn.losses(batch, fakes).values())).sum()
                loss.backward(inputs=train.trained_parameters(system, turn.networks))
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------
#  A process for each variant
# ----------------------------------------------------------------------------------------------------------

_work: Callable[[], Any]  # in a worker's process: what it does, and on which device
_device: torch.device


def start_worker() -> None:
    """Let a worker's process end with Ctrl-C, without a traceback, and when its parent ends, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def attempt(task: Callable[..., Any], *arguments: Any) -> Any:
    """Do a task in a worker's process. Raises InputError with one line for every error."""
    try:
        return task(*arguments)
    except Exception as error:
        if utils.is_out_of_memory(error):
            raise InputError("out of memory") from None
        traceback.print_exc()
        raise InputError(f"failed: {utils.first_line(error)}") from None


def warm_up(variant: Variant, options: argparse.Namespace, device_name: str) -> float:
    """Build what is timed and do it twice: the first time compiles and makes the optimizers' state. Returns seconds."""
    global _work, _device
    _device = torch.device(device_name)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    start = time.perf_counter()
    _work = make_work(variant, options, _device)
    repeat(2)
    if _device.type == "cuda":  # cuDNN's search for the fastest way tries out large workspaces
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter() - start


def repeat(times: int) -> float:
    """Do the work so many times. Returns the seconds of one."""
    start = time.perf_counter()
    for _ in range(times):
        _work()
    wait_for(_device)
    return (time.perf_counter() - start) / times


def take_turn(times: int) -> float:
    repeat(1)  # brings memory and caches back, which the others had meanwhile
    seconds = repeat(times)
    free_cached_memory(_device)
    return seconds


def other_figures() -> dict[str, float]:
    """Peak memory and what autograd keeps, in MiB, and on CUDA the number of kernels."""
    figures = {"peak": peak_memory(_device) / MIB, "kept": kept_for_backward(_work) / MIB}
    if _device.type == "cuda":
        figures["kernels"] = count_kernels(_work)
    return figures


class Worker:
    """The process of one variant, which keeps living between its turns.

    ``trouble`` is None, or says why there are no figures: memory ran out, an error, the process was killed.
    """

    def __init__(self, variant: Variant, options: argparse.Namespace, device: torch.device):
        self.variant = variant
        self.seconds: list[float] = []
        self.trouble: str | None = None
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_worker)
        self.figures = {"warm-up": self.ask(warm_up, variant, options, str(device))}
        once = self.ask(take_turn, 1)
        self.times = math.ceil(1.0 / once) if once else 1  # in a turn, which takes a second at least

    def ask(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """What the task returns in the process; None where there is trouble."""
        if self.trouble is not None:
            return None
        try:
            return self.pool.submit(attempt, task, *arguments).result()
        except InputError as error:
            self.trouble = str(error)
        except BrokenProcessPool:
            self.trouble = "killed, as systems do when memory runs out"
        self.pool.shutdown()  # its memory is free for the others
        return None

    def take_turn(self) -> None:
        seconds = self.ask(take_turn, self.times)
        if seconds is not None:
            self.seconds.append(seconds)

    def end(self) -> None:
        self.figures |= self.ask(other_figures) or {}
        self.pool.shutdown()


def measure(
    variants: Sequence[Variant], options: argparse.Namespace, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """The figures of every variant; where there are none, "trouble" says why.

    Besides the variants, this machine's own rate of matrix products in their precisions takes its turns.
    """
    rates = [Variant(precision, "matmul", precision) for precision in {v.precision: None for v in variants}]
    workers = [Worker(variant, options, device) for variant in (*variants, *rates)]
    for _ in range(rounds):
        for worker in workers:
            worker.take_turn()
    for worker in workers:
        worker.end()
    rated = [worker for worker in workers[len(variants) :] if worker.trouble is None]
    matmul = {worker.variant.precision: 2 * MATMUL**3 / statistics.median(worker.seconds) for worker in rated}
    flop = count_flop(variants[0].kind, options)
    pictures = "pictures/s" if variants[0].kind == "inference" else "pairs/s"
    rows: list[dict[str, Any]] = []
    for worker in workers[: len(variants)]:
        rows.append({"variant": worker.variant.name})
        if worker.trouble is not None:
            rows[-1]["trouble"] = worker.trouble
            continue
        median, rate = statistics.median(worker.seconds), matmul.get(worker.variant.precision)
        rows[-1] |= {"s": median, "s least": min(worker.seconds), "s most": max(worker.seconds)}
        rows[-1] |= {pictures: options.batch_size / median, "TFLOP/s": flop / median / 1e12}
        rows[-1] |= {"share of matmul": flop / median / rate if rate else None, **worker.figures}
    return rows


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it has been told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_cached_memory(device: torch.device) -> None:
    """Free the memory that the allocators keep for later: the others want it meanwhile."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def kept_for_backward(work: Callable[[], Any]) -> int:
    """Bytes that autograd has kept, float32 parameters apart, when the first backward pass begins."""
    kept: dict[int, int] = {}
    tensors: list[Tensor] = []  # what is freed could share its address with what comes later
    begun = False

    def pack(tensor: Tensor) -> Tensor:
        if not begun and not isinstance(tensor, nn.Parameter):
            tensors.append(tensor.detach())
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal begun
        begun = True
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        work()
    return sum(kept.values())


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: of the GPU's memory, or of RAM for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":  # keeps no peak; but nothing has been given back to Metal
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")  # on Linux getrusage counts the process that started this one, too
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_kernels(work: Callable[[], Any]) -> int:
    """CUDA kernels that one turn launches."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


# ----------------------------------------------------------------------------------------------------------
#  The loader
# ----------------------------------------------------------------------------------------------------------


def measure_loader(
    options: argparse.Namespace, device: torch.device, rounds: int, duration: float = 2.0
) -> list[dict[str, Any]]:
    """Training samples per second, by number of loader processes, decoded each time or kept in memory."""
    if options.dataset_name == BUILT_IN:
        draw_built_in(Path(options.data_dir) / BUILT_IN)
    loaders = {}
    for n_cpu in sorted({0, options.n_cpu}):
        loaders[f"decoded each time, --n_cpu {n_cpu}"] = endless_batches(options, device, n_cpu)
    loaders["kept in memory"] = kept = endless_batches(options, device, 0, keep=True)
    loaders["the same, ready for a step"] = utils.to_device(kept, device, normalise)
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        for name, batches in loaders.items():
            for _ in islice(batches, PREFETCHED * options.n_cpu):  # made while the others had their turns
                pass
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < duration:
                count += len(next(batches)["A"])
            wait_for(device)
            if turn:  # the first starts the processes
                found[name].append(count / (time.perf_counter() - start))
    return [
        {"loader": name, "pairs/s": statistics.median(v), "least": min(v), "most": max(v)} for name, v in found.items()
    ]


def endless_batches(
    options: argparse.Namespace, device: torch.device, n_cpu: int, keep: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Raises InputError where the pictures do not fill a batch, or are to be kept and do not fit into ``cache_gb``."""
    dataset = train.build_dataset(options)
    if keep and not dataset.load(1e9 * options.cache_gb):
        raise InputError(f"--cache_gb {options.cache_gb}: {options.dataset_name} does not fit")
    sampler = EpochSampler(len(dataset), options.seed)
    loader = make_loader(dataset, sampler, options.batch_size, n_cpu, pin_memory=device.type == "cuda")
    if not len(loader):
        raise InputError(
            f"--batch_sizes {options.batch_size}: {len(dataset)} samples in {options.data_dir}/{options.dataset_name} "
            "do not fill one batch, expected fewer"
        )
    while True:
        yield from loader


# ----------------------------------------------------------------------------------------------------------
#  Tables
# ----------------------------------------------------------------------------------------------------------


def step_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the table shows of ``measure``'s rows, by the headings of its columns."""
    found = []
    for row in rows:
        cells = {"": row["variant"]}
        if "trouble" in row:
            found.append(cells | {"median (least–most)": row["trouble"]})
            continue
        cells["median (least–most)"] = f"{seconds(row['s'])} ({seconds(row['s least'])}–{seconds(row['s most'])})"
        cells |= {rate: f"{row[rate]:.2f}" for rate in ("pairs/s", "pictures/s") if rate in row}
        cells[f"× {rows[0]['variant']}"] = f"{rows[0]['s'] / row['s']:.2f}" if "s" in rows[0] else "–"
        cells["peak memory"] = mib(row["peak"])
        if row["kept"]:
            cells["kept for backward"] = mib(row["kept"])
        cells["TFLOP/s"] = f"{row['TFLOP/s']:.3f}"
        cells["of matmul's rate"] = f"{100 * row['share of matmul']:.0f} %" if row["share of matmul"] else "–"
        cells["warm-up"] = f"{row['warm-up']:.0f} s"
        cells |= {"kernels": str(row["kernels"])} if "kernels" in row else {}
        found.append(cells)
    return found


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def mib(value: float) -> str:
    return f"{value:,.0f} MiB"


def align(rows: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """All headings, then the cells of each row below them, empty where it has none."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    return [heads, *([row.get(head, "") for head in heads] for row in rows)]


def markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    heads, *lines = ("| " + " | ".join(line) + " |" for line in cells)
    return [heads, "|---" * len(cells[0]) + "|", *lines]


def describe(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    unit = "GPU" if device.type == "mps" else f"{torch.get_num_threads()} threads"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {unit}"


def add_tables(out: Path, tables: Mapping[str, Any]) -> None:
    """Add tables to ``out``.json, in the place of those of the same titles, and show all of it in ``out``.md.

    Raises InputError where something else stands there, OSError where it cannot be written.
    """
    store, page = (out.with_name(f"{out.name}.{ending}") for ending in ("json", "md"))
    lines = []
    try:
        kept = (json.loads(store.read_text()) if store.exists() else {}) | dict(tables)
        for title, table in kept.items():
            lines += [f"### {title}", "", f"`{table['command']}`, {table['when']}", "", *markdown(table["cells"]), ""]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{store}: not the tables of an earlier benchmark.py ({error!r}); remove it") from error
    write_block(page, "benchmark", f"python benchmark.py --out {out}", lines[:-1])
    with utils.name_file(store):
        store.write_text(json.dumps(kept, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
#  The command
# ----------------------------------------------------------------------------------------------------------


def make_parser() -> utils.Parser:
    parser = utils.Parser(
        "Measure this machine.",
        "Other flags are those of train.py (--ngf, --lambda_id, --data_dir, ...) and describe the system. "
        "Where variants are timed, they stand for --precision and --compile.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="measure only a generator")
    what.add_argument("--loader", action="store_true", help="measure only decoding and augmenting")
    what.add_argument("--memory", action="store_true", help="find what fits: the peak memory of train.py's own step")
    add, number = parser.add_argument, utils.at_least(1)
    add("--systems", nargs="+", choices=sorted(SYSTEMS), default=["attentiongan"], help="systems to measure")
    add(
        "--sizes",
        type=number,
        nargs="+",
        default=[128, 256],
        help="heights of the pictures, pixels; they are square here (instead of --img_height and --img_width)",
    )
    add("--batch_sizes", type=number, nargs="+", default=[1], help="pictures of each side in a batch")
    add("--rounds", type=number, default=5, help="turns of every variant, of a second at least; --memory has none")
    variants = parser.add_mutually_exclusive_group()
    variants.add_argument(
        "--variants",
        type=number,
        nargs="+",
        help="numbers of the variants to measure, from 1 (default: all; a GPU has to hold them side by side)",
    )
    variants.add_argument(
        "--own",
        action="store_true",
        help="measure what train.py does, by --precision and --compile, in the place of the variants",
    )
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    add("--out", type=Path, help="also write the tables to OUT.json and, between its marks, to OUT.md")
    return parser


def refuse_ignored(own: argparse.Namespace, others: Sequence[str]) -> None:
    """Raise InputError for flags that would be ignored."""
    instead = {"--system": "--systems", "--img_height": "--sizes", "--img_width": "--sizes"}
    instead["--batch_size"] = "--batch_sizes"
    if not (own.memory or own.loader or own.own):
        instead |= dict.fromkeys(("--precision", "--compile"), "--variants")
    for flag in (other.partition("=")[0] for other in others):
        if flag in instead:
            raise InputError(f"{flag} is set by {instead[flag]} here, expected that in its place")
    if (own.variants or own.own) and (own.memory or own.loader):
        flag = "--own" if own.own else "--variants"
        raise InputError(f"{flag} is for steps and --inference, expected neither with --memory nor with --loader")


def plan(
    own: argparse.Namespace, others: Sequence[str], device: torch.device, system: str, size: int, batch_size: int
) -> tuple[argparse.Namespace, list[Variant]]:
    """The options of train.py, and what is timed. Raises InputError for what cannot be measured."""
    shape = f"--system {system} --img_height {size} --img_width {size} --batch_size {batch_size}"
    options = train.parse_options([*others, *shape.split(), "--device", own.device])
    with torch.device("meta"):
        built = train.build_system(options)
    if NOISE in built.generators:
        raise InputError(f"--systems {system}: draws pictures from noise, expected systems that translate")
    kind = "inference" if own.inference else "step"
    if own.own or own.memory:
        precision = "bf16" if utils.make_autocast(device, options.precision).keywords["enabled"] else "float32"
        layout = utils.pick_layout(device) == torch.channels_last
        return options, [Variant("train.py", kind, precision, channels_last=layout, compile=options.compile)]
    variants = ladder(kind, device, has_textbook(built))
    numbers = own.variants or range(1, len(variants) + 1)
    if max(numbers) > len(variants):
        names = ", ".join(f"{i} {v.name}" for i, v in enumerate(variants, 1))
        raise InputError(f"--variants {max(numbers)}: expected some of {names}")
    return options, [variants[i - 1] for i in sorted(numbers)]


def measured_tables(
    own: argparse.Namespace, others: Sequence[str], device: torch.device
) -> Iterator[tuple[str, list[dict[str, str]], list[dict[str, Any]]]]:
    """Title, cells and figures of each table as soon as it is measured. Raises InputError before the first."""
    asked = list(product(own.systems, own.sizes, own.batch_sizes))
    plans = {each: plan(own, others, device, *each) for each in asked}
    if own.out is not None:
        add_tables(own.out, {})
    for system, size, n in () if own.memory else asked:
        options, variants = plans[system, size, n]
        name = f"{' '.join([system, *others])}, {size} × {size}, batch {n}"
        if own.loader:
            rows = measure_loader(options, device, own.rounds)
            rates = [f"{r['pairs/s']:,.0f} ({r['least']:,.0f}–{r['most']:,.0f})" for r in rows]
            cells = [
                {"": r["loader"], "pairs/s: median (least–most)": rate} for r, rate in zip(rows, rates, strict=True)
            ]
            yield f"Loader, {name}", cells, rows
        else:
            rows = measure(variants, options, device, own.rounds)
            what = ("Inference" if own.inference else "Training step") + (" of train.py" if own.own else "")
            some = f", variants {' '.join(map(str, own.variants))}" if own.variants else ""
            yield f"{what}, {name}{some}", step_cells(rows), rows
    for system in own.systems if own.memory else ():
        ...


def benchmark(own: argparse.Namespace, others: Sequence[str], command: str) -> None:
    """Measure all that was asked for; each table is shown, and written, as it is ready. Raises InputError."""
    ...


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        own, others = make_parser().parse_known_args(argv)
        refuse_ignored(own, others)
        benchmark(own, others, " ".join(["python benchmark.py", *(sys.argv[1:] if argv is None else argv)]))
        return 0

    return utils.run_script("benchmark.py", work)


if __name__ == "__main__":
    sys.exit(main())
