"""Runs that are killed, full disks, damaged files of all kinds, and 2,000 steps: every part counts what survived.

In the ordinary tests a share of the cases, in ``make torture`` all of them.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from common import QUICK, QUICK_PIX2PIX, below, checkpoint, free_port, make_set, noise, publish, quick, run, same_run
from conftest import ROOT
from PIL import Image, features

import checkpoints
import prepare
import record
import train
import train_dist
import translate
from models import AttentionGenerator
from pictures import Picture

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
PATIENCE = 240  # seconds that one child may take, on a busy machine
GIGABYTE = 2**30
SCRIPTS = {"train": train, "train_dist": train_dist, "prepare": prepare, "translate": translate}


def shares(few, all_of_them):
    """A few cases for the ordinary tests, all of them for ``make torture``."""
    return pytest.mark.parametrize("n", [few, pytest.param(all_of_them, marks=pytest.mark.torture)])


class Count:
    """Counts cases. At its end it prints one line, and it fails if a case has."""

    def __init__(self, what):
        self.what, self.tried, self.failed = what, 0, []

    @contextmanager
    def case(self, name):
        self.tried += 1
        try:
            yield
        except Exception:
            self.failed.append(f"{name}: {traceback.format_exc()}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            print(f"\n{self.what}: {self.tried} tried, {self.tried - len(self.failed)} survived as they should")
            assert not self.failed, "\n".join(self.failed)


# ----------------------------------------------------------------------------------------------------------
#  Processes
# ----------------------------------------------------------------------------------------------------------


class Child:
    """Work in a forked process, in a session of its own: it has imported everything already."""

    def __init__(self, work, limit=None):
        self.told = Path(tempfile.mkdtemp(dir="told")) / "told"
        self.process = multiprocessing.get_context("fork").Process(target=be_a_child, args=(work, self.told, limit))
        self.process.start()
        self.pid = self.process.pid

    def end(self):
        """The exit status, negative for the signal that killed it, and what it told."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            pytest.fail(f"still running after {PATIENCE} s: {self.text()}")
        return self.process.exitcode, self.text()

    def text(self):
        return self.told.read_text() if self.told.exists() else ""

    def peak(self):
        """The most memory that it took beyond what it had at its start, in bytes."""
        return int(self.told.with_name("peak").read_text())

    def trains(self, times=1):
        """Whether it has announced so many times that it takes its first step."""
        return len(re.findall("^(?:training|resuming) ", self.text(), re.MULTILINE)) >= times

    def wait_until(self, ready):
        """Until it has come so far, or has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.exitcode is None and not ready():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def send(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def script(name, command, anew=False, launcher="", limit=None):
    """A script as a child. ``anew`` starts Python again, imports and all, and so does a ``launcher``."""
    if anew or launcher:
        arguments = [sys.executable, *launcher.split(), str(ROOT / f"{name}.py"), *command.split()]
        return Child(lambda: os.execv(sys.executable, arguments))
    return Child(lambda: SCRIPTS[name].main(command.split()), limit)


def be_a_child(work, told, limit):
    os.setsid()
    warnings.resetwarnings()  # to the tests they are errors
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    file = open(told, "w", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    # What a child with a full disk tells stays in memory until its end.
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = file if limit is None else io.StringIO()
    mp.spawn = partial(mp.start_processes, start_method="fork")  # the ranks of train_dist.py, too
    before = memory("VmRSS", reset=True)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.write(sys.stdout.getvalue())
    told.with_name("peak").write_text(str(memory("VmHWM") - before))
    sys.exit(code)


def memory(what, reset=False):
    """Resident memory of this process, in bytes: now (VmRSS), or the most (VmHWM) since the last ``reset``."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def living():
    """The processes that work in this test's folder, by their command; the tests' own is left out."""
    here, found = Path.cwd(), {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if Path(os.readlink(place / "cwd")).is_relative_to(here) and int(place.name) != os.getpid():
                found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
    return found


def all_gone(seconds=40):
    deadline = time.monotonic() + seconds
    while found := living():
        assert time.monotonic() < deadline, f"still there after {seconds} s: {found}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _no_process_stays(tmp_path):
    (tmp_path / "told").mkdir()
    yield
    for pid in living():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_files(name, ended=False):
    """No half file has a final name. When the run has ``ended``, no temporary file is left."""
    for path in (p for folder in (checkpoints.SAVED_MODELS, record.IMAGES) for p in (folder / name).rglob("*")):
        if path.name.startswith("."):
            assert not ended, f"{path} was left"
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
            checkpoints.check_sums(path)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>\n")


# Of 12 x 12 pixels, where networks take them. Checkpoints come so often that many moments are within a save.
OFTEN = "--device cpu --precision float32 --checkpoint_minutes 0.002 --log_interval 3"
RUNS = {
    "attention": f"{QUICK} {OFTEN} --sample_interval 7",
    "workers": f"{quick('cyclegan')} {OFTEN} --system cyclegan --cache_gb 0 --n_cpu 1",
    "pix2pix": f"{QUICK_PIX2PIX} {OFTEN}",
    "guided": f"{QUICK} {OFTEN} --attn_disc concat --checkpoint_interval 0",
}


@pytest.fixture
def straight(small_set, pairs, monkeypatch):
    """Makes a run of a kind undisturbed, at the first call, and returns its name."""
    made = {}

    def straight(kind, epochs, name="train"):
        run = f"{kind}_{epochs}_{name}"
        if run not in made:
            made[run], told = script(name, f"{command(kind, epochs, name)} --name {run}").end()
            assert made[run] == 0, told
        return run

    return straight


def command(kind, epochs, name="train"):
    launch = f" --n_procs 2 --port_num {free_port()}" if name == "train_dist" else ""
    return f"{RUNS[kind]} --n_epochs {epochs} --decay_epoch {epochs // 2}{launch}"


def disturb(kind, epochs, rng, count, n, act, straight, name="train", real=6):
    """Start a run again and again and disturb it at a random moment, ``n`` times; then let it end, and compare it.

    A run that ends before it was disturbed is followed by a new one. Every ``real``-th process starts Python anew.
    ``act(child, run)`` disturbs it, waits for its end and looks at that.
    """
    disturbed = 0
    for i in range(n + 1):
        run = f"disturbed_{kind}_{name}_{i}"
        ended = False
        while not ended and disturbed < n:
            anew = disturbed % real == real - 1
            child = script(name, f"{command(kind, epochs, name)} --name {run} --auto_resume", anew)
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, 12 if anew else 1))  # also while it starts
            else:
                child.wait_until(child.trains)
                time.sleep(rng.uniform(0, 1.5))
            ended = child.process.exitcode is not None
            if not ended:
                disturbed += 1
                with count.case(f"{run}, {disturbed}"):
                    act(child, run)
                    all_gone()
                    check_files(run)
        code, told = script(name, f"{command(kind, epochs, name)} --name {run} --auto_resume").end()
        assert code == 0, told
        all_gone()
        check_files(run, ended=True)
        same_run(straight(kind, epochs, name), run)
        if disturbed == n:
            return


def split(n, kinds):
    """``n`` cases over kinds, as (kind, share)."""
    return [(kind, len(range(i, n, len(kinds)))) for i, kind in enumerate(kinds) if i < n]


# ----------------------------------------------------------------------------------------------------------
#  One process
# ----------------------------------------------------------------------------------------------------------


@shares(1, 50)
def test_a_killed_run_goes_on_to_the_very_bits(straight, n):
    def kill(child, _):
        child.send(signal.SIGKILL)
        code, told = child.end()
        assert code in (-signal.SIGKILL, 0), told

    with Count("kills of one process") as count:
        for kind, share in split(n, RUNS):
            disturb(kind, epochs(n), random.Random(1), count, share, kill, straight)


def epochs(n):
    return 4 if n == 1 else 50


@shares(1, 30)
def test_a_signal_saves_and_the_run_goes_on_to_the_very_bits(straight, n):
    rng = random.Random(2)

    def stop(child, run):
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
        began = child.trains()
        child.send(number)
        code, told = child.end()
        check_stop(run, number, code, told, began)

    with Count("signals to one process") as count:
        for kind, share in split(n, RUNS):
            disturb(kind, epochs(n), rng, count, share, stop, straight)


def check_stop(run, number, code, told, began):
    if saved := re.search(r"^stopped after step (\d+) of", told, re.MULTILINE):
        assert code == 128 + number and checkpoint(run)["step"] == int(saved[1]), (code, told)
    elif re.search("^done:", told, re.MULTILINE):
        assert code in (0, -number, 128 + number), (code, told)
    else:  # before training listens to signals, which is just after its first line
        assert code in (-number, 128 + number), (code, told)
        if began:
            (step,) = re.findall(r"step (\d+) of", told)
            assert not (checkpoints.SAVED_MODELS / run / checkpoints.CHECKPOINT).exists() or (
                checkpoint(run)["step"] == int(step)
            )


# ----------------------------------------------------------------------------------------------------------
#  Two ranks
# ----------------------------------------------------------------------------------------------------------


def ranks_of(pid):
    """The ranks that a launcher has started, in their order."""
    with suppress(OSError):
        children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [each for each in children if "resource_tracker" not in Path(f"/proc/{each}/cmdline").read_text()]
    return []


@pytest.mark.torture
@pytest.mark.parametrize("n", [10])
def test_two_ranks_that_are_killed_go_on_to_the_very_bits(straight, n):
    rng = random.Random(3)

    def kill(child, _):
        pid = rng.choice([child.pid, *ranks_of(child.pid)])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code, told = child.end()
        if pid == child.pid:
            assert code == -signal.SIGKILL, (code, told)
        else:
            assert code in (0, 2), (code, told)
            assert len(re.findall("^train_dist.py: error: ", told, re.MULTILINE)) == (code == 2), told

    with Count("kills of a rank or the launcher") as count:
        disturb("attention", epochs(n), rng, count, n, kill, straight, "train_dist", real=5)


@pytest.mark.torture
@pytest.mark.parametrize("n", [10])
def test_two_ranks_that_are_told_to_stop_go_on_to_the_very_bits(straight, n):
    rng = random.Random(4)

    def stop(child, run):
        began, ranks = child.trains(), ranks_of(child.pid)
        how = rng.choice(["launcher", "terminal", "rank"])
        number = signal.SIGINT if how == "terminal" else signal.SIGTERM
        with suppress(ProcessLookupError):
            if how == "terminal":
                os.killpg(child.pid, number)
            else:
                os.kill(rng.choice(ranks) if how == "rank" and began and ranks else child.pid, number)
        code, told = child.end()
        check_stop(run, number, code, told, began)

    with Count("signals to two ranks") as count:
        disturb("attention", epochs(n), rng, count, n, stop, straight, "train_dist", real=5)


@pytest.mark.torture
def test_torchrun_starts_a_group_again_whose_worker_was_killed(straight):
    """Torch's own rendezvous keeps the addresses of the ranks that have gone, with each of its backends."""
    rng = random.Random(5)
    with Count("workers killed under torchrun") as count:
        for i, where in enumerate(("--standalone", f"--master_port {free_port()}")):
            launcher = f"-m torch.distributed.run {where} --nproc_per_node 2 --max-restarts 2"
            run = f"elastic_{i}"
            child = script("train_dist", f"{command('attention', 50, 'train_dist')} --name {run}", launcher=launcher)
            for kill in range(2):
                with count.case(f"{run}, {kill}"):
                    child.wait_until(partial(child.trains, kill + 1))
                    time.sleep(rng.uniform(1, 2))
                    os.kill(rng.choice(ranks_of(child.pid)), signal.SIGKILL)
            code, told = child.end()
            assert code == 0, told
            all_gone()
            check_files(run, ended=True)
            same_run(straight("attention", 50, "train_dist"), run)


# ----------------------------------------------------------------------------------------------------------
#  Full disks
# ----------------------------------------------------------------------------------------------------------


@shares(1, 14)
def test_a_full_disk_is_named_and_costs_no_checkpoint(straight, n):
    """A file may not grow beyond a limit. Every second run has a checkpoint from before."""
    kind = straight("attention", 4)
    C, G = (Path(f"saved_models/{kind}/{file}").stat().st_size for file in ("checkpoint.pt", "AtoB.pt"))
    limits = [C - 1, 0, 1, 100, 1000, 4096, G // 2, G - 1, G, G + 1, C // 2, C * 9 // 10, C + 10_000, 4 * C]
    with Count("full disks") as count:
        for i, limit in enumerate(limits[:n]):
            with count.case(f"{limit} bytes"):
                flags = f"{command('attention', 4)} --name full_{i} --auto_resume"
                if i % 2:
                    assert script("train", f"{flags} --max_steps 5").end()[0] == 0
                code, told = script("train", flags, limit=limit).end()
                if limit < C:
                    assert code == 2 and "Traceback" not in told, told
                    (line,) = re.findall("^train.py: error: .*", told, re.MULTILINE)
                    assert re.search(
                        rf"(saved_models|images)/full_{i}/\S+: could not be written .*File too large", line
                    )
                else:
                    assert code == 0, told
                check_files(f"full_{i}")
                code, told = script("train", flags).end()
                assert code == 0, told
                check_files(f"full_{i}", ended=True)
                same_run(kind, f"full_{i}")
        with count.case("no folder for pictures"):
            record.IMAGES.rename("images_aside")
            record.IMAGES.write_text("")
            flags = f"{command('attention', 4)} --name no_images --auto_resume"
            code, told = script("train", flags).end()
            assert code == 2 and "images" in told and "Traceback" not in told, told
            record.IMAGES.unlink()
            assert script("train", flags).end()[0] == 0
            same_run(kind, "no_images")


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


def sample_pictures():
    """Small files of every format and of the common kinds of each, as (ending, bytes)."""
    picture = noise(0, (48, 36)).resize((96, 72))
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.arange(96 * 72, dtype=np.uint16).reshape(72, 96))
    frames = {"save_all": True, "append_images": [picture.rotate(90)]}
    kinds = [
        *(("jpg", picture, how) for how in ({}, {"progressive": True}, {"exif": turned})),
        *(("jpg", picture.convert(mode), {}) for mode in ("L", "CMYK")),
        *(("png", image, {}) for image in (picture, alpha, deep, picture.convert("P"), picture.convert("1"))),
        *(("webp", image, how) for image, how in ((picture, {}), (alpha, {"lossless": True}), (picture, frames))),
        *(("bmp", image, {}) for image in (picture, picture.convert("P"))),
        *(("gif", image, how) for image, how in ((picture, {}), (alpha, {}), (picture, frames))),
        *(("tif", picture, {"compression": how}) for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
        *(("tif", image, {}) for image in (deep, alpha, picture.convert("F"), picture.convert("I"))),
        ("mpo", picture, frames),
        *([("avif", picture, {})] if features.check("avif") else []),
        *([("heic", picture, {"format": "HEIF"})] if "HEIF" in Image.SAVE else []),
    ]
    found = []
    for ending, image, options in kinds:
        stream = io.BytesIO()
        image.save(stream, **{"format": Image.registered_extensions()[f".{ending}"], **options})
        found.append((ending, stream.getvalue()))
    return found


def mutated(content, other, rng):
    """The bytes of a file, damaged in one of many ways."""
    at, end = sorted(rng.sample(range(len(content)), 2))
    head = rng.choice([4, 8, 16, 64])
    way = rng.randrange(8)
    if way == 0:  # cut
        return content[:at]
    if way == 1:  # doubled
        return content[:end] + content[at:]
    if way == 2:  # a piece is gone
        return content[:at] + content[end:]
    if way == 3:  # another head
        return other[:head] + content[head:]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 64])):
        # Mostly in the first bytes, where sizes stand; mostly extreme values.
        place = rng.randrange(min(len(changed), 100 if way < 7 else 10**9))
        changed[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed)


def look_at_each(paths):
    """Decode each file. One that takes longer than a minute, whatever else the machine does, ends the process."""
    readable = 0
    for path in paths:
        print(path)
        signal.alarm(60)
        start = time.process_time()
        with suppress(Exception):  # decoders raise what they like, and those who call them name the file
            readable += bool(Picture(path).open())
        assert time.process_time() - start < 20
    signal.alarm(0)
    print(f"{readable} readable")
    return 0


@shares(20, 1000)
def test_a_damaged_picture_is_read_or_named_by_every_script(n):
    samples, rng = sample_pictures(), random.Random(6)
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3)
    torch.save({**checkpoints.pack_generator(generator), "direction": "AtoB"}, "net.pt")
    most = 0
    with Count("damaged pictures") as count:
        for first in range(0, n, 100):
            data = make_set(Path(f"data/{first}"))
            paths = []
            for i in range(first, min(n, first + 100)):
                ending, content = samples[i % len(samples)]
                paths.append(data / "trainA" / f"m{i:04d}.{ending}")
                paths[-1].write_bytes(mutated(content, rng.choice(samples)[1], rng))
            folders = f"--from_A {data}/trainA --from_B {data}/trainB"
            training = f"{QUICK} --device cpu --max_steps 2 --name"
            children = {
                "decoding": Child(lambda paths=tuple(paths): look_at_each(paths)),
                "import": script("prepare", f"{folders} --dataset_name made{first} --test_share 0"),
                "check": script("train", f"{training} raw{first} --dataset_name {first}"),
                "translation": script("translate", f"--input {data}/trainA --output out{first} --checkpoint net.pt"),
            }
            ends = {what: child.end() for what, child in children.items()}
            children["training"] = script("train", f"{training} made{first} --dataset_name made{first}")
            ends["training"] = children["training"].end()
            for what, (code, told) in ends.items():
                assert code in (0, 1, 2) and "Traceback" not in told, (what, told)
                most = max(most, children[what].peak())
            assert most < GIGABYTE, {what: child.peak() for what, child in children.items()}
            assert ends["decoding"][0] == ends["import"][0] == ends["training"][0] == 0, ends
            made = {path.name.partition("_")[2] for path in Path(f"data/made{first}/trainA").iterdir()}
            left_out = set(re.findall(r"^left out, \w+: +\S+/(\S+) \(", ends["import"][1], re.MULTILINE))
            unreadable = set(re.findall(r"^left out, unreadable: +\S+/(\S+) \(", ends["import"][1], re.MULTILINE))
            failed = set(re.findall(r"^not translated: \S+/(\S+): ", ends["translation"][1], re.MULTILINE))
            for path in paths:
                with count.case(path.name):
                    assert (path.name in made) != (path.name in left_out)
                    # A picture that can be read may be too large to translate, or of a shape that networks refuse.
                    assert path.name in failed or path.name not in unreadable
                    outputs = [*Path(f"out{first}").glob(f"{path.stem}.*png")]
                    assert bool(outputs) != (path.name in failed)
            assert ends["translation"][0] == bool(failed), ends["translation"]
            assert (ends["check"][0] == 2) == bool(unreadable)
            assert not unreadable or min(unreadable) in ends["check"][1]
    print(f"at most {most / GIGABYTE:.2f} GB")


# ----------------------------------------------------------------------------------------------------------
#  Weights
# ----------------------------------------------------------------------------------------------------------

DROPPED = object()


def variants(value):
    """What may stand in the place of a value."""
    yield from (DROPPED, None, "text", [1], -1, 10**12, float("nan"), {})
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
        broken = value.clone(memory_format=torch.contiguous_format)
        broken.view(-1)[0] = float("nan")
        yield from (broken, value[..., :0], value[None], value.new_zeros(1).expand(value.shape), value.long())
    if isinstance(value, dict):
        yield {**value, "unknown": 1}


def places(value, depth, at=()):
    """The paths to all keys down to a depth; of many tensors, or numbered keys, in one dictionary only the first."""
    if isinstance(value, dict) and depth:
        tensors = [key for key, each in value.items() if isinstance(each, torch.Tensor)]
        numbered = [key for key in value if isinstance(key, int)]
        for key in value:
            if key not in (*tensors[1:], *numbered[1:]):
                yield (*at, key)
                yield from places(value[key], depth - 1, (*at, key))
    if isinstance(value, list) and value and depth:
        yield (*at, 0)
        yield from places(value[0], depth - 1, (*at, 0))


def replaced(value, path, new):
    """A copy in which the value at a path is another one."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = replaced(copy[key], rest, new)
    elif new is DROPPED:
        del copy[key]
    else:
        copy[key] = new
    return copy


def changed_files(content, depth):
    for path in places(content, depth):
        value = content
        for key in path:
            value = value[key]
        for new in variants(value):
            yield ".".join(map(str, path)), replaced(content, path, new)


def every(n):
    """A share of the cases."""
    return 30 if n == 1 else 1


@shares(1, "all")
def test_a_changed_generator_file_is_refused_in_one_line_or_opens(n):
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3)
    options = {"img_height": 32, "img_width": 32, "resize": "squash", "task": "translation", "system": "attentiongan"}
    content = {**checkpoints.pack_generator(generator), "direction": "AtoB", "options": options, "step": 7}
    opened, before = 0, memory("VmRSS", reset=True)
    with Count("changed generator files") as count:
        for name, changed in islice(changed_files(content, 3), 0, None, every(n)):
            torch.save(changed, "net.pt")
            start = time.process_time()
            with count.case(name):
                try:
                    checkpoints.load_generator("net.pt")
                    opened += 1
                except ValueError as error:
                    assert "\n" not in str(error) and "net.pt" in str(error)
                assert time.process_time() - start < 10
        assert opened < count.tried / 2
        assert memory("VmHWM") - before < GIGABYTE


@shares(1, "all")
def test_a_changed_checkpoint_is_refused_in_one_line_or_resumed(small_set, n, capsys):
    flags = f"{QUICK} --n_masks 3 --name r"
    assert run(f"{flags} --n_epochs 2 --max_steps 6") == 0
    path = "saved_models/r/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    resumed, before = 0, memory("VmRSS", reset=True)
    with Count("changed checkpoints") as count:
        for name, changed in islice(changed_files(content, 7), 0, None, every(n)):
            torch.save(changed, path)
            capsys.readouterr()
            start = time.process_time()
            with count.case(name):
                status = run("--dataset_name small --resume --name r --max_steps 7")
                told = capsys.readouterr().err
                assert time.process_time() - start < 10
                assert status in (0, 2)
                lines = [line for line in told.splitlines() if "error" in line]
                assert len(lines) == (status == 2) and "Traceback" not in told, told
                resumed += status == 0
        assert resumed < count.tried / 2
        assert memory("VmHWM") - before < GIGABYTE


# ----------------------------------------------------------------------------------------------------------
#  Archives
# ----------------------------------------------------------------------------------------------------------


@shares(10, 100)
def test_a_damaged_archive_is_unpacked_in_its_folder_or_refused_in_one_line(web, n, monkeypatch, capsys):
    """For hostile ones see test_prepare.py."""
    pictures = {f"train{i}/{i}.png": sample_pictures()[5][1] for i in range(3)}
    paths = {}
    for name in ("apple2orange", "facades"):
        paths[name] = publish(web, monkeypatch, {f"{name}/{path}": content for path, content in pictures.items()}, name)
    sound, rng, both = {name: path.read_bytes() for name, path in paths.items()}, random.Random(7), sorted(paths)
    with Count("damaged archives") as count:
        for i in range(n):
            name, other = both[i % 2], both[1 - i % 2]
            paths[name].write_bytes(mutated(sound[name], sound[other], rng))
            before, outside = below(Path.cwd()), below(web.folder)
            with count.case(f"{name} {i}"):
                status = prepare.main(["--dataset_name", name, "--data_dir", "data", "--mirror", web.url])
                told = capsys.readouterr().err
                lines = [line for line in told.splitlines() if line.startswith("prepare.py")]
                assert status in (0, 2) and len(lines) == (status == 2) and "Traceback" not in told
                assert all(paths[name].name in line for line in lines)
                after = below(Path.cwd())
                new = {at: after[at] for at in after if at not in before and at != "data"}
                assert before.items() <= after.items() and below(web.folder) == outside
                assert all(at == f"data/{name}" or at.startswith(f"data/{name}/") for at in new)
                assert status == 0 or not new
            shutil.rmtree("data", ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------
#  A long run
# ----------------------------------------------------------------------------------------------------------


@shares(60, 2000)
def test_a_long_run_takes_no_more_memory_files_threads_or_time_at_its_end(small_set, n):
    """The second quarter of a run and its last are compared."""

    def soak():
        add, seen = record.Record.add, []

        def add_and_look(self, *arguments):
            add(self, *arguments)
            threads, files = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
            seen.append((time.process_time(), memory("VmRSS"), files, threads))

        record.Record.add = add_and_look
        if n == 2000:
            record.Record.PAGE_SECONDS = 5  # drawn often, because drawing is what might keep something
        code = train.main(f"{QUICK} --device cpu --name soak --n_epochs {-(-n // 6)} --cache_gb 0 --n_cpu 1".split())
        assert multiprocessing.active_children() == []
        Path("seen.json").write_text(json.dumps(seen))
        return code

    with Count("steps of a long run") as count:
        code, told = Child(soak).end()
        assert code == 0, told
        seen = json.loads(Path("seen.json").read_text())
        count.tried = len(seen)
        times, *others = zip(*seen, strict=True)
        quarter = len(seen) // 4
        for what, values in zip(("memory", "files", "threads"), others, strict=True):
            # Batches on their way from a loader process are open files now and then.
            second, last = (statistics.median(values[q * quarter : (q + 1) * quarter]) for q in (1, 3))
            assert last <= 1.05 * second, (what, second, last)
        steps = [after - before for before, after in pairwise(times)]
        second, last = (statistics.median(steps[q * quarter : (q + 1) * quarter]) for q in (1, 3))
        megabytes = [others[0][place] >> 20 for place in (quarter, -1)]
        print(f"\nmemory {megabytes} MiB, steps of {1000 * second:.1f} and {1000 * last:.1f} ms")
        assert last < (1.1 if n == 2000 else 2) * second  # few steps tell little of time
        assert living() == {}
