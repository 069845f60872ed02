import utils

import itertools
import json
import multiprocessing
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import CPU, build, make_batch

import benchmark
import translate
from benchmark import Variant, Worker
from options import parse_options
from pictures import normalise
from prepare import draw_built_in
from record import write_block
from systems import SYSTEMS
from train import trained_parameters, training_step

TINY = "--ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2"


def options(flags=""):
    return parse_options(f"--dataset_name solid2striped --img_height 16 --img_width 16 {TINY} {flags}".split())


@pytest.fixture
def small_built_in(monkeypatch):
    monkeypatch.setattr(benchmark.train, "draw_built_in", partial(draw_built_in, n_train=4, n_test=1))


@pytest.mark.parametrize("name", ["attentiongan", "cyclegan"])
def test_the_textbook_step_is_ours(name):
    """The speeds may be compared because the weights after some steps are the same, with full replay buffers too."""

    def adam(system, fused):
        parameters = {turn.player: trained_parameters(system, turn.networks) for turn in system.turns}
        return {key: torch.optim.Adam(each, 2e-4, (0.5, 0.999), fused=fused) for key, each in parameters.items()}

    ours, book = build(name, pool_size=3), build(name, pool_size=3)
    optimizers, textbook = adam(ours, True), adam(book, None)
    for step in range(4):
        batch = make_batch(step)
        shown = training_step(ours, optimizers, lambda: torch.autocast("cpu", enabled=False), batch)
        losses = benchmark.textbook_step(book, textbook, batch)
        assert len(losses) == 8
        for key, loss in losses.items():
            assert abs(loss - shown[key].item()) < 1e-9, key
    for (key, mine), theirs in zip(ours.named_parameters(), book.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-9, key


def test_systems_with_other_terms_have_no_textbook_step():
    assert {name for name in SYSTEMS if benchmark.has_textbook(build(name))} == {"attentiongan", "cyclegan"}
    for settings in (dict(attn_disc="concat"), dict(lambda_id=0.0)):
        assert not benchmark.has_textbook(build("attentiongan", **settings))


def test_one_optimisation_more_each_time():
    variants = benchmark.ladder("step", CPU, True)
    assert variants[0].kind == "textbook" and variants[-1].compile
    for before, after in itertools.pairwise(variants[1:]):
        changed = [f for f, a, b in zip(before._fields, before, after, strict=True) if a != b]
        assert len(changed) == 2 and changed[0] == "name"


def test_on_cuda_the_last_step_is_a_graph(monkeypatch):
    """Which is not compiled; and a generator alone is not captured."""
    monkeypatch.setattr(utils, "has_bf16", lambda device: True)
    *before, compiled, captured = benchmark.ladder("step", torch.device("cuda"), True)
    assert compiled.compile and captured == compiled._replace(name=captured.name, compile=False, cuda_graph=True)
    inference = benchmark.ladder("inference", torch.device("cuda"), False)
    assert not any(variant.cuda_graph for variant in (*before, compiled, *inference))


def test_operations_are_counted_as_published():
    """56.94 G multiplications and additions, each, in the generator at 256 pixels; 2.15 T operations in a step."""
    full = parse_options(["--dataset_name", "solid2striped"])
    assert benchmark.count_flop("inference", full) / 2e9 == pytest.approx(56.94, abs=0.01)
    assert benchmark.count_flop("step", full) / 1e12 == pytest.approx(2.15, abs=0.02)


def test_the_command_measures_and_writes(capsys, monkeypatch):
    textbook, ours = Variant("textbook, float32", "textbook", fused=False), Variant("+ fused Adam")
    monkeypatch.setattr(benchmark, "ladder", lambda *_: [textbook, ours])
    write_block(Path("docs/speed.md"), "benchmark", "an older one", ["old"])
    command = f"--sizes 16 --batch_sizes 2 --rounds 1 --out docs/speed {TINY}".split()
    assert benchmark.main(command) == 0
    shown = capsys.readouterr().out
    ((title, table),) = json.loads(Path("docs/speed.json").read_text()).items()
    assert title.startswith(f"Training step, attentiongan {TINY}, 16 × 16, batch 2, ")
    assert table["command"] == " ".join(["python benchmark.py", *command])
    times = "median (least–most)"
    first, second = table["rows"]
    for row, name in ((first, "textbook, float32"), (second, "+ fused Adam")):
        assert row[""] == name and len(row[times]) == 1 and row["pairs/s"] == pytest.approx(2 / row[times][0])
        assert 0 < row["of matmul's rate"] < 1 and 0 < row["kept for backward"] < row["peak memory"]
    ratio = first[times][0] / second[times][0]
    assert second["× textbook, float32"] == pytest.approx(ratio)
    heads, _, _, cells = ([cell.strip() for cell in line.split("|")] for line in benchmark.table(table["rows"]))
    assert cells[heads.index("× textbook, float32")] == f"{ratio:.2f}"

    # Tables of other commands stay, one of the same title gives way; the page shows all.
    elsewhere = "Training step, elsewhere"
    Path("docs/speed.json").write_text(json.dumps({elsewhere: table, title: table}))
    benchmark.add_tables(Path("docs/speed"), {title: {**table, "when": "later"}})
    assert list(json.loads(Path("docs/speed.json").read_text())) == [elsewhere, title]
    page, lines = Path("docs/speed.md").read_text(), "\n".join(benchmark.table(table["rows"]))
    assert page.startswith(
        "<!-- begin benchmark: python benchmark.py --out docs/speed -->\n\n### Training step, elsewh"
    )
    assert page.count("### ") == 2 and page.count("later") == 1 and "old" not in page
    assert page.count(lines) == 2 and lines in shown


def test_what_does_not_fit_is_a_row_and_no_end():
    found = options()
    found.batch_size = 10**14  # beyond all addresses: no system grants it
    worker = Worker(Variant("huge"), found, CPU)
    worker.ask(True)
    worker.ask(False)
    assert worker.figures == {"trouble": "out of memory"}
    fine = {"": "fine", "median (least–most)": [1.0, 0.5, 2.0], "peak memory": 1234.5}
    lines = benchmark.table([{"": "huge", **worker.figures}, fine])
    assert lines[0] == "|  | trouble | median (least–most) | peak memory |"
    assert lines[2:] == ["| huge | out of memory |  |  |", "| fine |  | 1.00 s (500.0 ms–2.00 s) | 1,234 MiB |"]


def pretend(monkeypatch, figures):
    """Let no process measure; they have the ``figures`` of their variant. Returns the list of variants, once asked."""
    asked = []

    def worker(variant, *_):
        asked.append(variant)
        return SimpleNamespace(variant=variant, figures=figures(variant), ask=lambda another_turn: None)

    monkeypatch.setattr(benchmark, "Worker", worker)
    return asked


def test_steps_are_told_without_the_machines_own_rate(monkeypatch):
    fine, trouble = {"seconds": [0.5, 0.25, 1.0], "peak memory": 1.0}, {"trouble": "out of memory"}
    pretend(monkeypatch, lambda variant: dict(fine) if variant.name == "plain" else trouble)
    huge, row = benchmark.measure([Variant("huge"), Variant("plain")], options(), CPU, rounds=3)
    assert huge == {"": "huge", **trouble}
    assert list(row) == ["", "median (least–most)", "pairs/s", "TFLOP/s", "peak memory"]
    assert row["pairs/s"] == 2 and row["median (least–most)"] == [0.5, 0.25, 1.0]


def test_only_our_own_step_in_the_precision_asked_for(monkeypatch):
    asked = pretend(monkeypatch, lambda variant: {"trouble": "not measured"})
    for flags in ("--own --precision bf16", "--own --inference --precision float32 --compile"):
        assert benchmark.main(f"--sizes 16 {flags} {TINY}".split()) == 0
    for flags in ("--precision bf16", "--precision float32 --compile"):
        assert benchmark.main(f"--memory --sizes 16 {flags} {TINY}".split()) == 0
    found = [(v.kind, v.precision, v.compile) for v in asked if v.name == "train.py"]
    assert found[:2] == [("step", "bf16", False), ("inference", "float32", True)]
    assert found[2:] == [("step", "bf16", False), ("step", "float32", True)]


def serve(variant, orders, monkeypatch):
    """All answers of a variant's process to its orders; without orders, the parent has ended."""
    monkeypatch.setattr(benchmark.signal, "signal", lambda *_: None)
    monkeypatch.setattr(benchmark, "MATMUL", 8)
    ours, theirs = multiprocessing.Pipe()
    for order in orders:
        ours.send(order)
    if not orders:
        ours.close()
    benchmark.serve(theirs, variant, None, "cpu")
    answers = []
    while orders and ours.poll():
        answers.append(ours.recv())
    return answers


def test_a_process_takes_turns_until_it_is_told_to_end(monkeypatch, capfd):
    matmul = Variant("matmul", "matmul")
    ready, once, twice, last = serve(matmul, [True, True, True, False], monkeypatch)
    assert list(ready) == ["warm-up"] and len(once["seconds"]) == 1 and len(twice["seconds"]) == 2
    assert last == {**twice, "peak memory": last["peak memory"]} and last["peak memory"] > 1
    assert serve(matmul, [], monkeypatch) == []
    assert capfd.readouterr() == ("", "")


def test_a_process_that_fails_is_not_called_killed(monkeypatch, capfd):
    (answer,) = serve(Variant("of no options"), [True], monkeypatch)
    assert answer == {"trouble": "failed: vars() argument must have __dict__ attribute"}
    assert "Traceback" in capfd.readouterr().err
    worker = Worker.__new__(Worker)
    worker.pipe, theirs = multiprocessing.Pipe()
    worker.process, worker.figures = SimpleNamespace(join=lambda: None, exitcode=-9), {}
    theirs.close()
    worker.ask(True)
    killed = "ended with exit code -9 (-9: killed, as systems do when memory runs out)"
    assert worker.figures == {"trouble": killed}


def test_peak_memory_grows_with_the_picture(capsys):
    """And is that of the process itself: this one is larger."""
    larger = bytearray(2**30)
    command = "--memory --systems cyclegan --sizes 32 256 --batch_sizes 1 --ngf 16 --ndf 16 --n_residual_blocks 1"
    assert benchmark.main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    small, large = (int(line.split("|")[4].removesuffix(" MiB ").replace(",", "")) for line in lines[-2:])
    assert lines[-4].split("|")[4] == " peak memory " and small < len(larger) / 2**20
    # Six generator calls: at the size itself at least 16 channels, as they are, normalised and padded, in bf16.
    assert large - small > 6 * 3 * 16 * 256 * 256 * 2 / 2**20


@pytest.mark.parametrize("system, most", [("attentiongan", 108e6), ("cyclegan", 79e6)])
def test_our_step_keeps_little_more_than_half_of_the_textbooks_for_the_backward_pass(system, most):
    """The smaller the pictures, the more of it are weights in bf16. The textbook step has our networks, and would keep
    more with them: hence the bytes, too."""
    found = parse_options(
        f"--dataset_name solid2striped --system {system} --img_height 128 --img_width 128 --ngf 16 --ndf 8".split()
    )
    ours = Variant("ours", precision="bf16", channels_last=True)
    kept = [
        benchmark.kept_for_backward(benchmark.make_work(variant, found, CPU))
        for variant in (ours, Variant("textbook", "textbook", fused=False))
    ]
    assert 0 < kept[0] < min(0.6 * kept[1], most)


def test_files_are_translated_in_turns_by_precision(capsys, monkeypatch):
    turns, translated = [], translate.translate

    def spy(generator, batches, device, autocast, failed):
        turns.append("bf16" if autocast.keywords["enabled"] else "float32")
        translated(generator, batches, device, autocast, failed)
        assert not failed and sum(map(len, batches)) == benchmark.TRANSLATED
        assert all(task.target.is_file() and len(batch) <= 8 for batch in batches for task in batch)

    monkeypatch.setattr(translate, "translate", spy)
    monkeypatch.setattr(utils, "has_bf16", lambda device: True)
    command = f"--translate --sizes 16 --batch_sizes 8 --rounds 2 --device cpu {TINY}"
    assert benchmark.main(command.split()) == 0
    assert turns == 3 * ["float32", "bf16"]
    out = capsys.readouterr().out
    assert "Translation of files, attentiongan" in out and re.search(r"\| bf16 \| [\d.]+ \([\d.]+–[\d.]+\) \|", out)
    assert benchmark.main([*command.split(), "--own"]) == 2
    assert "--own would be ignored by --translate" in capsys.readouterr().err
    monkeypatch.setattr(translate, "translate", lambda *_, failed: failed.update({Path("0.png"): "out of memory"}))
    assert benchmark.main(command.split()) == 2
    assert "16 x 16, batch 8: out of memory" in capsys.readouterr().err


def test_loaders_take_turns(capsys, monkeypatch, small_built_in):
    """Of the built-in set, too, where it has not been drawn yet."""
    converted = []
    monkeypatch.setattr(benchmark, "normalise", lambda images: converted.append(images.dtype) or normalise(images))
    rows = benchmark.measure_loader(options("--n_cpu 1"), CPU, rounds=1, duration=0.2)
    names = ["decoded each time, --n_cpu 0", "decoded each time, --n_cpu 1", "kept in memory"]
    assert [row[""] for row in rows] == [*names, "the same, ready for a step"]
    rates = [row["pairs/s: median (least–most)"] for row in rows]
    assert [len(each) for each in rates] == [1] * 4 and rates[2][0] > 2 * rates[0][0]
    assert set(converted) == {torch.uint8}  # by the last one
    command = f"--loader --sizes 16 --dataset_name solid2striped {TINY}"
    for flag, message in (
        ("--cache_gb 0.0000001", "--cache_gb 1e-07: solid2striped does not fit"),
        ("--batch_sizes 5", "--batch_sizes 5: 4 samples do not fill one batch"),
    ):
        assert benchmark.main(f"{command} {flag}".split()) == 2
        assert message in capsys.readouterr().err


def test_what_was_made_before_the_clock_started_is_not_counted(monkeypatch, small_built_in):
    """Each of the loader's processes has batches ready that it made while others were timed."""
    taken, built = [], []

    def batches(found, device, n_cpu, keep=False):
        built.append((n_cpu, keep))
        while True:
            taken.append(benchmark.time.perf_counter())
            yield {"A": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}

    monkeypatch.setattr(benchmark, "endless_batches", batches)
    clock = iter(range(10**6))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    rows = benchmark.measure_loader(options("--n_cpu 3"), CPU, rounds=1, duration=1)
    assert built == [(0, False), (3, False), (0, True)] and len(rows) == 4
    assert len(taken) >= 2 * 4 * benchmark.PREFETCHED * 3


def test_a_block_is_made_and_replaced_between_its_marks():
    page, end = Path("docs/page.md"), "\n\n<!-- end one -->\n"
    write_block(page, "one", "make one", ["first", "", "second"])
    block = page.read_text()
    assert block == f"<!-- begin one: make one -->\n\nfirst\n\nsecond{end}"
    page.write_text(f"# Über\n\n<!-- begin ones -->\n<!-- end ones -->\n{block}\nafter\n", encoding="utf-8")
    write_block(page, "one", "make one --more", ["third"])
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- begin one:")
    assert before == "# Über\n\n<!-- begin ones -->\n<!-- end ones -->\n"
    assert rest == f" make one --more -->\n\nthird{end}\nafter\n"


def test_tables_are_written_as_they_are_ready_and_to_no_others_file(monkeypatch, capsys):
    def measure(variants, found, *_):
        if found.img_height == 32:
            raise KeyboardInterrupt
        return [{"": "measured"}]

    monkeypatch.setattr(benchmark, "measure", measure)
    command = f"--sizes 16 32 {TINY} --out".split()
    assert benchmark.main([*command, "docs/torch2.15"]) == 130
    (title,) = json.loads(Path("docs/torch2.15.json").read_text())
    assert title.startswith(f"Training step, attentiongan {TINY}, 16 × 16, batch 1, ")
    assert "### Training step" in Path("docs/torch2.15.md").read_text()
    for name, content, message in (
        ("README.md", "mine", "README.md: expected a line <!-- begin benchmark --> and, below it"),
        ("list.json", "[1]", "list.json: not the tables of an earlier benchmark.py"),
        ("other.json", '{"a": {}}', "other.json: not the tables of an earlier benchmark.py (KeyError('command'))"),
    ):
        Path(name).write_text(content)
        capsys.readouterr()
        assert benchmark.main([*command, Path(name).stem]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and not shown.out and Path(name).read_text() == content
        assert len(list(Path().glob(f"{Path(name).stem}.*"))) == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rounds 0", "--rounds: expected at least 1, found 0"),
        ("--sizes 16 0", "--sizes: expected at least 1, found 0"),
        ("--batch_sizes -1", "--batch_sizes: expected at least 1, found -1"),
        ("--sizes 16 18", "--img_height 18: expected a multiple of 4"),
        ("--system cyclegan", "--system would be ignored here, expected --systems"),
        ("--memory --batch_size=4", "--batch_size would be ignored here, expected --batch_sizes"),
        ("--img_height 64", "--img_height would be ignored here, expected --sizes"),
        ("--crop_size 8", "--crop_size would be ignored here, expected --sizes"),
        ("--loader --img_width 64", "--img_width would be ignored here, expected --sizes"),
        ("--precision bf16", "--precision would be ignored here, expected --own with it"),
        ("--inference --compile", "--compile would be ignored here, expected --own with it"),
        ("--loader --compile", "--compile would be ignored here, expected none"),
        ("--translate --precision=bf16", "--precision would be ignored here, expected none"),
        ("--cuda_graph", "--cuda_graph would be ignored here, expected --own with it"),
        ("--own --inference --cuda_graph", "--cuda_graph would be ignored by --inference"),
        ("--loader --own", "--own would be ignored by --loader"),
        ("--systems cyclegan dcgan", "--systems: invalid choice: 'dcgan'"),  # translates nothing
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    """Before anything is measured."""
    assert benchmark.main([*flags.split(), *TINY.split()]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
