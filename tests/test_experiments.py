from utils import InputError

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import checkpoint
from conftest import ROOT
from PIL import Image

import checkpoints
import evaluate
import experiments
import record
import train
from checkpoints import find_run, load_generator, open_generator, open_generators, pack_generator
from datasets import fixed_noise
from experiments import Run
from metrics import Features, kernel_distance
from models import AttentionGenerator, SingleMaskGenerator, translate_any_size
from options import parse_options, stored_options
from pictures import Picture, quantise, unaugmented
from prepare import draw_built_in

TINY = (
    "--dataset_name solid2striped --img_height 16 --img_width 16 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2 "
    "--n_epochs 1 --decay_epoch 1 --n_cpu 0 --sample_interval 0 --log_interval 1"
)
OWN = f"{TINY} --system attentiongan"
SETTINGS = {"II": "--system attentiongan --n_masks 3", "CycleGAN, plain": "--system cyclegan"}
GROUP = "solid2striped, 16 × 16"
RUNS = (
    Run("AttentionGAN II", "two", f"{TINY} --system attentiongan --n_masks 3", GROUP),
    Run("CycleGAN", "cycle", f"{TINY} --system cyclegan", GROUP),
    Run("AttentionGAN I", "one", f"{TINY} --system attentiongan1 --curriculum_epochs 0", GROUP),
)
CELL = 16 * 6 + 2  # pixels of a picture on a sheet, and the line beside it


def make_page(name: str, shown: str = "") -> Path:
    """A page with an empty block."""
    page = Path("docs", "results.md" if name == "results" else experiments.PAGES[name].name)
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"before {shown}\n\n<!-- begin {name} -->\nold\n<!-- end {name} -->\n\nafter\n")
    return page


def set_comparison(monkeypatch, name: str, shared: str, settings: dict[str, str]) -> Path:
    monkeypatch.setitem(experiments.SHARED, name, shared)
    monkeypatch.setitem(experiments.SETTINGS, name, settings)
    return make_page(name)


@pytest.fixture
def two_settings(monkeypatch):
    draw_built_in(Path("data/solid2striped"), n_train=3, n_test=2)
    return set_comparison(monkeypatch, "systems", TINY, SETTINGS)


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs without a process for each, whose start takes longer than they do; the function that would start them."""

    def train_all(runs, jobs, data_dir):
        for run in runs:
            assert train.main([*run.flags.split(), "--name", run.name, "--data_dir", str(data_dir)]) == 0
        return 0

    in_processes = experiments.train_all
    monkeypatch.setattr(experiments, "train_all", train_all)
    return in_processes


@pytest.fixture
def three_runs(in_this_process, monkeypatch):
    """A page with room for a table of three runs on drawn pictures, none of them trained yet."""
    for name, value in (("RUNS", RUNS), ("EXTRACTOR", "none"), ("REAL_SETS", {"solid2striped": ("solid", "striped")})):
        monkeypatch.setattr(experiments, name, value)
    monkeypatch.setattr(experiments, "PUBLISHED", {("solid2striped", "BtoA"): "KID 7"})
    draw_built_in(Path("data/solid2striped"), n_train=5, n_test=3)
    kinds = (f"{way}{kind}.webp" for way in ("AtoB", "BtoA") for kind in ("", "_judged", "_masks"))
    return make_page("results", f"{' '.join(f'two_{kind}' for kind in kinds)} ![it](cycle_AtoB.webp)")


@pytest.fixture
def drawn(monkeypatch):
    """The columns and the options of every sheet."""
    sheets, draw = [], record.draw_sheet
    monkeypatch.setattr(
        record, "draw_sheet", lambda cols, **others: sheets.append((cols, others)) or draw(cols, **others)
    )
    return sheets


def evaluated(name: str, direction: str) -> dict:
    """The figures of a run in its report."""
    report = json.loads(Path(f"images/{name}/evaluation.json").read_text())
    return next(row["figures"] for row in report["rows"] if row["direction"] == direction)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def read_table(text: str) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of the first table in a text."""
    lines = text[text.index("|") :].split("\n\n")[0].splitlines()
    assert set(cells(lines[1])) == {"---"}
    return cells(lines[0]), [cells(line) for line in lines[2:]]


# ----------------------------------------------------------------------------------------------------------
#  compare
# ----------------------------------------------------------------------------------------------------------


def test_a_comparison_trains_measures_and_writes_means_over_seeds(two_settings, in_this_process, drawn, capsys):
    assert experiments.main(["compare", "systems", "--seeds", "3", "4"]) == 0
    text = two_settings.read_text()
    command = "python experiments.py compare systems --seeds 3 4 --extractor none"
    assert text.startswith(f"before \n\n<!-- begin systems: {command} -->\n\n`{command}`: mean ±") and "old" not in text
    assert text.endswith("![A row for each setting](compare_systems.webp)\n\n<!-- end systems -->\n\nafter\n")
    heads, lines = read_table(text.split("**AtoB**")[1])
    rows = {line[0]: line for line in lines}
    assert list(rows) == [*SETTINGS, "untranslated"] and "**BtoA**" in text
    assert all(f"- {setting}: `{flags}`" in text for setting, flags in SETTINGS.items()) and f"`{TINY}`" in text
    (columns, _) = drawn[-1]
    for row, (setting, slug) in enumerate((("II", "ii"), ("CycleGAN, plain", "cyclegan-plain"))):
        figures = []
        for seed in (3, 4):
            figures.append(evaluated(f"compare_systems_{slug}_{seed}", "AtoB"))
            assert len(Path(f"saved_models/compare_systems_{slug}_{seed}/log.jsonl").read_text().splitlines()) == 3
        for key in ("AP", "L1", "cycle error"):
            if key in figures[0]:
                values = [f[key] for f in figures]
                expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
                assert rows[setting][heads.index(key)] == expected
        generator = open_generator(f"compare_systems_{slug}_3", "AtoB")[0].eval()
        size = f"{sum(p.numel() for p in generator.parameters()) / 1e6:.2f}"
        assert rows[setting][heads.index("million parameters of a generator")] == size
        with torch.no_grad():
            output = generator(columns["input 2"][row : row + 1]).image[0]
        torch.testing.assert_close(columns["output 2"][row], output)
    assert rows["CycleGAN, plain"][heads.index("IoU")] == "–" != rows["II"][heads.index("IoU")]
    assert columns["attention 1"][1].eq(1).all() and not columns["attention 1"][0].eq(1).all()
    with Image.open("docs/compare_systems.webp") as sheet:
        assert sheet.format == "WEBP" and sheet.height == 18 + 2 * CELL + 2  # a row for each setting

    # What is finished is kept.
    before = Path("saved_models/compare_systems_ii_3/checkpoint.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert find_run("compare_systems_nothing_0") is None
    flags = f"{TINY} {SETTINGS['II']} --seed 3"
    assert in_this_process([Run("II", "compare_systems_ii_3", flags, "")], 1, Path("data")) == 0
    assert Path("saved_models/compare_systems_ii_3/checkpoint.pt").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_pairs_are_held_against_the_mean_grey_and_shown_with_the_truth(in_this_process, monkeypatch):
    tiny = "--dataset_name pairs --img_height 16 --img_width 16 --ngf 4 --ndf 4 --n_layers_D 1 --n_epochs 1 --n_cpu 0"
    settings = {"L1": "--system pix2pix --direction BtoA --lambda_gan 0", "CycleGAN": "--system cyclegan"}
    page = set_comparison(monkeypatch, "pix2pix", f"{tiny} --sample_interval 0", settings)
    draws, parts = np.random.default_rng(0), {"train": [], "test": []}
    for split, pictures in parts.items():
        folder = Path("data/pairs") / split
        folder.mkdir(parents=True)
        for i in range(3):
            pictures.append(draws.integers(0, 100 + 50 * i, (16, 32, 3), dtype=np.uint8))
            Image.fromarray(pictures[-1]).save(folder / f"{i}.png")
    assert experiments.main(["compare", "pix2pix", "--seeds", "1"]) == 0
    text = page.read_text()
    assert "**AtoB**" not in text  # which pix2pix has not learned
    heads, lines = read_table(text.split("**BtoA**")[1])
    rows = {line[0]: line for line in lines}
    assert list(rows) == [*settings, "untranslated", "mean grey of the training pictures"]
    photos = {split: np.stack(pictures)[:, :, :16] / 127.5 - 1 for split, pictures in parts.items()}
    expected = abs(photos["test"] - photos["train"].mean()).mean()
    assert rows["mean grey of the training pictures"][heads.index("L1")] == f"{expected:.3f}"
    expected = evaluated("compare_pix2pix_cyclegan_1", "BtoA")["L1"]
    assert rows["CycleGAN"][heads.index("L1")] == f"{expected:.3f}"
    with Image.open("docs/compare_pix2pix.webp") as sheet:  # input, output, truth of three pictures
        assert sheet.height == 18 + 2 * CELL + 2 and sheet.width > 9 * CELL


def test_pictures_of_equal_names_are_truths_where_the_system_takes_pairs(small_set):
    of_system = {"pix2pix": [Picture(small_set / "testA" / f"{i}.png") for i in (0, 1)], "cyclegan": None}
    for system, truths in of_system.items():
        reading = experiments.best_reading({"options": {"system": system, "channels": 3}})
        inputs, found = experiments.find_tests(small_set, "BtoA", reading)
        assert inputs == [Picture(small_set / "testB" / f"{i}.png") for i in (0, 1)] and found == truths
        assert experiments.find_tests(small_set, "BtoA", reading, 1) == (inputs[:1], truths and truths[:1])


def test_samples_from_noise_are_compared_by_kid_to_the_test_pictures(in_this_process, monkeypatch, capsys):
    tiny = "--system dcgan --dataset_name solid2striped --channels 1 --img_height 16 --img_width 16 --nz 4 --ngf 4 "
    tiny += "--ndf 4 --batch_size 2 --n_epochs 2 --n_cpu 0 --sample_interval 0"
    settings = {"transposed": "", "nearest": "--upsample nearest"}
    page = set_comparison(monkeypatch, "dcgan", tiny, settings)
    assert experiments.main(["compare", "dcgan"]) == 2
    assert "--extractor none: samples are compared by their features" in capsys.readouterr().err
    assert not Path("saved_models").exists()

    class PixelExtractor:
        suffix = "-pixels"

        def __init__(self, *_):
            pass

        def __call__(self, images):
            return Features(images.float().flatten(1) / 255, None)

    monkeypatch.setattr(experiments, "Extractor", PixelExtractor)
    draw_built_in(Path("data/solid2striped"), n_train=4, n_test=3)
    assert experiments.main(["compare", "dcgan", "--seeds", "3", "4", "--extractor", "pixels"]) == 0
    text = page.read_text()
    heads, lines = read_table(text.split("**generator**")[1])
    rows = {line[0]: line for line in lines}
    assert list(rows) == [*settings, "real training pictures"] and "- transposed: `as above`" in text
    column = heads.index("100 KID-pixels")

    def pictures(folder):
        paths = sorted(Path("data/solid2striped", folder).glob("*.png"))
        return torch.stack([unaugmented(Picture(path), (16, 16), 1) for path in paths]).float().flatten(1) / 255

    real = pictures("testA")
    for setting in settings:
        figures = []
        for seed in (3, 4):
            generator, about = load_generator(f"saved_models/compare_dcgan_{setting}_{seed}/generator.pt")
            assert about["step"] == 4 and generator.settings["upsample"] == setting
            with torch.no_grad():
                samples = quantise(generator.eval()(fixed_noise(500, 4, seed)))
            figures.append(100 * kernel_distance(samples.float().flatten(1) / 255, real))
        expected = f"{statistics.mean(figures):.2f} ± {statistics.stdev(figures):.2f}"
        assert rows[setting][column] == expected and float(rows[setting][heads.index("steps/s")]) > 0
    assert rows["real training pictures"][column] == f"{100 * kernel_distance(pictures('trainA'), real):.2f}"
    with Image.open("docs/compare_dcgan.webp") as sheet:
        assert sheet.height == 18 + 2 * CELL + 2


# ----------------------------------------------------------------------------------------------------------
#  Training
# ----------------------------------------------------------------------------------------------------------


def train_all(*flags: str) -> int:
    """Train a run called r, after others."""
    runs = [Run("", name, own, "") for name, own in zip(("new", "r")[-len(flags) :], flags, strict=True)]
    return experiments.train_all(runs, 1, Path("data"))


def stand(name, flags, step=3, lacking=(), **others):
    """The checkpoint of a run of these flags, as far as ``train_all`` looks at it."""
    options = parse_options(flags.split())
    names = train.build_dataset(options).names() if Path("data").exists() else []
    stored = {k: v for k, v in {**stored_options(options), **others}.items() if k not in lacking}
    files = checkpoints.CheckpointFiles(Path("saved_models") / name)
    files.folder.mkdir(parents=True)
    state = {"options": stored, "step": step, "steps_per_epoch": 3, "picture_names": names, "networks": {}}
    rank = {"children": {}, "record": {}, "random": torch.get_rng_state()}
    files.save({**state, "optimizers": {}, "ranks": [rank]})
    files.rotate()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lambda_id 5", "--lambda_id 0.5 (expected 5.0)"),
        ("--seed 1 --precision float32", "--precision auto (expected float32), --seed 0 (expected 1)"),
        # Which may change on resuming, but not unseen.
        ("--n_epochs 2", "--n_epochs 1 (expected 2)"),
        ("--n_epochs 2 --decay_epoch 2", "--decay_epoch 1 (expected 2), --n_epochs 1 (expected 2)"),
        ("--system cyclegan", "--system attentiongan (expected cyclegan)"),
        ("--init_from demo", "--init_from None (expected demo)"),
    ],
)
@pytest.mark.parametrize("step", [1, 3])
def test_runs_of_other_flags_are_refused_before_anything_trains(monkeypatch, step, flags, message):
    stand("r", OWN, step=step)
    monkeypatch.setattr(experiments.subprocess, "Popen", None)
    expected = re.escape(f"saved_models/r: trained with {message}; remove it to train it anew")
    with pytest.raises(InputError, match=f"^{expected}$"):
        train_all(OWN, f"{OWN} {flags}")


def test_runs_of_an_older_version_are_used(two_settings):
    """What it did not know had the value that is the default now; what is gone was not in use."""
    stand("r", OWN, gone=0, lacking=("pool_size",), data_dir="elsewhere", n_cpu=9)
    assert train_all(OWN) == 0
    with pytest.raises(InputError, match=r"r: trained with --pool_size 50 \(expected 5\); remove"):
        train_all(f"{OWN} --pool_size 5")
    stand("new", OWN, gone=7)
    with pytest.raises(InputError, match=r"new: trained with --gone 7 \(which this version does not know\); remove"):
        train_all(OWN, OWN)

    first = next(Path("data/solid2striped/trainA").iterdir())
    first.with_name("another.png").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"r: trained with pictures of other names than those in data/solid2striped"):
        train_all(OWN)


def test_a_run_that_fails_is_named_and_the_others_are_done(two_settings, monkeypatch, capsys):
    bad = {"bad": "--system cyclegan --n_layers_D 0", "good": "--system cyclegan", "none": "--dataset_name none"}
    before = set_comparison(monkeypatch, "systems", TINY, bad).read_text()
    evaluated_first = Path("saved_models/compare_systems_good_0/best/AtoB.pt")  # killed before its first checkpoint
    evaluated_first.parent.mkdir(parents=True)
    evaluated_first.touch()
    assert experiments.main(["compare", "systems", "--seeds", "0"]) == 2
    shown = capsys.readouterr()
    assert "compare_systems_good_0: done" in shown.out and "compare_systems_bad_0: failed" in shown.out
    assert "2 of 3 runs failed" in shown.err and "--n_layers_D 0: expected at least 1" in shown.err
    assert "compare_systems_none_0: data/none: no such folder" in shown.err
    assert find_run("compare_systems_good_0")["finished"] and two_settings.read_text() == before


def test_sigterm_is_handed_to_the_runs_which_save(two_settings):
    flags = f"{TINY} --n_epochs 1000 --checkpoint_interval 0"
    script = f"import sys, experiments; experiments.SHARED['systems'] = {flags!r}\n"
    script += f"experiments.SETTINGS['systems'] = {SETTINGS!r}\n"
    script += "sys.exit(experiments.main(['compare', 'systems', '--seeds', '0', '--jobs', '1']))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        log, deadline = Path("saved_models/compare_systems_ii_0/log.jsonl"), time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert out == "compare_systems_ii_0: stopped\n" and "stopped; the same command goes on" in err
    lines = log.read_text().splitlines()
    assert 0 < checkpoint("compare_systems_ii_0")["step"] == json.loads(lines[-1])["step"] == len(lines) < 3000
    assert [path.name for path in Path("saved_models").iterdir()] == ["compare_systems_ii_0"]  # nothing else has begun


# ----------------------------------------------------------------------------------------------------------
#  results
# ----------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_evaluate_says_and_how_it_came_about(three_runs):
    assert experiments.main(["results", "--train", "two", "cycle"]) == 0
    text = three_runs.read_text()
    assert text.startswith("before ") and "old" not in text
    assert "\n\n<!-- begin results: python experiments.py results -->\n\n| " in text
    assert text.endswith(" |\n\n<!-- end results -->\n\nafter\n")
    heads, lines = read_table(text)
    each = ["real training pictures", "untranslated", "AttentionGAN II", "CycleGAN"]
    each.append("AttentionGAN I: not trained, `one`")
    ways = ("solid → striped", "striped → solid")
    assert [line[0] for line in lines] == [t for way in ways for t in (f"**solid2striped: {way}, 16 × 16**", *each)]
    assert lines[6][-1] == "KID 7" and lines[0][-1] == "–"
    for name, start in (("two", 3), ("cycle", 4)):
        for direction, line in (("AtoB", lines[start]), ("BtoA", lines[start + 6])):
            figures = evaluated(name, direction)
            same = ((key, key) for key in ("background error", "change", "cycle error"))
            for head, key in (("attention AP", "AP"), ("attention IoU", "IoU"), *same):
                expected = f"{figures[key]:.3f}" if key in figures else ""
                assert line[heads.index(head)] == expected
            assert line[heads.index("pairs")] == "5" and float(line[heads.index("hours")]) < 0.1
    assert lines[3][heads.index("attention AP")] and not lines[4][heads.index("attention AP")]
    assert not any(lines[5][1:])  # not trained

    # Sheets are drawn where the page shows them.
    sheets = {path: path.read_bytes() for path in Path("docs").glob("*.webp")}
    ways = [f"two_{way}{kind}" for way in ("AtoB", "BtoA") for kind in ("", "_judged", "_masks")]
    assert {path.stem for path in sheets} == {*ways, "cycle_AtoB"}

    # What is measured stays, wherever the run is; and is measured anew, in its own size, where it is here.
    other_size = "--dataset_name solid2striped --checkpoint cycle --extractor none --size 32"
    assert evaluate.main(other_size.split()) == 0
    for path in Path("saved_models/two").iterdir():
        path.unlink()
    known = json.loads(Path("docs/results.json").read_text())
    known["cycle"]["pairs"] = 3
    Path("docs/results.json").write_text(json.dumps(known))
    Path("docs/cycle_AtoB.webp").unlink()
    assert experiments.main(["results"]) == 0 and read_table(three_runs.read_text()) == (heads, lines)
    assert {path: path.read_bytes() for path in Path("docs").glob("*.webp")} == sheets


def test_the_table_shows_kid_and_class_rate():
    about = {"pairs": 2000, "hours": 1.25, "rows": []}
    for weights, kid in (("best by validation", 0.0625), ("last", 0.125)):
        figures = {"KID-EffNet low": 0.5, "KID-EffNet": kid, "zebra rate": 0.25, "change": 0.0341, "cycle error": None}
        shared = {"weights": weights, "floor": {"KID-EffNet": -0.0001}, "untranslated": {"KID-EffNet": 0.2}}
        about["rows"] += [{"direction": way, "figures": figures, **shared} for way in ("AtoB", "BtoA")]
    rows = experiments.result_rows({"results_horse2zebra_attentiongan": about})
    heads, lines = read_table("\n".join(experiments.table(rows, experiments.RESULTS, blank="")))
    expected = "100 KID-EffNet,class rate,attention AP,attention IoU,background error,change,cycle error,pairs,hours"
    assert heads == ["", *expected.split(","), "published"]
    assert lines[3] == ["AttentionGAN II", "12.5", "0.250", "", "", "", "0.034", "", "2,000", "1.2", ""]
    assert lines[1][:2] == ["real training pictures", "0.0"] and lines[2][:2] == ["untranslated", "20.0"]


def test_hours_are_those_of_the_steps(tmp_path):
    log = tmp_path / "log.jsonl"
    entries = [
        {"step": 900, "images_per_s": 2.0},
        {"step": 900, "validation": {"KID": 1.0}},
        {"step": 1800, "images_per_s": 4.0},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert experiments.hours_taken(log, 4) == pytest.approx((2 * 4 * 900 / 2 + 2 * 4 * 900 / 4) / 3600)


def test_a_run_that_goes_on_is_not_measured(three_runs):
    assert train.main([*RUNS[1].flags.split(), "--name", "cycle"]) == 0
    assert experiments.is_here("cycle") and not experiments.is_here("two")
    state = checkpoint("cycle")
    torch.save(state | {"step": state["step"] - 1}, "saved_models/cycle/checkpoint.pt")
    assert not experiments.is_here("cycle")
    assert experiments.main(["results"]) == 0 and json.loads(Path("docs/results.json").read_text()) == {}
    for path in Path("saved_models/cycle").glob("checkpoint*"):  # brought here without them
        path.unlink()
    assert experiments.is_here("cycle")


def test_sheets_show_what_a_run_paints_and_every_mask(three_runs, drawn):
    assert experiments.main(["results", "--train", "two", "cycle", "one"]) == 0
    for run in RUNS:
        for direction, back in (("AtoB", "BtoA"), ("BtoA", "AtoB")):
            drawn.clear()
            sheets = experiments.draw_results(run, direction, Path("data/solid2striped"))
            (columns, _), *others = drawn
            inputs = columns.pop("input")
            with torch.no_grad():
                found = open_generator(run.name, direction)[0].eval()(inputs)
                recovered = open_generator(run.name, back)[0].eval()(found.image).image
            expected = {"output": found.image, "recovered": recovered}
            if found.content is not None:
                content = experiments.painted(found.attention, found.content)
                expected |= {"attention": 2 * found.foreground - 1, "content": content}
            assert len(inputs) == 3 and columns.keys() == expected.keys()
            for name, pictures in expected.items():
                torch.testing.assert_close(columns[name], pictures)
            assert sheets[""].size == (2 + CELL * (1 + len(columns)), 18 + 2 + 3 * CELL)
            with Image.open(f"images/{run.name}/evaluation_{direction}.png") as judged:
                assert np.array_equal(judged, sheets["_judged"])
            assert ("_masks" in sheets) == (found.content is not None)
            if found.content is not None:
                ((parts, options),) = others
                masks, contents = found.attention[0], [*found.content[0], inputs[0]]
                names = [*map(str, range(1, len(contents))), "background"]
                for name, mask, content, (head, pair) in zip(names, masks, contents, parts.items(), strict=True):
                    assert head == f"{name}: to {mask.max():.2f}"
                    torch.testing.assert_close(pair[0], 2 * mask.expand(3, -1, -1) / mask.max() - 1)
                    assert torch.equal(pair[1], content)
                assert options["rows"] == ["mask", "content"] and sheets["_masks"].height == 18 + 2 + 2 * CELL
                assert sheets["_masks"].width > len(parts) * CELL
    larger, root = RUNS[0]._replace(size=32), Path("data/solid2striped")
    assert {(*row["protocol"]["size"],) for row in experiments.measure([larger], root, "none")["two"]["rows"]} == {
        (32, 32)
    }
    drawn.clear()
    experiments.draw_results(larger, "AtoB", root)
    assert drawn[0][0]["output"].shape[2:] == (32, 32)


def test_the_stages_of_a_run_stand_beside_each_other_in_one_size(three_runs, drawn, monkeypatch):
    flags = RUNS[0].flags.split()
    assert train.main([*flags, "--name", "two"]) == 0
    later = ["--img_height", "32", "--img_width", "32", "--init_from", "two/checkpoint.pt"]
    assert train.main([*flags, *later, "--name", "later"]) == 0
    monkeypatch.setattr(experiments, "STORY", {"two": "at 16", "later": "at 32"})
    drawn.clear()
    experiments.draw_story(Path("data/solid2striped"))
    ((columns, _),) = drawn
    assert list(columns) == ["input", "at 16", "at 32"]
    assert all(pictures.shape == (3, 3, 32, 32) for pictures in columns.values())
    with torch.no_grad():
        found = open_generator("later", "AtoB")[0].eval()(columns["input"]).image
    torch.testing.assert_close(columns["at 32"], found)
    early = columns["at 16"]
    assert torch.equal(early, early[:, :, ::2, ::2].repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize("generator", [AttentionGenerator(3, 4, 1, 3), SingleMaskGenerator(3, 4, 1)])
def test_what_is_painted_and_the_input_make_the_output(generator):
    inputs = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = generator(inputs)
        painted = experiments.painted(found.attention, found.content)
        expected = found.foreground * painted + (1 - found.foreground) * inputs
    torch.testing.assert_close(found.image, expected)


# ----------------------------------------------------------------------------------------------------------
#  ship, errors, what stands in the repository
# ----------------------------------------------------------------------------------------------------------


def test_shipped_weights_are_half_as_large_and_translate_alike(three_runs, drawn, capsys):
    assert train.main([*RUNS[0].flags.split(), "--name", "two"]) == 0
    drawn.clear()
    assert experiments.main(["ship", "two", "small", "--best_size", "30"]) == 0  # no multiple of 4
    for direction, (columns, options) in zip(("AtoB", "BtoA"), drawn, strict=True):
        with Image.open(f"docs/small_{direction}.webp") as sheet:
            assert sheet.format == "WEBP" and list(columns) == ["1", "2", "3"]
        for inputs, outputs, attention in columns.values():
            assert inputs.shape == (3, 30, 30)  # the best size, not that of training
            with torch.no_grad():
                found = translate_any_size(open_generator("small", direction)[0].eval(), inputs[None])
            assert options["rows"] == ["input", "output", "attention"]
            torch.testing.assert_close(outputs, found.image[0])
            torch.testing.assert_close(attention, 2 * found.foreground[0].expand(3, -1, -1) - 1)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    assert set(open_generators("small")) == {"AtoB", "BtoA"}
    for direction in ("AtoB", "BtoA"):
        weights = torch.load(f"saved_models/pretrained/small/{direction}.pt", weights_only=True)["weights"]
        assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
        (full, about), (half, said) = open_generator("two", direction), open_generator("small", direction)
        assert (
            said == {**about, "best_size": 30}
            and "data_dir" not in about["options"]
            and next(half.parameters()).dtype == torch.float32
        )
        with torch.no_grad():
            assert (half(picture).image - full(picture).image).abs().max() < 2 / 255
    discriminators = torch.load("saved_models/pretrained/small/discriminators.pt", weights_only=True)["networks"]
    assert discriminators.keys() == {"D_A", "D_B"} and discriminators["D_A"]["layers.0.weight"].dtype == torch.float16
    assert train.main([*RUNS[0].flags.split(), "--name", "on", "--init_from", "small", "--max_steps", "1"]) == 0
    assert "D_A, D_B start from saved_models/pretrained/small/discriminators.pt" in capsys.readouterr().out
    for name in ("AtoB.pt", "old.pt"):
        Path("saved_models/pretrained/small", name).write_bytes(b"of other weights")
    assert experiments.main(["ship", "two", "small", "--best_size", "20000"]) == 2
    assert "--best_size 20000: best_size: 20000, expected at most 16384" in capsys.readouterr().err
    assert Path("saved_models/pretrained/small/AtoB.pt").read_bytes() == b"of other weights"
    assert experiments.main(["ship", "two", "small"]) == 0
    shipped = {path.name for path in Path("saved_models/pretrained/small").iterdir()}
    assert shipped == {"AtoB.pt", "BtoA.pt", "discriminators.pt"}
    assert experiments.main(["ship", "saved_models/two", "small"]) == 0
    assert {path.name for path in Path("saved_models/pretrained/small").iterdir()} == shipped
    assert experiments.main(["ship", "two", "other", "--data_dir", "elsewhere"]) == 2
    assert "elsewhere/solid2striped: found no testA" in capsys.readouterr().err
    Path("bare").mkdir()
    torch.save({**pack_generator(AttentionGenerator(3, 4, 1, 3)), "direction": "AtoB"}, "bare/AtoB.pt")
    assert experiments.main(["ship", "bare", "other"]) == 2
    assert "bare: says nothing of its data set, expected a run of train.py" in capsys.readouterr().err
    assert not Path("saved_models/pretrained/other").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("results --train three", "--train: invalid choice: 'three' (choose from"),
        ("ship two", "the following arguments are required: NAME"),
        ("ship two a/b", "NAME a/b: expected a plain name"),
        ("ship nothing small", "nothing: no generator"),
        ("ship two small --best_size 64 32 16", "--best_size: expected one size, or one for each direction, found 3"),
        ("compare nothing", "invalid choice: 'nothing'"),
        ("compare systems --jobs 0", "--jobs: expected at least 1, found 0"),
    ],
)
def test_what_cannot_be_done_is_said(three_runs, arguments, message, capsys):
    assert experiments.main(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and not Path("saved_models").exists()


@pytest.mark.parametrize(
    "text", [None, "", "<!-- begin X -->\n", "<!-- end X -->\n<!-- begin X -->\n<!-- end Xy -->\n"]
)
@pytest.mark.parametrize(
    "name, arguments", [("dcgan", ["compare", "dcgan", "--extractor", "tiny"]), ("results", ["results"])]
)
def test_a_page_without_room_for_the_table_is_refused_before_anything_trains(
    three_runs, name, arguments, text, monkeypatch, capsys
):
    monkeypatch.setattr(experiments, "train_all", None)
    page = make_page(name)
    page.unlink() if text is None else page.write_text(text.replace("X", name))
    assert experiments.main(arguments) == 2
    marks = f"a line <!-- begin {name} --> and, below it, a line <!-- end {name} -->"
    assert f"error: {page}: expected {marks}\n" in capsys.readouterr().err


@pytest.mark.parametrize("before", ["", "[1]", '{"two": 3}', '{"two": {"rows": [{}]}}'])
def test_a_file_that_holds_no_figures_is_refused_before_anything_trains(three_runs, before, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "train_all", None)
    Path("docs/results.json").write_text(before)
    assert experiments.main(["results"]) == 2
    assert "docs/results.json: not the figures of an earlier experiments.py results (" in capsys.readouterr().err
    assert Path("docs/results.json").read_text() == before


def test_every_run_has_flags_that_train_takes_and_a_name_of_its_own():
    compared = [run for name in experiments.SETTINGS for run in experiments.compared_runs(name, [0])]
    assert len({run.name for run in (*compared, *experiments.RUNS)}) == len(compared) + len(experiments.RUNS)
    assert experiments.SHARED.keys() == experiments.SETTINGS.keys() == experiments.PAGES.keys()
    datasets = [run.group.split(",")[0] for run in experiments.RUNS]
    assert list(dict.fromkeys(datasets)) == list(experiments.REAL_SETS)
    for run in compared:
        parse_options(run.flags.split())
    for run, dataset in zip(experiments.RUNS, datasets, strict=True):
        options = parse_options(run.flags.split())
        assert run.group == f"{dataset}, {run.size} × {run.size}"
        assert run.size in (options.img_height, 256) and options.img_height == options.img_width
        assert options.dataset_name == dataset


def test_the_pages_have_room_for_every_table_and_show_what_is_measured():
    for name, page in experiments.PAGES.items():
        before, after = experiments.find_block(ROOT / page, name)
        block = (ROOT / page).read_text()[len(before) : -len(after)]
        assert f"({(sheet := f'compare_{name}.webp')})" in block and (ROOT / "docs" / sheet).exists()
    known = json.loads((ROOT / "docs" / "results.json").read_text())
    rows = experiments.table(experiments.result_rows(known), experiments.RESULTS, blank="")
    before, _ = experiments.find_block(ROOT / "docs" / "results.md", "results")
    text = (ROOT / "docs" / "results.md").read_text()[len(before) :]
    assert read_table(text) == read_table("\n".join(rows))


def test_what_ships_opens_both_ways_and_is_in_its_card():
    folder = ROOT / "saved_models" / "pretrained"
    card = (folder / "README.md").read_text()
    shipped = [path for path in folder.iterdir() if path.is_dir()]
    assert shipped
    for path in shipped:
        assert f"## {path.name}\n" in card
        assert sum(file.stat().st_size for file in path.iterdir()) < 50e6
        opened = open_generators(path)
        assert set(opened) == {"AtoB", "BtoA"}
        for direction, (generator, about) in opened.items():
            picture = torch.rand(1, 3, about["options"]["img_height"], about["options"]["img_width"]) * 2 - 1
            with torch.no_grad():
                translation = generator.eval()(picture)
            assert translation.image.shape == picture.shape and not torch.equal(translation.image, picture)
            assert translation.image.isfinite().all() and about["direction"] == direction
