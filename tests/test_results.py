import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import compare
import results
import train
import utils
from datasets import draw_built_in
from models import AttentionGenerator, SingleMaskGenerator, open_generator, open_generators, pack_generator

FLAGS = (
    "--ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2 --n_epochs 1 --n_cpu 0 --sample_interval 0 --log_interval 2"
)
RUNS = (
    results.Run("solid2striped", 16, "AttentionGAN II", "two", f"{FLAGS} --system attentiongan --n_masks 3"),
    results.Run("solid2striped", 16, "CycleGAN", "cycle", f"{FLAGS} --system cyclegan"),
    results.Run("solid2striped", 16, "AttentionGAN I", "one", f"{FLAGS} --system attentiongan1 --curriculum_epochs 0"),
)


@pytest.fixture
def table(monkeypatch):
    """A README with room for a table of three runs on drawn pictures, none of them trained yet."""
    monkeypatch.setattr(results, "RUNS", RUNS)
    monkeypatch.setattr(results, "GROUPS", (("solid2striped", 16),))
    monkeypatch.setattr(results, "EXTRACTOR", "none")
    monkeypatch.setattr(results, "SIDES", {"solid2striped": ("solid", "striped")})
    monkeypatch.setattr(results, "PUBLISHED", {("solid2striped", "BtoA"): "KID 7"})

    def train_all(runs, jobs, extra):
        for name, flags in runs.items():
            assert train.main([*flags.split(), "--name", name, *extra]) == 0

    monkeypatch.setattr(compare, "train_all", train_all)
    draw_built_in(Path("data/solid2striped"), n_train=5, n_test=3)
    Path("README.md").write_text(f"before\n\n{results.MARKS[0]}old\n{results.MARKS[1]}\nafter\n")


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_table_shows_what_evaluate_says_and_how_it_came_about(table):
    assert results.main(["--train", "two", "cycle"]) == 0
    text = Path("README.md").read_text()
    assert text.startswith("before\n\n") and text.endswith("\nafter\n") and "old" not in text
    heads, _, *lines = rows(text)
    titles = [line[0] for line in lines]
    each = [
        "real training pictures",
        "untranslated",
        "AttentionGAN II",
        "CycleGAN",
        "AttentionGAN I: not trained, `one`",
    ]
    assert titles == [
        "**solid2striped: solid → striped, 16 × 16**",
        *each,
        "**solid2striped: striped → solid, 16 × 16**",
        *each,
    ]
    assert lines[6][-1] == "KID 7" and lines[0][-1] == "–"
    for name, start in (("two", 3), ("cycle", 4)):
        report = json.loads(Path(f"images/{name}/evaluation.json").read_text())["rows"]
        for direction, line in (("AtoB", lines[start]), ("BtoA", lines[start + 6])):
            figures = next(row["figures"] for row in report if row["direction"] == direction)
            same = ((key, key) for key in ("background error", "change", "cycle error"))
            for head, key in (("attention AP", "AP"), ("attention IoU", "IoU"), *same):
                expected = f"{figures[key]:.3f}" if key in figures else ""
                assert line[heads.index(head)] == expected
            assert line[heads.index("pairs")] == "5" and float(line[heads.index("hours")]) < 0.1
    assert lines[3][heads.index("attention AP")] and not lines[4][heads.index("attention AP")]
    assert not any(lines[5][1:])  # not trained

    # What is measured stays, wherever the run is; and is measured anew where it is here.
    for path in Path("saved_models/two").iterdir():
        path.unlink()
    known = json.loads(Path("docs/results.json").read_text())
    known["cycle"]["pairs"] = 3
    Path("docs/results.json").write_text(json.dumps(known))
    sheets = {path: path.read_bytes() for path in Path("docs").glob("two_*.png")}
    Path("docs/cycle_AtoB.png").unlink()
    assert results.main([]) == 0 and rows(Path("README.md").read_text()) == rows(text)
    assert len(sheets) == 6 and all(path.read_bytes() == sheet for path, sheet in sheets.items())
    assert Path("docs/cycle_AtoB.png").exists()


def test_the_table_shows_kid_and_class_rate():
    about = {"pairs": 2000, "hours": 1.25, "rows": []}
    for weights, kid in (("best by validation", 0.0625), ("last", 0.125)):
        figures = {"KID-EffNet low": 0.5, "KID-EffNet": kid, "zebra rate": 0.25, "change": 0.0341, "cycle error": None}
        shared = {"weights": weights, "floor": {"KID-EffNet": -0.0001}, "untranslated": {"KID-EffNet": 0.2}}
        about["rows"] += [{"direction": way, "figures": figures, **shared} for way in ("AtoB", "BtoA")]
    lines = rows("\n".join(results.make_table({"results_horse2zebra_attentiongan": about})))
    assert dict(zip(lines[0], lines[5], strict=True)) == {
        "": "AttentionGAN II",
        "100 KID-EffNet": "12.5",
        "class rate": "0.250",
        "attention AP": "",
        "attention IoU": "",
        "background error": "",
        "change": "0.034",
        "cycle error": "",
        "pairs": "2,000",
        "hours": "1.2",
        "published": "",
    }
    assert lines[3][:2] == ["real training pictures", "0.0"] and lines[4][:2] == ["untranslated", "20.0"]


def test_hours_are_those_of_the_steps(tmp_path):
    log = tmp_path / "log.jsonl"
    entries = [
        {"step": 900, "images_per_s": 2.0},
        {"step": 900, "validation": {"KID": 1.0}},
        {"step": 1800, "images_per_s": 4.0},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert results.hours_taken(log, 4) == pytest.approx((2 * 4 * 900 / 2 + 2 * 4 * 900 / 4) / 3600)


def test_a_run_that_goes_on_is_not_measured(table):
    assert train.main([*RUNS[1].flags.split(), "--name", "cycle"]) == 0
    assert results.is_here(RUNS[1]) and not results.is_here(RUNS[0])
    state = torch.load("saved_models/cycle/checkpoint.pt", weights_only=True)
    torch.save(state | {"step": state["step"] - 1}, "saved_models/cycle/checkpoint.pt")
    assert not results.is_here(RUNS[1])
    assert results.main([]) == 0 and json.loads(Path("docs/results.json").read_text()) == {}
    for path in Path("saved_models/cycle").glob("checkpoint*"):  # brought here without them
        path.unlink()
    assert results.is_here(RUNS[1])


def test_sheets_show_what_a_run_paints_and_every_mask(table, monkeypatch):
    assert results.main(["--train", "two", "cycle", "one"]) == 0
    drawn = []
    draw = record.draw_sheet
    monkeypatch.setattr(utils, "draw_sheet", lambda columns, **o: drawn.append(columns) or draw(columns, **o))
    cell = 16 * 6 + 2
    for run in RUNS:
        for direction, back in (("AtoB", "BtoA"), ("BtoA", "AtoB")):
            results.draw(run.name, direction, Path("data"))
            sheet = drawn.pop()
            inputs = sheet.pop("input")
            with torch.no_grad():
                found = open_generator(run.name, direction)[0].eval()(inputs)
                recovered = open_generator(run.name, back)[0].eval()(found.image).image
            expected = {"output": found.image, "recovered": recovered}
            if found.content is not None:
                expected |= {"attention": 2 * found.foreground - 1, "content": results.painted(found)}
            assert len(inputs) == 3 and sheet.keys() == expected.keys()
            for name, pictures in expected.items():
                torch.testing.assert_close(sheet[name], pictures)
            path = Path(f"docs/{run.name}_{direction}.png")
            with Image.open(path) as picture:
                assert picture.size == (2 + cell * (1 + len(sheet)), 18 + 2 + 3 * cell)
            judged = path.with_stem(f"{path.stem}_judged").read_bytes()
            assert judged == Path(f"images/{run.name}/evaluation_{direction}.png").read_bytes()
            path = path.with_stem(f"{path.stem}_masks")
            assert path.exists() == (found.content is not None)
            if path.exists():
                parts = drawn.pop()
                masks, contents = found.attention[0], [*found.content[0], inputs[0]]
                assert list(parts) == [*map(str, range(1, len(contents))), "background"]
                for mask, content, pair in zip(masks, contents, parts.values(), strict=True):
                    torch.testing.assert_close(pair[0], 2 * mask.expand(3, -1, -1) - 1)
                    assert torch.equal(pair[1], content)
                with Image.open(path) as picture:
                    assert picture.height == 18 + 2 + 2 * cell and picture.width > len(parts) * cell


@pytest.mark.parametrize("generator", [AttentionGenerator(3, 4, 1, 3), SingleMaskGenerator(3, 4, 1)])
def test_what_is_painted_and_the_input_make_the_output(generator):
    inputs = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = generator(inputs)
        expected = found.foreground * results.painted(found) + (1 - found.foreground) * inputs
    torch.testing.assert_close(found.image, expected)


def test_shipped_weights_are_half_as_large_and_translate_alike(table, monkeypatch, capsys):
    assert train.main([*RUNS[0].flags.split(), "--name", "two"]) == 0
    drawn = []
    draw = record.draw_sheet
    monkeypatch.setattr(utils, "draw_sheet", lambda columns, **o: drawn.append((columns, o)) or draw(columns, **o))
    assert results.main(["--ship", "two", "--as", "small"]) == 0
    for direction, (columns, options) in zip(("AtoB", "BtoA"), drawn, strict=True):
        assert Path(f"docs/small_{direction}.png").exists() and list(columns) == ["1", "2", "3"]
        for inputs, outputs, attention in columns.values():
            with torch.no_grad():
                found = open_generator("two", direction)[0].eval()(inputs[None])
            assert options["rows"] == ["input", "output", "attention"]
            torch.testing.assert_close(outputs, found.image[0])
            torch.testing.assert_close(attention, 2 * found.foreground[0].expand(3, -1, -1) - 1)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    assert set(open_generators("small")) == {"AtoB", "BtoA"}
    for direction in ("AtoB", "BtoA"):
        weights = torch.load(f"saved_models/pretrained/small/{direction}.pt", weights_only=True)["weights"]
        assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
        (full, about), (half, said) = open_generator("two", direction), open_generator("small", direction)
        assert said == about and "data_dir" not in about["options"] and next(half.parameters()).dtype == torch.float32
        with torch.no_grad():
            assert (half(picture).image - full(picture).image).abs().max() < 2 / 255
    assert results.main(["--ship", "two", "--as", "other", "--data_dir", "elsewhere"]) == 2
    assert "elsewhere/solid2striped: found no testA" in capsys.readouterr().err
    Path("bare").mkdir()
    torch.save(pack_generator(AttentionGenerator(3, 4, 1, 3)), "bare/AtoB.pt")
    assert results.main(["--ship", "bare", "--as", "other"]) == 2
    assert "--ship bare: says nothing of its data set, expected a run of train.py" in capsys.readouterr().err
    assert not Path("saved_models/pretrained/other").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train", "three"], "--train three: expected two, cycle, one"),
        (["--ship", "two"], "--ship and --as: expected both or neither"),
        (["--ship", "two", "--as", "small", "--train", "two"], "--ship writes weights, --train trains first"),
        (["--ship", "two", "--as", "a/b"], "--as a/b: expected a plain name"),
        (["--ship", "nothing", "--as", "small"], "nothing: no generator"),
    ],
)
def test_what_cannot_be_done_is_said(table, arguments, message, capsys):
    assert results.main(arguments) == 2
    assert message in capsys.readouterr().err and not Path("saved_models/pretrained/small/AtoB.pt").exists()


def test_a_readme_without_room_for_the_table_is_refused(table, capsys):
    Path("README.md").write_text("nothing")
    assert results.main([]) == 2
    assert "README.md: expected <!-- written by results.py -->" in capsys.readouterr().err


def test_every_run_has_flags_that_train_takes_and_a_name_of_its_own():
    assert len({run.name for run in results.RUNS}) == len(results.RUNS)
    assert list(dict.fromkeys(dataset for dataset, _ in results.GROUPS)) == list(results.SIDES)
    assert {run.group for run in results.RUNS} == set(results.GROUPS)
    for run in results.RUNS:
        assert train.parse_options(run.flags.split()).dataset_name == run.dataset


def test_what_ships_opens_both_ways_and_is_in_its_card():
    folder = Path(results.__file__).parent / "saved_models" / "pretrained"
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
