"""How fast this machine takes a step, beside the textbook step, in one run.

    python benchmark.py                                       # a training step, optimisations switched on in turn
    python benchmark.py --sizes 256 --batch_sizes 1 4 8 16    # for a GPU
    python benchmark.py --memory --systems attentiongan cyclegan --sizes 128 256
    python benchmark.py --systems ugatit --light              # other flags are those of train.py
    python benchmark.py --inference --batch_sizes 1 16
    python benchmark.py --loader --dataset_name horse2zebra

Every variant lives in a process of its own, which gives it a peak of memory of its own, and they take turns round by
round, so that a machine that drifts, or has other work, harms none more than the others. The tables go to the terminal
and, with ``--out docs/benchmark``, to ``docs/benchmark.json`` and ``docs/benchmark.md``, where the tables of other
machines and other flags stay.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import islice, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import train
import utils
from datasets import BUILT_IN, EpochSampler, draw_built_in, make_loader, normalise
from systems import SYSTEMS, System, TwoWay
from utils import InputError

# ----------------------------------------------------------------------------------------------------------
#  The textbook step
# ----------------------------------------------------------------------------------------------------------


class TextbookPool:
    """The replay buffer of the reference projects: a list of pictures, asked one by one."""

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
    on, Adam as PyTorch has it by default, and every loss fetched for the log. The networks and the mathematics are
    ours: the weights after a step are those of ``train.play``.
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
    """Whether ``Textbook`` plays the system's game: that of CycleGAN and AttentionGAN II without further terms."""
    return (
        isinstance(system, TwoWay)
        and system.weights == system.weights._replace(gan=1.0, pixel=0.0, tv=0.0)
        and bool(system.weights.identity)
        and system.attn_disc == "none"
        and not system.curriculum
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
        return lambda: train.play(system, optimizers, autocast, batch)
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


MATMUL = 4096  # side of the matrices whose product tells the machine's own rate
MIB = 2**20


def serve(pipe: Connection, variant: Variant, options: argparse.Namespace, device_name: str) -> None:
    """A process of one variant: does its work as often as it is told, and answers with the seconds of one time.

    Told 0, it answers with the rest of its figures and ends. The message of an InputError or of an exhausted memory is
    answered in place of a figure.
    """
    try:
        device = torch.device(device_name)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)

        def timed(times: int) -> float:
            start = time.perf_counter()
            for _ in range(times):
                work()
            wait_for(device)
            return (time.perf_counter() - start) / times

        start = time.perf_counter()
        work = make_work(variant, options, device)
        timed(2)  # the first also compiles, and makes the optimizers' state
        if cuda:  # cuDNN's search for the fastest way tries out large workspaces
            torch.cuda.reset_peak_memory_stats()
        pipe.send(time.perf_counter() - start)
        while times := pipe.recv():
            timed(1)  # finds the memory and the caches that the others had meanwhile
            pipe.send(timed(times))
            give_back(cuda)
        figures = {"peak": peak_memory(device) / MIB, "kept": kept_for_backward(work) / MIB}
        if cuda:
            figures["kernels"] = count_kernels(work)
        pipe.send(figures)
    except (InputError, RuntimeError, MemoryError) as error:
        pipe.send("out of memory" if utils.is_out_of_memory(error) else utils.first_line(error))


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it has been told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def give_back(cuda: bool) -> None:
    """Free the memory that the allocators keep for later: the others want it meanwhile."""
    if cuda:
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


class Server:
    """The process of one variant, seen from the one that asks."""

    def __init__(self, variant: Variant, options: argparse.Namespace, device: torch.device):
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, variant, options, str(device)), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.trouble: str | None = None
        warm_up = self._hear()
        once = self.ask(1)
        self.figures = {"warm-up": warm_up}
        self.times = math.ceil(1.0 / once) if once else 1  # in a turn, which takes a second at least

    def _hear(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            killed = f"killed by signal {-code}, as systems do when memory runs out"
            answer = killed if code < 0 else f"failed (exit code {code}), its traceback is above"
        if isinstance(answer, str):
            self.trouble = answer
            return None
        return answer

    def ask(self, times: int) -> Any:
        if self.trouble is not None:
            return None
        with suppress(BrokenPipeError):  # it has been killed; what is heard says so
            self.pipe.send(times)
        return self._hear()

    def take_turn(self) -> None:
        seconds = self.ask(self.times)
        if seconds is not None:
            self.seconds.append(seconds)

    def end(self) -> None:
        self.figures |= self.ask(0) or {}
        self.process.join()


def measure(
    variants: Sequence[Variant], options: argparse.Namespace, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """The figures of every variant; what could not be done has the reason under "trouble".

    Besides the variants the machine's own rate of matrix products in their precisions takes its turns.
    """
    precisions = dict.fromkeys(variant.precision for variant in variants)
    rates = [Variant(p, "matmul", p) for p in precisions]
    servers = [Server(variant, options, device) for variant in (*variants, *rates)]
    for _ in range(rounds):
        for server in servers:
            server.take_turn()
    for server in servers:
        server.end()
    rated = [server for server in servers if server.variant in rates and server.trouble is None]
    peaks = {server.variant.precision: 2 * MATMUL**3 / statistics.median(server.seconds) for server in rated}
    flop = count_flop(variants[0].kind, options)
    rate = "pictures/s" if variants[0].kind == "inference" else "pairs/s"
    rows = []
    for server in servers[: len(variants)]:
        variant, seconds = server.variant, server.seconds
        row: dict[str, Any] = {"variant": variant.name}
        if server.trouble is not None:
            rows.append(row | {"trouble": server.trouble})
            continue
        median = statistics.median(seconds)
        row |= {"s": median, "s least": min(seconds), "s most": max(seconds), rate: options.batch_size / median}
        peak = peaks.get(variant.precision)
        row |= {"TFLOP/s": flop / median / 1e12, "share of matmul": flop / median / peak if peak else None}
        rows.append(row | server.figures)
    return rows


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
        loaders[f"decoded each time, --n_cpu {n_cpu}"] = build_loader(options, device, n_cpu, 0.0)
    loaders["kept in memory"] = kept = build_loader(options, device, 0, options.cache_gb)
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


PREFETCHED = 2  # batches that each process of a DataLoader has ready


def build_loader(
    options: argparse.Namespace, device: torch.device, n_cpu: int, cache_gb: float
) -> Iterator[dict[str, Tensor]]:
    """Batches without end. Raises InputError where the pictures do not fill one, or do not fit into ``cache_gb``."""
    dataset = train.build_dataset(options)
    if not dataset.load(1e9 * cache_gb) and cache_gb:
        raise InputError(f"--cache_gb {cache_gb}: {options.dataset_name} does not fit")
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


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def lay_out(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of ``measure``'s rows, headings first."""
    first, done = rows[0], [row for row in rows if "trouble" not in row]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: row["variant"],
        "median (least–most)": lambda row: f"{seconds(row['s'])} ({seconds(row['s least'])}–{seconds(row['s most'])})",
        "pairs/s": lambda row: f"{row['pairs/s']:.2f}",
        "pictures/s": lambda row: f"{row['pictures/s']:.2f}",
        f"× {first['variant']}": lambda row: f"{first['s'] / row['s']:.2f}" if "s" in first else "–",
        "peak memory": lambda row: f"{row['peak']:,.0f} MiB",
        "kept for backward": lambda row: f"{row['kept']:,.0f} MiB",
        "TFLOP/s": lambda row: f"{row['TFLOP/s']:.3f}",
        "of matmul's rate": lambda row: f"{100 * row['share of matmul']:.0f} %" if row["share of matmul"] else "–",
        "warm-up": lambda row: f"{row['warm-up']:.0f} s",
        "kernels": lambda row: str(row["kernels"]),
    }
    for head, key in (("pairs/s",) * 2, ("pictures/s",) * 2, ("kept for backward", "kept"), ("kernels",) * 2):
        if not any(row.get(key) for row in done):
            del columns[head]
    cells = [list(columns)]
    for row in rows:
        if "trouble" in row:
            cells.append([row["variant"], row["trouble"], *[""] * (len(columns) - 2)])
        else:
            cells.append([show(row) for show in columns.values()])
    return cells


def markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


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


def read_tables(out: Path) -> dict[str, Any]:
    """What ``write`` has written to ``out`` before, by titles. Raises InputError where something else stands there."""
    store, shown = (out.with_name(f"{out.name}.{ending}") for ending in ("json", "md"))
    if not store.exists():
        if shown.exists():
            raise InputError(f"--out {out}: {shown} is not of an earlier benchmark.py, expected another name")
        return {}
    try:
        tables = json.loads(store.read_text())
        if not all(section.keys() >= {"command", "when", "cells"} for section in tables.values()):
            raise ValueError("a table lacks its cells")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{store}: not the tables of an earlier benchmark.py ({error}); remove it") from error
    return tables


def write(out: Path, sections: Mapping[str, Any]) -> None:
    """Add the sections to ``out``.json, in the place of older ones of the same titles, and make ``out``.md of all."""
    kept = read_tables(out) | dict(sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    store, shown = (out.with_name(f"{out.name}.{ending}") for ending in ("json", "md"))
    with utils.writing(store):
        store.write_text(json.dumps(kept, indent=1) + "\n")
    parts = [
        "# Benchmarks",
        "Medians of rounds in which the variants took turns. One turn of a training step is a pair",
    ]
    parts[1] += " per picture of the batch: G and D, forward, backward and Adam. Made by `benchmark.py`. On CUDA"
    parts[1] += " float32 is PyTorch's default, TF32 in convolutions, and so is the matmul beside it."
    for title, section in kept.items():
        parts += [f"## {title}", f"`{section['command']}`, {section['when']}", markdown(section["cells"])]
    with utils.writing(shown):
        shown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------
#  The command
# ----------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure this machine.",
        epilog="Other flags are those of train.py (--ngf, --lambda_id, --data_dir, ...) and describe the system. "
        "Where variants are timed, they stand for --precision and --compile.",
        formatter_class=utils.HelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="measure a generator alone")
    what.add_argument("--loader", action="store_true", help="measure decoding and augmenting alone")
    what.add_argument("--memory", action="store_true", help="find what fits: the peak memory of train.py's own step")
    add = parser.add_argument
    add("--systems", nargs="+", choices=sorted(SYSTEMS), default=["attentiongan"], help="systems to measure")
    add("--sizes", type=int, nargs="+", default=[128, 256], help="heights and widths of the pictures, pixels")
    add("--batch_sizes", type=int, nargs="+", default=[1], help="pictures of each side in a batch")
    add("--rounds", type=int, default=5, help="turns of every variant, of a second at least; --memory takes one step")
    variants = parser.add_mutually_exclusive_group()
    variants.add_argument(
        "--variants",
        type=int,
        nargs="+",
        help="numbers of the variants to measure, from 1 (default: all; a GPU has to hold them side by side)",
    )
    variants.add_argument(
        "--own",
        action="store_true",
        help="measure what train.py does, by --precision and --compile, in the place of the variants",
    )
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    add("--out", type=Path, help="write the tables to OUT.md and OUT.json too")
    return parser


def check_flags(own: argparse.Namespace, others: Sequence[str]) -> None:
    """Raise InputError for values that cannot be meant, and for flags that would be ignored."""
    for flag, values in (("sizes", own.sizes), ("batch_sizes", own.batch_sizes), ("rounds", [own.rounds])):
        if min(values) < 1:
            raise InputError(f"--{flag} {min(values)}: expected at least 1")
    instead = {"--system": "--systems", "--img_height": "--sizes", "--img_width": "--sizes"}
    instead["--batch_size"] = "--batch_sizes"
    if not (own.memory or own.loader or own.own):
        instead |= dict.fromkeys(("--precision", "--compile"), "--variants")
    for flag in (other.partition("=")[0] for other in others):
        if flag in instead:
            raise InputError(f"{flag} is set by {instead[flag]} here, expected that in its place")
    if own.loader:
        for flag, values in (("systems", own.systems), ("batch_sizes", own.batch_sizes)):
            if len(values) > 1:
                raise InputError(f"--{flag} {' '.join(map(str, values))}: --loader measures one of them, expected one")
    if (own.variants or own.own) and (own.memory or own.loader):
        flag = "--own" if own.own else "--variants"
        raise InputError(f"{flag} is for steps and --inference, expected neither with --memory nor with --loader")


def benchmark(own: argparse.Namespace, others: Sequence[str], command: str) -> None:
    """Measure all that was asked for; each table is shown, and written, as it is ready. Raises InputError."""
    device = utils.pick_device(own.device)
    on = describe(device)
    about = {"command": command, "when": f"PyTorch {torch.__version__}, Python {platform.python_version()}, {on}, "}
    about["when"] += f"{date.today():%d %B %Y}"

    def show(title: str, cells: Sequence[Sequence[str]], rows: Any) -> None:
        print(f"\n{title}, {on}\n\n{markdown(cells)}", flush=True)
        if own.out is not None:
            write(own.out, {f"{title}, {on}": {**about, "cells": cells, "rows": rows}})

    def options(system: str, size: int, batch_size: int) -> argparse.Namespace:
        shape = ["--img_height", str(size), "--img_width", str(size), "--batch_size", str(batch_size)]
        found = train.parse_options([*others, "--system", system, *shape, "--device", own.device])
        with torch.device("meta"):
            if utils.NOISE in train.build_system(found).generators:
                raise InputError(f"--systems {system}: draws pictures from noise, expected systems that translate")
        return found

    # What is wrong with one of them is told before any is measured.
    asked = {key: options(*key) for key in product(own.systems, own.sizes, own.batch_sizes)}
    variants = {key: pick_variants(own, found, device) for key, found in asked.items()}
    if own.out is not None:
        read_tables(own.out)

    if own.memory:
        for system in own.systems:
            cells, table = [["size", *(f"batch {n}" for n in own.batch_sizes)]], []
            for size in own.sizes:
                line = [f"{size} × {size}"]
                for n in own.batch_sizes:
                    (variant,) = variants[system, size, n]
                    server = Server(variant, asked[system, size, n], device)
                    server.end()
                    line.append(f"{server.figures['peak']:,.0f} MiB" if server.trouble is None else server.trouble)
                    table.append({"size": size, "batch": n, "trouble": server.trouble, **server.figures})
                cells.append(line)
            show(f"Peak memory of a training step, {' '.join([system, *others])}", cells, table)
        return
    for (system, size, n), found in asked.items():
        name = f"{' '.join([system, *others])}, {size} × {size}, batch {n}"
        if own.loader:
            rows = measure_loader(found, device, own.rounds)
            cells = [["", "pairs/s: median (least–most)"]]
            cells += [[r["loader"], f"{r['pairs/s']:,.0f} ({r['least']:,.0f}–{r['most']:,.0f})"] for r in rows]
            show(f"Loader, {name}", cells, rows)
            continue
        rows = measure(variants[system, size, n], found, device, own.rounds)
        what = "Inference" if own.inference else "Training step"
        which = " of train.py" if own.own else ""
        some = f", variants {' '.join(map(str, own.variants))}" if own.variants else ""
        show(f"{what}{which}, {name}{some}", lay_out(rows), rows)


def pick_variants(own: argparse.Namespace, options: argparse.Namespace, device: torch.device) -> list[Variant]:
    """What is timed of a system. Raises InputError for numbers of variants that there are not."""
    kind = "inference" if own.inference else "step"
    if own.own or own.memory:
        return [pick_own(options, device)._replace(kind=kind)]
    with torch.device("meta"):
        textbook = has_textbook(train.build_system(options))
    variants = ladder(kind, device, textbook)
    for number in own.variants or ():
        if not 1 <= number <= len(variants):
            names = ", ".join(f"{i} {v.name}" for i, v in enumerate(variants, 1))
            raise InputError(f"--variants {number}: expected some of {names}")
    return [variants[i - 1] for i in sorted(own.variants)] if own.variants else variants


def pick_own(options: argparse.Namespace, device: torch.device) -> Variant:
    """What ``train.py`` does with these options."""
    bf16 = utils.make_autocast(device, options.precision).keywords["enabled"]
    return Variant(
        "train.py",
        precision="bf16" if bf16 else "float32",
        channels_last=utils.pick_layout(device) == torch.channels_last,
        compile=options.compile,
    )


def main(argv: Sequence[str] | None = None) -> int:
    own, others = make_parser().parse_known_args(argv)

    def work() -> int:
        check_flags(own, others)
        command = " ".join(["python benchmark.py", *(sys.argv[1:] if argv is None else argv)])
        benchmark(own, others, command)
        return 0

    return utils.run_script("benchmark.py", work)


if __name__ == "__main__":
    sys.exit(main())
