import itertools
import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import utils
from utils import Checkpoints, InputError, Record, draw_sheet, save_atomically


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    save_atomically({"value": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=r"state\.pt: could not be written"):
            save_atomically({"value": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


class Damaged(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("a.jpg: damaged")


@pytest.mark.parametrize("n_cpu", [0, 1])
def test_what_is_wrong_is_told_in_a_line_from_a_loaders_process_too(capsys, n_cpu):
    assert utils.run_script("train.py", lambda: len(list(DataLoader(Damaged(), num_workers=n_cpu)))) == 2
    assert capsys.readouterr().err == "train.py: error: a.jpg: damaged\n"


def test_two_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint, nothing to resume"):
        checkpoints.load()
    for step in (1, 2, 3):
        checkpoints.save({"step": step})
    assert checkpoints.load()["step"] == 3
    assert torch.load(checkpoints.previous)["step"] == 2
    os.replace(checkpoints.newest, checkpoints.fresh)  # killed between the two renames
    assert checkpoints.load()["step"] == 3
    save_atomically({"format": checkpoints.FORMAT, "step": 1}, checkpoints.newest)  # killed before them
    assert checkpoints.load()["step"] == 3
    checkpoints.newest.unlink()
    os.truncate(checkpoints.fresh, 100)
    assert checkpoints.load()["step"] == 2


def test_a_save_that_fails_leaves_both_checkpoints(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"step": step})

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(utils, "save_atomically", fail)
    with pytest.raises(OSError, match="the disk is full"):
        checkpoints.save({"step": 3})
    assert torch.load(checkpoints.newest)["step"] == 2 and torch.load(checkpoints.previous)["step"] == 1


@pytest.mark.parametrize("step", [2, 3])
def test_damage_inside_is_noticed_and_never_becomes_what_one_goes_back_to(tmp_path, capsys, step):
    weights = torch.arange(100_000.0)
    for at in range(step):
        Checkpoints(tmp_path).save({"step": at, "weights": weights + at})
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[200_000:200_100] = bytes(100)  # which torch.load does not see
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["weights"], weights + step - 1)

    checkpoints = Checkpoints(tmp_path)
    state = checkpoints.load()
    assert state["step"] == step - 2 and torch.equal(state["weights"], weights + step - 2)
    assert f"{path}: damaged" in (out := capsys.readouterr().out) and f"going back to {checkpoints.previous}" in out
    checkpoints.save({"step": 9})
    assert checkpoints.load()["step"] == 9 and torch.load(checkpoints.previous)["step"] == step - 2
    checkpoints.save({"step": 10})
    assert torch.load(checkpoints.previous)["step"] == 9


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
def test_a_full_disk_is_told_with_the_file():
    record = Record("r", {}, total_steps=4, interval=1)
    record.log_path = Path("/dev/full")
    with pytest.raises(OSError, match=r"^/dev/full: could not be written \(.*No space left on device"):
        record.note({"G": torch.tensor(1.0)}, 1, 0, 0.1)
    record.close()


def test_bf16_is_chosen_only_where_it_is_native(monkeypatch):
    cpu = torch.device("cpu")
    for able, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert utils.has_bf16(cpu) == expected
        assert utils.make_autocast(cpu, "auto")().fast_dtype == torch.bfloat16
        assert utils.make_autocast(cpu, "auto").keywords["enabled"] == expected
        assert not utils.make_autocast(cpu, "float32").keywords["enabled"]
        assert utils.make_autocast(cpu, "bf16").keywords["enabled"]


def test_a_sheet_shows_the_pictures_where_it_says():
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 96, 96)
    mask = torch.full((2, 1, 96, 96), 1.0)
    mask[1] = -1
    sheet = draw_sheet({"real": red, "attention": mask})
    assert sheet.size == (2 * 98 + 2, 2 * 98 + 2 + 18)
    assert sheet.getpixel((50, 18 + 50)) == (255, 0, 0)
    assert sheet.getpixel((98 + 50, 18 + 50)) == (255, 255, 255)
    assert sheet.getpixel((98 + 50, 18 + 98 + 50)) == (0, 0, 0)
    heading = sheet.crop((0, 0, 98, 18)).convert("L")
    assert heading.getextrema() == (0, 255)


def test_the_history_and_the_slider_stay_bounded(monkeypatch):
    monkeypatch.setattr(Record, "CURVE_POINTS", 10)
    monkeypatch.setattr(Record, "SHEETS_SHOWN", 4)
    record = Record("r", {}, total_steps=1000, interval=1)
    for _ in range(300):
        record.note({"G": torch.tensor(1.0)}, 1, 0, 0.1)
    assert 5 <= len(record.history) <= 10
    steps = [entry["step"] for entry in record.history]
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    assert len(gaps) == 1 and steps[0] == 1
    for step in range(0, 300, 10):
        Path(f"images/r/{step:08d}.png").touch()
    assert not Path("images/r/index.html").exists()
    record.page(final=True)
    page = Path("images/r/index.html").read_text()
    sheets = json.loads(page.split("sheets = ")[1].split(", slider")[0])
    assert len(sheets) <= 6 and sheets[0] == "00000000.png" and sheets[-1] == "00000290.png"
    record.close()


def test_the_page_is_drawn_as_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(Record, "PAGE_SECONDS", 0)
    record = Record("r", {}, total_steps=1000, interval=2)
    record.note({"G": torch.tensor(1.0)}, 1, 0, 0.1)
    assert not Path("images/r/index.html").exists()
    record.note({"G": torch.tensor(1.0)}, 1, 0, 0.1)
    assert "step 2 of 1000" in Path("images/r/index.html").read_text() and Path("images/r/curves.png").exists()


def test_the_rate_is_of_training_alone(monkeypatch):
    """Images over seconds, those of an evaluation and of drawing the page not among them."""
    now = 100.0

    def draw(record):
        nonlocal now
        now += 20

    monkeypatch.setattr(utils.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Record, "page", draw)
    record = Record("r", {}, total_steps=4, interval=2)
    record.bar.disable = True  # which divides by the time since the last line
    for _ in range(2):
        now += 5
        record.note({"G": torch.tensor(1.0)}, 3, 0, 0.1)
    now += 7
    record.note_validation({"KID": 0.5}, 0, seconds=6)
    for _ in range(2):
        now += 1
        record.note({"G": torch.tensor(1.0)}, 4, 0, 0.1)
    first, validation, second = map(json.loads, record.log_path.read_text().splitlines())
    assert first["images_per_s"] == 6 / 10 and validation["validation"] == {"KID": 0.5}
    assert second["images_per_s"] == pytest.approx(8 / 3, abs=1e-3)


def test_the_bar_shows_the_rate_up_to_this_step(monkeypatch):
    now = 100.0
    monkeypatch.setattr(utils.time, "perf_counter", lambda: now)
    record = Record("r", {}, total_steps=4, interval=1)
    record.bar.disable, record.bar.mininterval, shown = False, 0, []
    monkeypatch.setattr(record.bar, "set_postfix_str", lambda text, **_: shown.append(text))
    for images in (100, 200):
        now += 40
        record.note({"G": torch.tensor(1.0)}, images, 0, 0.1)
    assert shown == ["2.5 images/s G 1.000", "5.0 images/s G 1.000"]
    record.bar.disable = True


def test_a_resumed_history_is_thinned_as_the_straight_one(monkeypatch):
    monkeypatch.setattr(Record, "CURVE_POINTS", 10)
    straight = Record("r", {}, total_steps=100, interval=1)
    for _ in range(57):
        straight.note({"G": torch.tensor(1.0)}, 1, 0, 0.1)
    resumed = Record("r", {}, total_steps=100, interval=1, start=57)
    assert [e["step"] for e in resumed.history] == [e["step"] for e in straight.history]


@pytest.mark.parametrize("damage", [b'{"step": 2, "G"', b"5\n", b"\xff\xfe\x00\n", b'{"epoch": 1}\n'])
def test_a_damaged_log_is_cut_where_the_damage_begins(damage):
    path = Path("saved_models/r/log.jsonl")
    path.parent.mkdir(parents=True)
    sound = b'{"step": 1, "G": 0.5}\n'
    path.write_bytes(sound + damage)
    record = Record("r", {}, total_steps=100, interval=1, start=50)
    assert path.read_bytes() == sound and [entry["step"] for entry in record.history] == [1]


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
