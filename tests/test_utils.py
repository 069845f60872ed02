import utils
from utils import InputError, Option, StopSignals, lock_folder, option, options_of

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader, Dataset


class Damaged(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("a.jpg: damaged")


@pytest.mark.parametrize("n_cpu", [0, 1])
def test_what_is_wrong_is_told_in_a_line_from_a_loaders_process_too(capsys, n_cpu):
    assert utils.run_script("train.py", lambda: len(list(DataLoader(Damaged(), num_workers=n_cpu)))) == 2
    assert capsys.readouterr().err == "train.py: error: a.jpg: damaged\n"


def test_a_script_runs_where_its_outputs_are_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def work():
        list(utils.Progress(range(3), "steps", 3))
        print("told to nobody")
        raise InputError("nor is this")

    assert utils.run_script("train.py", work) == 2 and sys.stdout is None


def test_bf16_is_chosen_only_where_it_is_native(monkeypatch):
    cpu = torch.device("cpu")
    for able, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert utils.has_bf16(cpu) == expected
        assert utils.make_autocast(cpu, "auto")().fast_dtype == torch.bfloat16
        assert utils.make_autocast(cpu, "auto").keywords["enabled"] == expected
        assert not utils.make_autocast(cpu, "float32").keywords["enabled"]
        assert utils.make_autocast(cpu, "bf16").keywords["enabled"]


def test_unknown_devices_are_refused_by_name():
    with pytest.raises(InputError, match="--device quantum"):
        utils.pick_device("quantum")
    assert utils.pick_device("cpu").type == "cpu"


def test_a_device_is_picked_with_its_index(monkeypatch):
    """torch.cuda.set_device takes no other."""
    asked = []
    second = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or second)
    assert utils.pick_device("cuda") == torch.device("cuda:1") and asked == [torch.device("cuda")]


@pytest.mark.parametrize("device, waits", [("cuda", False), ("mps", True), ("cpu", True)])
def test_batches_are_copied_at_once_where_nothing_keeps_their_memory(device, waits):
    """On CUDA the loader's pages are pinned, and kept until the copy is done."""
    asked = []
    picture = SimpleNamespace(to=lambda device, non_blocking: asked.append(non_blocking))
    batches = utils.to_device([{"A": picture}], torch.device(device), lambda _: torch.zeros(1, 3, 4, 4))
    assert next(batches)["A"].shape == (1, 3, 4, 4) and asked == [not waits]


@pytest.mark.parametrize(
    "error, expected",
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Invalid buffer size: 54.00 GiB"), True),  # MPS
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert utils.is_out_of_memory(error) is expected


# ----------------------------------------------------------------------------------------------------------
#  Signals and locks
# ----------------------------------------------------------------------------------------------------------


def unhandled(number, frame):
    pytest.fail(f"signal {number} reached the handler from before")


@pytest.fixture
def handled():
    """Signals as in a shell's foreground; the tests themselves may run where they are ignored."""
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, unhandled) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signals_are_noted_and_a_second_ctrl_c_interrupts(handled, monkeypatch, capfd):
    monkeypatch.setattr(utils.os, "dup2", lambda *_: None)  # the terminal is not closed
    for number in handled:
        with StopSignals("saving") as stop:
            assert stop.signal is None
            signal.raise_signal(number)
            assert stop.signal == number and capfd.readouterr().err == "\nsaving\n"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(number) is unhandled


def test_signals_that_are_ignored_stay_ignored(handled):
    for number in handled:
        signal.signal(number, signal.SIG_IGN)
        with StopSignals() as stop:
            signal.raise_signal(number)
        assert stop.signal is None and signal.getsignal(number) == signal.SIG_IGN


def test_the_end_of_the_parent_asks_to_stop():
    with StopSignals(parent=os.getppid()) as stop:
        assert stop.signal is None
    with StopSignals(parent=os.getppid() + 1) as stop:
        assert stop.signal == signal.SIGTERM


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_locked_folder_is_refused_where_the_system_has_locks(monkeypatch, has_locks):
    monkeypatch.setattr(utils, "LOCK_SECONDS", 0)
    if not has_locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with lock_folder(Path("a/run")):
        if has_locks:
            with pytest.raises(InputError, match=r"^a/run: another process works here"), lock_folder(Path("a/run")):
                pass
        else:
            with lock_folder(Path("a/run")):
                assert Path("a/run").is_dir()
    with lock_folder(Path("a/run")):
        pass


def test_everything_but_training_imports_where_there_are_no_locks():
    modules = "utils, datasets, models, checkpoints, translate, evaluate"
    code = f"import sys; sys.modules['fcntl'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc has mallopt")
def test_freed_memory_is_kept_for_the_next_step():
    """New pages come by page faults."""
    code = """
import resource, numpy, utils
{}
for step in range(11):
    numpy.ones(2**23)  # 64 MiB
    if step == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c"]
    usual, kept = (
        int(subprocess.run([*command, code.format(first)], capture_output=True, text=True, check=True).stdout)
        for first in ("", "utils.keep_freed_memory()")
    )
    assert kept < 50 < usual


# ----------------------------------------------------------------------------------------------------------
#  Options
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "declared, good, bad",
    [
        (Option(int, 3, "", least=1), [1, 10**9], {0: "at least 1", 2.0: "int", True: "int", "4": "int", None: "int"}),
        (Option(int, 3, "", most=5), [5, -1], {6: "at most 5"}),
        (Option(float, 0.5, "", least=0, below=1), [0, 0.0, 0.99], {1: "below 1", -0.1: "at least 0", "a": "float"}),
        (Option(float, 0.5, "", least=0), [1e9], {math.nan: "at least 0", math.inf: "a finite number"}),
        (Option(str, "a", "", choices=("a", "b")), ["a", "b"], dict.fromkeys(("c", 1, None), "one of a, b")),
        (Option(bool, False, ""), [True, False], {1: "bool"}),
        (Option(int, None, "", least=1), [None, 1], {0: "at least 1"}),
    ],
)
def test_options_are_checked_by_type_and_bounds(declared, good, bad):
    for value in good:
        declared.check("flag", value)
    for value, expected in bad.items():
        with pytest.raises(InputError, match=rf"^--flag {value}: expected {expected}$"):
            declared.check("flag", value)


def test_a_subclass_that_gives_another_default_keeps_the_rest_of_an_option():
    @dataclass(frozen=True, kw_only=True)
    class Base:
        size: int = option(4, "how large", least=2, most=9)
        kind: str = option("a", "which", choices=("a", "b"))

    @dataclass(frozen=True, kw_only=True)
    class Middle(Base):
        size: int = 5
        more: int = option(1, "own")

    @dataclass(frozen=True, kw_only=True)
    class Last(Middle):
        kind: str = "b"

    kind = Option(str, "a", "which", choices=("a", "b"))
    assert options_of(Base) == {"size": Option(int, 4, "how large", least=2, most=9), "kind": kind}
    assert options_of(Last) == {
        "size": Option(int, 5, "how large", least=2, most=9),
        "kind": Option(str, "b", "which", choices=("a", "b")),
        "more": Option(int, 1, "own"),
    }


def test_ctrl_c_during_the_imports_ends_a_script_without_a_word(tmp_path):
    """They take seconds. A torch that never gets ready stands for them."""
    (tmp_path / "torch.py").write_text(
        f"import time\nopen({str(tmp_path / 'importing')!r}, 'w').close()\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "translate.py"), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "importing").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"") and process.returncode == -signal.SIGINT
