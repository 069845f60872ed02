"""Measure how fast this machine takes a training step, beside the textbook step.

    python benchmark.py                                       # a training step, optimisations switched on in turn
    python benchmark.py --sizes 256 --batch_sizes 1 4 8 16    # for a GPU
    python benchmark.py --memory --systems attentiongan cyclegan --sizes 128 256
    python benchmark.py --systems ugatit --light              # other flags are those of train.py
    python benchmark.py --inference --batch_sizes 1 16
    python benchmark.py --translate --batch_sizes 8
    python benchmark.py --loader --dataset_name horse2zebra

Every variant has a process of its own, and so a peak of memory of its own. The processes keep living and take turns
round by round: when the machine slows down, or has other work, all variants suffer alike. The tables go to the
terminal. With ``--out docs/speed`` they also go to ``docs/speed.json`` and into ``docs/speed.md``, where the tables
of other machines and other flags stay.
"""

from __future__ import annotations

import utils
from utils import InputError

import argparse
import ctypes
import json
import math
import multiprocessing
import platform
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import chain, islice, product, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import record
import train
import translate
from datasets import EpochSampler, make_loader
from options import build_system, parse_options
from pictures import Picture, normalise
from prepare import draw_scene
from systems import SYSTEMS, System, TwoWay
from translate import Task, make_batches

MATMUL = 4096  # side of the matrices whose product tells the machine's own rate
MIB = 2**20
TRANSLATED = 24  # pictures in a turn of ``--translate``
PREFETCHED = 2  # batches that each process of a DataLoader has ready

# ----------------------------------------------------------------------------------------------------------
#  What is timed
# ----------------------------------------------------------------------------------------------------------


def textbook_step(
    system: TwoWay, optimizers: Mapping[str, torch.optim.Optimizer], batch: Mapping[str, Tensor]
) -> dict[str, float]:
    """The step of CycleGAN and AttentionGAN as the reference projects take it. Returns the losses.

    Six generator calls and a discriminator call for every term, targets made anew, ``requires_grad`` switched off and
    on, and every loss fetched for the log. The networks, the replay buffers and the mathematics are ours: the weights
    after a step are those of ``train.training_step``.
    """

    def judge(discriminator: nn.Module, images: Tensor, real: bool) -> Tensor:
        (logits,) = discriminator(images)
        return F.mse_loss(logits, torch.full_like(logits, float(real)))

    to = {"A": system.G_BA, "B": system.G_AB}
    judges, pools = {"A": system.D_A, "B": system.D_B}, {"A": system.pool_A, "B": system.pool_B}
    losses, fakes = {}, {}
    for discriminator in judges.values():
        discriminator.requires_grad_(False)
    for source, target in ("AB", "BA"):
        real = batch[source]
        fakes[target] = fake = to[target](real).image
        losses[f"G_{source}{target}"] = judge(judges[target], fake, True)
        losses[f"cycle_{source}"] = system.options.lambda_cyc * F.l1_loss(to[source](fake).image, real)
        losses[f"identity_{source}"] = system.options.lambda_id * F.l1_loss(to[source](real).image, real)
    optimizers["G"].zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizers["G"].step()

    for discriminator in judges.values():
        discriminator.requires_grad_(True)
    optimizers["D"].zero_grad()
    for side, discriminator in judges.items():
        pooled = pools[side](fakes[side])
        loss = 0.5 * (judge(discriminator, batch[side], True) + judge(discriminator, pooled, False))
        loss.backward()
        losses[f"D_{side}"] = loss
    optimizers["D"].step()
    return {name: loss.item() for name, loss in losses.items()}


def has_textbook(system: System) -> bool:
    """Whether ``textbook_step`` has the system's terms: those of CycleGAN and AttentionGAN II, and no further ones."""
    return isinstance(system, TwoWay) and bool(system.options.lambda_id) and system.options.attn_disc == "none"


class Variant(NamedTuple):
    """One way to do the work. ``kind``: "textbook", "step" (ours), "inference", "matmul" (this machine's own rate)."""

    name: str
    kind: str = "step"
    precision: str = "float32"
    fused: bool = True
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False


def ladder(kind: str, device: torch.device, with_textbook: bool) -> list[Variant]:
    """From the textbook step to what ``train.py`` does here by default, one optimisation more each time; then
    ``--compile`` and ``--cuda_graph``.
    """
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
    if kind == "step" and device.type == "cuda":
        variants.append(variants[-1]._replace(name="CUDA graph instead", compile=False, cuda_graph=True))
    return variants


def make_work(variant: Variant, options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """What is timed, on random pictures that are on the device already."""
    if variant.kind == "matmul":
        dtype = torch.bfloat16 if variant.precision == "bf16" else torch.float32
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as PyTorch's convolutions by default
        a, b = (torch.randn(MATMUL, MATMUL, device=device, dtype=dtype) for _ in range(2))
        return lambda: a @ b
    chosen = {name: getattr(variant, name) for name in ("precision", "compile", "cuda_graph")}
    options = argparse.Namespace(**{**vars(options), **chosen})
    system, optimizers, autocast = train.set_up(options, device)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    system.to(memory_format=layout)
    for group in (g for optimizer in optimizers.values() for g in optimizer.param_groups):
        group["fused"] = variant.fused or None
    shape = options.batch_size, options.channels, options.img_height, options.img_width
    batch = {side: (torch.rand(shape, device=device) * 2 - 1).contiguous(memory_format=layout) for side in "AB"}
    if variant.kind == "textbook" and isinstance(system, TwoWay):
        return lambda: textbook_step(system, optimizers, batch)
    if variant.kind == "step" and variant.cuda_graph:
        return partial(train.CapturedStep(system, optimizers, autocast), batch)
    if variant.kind == "step":
        return lambda: train.training_step(system, optimizers, autocast, batch)
    generator = system.generator(next(iter(system.generators)))

    def generate() -> Tensor:
        with torch.no_grad(), autocast():
            return generator(batch["A"]).image

    return generate


def count_flop(kind: str, options: argparse.Namespace) -> int:
    """Floating-point operations of convolutions and matrix products in one step, counted without doing them."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        system = build_system(options)
        shape = options.batch_size, options.channels, options.img_height, options.img_width
        batch = {side: torch.zeros(shape) for side in "AB"}
        if kind == "inference":
            with torch.no_grad():
                system.generator(next(iter(system.generators)))(batch["A"])
        else:
            fakes = system(batch)
            for turn in system.turns:
                loss = torch.stack(list(turn.losses(batch, fakes).values())).sum()
                loss.backward(inputs=train.trained_parameters(system, turn.networks))
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------
#  A process for each variant
# ----------------------------------------------------------------------------------------------------------


def serve(pipe: Connection, variant: Variant, options: argparse.Namespace, device_name: str) -> None:
    """The process of a variant: sent True it warms up, then takes a turn each time; sent False it ends.

    It answers with its figures so far, in seconds and MiB, named as in ``UNITS``, and with "seconds": those of one
    step in each turn. After an error the only figure is "trouble", the reason.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    device = torch.device(device_name)
    cuda = device.type == "cuda"

    def repeat(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait_for(device)
        return (time.perf_counter() - start) / times

    try:
        pipe.recv()
        if cuda:
            torch.cuda.set_device(device)
        start = time.perf_counter()
        work = make_work(variant, options, device)
        repeat(2)  # the first also compiles, and makes the optimizers' state
        figures: dict[str, Any] = {"warm-up": time.perf_counter() - start}
        if cuda:  # cuDNN's search for the fastest way tries out large workspaces
            torch.cuda.reset_peak_memory_stats()
        times = math.ceil(1.0 / repeat(1))  # in a turn, which so takes about a second at least
        free_cached_memory(device)
        pipe.send(figures)
        while pipe.recv():
            repeat(1)  # gets back memory and caches that the others had meanwhile
            figures.setdefault("seconds", []).append(repeat(times))
            free_cached_memory(device)
            pipe.send(figures)
        figures["peak memory"] = peak_memory(device) / MIB
        if kept := kept_for_backward(work):
            figures["kept for backward"] = kept / MIB
        if cuda:
            figures["kernels"] = count_kernels(work)
        pipe.send(figures)
    except (EOFError, ConnectionError):  # the parent has ended
        return
    except Exception as error:
        if utils.is_out_of_memory(error):
            pipe.send({"trouble": "out of memory"})
        else:
            if not isinstance(error, InputError):
                traceback.print_exc()
            pipe.send({"trouble": f"failed: {utils.first_line(error)}"})


class Worker:
    """The process of a variant, seen by the one that asks. ``figures`` are what ``serve`` has answered last."""

    def __init__(self, variant: Variant, options: argparse.Namespace, device: torch.device):
        context = multiprocessing.get_context("spawn")
        self.variant = variant
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, variant, options, str(device)), daemon=True)
        self.process.start()
        theirs.close()
        self.figures: dict[str, Any] = {}

    def hear(self) -> None:
        try:
            self.figures = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.figures = {"trouble": f"ended with exit code {code} (-9: killed, as systems do when memory runs out)"}

    def ask(self, another_turn: bool) -> None:
        if "trouble" not in self.figures:
            with suppress(ConnectionError):  # the process has been killed; what is heard says so
                self.pipe.send(another_turn)
            self.hear()
        if not another_turn:
            self.process.join()


def measure(
    variants: Sequence[Variant], options: argparse.Namespace, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """A row of figures for every variant: those of ``serve``, and what follows from them.

    This machine's own rate of matrix products, in the precisions of the variants, takes its turns beside them.
    """
    matmuls = {v.precision: Variant("matmul", "matmul", v.precision) for v in variants}
    workers = [Worker(variant, options, device) for variant in (*variants, *matmuls.values())]
    for another_turn in [True] * (1 + rounds) + [False]:  # the first is the warm-up
        for worker in workers:
            worker.ask(another_turn)
    medians = {w.variant: statistics.median(w.figures["seconds"]) for w in workers if "trouble" not in w.figures}
    first, rows = variants[0], []
    rate, flop = "pictures/s" if first.kind == "inference" else "pairs/s", count_flop(first.kind, options)
    for worker in workers[: len(variants)]:
        variant, figures = worker.variant, worker.figures
        row: dict[str, Any] = {"": variant.name}
        if median := medians.get(variant):
            row["median (least–most)"] = figures.pop("seconds")
            row[rate] = options.batch_size / median
            if first in medians:
                row[f"× {first.name}"] = medians[first] / median
            row["TFLOP/s"] = flop / median / 1e12
            if matmul := medians.get(matmuls[variant.precision]):
                row["of matmul's rate"] = flop / median / (2 * MATMUL**3 / matmul)
        rows.append(row | figures)
    return rows


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it has been told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_cached_memory(device: torch.device) -> None:
    """Free what the allocators keep for later: the other processes want it meanwhile."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: of the GPU's memory, or of RAM for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":  # keeps no peak; but nothing has been given back to Metal
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")  # on Linux getrusage counts the process that started this one, too
    if peak := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE):
        return 1024 * int(peak[1])
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    return [{"": name, "pairs/s: median (least–most)": rates} for name, rates in found.items()]


def endless_batches(
    options: argparse.Namespace, device: torch.device, n_cpu: int, keep: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches of epoch 0, again and again.

    Raises InputError where the pictures do not fill a batch, or are to be kept and do not fit into ``cache_gb``.
    """
    dataset = train.build_dataset(options)
    if keep and not dataset.load(1e9 * options.cache_gb):
        raise InputError(f"--cache_gb {options.cache_gb}: {options.dataset_name} does not fit")
    sampler = EpochSampler(len(dataset), options.seed)
    loader = make_loader(dataset, sampler, options.batch_size, n_cpu, pin_memory=device.type == "cuda")
    if not len(loader):
        raise InputError(f"--batch_sizes {options.batch_size}: {len(dataset)} samples do not fill one batch")
    return chain.from_iterable(repeat(loader))


def measure_translation(options: argparse.Namespace, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Pictures per second of translate.py, from files to files, by precision."""
    system = build_system(options)
    generator = system.generator(next(iter(system.generators))).eval()
    size = options.img_height, options.img_width
    precisions = ["float32", *(["bf16"] if utils.has_bf16(device) else [])]
    found: dict[str, list[float]] = {precision: [] for precision in precisions}
    with TemporaryDirectory() as folder:
        tasks = []
        for i in range(TRANSLATED):
            picture, target = Picture(Path(folder, f"{i}.png")), Path(folder, "out", f"{i}.png")
            draw_scene(np.random.default_rng((4, i)))["A"].resize(size[::-1]).save(picture.path)
            tasks.append(Task(picture, size, size, target))
        batches = make_batches(tasks, options.batch_size)
        for turn, precision in product(range(rounds + 1), precisions):
            start, autocast = time.perf_counter(), utils.make_autocast(device, precision)
            failed: dict[Path, str] = {}
            translate.translate(generator, batches, device, autocast, failed=failed)
            if failed:
                raise InputError(f"{size[0]} x {size[1]}, batch {options.batch_size}: {next(iter(failed.values()))}")
            if turn:  # the first warms up
                found[precision].append(TRANSLATED / (time.perf_counter() - start))
    return [{"": precision, "pictures/s": rates} for precision, rates in found.items()]


# ----------------------------------------------------------------------------------------------------------
#  Tables
# ----------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


UNITS: dict[str, Callable[[Any], str]] = {  # of columns; others have two decimals, or are whole numbers and words
    "median (least–most)": seconds,
    "pairs/s: median (least–most)": "{:,.0f}".format,
    "TFLOP/s": "{:.3f}".format,
    "of matmul's rate": lambda share: f"{100 * share:.0f} %",
    "warm-up": "{:.0f} s".format,
    "peak memory": "{:,.0f} MiB".format,
    "kept for backward": "{:,.0f} MiB".format,
}


def cell(column: str, value: Any) -> str:
    """A figure as text; a list has a figure for every round."""
    if isinstance(value, list):
        return f"{cell(column, statistics.median(value))} ({cell(column, min(value))}–{cell(column, max(value))})"
    return UNITS.get(column, "{:.2f}".format if isinstance(value, float) else str)(value)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table with a column for every key; where a row lacks one the cell is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = ([cell(column, row[column]) if column in row else "" for column in columns] for row in rows)
    return record.markdown(columns, cells)


def describe(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    unit = "GPU" if device.type == "mps" else f"{torch.get_num_threads()} threads"
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor() or platform.machine()}, {unit}"


def add_tables(out: Path, tables: Mapping[str, Any]) -> None:
    """Add tables to ``out``.json, in the place of those of the same titles, and show all of it in ``out``.md.

    Raises InputError where something else stands there, OSError where it cannot be written.
    """
    store, page = (out.with_name(f"{out.name}.{ending}") for ending in ("json", "md"))
    lines = []
    try:
        kept = (json.loads(store.read_text()) if store.exists() else {}) | dict(tables)
        for title, each in kept.items():
            lines += [f"### {title}", "", f"`{each['command']}`, {each['when']}", "", *table(each["rows"]), ""]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{store}: not the tables of an earlier benchmark.py ({error!r})") from error
    record.write_block(page, "benchmark", f"python benchmark.py --out {out}", lines[:-1])
    with utils.replacing(store) as path:
        path.write_text(json.dumps(kept, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------
#  The command
# ----------------------------------------------------------------------------------------------------------


def make_parser() -> utils.Parser:
    parser = utils.Parser(
        "Measure this machine.",
        "Other flags are those of train.py (--ngf, --lambda_id, --data_dir, ...) and describe the system.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="measure only a generator")
    what.add_argument("--translate", action="store_true", help="measure translate.py, from files to files")
    what.add_argument("--loader", action="store_true", help="measure only decoding and augmenting")
    what.add_argument("--memory", action="store_true", help="find what fits: the peak memory of train.py's own step")
    add, number = parser.add_argument, utils.at_least(1)
    add("--own", action="store_true", help="measure no variants, but what train.py does by --precision and --compile")
    # The other draws from noise.
    translating = sorted(name for name in SYSTEMS if SYSTEMS[name].system_class.data != "plain")
    add("--systems", nargs="+", choices=translating, default=["attentiongan"], help="systems to measure")
    sizes = "sides of the pictures, pixels; one list of squares, since --img_height and --img_width are of one size"
    add("--sizes", type=number, nargs="+", default=[128, 256], help=sizes)
    add("--batch_sizes", type=number, nargs="+", default=[1], help="pictures of each side in a batch")
    add("--rounds", type=number, default=5, help="turns of each variant, of about a second or more; none for --memory")
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    add("--out", type=Path, help="also write the tables to OUT.json, and all tables in it to OUT.md")
    return parser


def refuse_ignored(own: argparse.Namespace, others: Sequence[str]) -> None:
    """Raise InputError for flags that would be ignored."""
    instead = {"--system": "--systems", "--batch_size": "--batch_sizes"}
    instead |= dict.fromkeys(("--img_height", "--img_width", "--crop_size"), "--sizes")
    if not (own.memory or own.own):
        without = own.loader or own.translate
        instead |= dict.fromkeys(("--precision", "--compile", "--cuda_graph"), "none" if without else "--own with it")
    for flag in (other.partition("=")[0] for other in others):
        if flag in instead:
            raise InputError(f"{flag} would be ignored here, expected {instead[flag]}")
        if flag == "--cuda_graph" and own.inference:
            raise InputError("--cuda_graph would be ignored by --inference: it captures training steps")
    if own.own and (own.loader or own.translate):
        other = "--loader" if own.loader else "--translate"
        raise InputError(f"--own would be ignored by {other}, expected one of the two")


def plan(
    own: argparse.Namespace, others: Sequence[str], device: torch.device, system: str, size: int, batch_size: int
) -> tuple[argparse.Namespace, list[Variant]]:
    """The options of train.py, and what is timed. Raises InputError for options that cannot be used."""
    shape = f"--system {system} --img_height {size} --img_width {size} --batch_size {batch_size}"
    options = parse_options([*others, *shape.split(), "--device", own.device])
    kind = "inference" if own.inference else "step"
    if own.own or own.memory:
        precision = "bf16" if utils.make_autocast(device, options.precision).keywords["enabled"] else "float32"
        layout = utils.pick_layout(device) == torch.channels_last
        how = {"compile": options.compile, "cuda_graph": options.cuda_graph}
        return options, [Variant("train.py", kind, precision, channels_last=layout, **how)]
    with torch.device("meta"):
        return options, ladder(kind, device, has_textbook(build_system(options)))


def benchmark(own: argparse.Namespace, others: Sequence[str], command: str) -> None:
    """Measure all that was asked for; each table is shown, and written, as it is ready. Raises InputError."""
    device = utils.pick_device(own.device)
    on = describe(device)
    when = f"PyTorch {torch.__version__}, Python {platform.python_version()}, {on}, {date.today():%d %B %Y}"

    def show(title: str, rows: list[dict[str, Any]]) -> None:
        print("", f"{title}, {on}", "", *table(rows), sep="\n", flush=True)
        if own.out is not None:
            add_tables(own.out, {f"{title}, {on}": {"command": command, "when": when, "rows": rows}})

    # What is wrong with one of them is told before any is measured.
    asked = product(own.systems, own.sizes, own.batch_sizes)
    plans = {each: plan(own, others, device, *each) for each in asked}
    if own.out is not None:
        add_tables(own.out, {})

    if own.memory:
        for system in own.systems:
            rows = []
            for size, n in product(own.sizes, own.batch_sizes):
                options, (variant,) = plans[system, size, n]
                worker = Worker(variant, options, device)
                for another_turn in (True, False):
                    worker.ask(another_turn)
                rows.append({"size": f"{size} × {size}", "batch": n, **worker.figures})
            sizes, numbers = (", ".join(map(str, each)) for each in (own.sizes, own.batch_sizes))
            name = f"{' '.join([system, *others])}, sizes {sizes}, batches {numbers}"
            show(f"Peak memory of a training step, {name}", rows)
        return
    for (system, size, n), (options, variants) in plans.items():
        name = f"{' '.join([system, *others])}, {size} × {size}, batch {n}"
        if own.translate:
            show(f"Translation of files, {name}", measure_translation(options, device, own.rounds))
        elif own.loader:
            show(f"Loader, {name}", measure_loader(options, device, own.rounds))
        else:
            what = ("Inference" if own.inference else "Training step") + (" of train.py" if own.own else "")
            show(f"{what}, {name}", measure(variants, options, device, own.rounds))


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        own, others = make_parser().parse_known_args(argv)
        refuse_ignored(own, others)
        benchmark(own, others, " ".join(["python benchmark.py", *(sys.argv[1:] if argv is None else argv)]))
        return 0

    return utils.run_script("benchmark.py", work)


if __name__ == "__main__":
    sys.exit(main())
