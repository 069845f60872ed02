"""Device and precision, ranks, signals, command-line options, and errors that users can mend.

Nothing here knows a network, a data set or the layout of a file.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

# One of our scripts: Ctrl-C while it is still importing, for seconds, ends it without a traceback. ``run_script`` then
# gives it its usual meaning.
started = getattr(sys.modules["__main__"], "__file__", None)  # None in a notebook
is_script = started is not None and Path(started).resolve().parent == Path(__file__).resolve().parent
if is_script and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ctypes
import importlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from io import TextIOWrapper
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

LINE_SECONDS = 60  # between two lines of progress in a file
LINE = "{l_bar} {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LOCK_SECONDS = 10  # how long to wait for a folder that another process has locked


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what was found and what was expected."""


# ----------------------------------------------------------------------------------------------------------
#  Device and precision
# ----------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``, with its index; "auto" takes CUDA, then MPS, then the CPU.

    Raises InputError where it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("expected cuda, mps or cpu")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all of these
        raise InputError(f"--device {name}: not usable here ({first_line(error)})") from error


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively. Elsewhere bf16 is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def make_autocast(device: torch.device, precision: str = "auto") -> partial[torch.autocast]:
    """A maker of autocast contexts: bf16 if ``precision`` is "bf16", or "auto" and the hardware has it.

    Autocast caches cast weights: open one context for each forward pass or turn, and none across an optimizer step.
    """
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)


def no_tf32() -> ContextDecorator:
    """For figures: convolutions without TF32, which is PyTorch's default on CUDA. A context or a decorator."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def usable_cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_layout(device: torch.device) -> torch.memory_format:
    """The memory layout of pictures and weights in which the device convolves fastest."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step, about a tenth more in all.

    Otherwise Linux gives it out anew each time, page by page, and a step of U-GAT-IT on a CPU takes a quarter longer.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor has a mapping of its own, which goes with it
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the end of the heap stays


def to_device(
    batches: Iterable[Mapping[str, Tensor]], device: torch.device, convert: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Move batches to the device as they come from the loader, then convert them there."""
    layouts = {4: pick_layout(device)}  # only pictures have four dimensions
    # MPS reads the copy later and does not keep it alive until then, so only CUDA copies without waiting.
    asynchronous = device.type == "cuda"
    for batch in batches:
        moved = {key: convert(value.to(device, non_blocking=asynchronous)) for key, value in batch.items()}
        yield {k: v.contiguous(memory_format=layouts.get(v.ndim, torch.contiguous_format)) for k, v in moved.items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch ran out of memory. Except for CUDA's allocator, torch raises a plain RuntimeError."""
    words = ["allocate memory", "out of memory", "not enough memory", "status_alloc_failed", "invalid buffer size"]
    words += ["unable to find an engine"]  # cuDNN, where no algorithm finds room for its workspace
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


# ----------------------------------------------------------------------------------------------------------
#  Ranks: every function also works in a single process
# ----------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a CPU tensor over all ranks, on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def any_rank(flags: Iterable[bool]) -> list[bool]:
    """For each flag whether it is set on any rank. This is how ranks agree to stop or to save together."""
    agreed = torch.tensor([int(f) for f in flags])
    if world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [bool(f) for f in agreed]


def gather(value: Any) -> list[Any] | None:
    """The values of all ranks in their order, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def print0(message: str) -> None:
    """Print on rank 0, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(message)


class Progress(tqdm):
    """A bar where there is a terminal; elsewhere a line now and then, because a file would fill with bars."""

    def __init__(self, *arguments: Any, **others: Any):
        terminal = sys.stderr.isatty()
        self.lines = not terminal
        how = dict(mininterval=0.5, dynamic_ncols=True) if terminal else dict(mininterval=LINE_SECONDS, bar_format=LINE)
        super().__init__(*arguments, **{**how, **others})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.lines:
            super().display(msg, pos)
        elif msg is None and self.n > self.initial:
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.lines:
            self.leave, self.delay = False, math.inf  # no last bar, no end of a line
        super().close()


# ----------------------------------------------------------------------------------------------------------
#  Signals
# ----------------------------------------------------------------------------------------------------------


class Outlet:
    """An output stream that outlives its reader (``| tee`` that was killed): what is written later goes nowhere."""

    broken = False  # whether an outlet has lost its reader

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.outliving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.outliving():
            self.stream.flush()

    @contextmanager
    def outliving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            Outlet.broken = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextmanager
def outlets() -> Iterator[None]:
    """Within the block ``print`` and progress write to ``Outlet``s, so that a lost reader costs no work."""
    before, Outlet.broken = (sys.stdout, sys.stderr), False
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (Outlet(stream or nowhere) for stream in before)  # None where it was closed (``>&-``)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before


class StopSignals:
    """Within the block, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) only set ``signal``: a request to stop.

    SIGUSR1, with which batch systems announce the end of the time, does the same, as does an ``Outlet`` that has lost
    its reader. A second Ctrl-C interrupts at once. A signal that was ignored before (nohup) stays ignored. ``message``
    is printed at once. ``parent``: the id of the process that started this one; its end is a request to stop too.
    """

    def __init__(self, message: str = "", parent: int | None = None) -> None:
        self._signal: int | None = None
        self._message, self._parent = message, parent
        self._before: dict[int, Any] = {}
        self._terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]

    def __enter__(self) -> StopSignals:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signal(self) -> int | None:
        """The number of the signal that asks to stop, None without one."""
        if self._signal is None and self._parent is not None and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        hang_up = getattr(signal, "SIGHUP", None)
        if self._signal is None and Outlet.broken and hang_up in self._before:  # under nohup the run goes on
            self._signal = hang_up
        return self._signal

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        if self._message:
            with suppress(OSError):  # print would fail inside another print
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{self._message}\n".encode())
        if number == getattr(signal, "SIGHUP", None):
            # Writing to the closed terminal would fail, and with it the save that follows.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)


def exit_status(number: int) -> int:
    """The exit status of a script that the signal ``number`` ended, as shells have it; 0 for 0."""
    return 128 + number if number else 0


# ----------------------------------------------------------------------------------------------------------
#  Options: fields of dataclasses that are also command-line flags
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """All that is known of one flag: type, default, help, allowed values or bounds (``below`` excludes the bound)."""

    type: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    least: float | None = None
    most: float | None = None
    below: float | None = None

    def expected(self, value: Any) -> str | None:
        """What was expected, in words, where a value is of another type or out of bounds; None where it fits."""
        if value is None and self.default is None:
            return None
        wrong_type = type(value) is not self.type and not (self.type is float and type(value) is int)
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}" if wrong_type or value not in self.choices else None
        if wrong_type:
            return getattr(self.type, "__name__", "a value")
        if self.least is not None and not value >= self.least:  # nan is not
            return f"at least {self.least}"
        if self.most is not None and value > self.most:
            return f"at most {self.most}"
        if self.below is not None and not value < self.below:
            return f"below {self.below}"
        return "a finite number" if value in (float("inf"), float("-inf")) else None

    def check(self, name: str, value: Any) -> None:
        """Raise InputError for a value that does not fit."""
        if (wanted := self.expected(value)) is not None:
            raise InputError(f"--{name} {value}: expected {wanted}")


def option(default: Any, help: str, *, type: Callable[[str], Any] | None = None, **bounds: Any) -> Any:
    """Declare a field of a dataclass as a flag. ``type`` is needed only where the default is None."""
    if type is None:
        type = default.__class__
    return field(default=default, metadata={"option": Option(type, default, help, **bounds)})


def options_of(declared: type) -> dict[str, Option]:
    """The flags of a dataclass by name. A subclass that only gives another default keeps the rest of the option."""
    found: dict[str, Option] = {}
    for base in reversed(declared.__mro__):
        for each in fields(base) if is_dataclass(base) else ():
            known = each.metadata.get("option") or found[each.name]
            found[each.name] = replace(known, default=each.default)
    return found


def add_options(parser: argparse.ArgumentParser, title: str, options: Mapping[str, Option]) -> None:
    """Add flags to the parser as a group with this title."""
    group = parser.add_argument_group(title)
    for name, each in options.items():
        if each.type is bool:
            group.add_argument(f"--{name}", action="store_true", help=each.help)
        else:
            metavar = None if each.choices else "N" if each.type is int else "X" if each.type is float else "NAME"
            group.add_argument(
                f"--{name}",
                type=each.type,
                default=each.default,
                choices=each.choices,
                metavar=metavar,
                help=each.help,
            )


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from ``least`` on."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, found {value}")
        return value

    read.__name__ = "int"
    return read


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviated flags, whose errors are an InputError of one line."""

    def __init__(self, description: str, epilog: str | None = None, **others: Any):
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            **{"usage": "%(prog)s [flags]", **others},  # argparse gives those of commands more
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (--help lists all flags)")


# ----------------------------------------------------------------------------------------------------------
#  Errors of the user
# ----------------------------------------------------------------------------------------------------------


def run_script(name: str, work: Callable[[], int]) -> int:
    """Do a script's work and return its exit status. What the user can mend is one line, without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without "×" must not end the script
            stream.reconfigure(errors="replace")
    with outlets():
        try:
            return work()
        except (InputError, OSError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun once on every machine
                print(f"{name}: error: {one_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted at once; what was saved before is kept", file=sys.stderr)
            return exit_status(signal.SIGINT)


def import_optional(package: str, used_for: str, how: str = "pip install -r requirements-extras.txt") -> ModuleType:
    """Import a package that only some uses need; InputError says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{used_for} needs {package}, which cannot be imported ({error}): {how}") from error


def check_name(flag: str, name: str) -> None:
    """Refuse names of runs and data sets that would lead out of their folder, or to the shipped weights."""
    if name in ("", ".", "..", "pretrained") or Path(name).name != name:
        raise InputError(f"{flag} {name}: expected a plain name, without folders")


def first_line(error: BaseException) -> str:
    """The first line of an error; of torch's unpickler only the name, because it advises to open the file unsafely."""
    lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """The message, without the traceback in front of an InputError that comes from a loader process or a rank."""
    return str(error).rpartition("InputError: ")[2].strip()


@contextmanager
def name_file(path: Path) -> Iterator[None]:
    """Name the file when writing it fails; on a full disk the system's message does not. Raises OSError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer turns a failed write into a RuntimeError of its own words; what failed is its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: could not be written ({first_line(cause)})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which replaces ``path`` at the end of the block: ``path`` is old or new, never half.

    Raises OSError (a full disk, for example) and then leaves the file at ``path`` as it was.
    """
    partial = path.with_name(f".partial.{path.name}")
    try:
        with name_file(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path, advice: str = "choose another --name") -> Iterator[None]:
    """Lock a folder for this process; the kernel frees it however the process ends. Without effect on Windows.

    Raises InputError where another process still has it after ``LOCK_SECONDS``: the workers of a killed run need a
    moment to end. ``advice`` ends its message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(f"{folder}: another process works here; wait for its end, or {advice}") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(held)
