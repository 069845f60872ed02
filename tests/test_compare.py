import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import train
import utils
from datasets import Picture, draw_built_in, fixed_noise, quantise, unaugmented
from metrics import Features, kernel_distance
from models import load_generator, open_generator
from utils import InputError

TINY = (
    "--dataset_name solid2striped --img_height 16 --img_width 16 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2 "
    "--n_epochs 1 --decay_epoch 1 --n_cpu 0 --sample_interval 0 --log_interval 1"
)
SETTINGS = {"II": "--system attentiongan --n_masks 3", "CycleGAN, plain": "--system cyclegan"}


@pytest.fixture
def two_settings(monkeypatch):
    monkeypatch.setitem(compare.COMPARISONS, "systems", compare.Comparison(TINY, SETTINGS))
    draw_built_in(Path("data/solid2striped"), n_train=3, n_test=2)


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a comparison without a process for each, whose start takes longer than they do."""

    def train_all(runs, jobs, extra):
        for name, flags in runs.items():
            assert train.main([*flags.split(), "--name", name, *extra]) == 0

    monkeypatch.setattr(compare, "train_all", train_all)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_comparison_trains_measures_and_writes_means_over_seeds(two_settings, monkeypatch, capsys):
    drawn = {}
    draw = record.draw_sheet
    monkeypatch.setattr(utils, "draw_sheet", lambda columns, **o: drawn.update(columns) or draw(columns, **o))
    assert compare.main(["systems", "--seeds", "3", "4"]) == 0
    text = Path("docs/compare_systems.md").read_text()
    table = text.split("## AtoB")[1].split("## BtoA")[0].strip().splitlines()
    heads, rows = cells(table[0]), {cells(line)[0]: cells(line) for line in table[2:]}
    assert list(rows) == [*SETTINGS, "untranslated"]
    for setting, slug in (("II", "ii"), ("CycleGAN, plain", "cyclegan-plain")):
        figures = []
        for seed in (3, 4):
            report = json.loads(Path(f"images/compare_systems_{slug}_{seed}/evaluation.json").read_text())
            figures.append(next(row["figures"] for row in report["rows"] if row["direction"] == "AtoB"))
            options = Path(f"saved_models/compare_systems_{slug}_{seed}/log.jsonl").read_text().splitlines()
            assert len(options) == 3
        for key in ("AP", "L1", "cycle error"):
            if key in figures[0]:
                values = [f[key] for f in figures]
                expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
                assert rows[setting][heads.index(key)] == expected
    assert rows["CycleGAN, plain"][heads.index("IoU")] == "–" != rows["II"][heads.index("IoU")]
    assert all(setting in text and flags in text for setting, flags in SETTINGS.items()) and TINY in text
    for row, (setting, slug) in enumerate((("II", "ii"), ("CycleGAN, plain", "cyclegan-plain"))):
        generator = open_generator(f"compare_systems_{slug}_3", "AtoB")[0].eval()
        size = f"{sum(p.numel() for p in generator.parameters()) / 1e6:.2f}"
        assert rows[setting][heads.index("million parameters of a generator")] == size
        with torch.no_grad():
            output = generator(drawn["input 2"][row : row + 1]).image[0]
        torch.testing.assert_close(drawn["output 2"][row], output)
    with Image.open("docs/compare_systems.png") as sheet:
        assert sheet.height == 18 + 2 * (16 * 6 + 2) + 2  # a row for each setting

    # What is finished is kept, what is not goes on.
    checkpoint = Path("saved_models/compare_systems_ii_3/checkpoint.pt")
    before = checkpoint.stat().st_mtime_ns
    Path("saved_models/compare_systems_ii_4/checkpoint.pt").unlink()
    capsys.readouterr()
    assert compare.find_state("compare_systems_nothing_0") is None
    compare.train_all({"compare_systems_ii_3": f"{TINY} {SETTINGS['II']} --seed 3"}, 1, [])
    assert checkpoint.stat().st_mtime_ns == before and capsys.readouterr().out == ""


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
    own = f"{TINY} --system attentiongan"
    stand("r", own, step=step)
    monkeypatch.setattr(compare.subprocess, "run", None)
    runs = {"new": own, "r": f"{own} {flags}"}
    expected = re.escape(f"saved_models/r: trained with {message}; remove it to train it anew")
    with pytest.raises(InputError, match=f"^{expected}$"):
        compare.train_all(runs, 1, ["--data_dir", "data"])


def test_runs_of_an_older_version_are_used(two_settings):
    """What it did not know had the value that is the default now; what is gone was not in use."""
    own = f"{TINY} --system attentiongan"
    stand("r", own, gone=0, lacking=("pool_size",), data_dir="elsewhere", n_cpu=9)
    compare.train_all({"r": own}, 1, [])
    stand("s", own, gone=7)
    with pytest.raises(InputError, match=r"s: trained with --gone 7 \(which this version does not know\); remove"):
        compare.train_all({"s": own}, 1, [])
    with pytest.raises(InputError, match=r"r: trained with --pool_size 50 \(expected 5\); remove"):
        compare.train_all({"r": f"{own} --pool_size 5"}, 1, [])


def test_runs_on_other_pictures_are_refused(two_settings):
    own = f"{TINY} --system attentiongan"
    stand("r", own)
    Path("data/solid2striped/trainA/another.png").write_bytes(
        next(Path("data/solid2striped/trainA").iterdir()).read_bytes()
    )
    with pytest.raises(InputError, match=r"r: trained with pictures of other names than those in data/solid2striped"):
        compare.train_all({"r": own}, 1, [])


def stand(name, flags, step=3, lacking=(), **others):
    """The checkpoint of a run of these flags, as far as ``train_all`` looks at it."""
    options = train.parse_options(flags.split())
    pictures = train.build_dataset(options).digest() if Path("data").exists() else ""
    options = {**vars(options), **others}
    options = {k: v for k, v in options.items() if k not in (*train.HOW_TO_START, *lacking)}
    folder = Path("saved_models") / name
    folder.mkdir(parents=True)
    checkpoints.CheckpointFiles(folder).save(
        {"options": options, "step": step, "steps_per_epoch": 3, "pictures": pictures}
    )


def test_a_run_that_fails_is_named_and_the_others_are_done(two_settings, monkeypatch, capsys):
    bad = {"bad": "--system cyclegan --n_layers_D 0", "good": "--system cyclegan", "none": "--dataset_name none"}
    monkeypatch.setitem(compare.COMPARISONS, "systems", compare.Comparison(TINY, bad))
    assert compare.main(["systems", "--seeds", "0"]) == 2
    shown = capsys.readouterr()
    assert "compare_systems_good_0: done" in shown.out and "compare_systems_bad_0: failed" in shown.out
    assert "2 of 3 runs failed" in shown.err and "--n_layers_D 0: expected at least 1" in shown.err
    assert "compare_systems_none_0: data/none: no such folder" in shown.err
    assert compare.is_finished(compare.find_state("compare_systems_good_0"))


def test_pairs_are_held_against_the_mean_grey_and_shown_with_the_truth(in_this_process, monkeypatch):
    tiny = "--dataset_name pairs --img_height 16 --img_width 16 --ngf 4 --ndf 4 --n_layers_D 1 --n_epochs 1 --n_cpu 0"
    settings = {"L1": "--system pix2pix --direction BtoA --lambda_gan 0", "CycleGAN": "--system cyclegan"}
    monkeypatch.setitem(compare.COMPARISONS, "pix2pix", compare.Comparison(f"{tiny} --sample_interval 0", settings))
    draws, parts = np.random.default_rng(0), {"train": [], "test": []}
    for split, pictures in parts.items():
        folder = Path("data/pairs") / split
        folder.mkdir(parents=True)
        for i in range(3):
            pictures.append(draws.integers(0, 100 + 50 * i, (16, 32, 3), dtype=np.uint8))
            Image.fromarray(pictures[-1]).save(folder / f"{i}.png")
    assert compare.main(["pix2pix", "--seeds", "1"]) == 0
    text = Path("docs/compare_pix2pix.md").read_text()
    assert "## AtoB" not in text  # which pix2pix has not learned
    heads, _, *rows = text.split("## BtoA")[1].split("## Settings")[0].strip().splitlines()
    rows = {cells(line)[0]: cells(line) for line in rows}
    assert list(rows) == [*settings, "untranslated", "mean grey of the training pictures"]
    photos = {split: np.stack(pictures)[:, :, :16] / 127.5 - 1 for split, pictures in parts.items()}
    expected = abs(photos["test"] - photos["train"].mean()).mean()
    assert rows["mean grey of the training pictures"][cells(heads).index("L1")] == f"{expected:.3f}"
    report = json.loads(Path("images/compare_pix2pix_cyclegan_1/evaluation.json").read_text())
    figures = next(row["figures"] for row in report["rows"] if row["direction"] == "BtoA")
    assert rows["CycleGAN"][cells(heads).index("L1")] == f"{figures['L1']:.3f}"
    with Image.open("docs/compare_pix2pix.png") as sheet:  # input, output, truth of three pictures
        assert sheet.height == 18 + 2 * (16 * 6 + 2) + 2 and sheet.width > 9 * (16 * 6 + 2)


@pytest.mark.parametrize("system", ["pix2pix", "cyclegan"])
def test_pictures_of_equal_names_are_truths_where_the_system_takes_pairs(small_set, system):
    options = vars(train.parse_options(f"--system {system} --img_height 64 --img_width 64 --channels 1".split()))
    truths = compare.truths_of_pairs(small_set, "BtoA", options, 1)
    if system == "cyclegan":
        assert truths is None
    else:
        expected = unaugmented(Picture(small_set / "testA" / "0.png"), (64, 64), 1)
        assert torch.equal(quantise(truths), expected[None])
        assert len(compare.truths_of_pairs(small_set, "BtoA", options)) == 2


def test_samples_from_noise_are_compared_by_kid_to_the_test_pictures(in_this_process, monkeypatch, capsys):
    tiny = "--system dcgan --dataset_name solid2striped --channels 1 --img_height 16 --img_width 16 --nz 4 --ngf 4 "
    tiny += "--ndf 4 --batch_size 2 --n_epochs 2 --n_cpu 0 --sample_interval 0"
    settings = {"transposed": "", "nearest": "--upsample nearest"}
    monkeypatch.setitem(compare.COMPARISONS, "dcgan", compare.Comparison(tiny, settings))
    assert compare.main(["dcgan"]) == 2
    assert (
        "--extractor none: samples are compared by their features" in capsys.readouterr().err
        and not Path("saved_models").exists()
    )

    class PixelExtractor:
        suffix = "-pixels"

        def __init__(self, *_):
            pass

        def __call__(self, images):
            return Features(images.float().flatten(1) / 255, None)

    monkeypatch.setattr(compare, "Extractor", PixelExtractor)
    draw_built_in(Path("data/solid2striped"), n_train=4, n_test=3)
    assert compare.main(["dcgan", "--seeds", "3", "4", "--extractor", "pixels"]) == 0
    text = Path("docs/compare_dcgan.md").read_text()
    heads, _, *rows = text.split("## generator")[1].split("## Settings")[0].strip().splitlines()
    rows = {cells(line)[0]: cells(line) for line in rows}
    assert list(rows) == [*settings, "the training pictures"]
    column = cells(heads).index("100 KID-pixels")

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
        assert rows[setting][column] == expected and float(rows[setting][cells(heads).index("steps/s")]) > 0
    assert rows["the training pictures"][column] == f"{100 * kernel_distance(pictures('trainA'), real):.2f}"
    with Image.open("docs/compare_dcgan.png") as sheet:
        assert sheet.height == 18 + 2 * (16 * 6 + 2) + 2


def test_every_comparison_has_flags_that_train_takes():
    for name, (shared, settings) in compare.COMPARISONS.items():
        names = [compare.run_name(name, setting, 0) for setting in settings]
        assert len(set(names)) == len(names)
        for flags in settings.values():
            train.parse_options(f"{shared} {flags}".split())
