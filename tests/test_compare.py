import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

import compare
from datasets import draw_built_in

TINY = (
    "--dataset_name solid2striped --img_height 16 --img_width 16 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2 "
    "--n_epochs 1 --decay_epoch 1 --n_cpu 0 --sample_interval 0 --log_interval 1"
)
SETTINGS = {"II": "--system attentiongan --n_masks 3", "CycleGAN, plain": "--system cyclegan"}


@pytest.fixture
def two_settings(monkeypatch):
    monkeypatch.setitem(compare.COMPARISONS, "systems", compare.Comparison(TINY, SETTINGS))
    draw_built_in(Path("data/solid2striped"), n_train=3, n_test=2)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_comparison_trains_measures_and_writes_means_over_seeds(two_settings, capsys):
    assert compare.main(["systems", "--seeds", "3", "4"]) == 0
    text = Path("docs/compare_systems.md").read_text()
    table = text.split("## AtoB")[1].split("## BtoA")[0].strip().splitlines()
    heads, rows = cells(table[0]), {cells(line)[0]: cells(line) for line in table[2:]}
    assert list(rows) == list(SETTINGS)
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
    with Image.open("docs/compare_systems.png") as sheet:
        assert sheet.height == 18 + 2 * (16 * 6 + 2) + 2  # a row for each setting

    # What is finished is kept, what is not goes on.
    checkpoint = Path("saved_models/compare_systems_ii_3/checkpoint.pt")
    before = checkpoint.stat().st_mtime_ns
    Path("saved_models/compare_systems_ii_4/checkpoint.pt").unlink()
    capsys.readouterr()
    assert compare.is_finished("compare_systems_ii_3") and not compare.is_finished("compare_systems_nothing_0")
    compare.train_all("systems", [3], 1, ["--data_dir", "data"])
    assert checkpoint.stat().st_mtime_ns == before and capsys.readouterr().out == ""


def test_a_run_that_fails_is_named_and_the_others_are_done(two_settings, monkeypatch, capsys):
    bad = {"bad": "--system cyclegan --n_layers_D 0", "good": "--system cyclegan"}
    monkeypatch.setitem(compare.COMPARISONS, "systems", compare.Comparison(TINY, bad))
    assert compare.main(["systems", "--seeds", "0"]) == 2
    shown = capsys.readouterr()
    assert "compare_systems_good_0: done" in shown.out and "compare_systems_bad_0: failed" in shown.out
    assert "1 of 2 runs failed" in shown.err and "--n_layers_D 0: expected at least 1" in shown.err
    assert compare.is_finished("compare_systems_good_0")


def test_every_comparison_has_flags_that_train_takes():
    from train import parse_options

    for name, (shared, settings) in compare.COMPARISONS.items():
        names = [compare.run_name(name, setting, 0) for setting in settings]
        assert len(set(names)) == len(names)
        for flags in settings.values():
            parse_options(f"{shared} {flags}".split())
