import itertools
import json
import multiprocessing
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import build, make_batch

import benchmark
from datasets import draw_built_in, normalise
from systems import SYSTEMS
from train import parse_options, trained_parameters, training_step

TINY = "--ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2"


def options(flags=""):
    return parse_options(f"--dataset_name solid2striped --img_height 16 --img_width 16 {TINY} {flags}".split())


@pytest.mark.parametrize("name", ["attentiongan", "cyclegan"])
def test_the_textbook_step_is_ours(name):
    """The speeds may be compared because the weights after some steps are the same."""
    ours, book = build(name), build(name)
    optimizers = [
        {
            t.player: torch.optim.Adam(trained_parameters(s, t.networks), 2e-4, (0.5, 0.999), fused=fused)
            for t in s.turns
        }
        for s, fused in ((ours, True), (book, None))
    ]
    textbook = benchmark.Textbook(book, optimizers[1])
    for step in range(3):  # the replay buffers are not full: what they hand back is what they get
        batch = make_batch(step)
        shown = training_step(ours, optimizers[0], lambda: torch.autocast("cpu", enabled=False), batch)
        for key, loss in textbook.step(batch).items():
            assert abs(loss - shown[key].item()) < 1e-9, key
    for (key, mine), theirs in zip(ours.named_parameters(), book.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-9, key


def test_the_textbook_pool_hands_back_half_of_the_time():
    torch.manual_seed(0)
    pool = benchmark.TextbookPool(20)
    numbers = torch.arange(1000.0)
    handed = torch.cat([pool.query(n.view(1, 1, 1, 1)).flatten() for n in numbers])
    assert torch.equal(handed[:20], numbers[:20])
    assert 0.4 < (handed[20:] == numbers[20:]).float().mean() < 0.6
    assert len(handed.unique()) == 1000 - sum(int((handed == n).sum() == 0) for n in numbers)
    assert len(pool.images) == 20 and handed.max() == 999


def test_systems_with_other_terms_have_no_textbook_step():
    assert {name for name in SYSTEMS if benchmark.has_textbook(build(name))} == {"attentiongan", "cyclegan"}
    for settings in (dict(attn_disc="concat"), dict(lambda_id=0.0)):
        assert not benchmark.has_textbook(build("attentiongan", **settings))


def test_one_optimisation_more_each_time():
    variants = benchmark.ladder("step", torch.device("cpu"), True)
    assert variants[0].kind == "textbook" and variants[-1].compile
    for before, after in itertools.pairwise(variants[1:]):
        changed = [f for f, a, b in zip(before._fields, before, after, strict=True) if a != b]
        assert len(changed) == 2 and changed[0] == "name"


def test_operations_are_counted_as_published():
    """56.94 G multiplications and additions, each, in the generator at 256 pixels; 2.15 T operations in a step."""
    full = parse_options(["--dataset_name", "solid2striped"])
    assert benchmark.count_flop("inference", full) / 2e9 == pytest.approx(56.94, abs=0.01)
    assert benchmark.count_flop("step", full) / 1e12 == pytest.approx(2.15, abs=0.02)


def test_the_command_measures_and_writes(capsys):
    command = f"--sizes 16 --batch_sizes 2 --rounds 1 --variants 1 3 --out docs/speed {TINY}".split()
    assert benchmark.main(command) == 0
    shown = capsys.readouterr().out
    written = json.loads(Path("docs/speed.json").read_text())
    ((title, section),) = written.items()
    assert title.startswith(f"Training step, attentiongan {TINY}, 16 × 16, batch 2")
    assert " ".join(command) in section["command"]
    assert [row["variant"] for row in section["rows"]] == ["textbook, float32", "+ fused Adam"]
    for row in section["rows"]:
        assert row["pairs/s"] == pytest.approx(2 / row["s"]) and row["s least"] <= row["s"] <= row["s most"]
        assert 0 < row["share of matmul"] < 1 and 0 < row["kept"] < row["peak"]
    first, second = section["rows"]
    assert f"{first['s'] / second['s']:.2f}" == section["cells"][2][3]

    # Sections of other commands stay, one of the same title gives way; the text holds all.
    elsewhere = {"Training step, elsewhere": {**section, "rows": []}, title: section}
    Path("docs/speed.json").write_text(json.dumps(elsewhere))
    benchmark.write(Path("docs/speed"), {title: {**section, "when": "later"}})
    text = Path("docs/speed.md").read_text()
    assert text.count("## ") == 2 and "later" in text and benchmark.markdown(section["cells"]) in text
    assert benchmark.markdown(section["cells"]) in shown


def test_what_does_not_fit_is_a_row_and_no_end():
    found = options("--batch_size 100000000000000")  # beyond all addresses: no system grants it
    server = benchmark.Server(benchmark.Variant("huge"), found, torch.device("cpu"))
    server.take_turn()
    server.end()
    assert server.trouble == "out of memory" and server.seconds == []
    fine = {"variant": "fine", "s": 1.0, "s least": 1.0, "s most": 1.0, "pairs/s": 1.0, "TFLOP/s": 1.0}
    fine |= {"share of matmul": 0.5, "peak": 1.0, "kept": 1.0, "warm-up": 1.0}
    cells = benchmark.lay_out([{"variant": "huge", "trouble": server.trouble}, fine])
    assert cells[1][:2] == ["huge", "out of memory"] and cells[2][3] == "–"
    assert len({len(line) for line in cells}) == 1


class WithoutMatmul:
    """A server that tells figures of steps, and runs out of memory over matrix products."""

    def __init__(self, variant, *_):
        self.variant, self.seconds, self.figures = variant, [], {"peak": 1.0, "kept": 1.0, "warm-up": 1.0}
        self.trouble = "out of memory" if variant.kind == "matmul" else None

    def take_turn(self):
        self.seconds += [] if self.trouble else [0.5]

    def end(self):
        pass


def test_steps_are_told_without_the_machines_own_rate(monkeypatch):
    monkeypatch.setattr(benchmark, "Server", WithoutMatmul)
    (row,) = benchmark.measure([benchmark.Variant("plain")], options(), torch.device("cpu"), rounds=1)
    assert row["pairs/s"] == 2 and row["share of matmul"] is None
    heads, cells = benchmark.lay_out([row])
    assert cells[heads.index("of matmul's rate")] == "–"


@pytest.mark.parametrize(
    "code, message",
    [(1, "failed (exit code 1), its traceback is above"), (-9, "killed by signal 9, as systems do when memory runs")],
)
def test_a_process_that_fails_is_not_called_killed(code, message):
    server = benchmark.Server.__new__(benchmark.Server)
    server.pipe, theirs = multiprocessing.Pipe()
    server.process, server.trouble = SimpleNamespace(join=lambda: None, exitcode=code), None
    theirs.close()
    assert server.ask(1) is None and server.trouble.startswith(message)


def test_peak_memory_grows_with_the_picture(capsys):
    """And is that of the process itself: this one is larger."""
    larger = bytearray(2**30)
    command = "--memory --systems cyclegan --sizes 32 256 --batch_sizes 1 --ngf 16 --ndf 16 --n_residual_blocks 1"
    assert benchmark.main(command.split()) == 0
    small, large = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MiB", capsys.readouterr().out))
    assert small < len(larger) / 2**20
    # Six generator calls: at the size itself at least 16 channels, as they are, normalised and padded, in bf16.
    assert large - small > 6 * 3 * 16 * 256 * 256 * 2 / 2**20


@pytest.mark.parametrize("system, most", [("attentiongan", 108e6), ("cyclegan", 79e6)])
def test_our_step_keeps_little_more_than_half_of_the_textbooks_for_the_backward_pass(system, most):
    """The smaller the pictures, the more of it are weights in bf16. The textbook step has our networks, and would keep
    more with them: hence the bytes, too."""
    found = parse_options(
        f"--dataset_name solid2striped --system {system} --img_height 128 --img_width 128 --ngf 16 --ndf 8".split()
    )
    cpu = torch.device("cpu")
    ours = benchmark.Variant("ours", precision="bf16", channels_last=True)
    kept = [
        benchmark.kept_for_backward(benchmark.make_work(variant, found, cpu))
        for variant in (ours, benchmark.Variant("textbook", "textbook", fused=False))
    ]
    assert 0 < kept[0] < min(0.6 * kept[1], most)


def test_loaders_take_turns(capsys, monkeypatch):
    """Of the built-in set, too, where it has not been drawn yet."""
    monkeypatch.setattr(benchmark, "draw_built_in", partial(draw_built_in, n_train=4, n_test=1))
    found = options("--n_cpu 1")
    converted = []
    monkeypatch.setattr(benchmark, "normalise", lambda images: converted.append(images.dtype) or normalise(images))
    rows = benchmark.measure_loader(found, torch.device("cpu"), rounds=1, duration=0.2)
    names = ["decoded each time, --n_cpu 0", "decoded each time, --n_cpu 1", "kept in memory"]
    assert [row["loader"] for row in rows] == [*names, "the same, ready for a step"]
    assert rows[2]["pairs/s"] > 2 * rows[0]["pairs/s"]
    assert set(converted) == {torch.uint8}  # by the last one
    command = f"--loader --sizes 16 --dataset_name solid2striped {TINY}"
    for flag, message in (
        ("--cache_gb 0.0000001", "--cache_gb 1e-07: solid2striped does not fit"),
        ("--batch_sizes 5", "--batch_sizes 5: 4 samples in data/solid2striped do not fill one batch, expected fewer"),
    ):
        assert benchmark.main(f"{command} {flag}".split()) == 2
        assert message in capsys.readouterr().err


def test_what_was_made_before_the_clock_started_is_not_counted(monkeypatch):
    """Each of the loader's processes has batches ready that it made while others were timed."""
    monkeypatch.setattr(benchmark, "draw_built_in", lambda root: draw_built_in(root, n_train=4, n_test=1))
    taken, built = [], []

    def batches(found, device, n_cpu, cache_gb):
        built.append(n_cpu)
        while True:
            taken.append(benchmark.time.perf_counter())
            yield {"A": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}

    monkeypatch.setattr(benchmark, "build_loader", batches)
    clock = iter(range(10**6))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    rows = benchmark.measure_loader(options("--n_cpu 3"), torch.device("cpu"), rounds=1, duration=1)
    assert built == [0, 3, 0] and len(rows) == 4
    assert len(taken) >= 2 * 4 * benchmark.PREFETCHED * 3


def test_tables_are_written_as_they_are_ready_and_to_no_others_file(monkeypatch, capsys):
    def measure(variants, found, *_):
        if found.img_height == 32:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "lay_out", lambda rows: [["cells"]])
    command = f"--sizes 16 32 --variants 1 {TINY} --out".split()
    assert benchmark.main([*command, "docs/torch2.15"]) == 130
    (title,) = json.loads(Path("docs/torch2.15.json").read_text())
    assert title.startswith(f"Training step, attentiongan {TINY}, 16 × 16, batch 1, variants 1, ")
    assert "## Training step" in Path("docs/torch2.15.md").read_text()
    for name, content, message in (
        ("README.md", "mine", "--out README: README.md is not of an earlier benchmark.py"),
        ("list.json", "[1]", "list.json: not the tables of an earlier benchmark.py"),
        ("other.json", '{"a": {}}', "other.json: not the tables of an earlier benchmark.py (a table lacks its cells)"),
    ):
        Path(name).write_text(content)
        capsys.readouterr()
        assert benchmark.main([*command, Path(name).stem]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and not shown.out and Path(name).read_text() == content


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rounds 0", "--rounds 0: expected at least 1"),
        ("--sizes 16 --variants 9", "--variants 9: expected some of 1 textbook, float32, 2 calls batched"),
        ("--sizes 16 18", "--img_height 18: expected a multiple of 4"),
        ("--system cyclegan", "--system is set by --systems here"),
        ("--memory --batch_size=4", "--batch_size is set by --batch_sizes here"),
        ("--img_height 64", "--img_height is set by --sizes here"),
        ("--loader --img_width 64", "--img_width is set by --sizes here"),
        ("--precision bf16", "--precision is set by --variants here"),
        ("--inference --compile", "--compile is set by --variants here"),
        ("--loader --systems cyclegan attentiongan", "--systems cyclegan attentiongan: --loader measures one of them"),
        ("--loader --batch_sizes 1 4", "--batch_sizes 1 4: --loader measures one of them"),
        ("--memory --variants 1", "--variants is for steps and --inference, expected neither with --memory nor"),
        ("--loader --own", "--own is for steps and --inference, expected neither with --memory nor with --loader"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert benchmark.main([*flags.split(), *TINY.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_our_own_step_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "measure", lambda variants, *_: asked.append(variants) or [])
    monkeypatch.setattr(benchmark, "lay_out", lambda rows: [["nothing measured"]])
    for flags in ("--precision bf16", "--inference --precision float32 --compile"):
        assert benchmark.main(f"--own --sizes 16 {flags} {TINY}".split()) == 0
    (step,), (inference,) = asked
    assert (step.name, step.kind, step.precision, step.compile) == ("train.py", "step", "bf16", False)
    assert (inference.kind, inference.precision, inference.compile) == ("inference", "float32", True)


def test_the_peak_memory_is_that_of_the_precision_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmark,
        "Server",
        lambda variant, *_: (
            asked.append(variant) or SimpleNamespace(trouble="not measured", figures={}, end=lambda: None)
        ),
    )
    for flags in ("--precision bf16", "--precision float32 --compile"):
        assert benchmark.main(f"--memory --sizes 16 {flags} {TINY}".split()) == 0
    assert [(v.precision, v.compile) for v in asked] == [("bf16", False), ("float32", True)]


def test_systems_that_translate_nothing_are_refused_before_others_are_measured(capsys):
    assert benchmark.main(["--systems", "cyclegan", "dcgan", "--sizes", "64", "--ngf", "4", "--ndf", "4"]) == 2
    shown = capsys.readouterr()
    assert not shown.out and "--systems dcgan: draws pictures from noise, expected systems that translate" in shown.err
