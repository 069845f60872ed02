from utils import InputError

import html
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from common import QUICK, log, run

import record
import train
from record import Record, draw_sheet, read_log, thin


def make_record(total_steps=1000, interval=1, start=0, **others):
    return Record("r", Path("saved_models/r/log.jsonl"), {}, total_steps, interval, start, **others)


def add(record, steps=1, images=1):
    for _ in range(steps):
        record.add({"G": torch.tensor(1.0)}, images, 0, 0.1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_once_with_the_file_and_ends_nothing(capsys):
    record = make_record()
    record.log = Path("/dev/full")
    add(record, 2)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert re.search(r"no log, .*/dev/full: could not be written \(.*No space left on device", warning)
    assert record.step == 2
    record.close()


def test_a_damaged_line_of_the_log_costs_no_other_but_the_one_glued_to_it():
    record = make_record()
    add(record, 5)
    with open(record.log, "r+") as file:
        lines = file.read().splitlines(keepends=True)
        file.truncate(sum(map(len, lines[:2])) + 10)  # a disk was full amid the third line
        file.seek(0, 2)
        file.writelines(lines[3:])
    record.close()
    assert [entry["step"] for _, entry in read_log(record.log)] == [1, 2, 5]
    resumed = make_record(start=5)
    add(resumed)
    resumed.close()
    assert [json.loads(line)["step"] for line in record.log.read_text().splitlines()] == [1, 2, 5, 6]


@pytest.mark.parametrize("interval", [3, 100])
def test_values_that_are_not_finite_are_named_with_their_steps(interval):
    record = make_record(interval=interval)
    rows = [(1.0, 1.0, [0.5, 0.5]), (math.nan, 1.0, [0.5, math.inf]), (1.0, 1.0, [0.5, 0.5])]
    with pytest.raises(InputError, match=r"diverged: G, mask not finite between step 1 and step 3\. Checkpoints from"):
        for values in rows:
            record.add({n: torch.tensor(v) for n, v in zip(("G", "D", "mask"), values, strict=True)}, 1, 0, 0.1)
        record.check_finite()  # before a save between two lines
    assert not list(read_log(record.log)) and record.step == 3
    record.close()


def test_a_sign_of_collapse_is_told_once_when_it_lasts(monkeypatch, capsys):
    monkeypatch.setattr(Record, "PATIENCE", 3)
    weak = iter([1, 1, 0, 1, 1, 1, 1, 1, 1])
    record = make_record(symptoms=lambda values: ["D is weak"] if next(weak) and values["G"] == 1 else [])
    for step in range(1, 10):
        add(record)
        assert ("warning: since step 4 D is weak" in capsys.readouterr().out) == (step == 7)
    record.close()


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


@pytest.mark.parametrize("n", [0, 1, 2, 9, 10, 11, 12, 57, 300])
def test_lists_are_thinned_to_equal_distances_and_the_last(n):
    thinned = thin(range(n), 10)
    assert min(n, 5) <= len(thinned) <= 11 and [*thinned[:1], *thinned[-1:]] == [*range(n)][:1] + [*range(n)][-1:]
    gaps = [b - a for a, b in itertools.pairwise(thinned)]
    assert len(set(gaps[:-1])) <= 1 and all(0 < gap <= gaps[0] for gap in gaps)


def test_curves_and_slider_stay_bounded_also_in_a_resumed_run(monkeypatch):
    monkeypatch.setattr(Record, "CURVE_POINTS", 10)
    monkeypatch.setattr(Record, "SHEETS_SHOWN", 4)
    drawn = []

    def draw(history, validations, path):
        drawn.append([entry["step"] for entry in history])
        path.touch()

    monkeypatch.setattr(record, "draw_curves", draw)
    straight = make_record()
    add(straight, 300)
    for step in range(0, 300, 10):
        Path(f"images/r/{step:08d}.png").touch()
    assert not drawn
    straight.page(final=True)
    assert drawn == [[*range(1, 300, 30), 300]]
    sheets = re.search(r"sheets = (\[.*?\])", Path("images/r/index.html").read_text())[1]
    assert json.loads(sheets) == [f"{step:08d}.png" for step in (0, 80, 160, 240, 290)]
    make_record(start=300).page(final=True)
    assert drawn[1] == drawn[0]


def test_a_resumed_run_still_says_what_its_sheets_show():
    run = make_record()
    run.sheet({name: torch.zeros(1, 3, 8, 8) for name in ("real A", "fake B", "real B", "fake A")})
    make_record(start=1).page(final=True)
    (words,) = re.findall("<dl>(.*)</dl>", Path("images/r/index.html").read_text())
    assert words == f"<dt>real<dd>{record.WORDS['real']}<dt>fake<dd>its translation"


def test_the_page_is_drawn_as_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(Record, "PAGE_SECONDS", 0)
    record = make_record(interval=2)
    for state in ("step 0 of 1,000", "step 0 of 1,000", "step 2 of 1,000"):
        assert state in Path("images/r/index.html").read_text()
        assert Path("images/r/curves.png").exists() == (record.step == 2)
        add(record)


def test_the_rate_is_only_of_training(monkeypatch):
    """Images over seconds; those of an evaluation and of drawing the page are left out."""
    now = 100.0

    def draw(record):
        nonlocal now
        now += 20

    monkeypatch.setattr(record.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Record, "page", draw)
    log = make_record(total_steps=4, interval=2)
    log.bar.disable = True  # which divides by the time since the last line
    for _ in range(2):
        now += 5
        add(log, images=3)
    now += 7
    log.add_validation({"KID": 0.5}, 0, seconds=6)
    for _ in range(2):
        now += 1
        add(log, images=4)
    first, validation, second = (entry for _, entry in read_log(log.log))
    assert first["images_per_s"] == 6 / 10 and validation["validation"] == {"KID": 0.5}
    assert second["images_per_s"] == pytest.approx(8 / 3, abs=1e-3)


def test_the_bar_shows_the_rate_up_to_this_step(monkeypatch):
    now = 100.0
    monkeypatch.setattr(record.time, "perf_counter", lambda: now)
    log = make_record(total_steps=4)
    log.bar.disable, log.bar.mininterval, shown = False, 0, []
    monkeypatch.setattr(log.bar, "set_postfix_str", lambda text, **_: shown.append(text))
    for images in (100, 200):
        now += 40
        add(log, images=images)
    assert shown == ["2.5 images/s G 1.000", "5.0 images/s G 1.000"]
    log.bar.disable = True


def test_the_time_left_is_told_once_and_counts_to_the_last_step(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(record.time, "perf_counter", lambda: now)
    log = make_record(total_steps=10**6, interval=10**6, last_step=305)
    assert log.bar.total == 305
    log.bar.disable = True
    for _ in range(20):
        now += 10
        add(log)
    assert capsys.readouterr().out.count("about 50 min to go; pictures and curves: images/r/index.html") == 1
    log.page()
    page = (record.IMAGES / "r" / "index.html").read_text()
    assert re.search(r"step 20 of 1,000,000, about 48 min left \(\d\d \w+, \d\d:\d\d\)", page)


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "G"', b"5\n", b"\xff\xfe\x00\n", b'{"epoch": 1}\n', b'{"step": 60}\n']
)
def test_a_log_is_cut_where_damage_begins_and_where_the_checkpoint_ends(damage):
    path = Path("saved_models/r/log.jsonl")
    path.parent.mkdir(parents=True)
    sound = b'{"step": 1, "G": 0.5}\n'
    path.write_bytes(sound + damage)
    make_record(start=50)
    assert path.read_bytes() == sound


def test_the_log_holds_means_over_its_interval(small_set):
    assert run(f"{QUICK} --n_epochs 2 --name each --log_interval 1 --seed 3") == 0
    assert run(f"{QUICK} --n_epochs 2 --name four --log_interval 4 --seed 3") == 0
    each, four = log("each"), log("four")
    for i, entry in enumerate(four):
        window = each[4 * i : 4 * i + 4]
        assert entry["D_A"] == pytest.approx(sum(e["D_A"] for e in window) / 4, rel=1e-5)


def test_names_are_escaped_on_the_page(small_set):
    name = "a&b<c>"
    assert train.main([*QUICK.split(), "--n_epochs", "1", "--name", name]) == 0
    page = Path(f"images/{name}/index.html").read_text()
    assert f"<h1>{html.escape(name)}</h1>" in page and name not in page


def test_the_page_links_to_what_is_written_beside_it_later(tmp_path):
    folder = record.IMAGES / "r"
    log = record.Record("r", tmp_path / "log.jsonl", {}, 6, 1)
    log.close()
    assert "Beside this page" not in (folder / "index.html").read_text()
    (folder / "evaluation_AtoB.png").write_bytes(b"")
    (folder / "translated_AtoB").mkdir()
    record.update_links(folder)
    page = (folder / "index.html").read_text()
    assert 'href="evaluation_AtoB.png"' in page and 'href="translated_AtoB"' in page
    record.update_links(folder)
    assert (folder / "index.html").read_text() == page
    record.update_links(record.IMAGES / "none")


@pytest.mark.parametrize(
    "seconds, words", [(5, "5 s"), (600, "10 min"), (3600 * 3 + 1200, "3 h 20 min"), (86400 * 19, "19 days")]
)
def test_durations_are_in_words(seconds, words):
    assert record.duration(seconds) == words


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser_from_the_first_step_to_the_last(browse, monkeypatch, width, scheme):
    monkeypatch.setattr(Record, "PAGE_SECONDS", 0)
    name, odd = 'a "b" <i>c</i> é\'s #1 50% $$', "'\" </table><b>$state &amp; é" + 50 * "x"
    settings = {"data_dir": odd, "lambda_cyc": 10.0}
    run = Record(name, Path("log.jsonl"), settings, 60, 2, 0, {"data_dir": "data", "lambda_cyc": 10.0})
    page = browse(f"{run.folder.resolve().as_uri()}/index.html", width, color_scheme=scheme)
    page.clock.install()

    def look(state, label, images):
        """Wait for what the page shall show, and see that all of it fits and is there."""
        page.get_by_text(f"step {state}").wait_for()
        assert (page.inner_text("h1"), page.title()) == (name, name)
        assert page.inner_text("#label") == label and page.is_visible("#slider") == bool(label)
        page.wait_for_function("[...document.images].every((each) => each.complete)")
        shown = [each for each in page.locator("img").all() if each.is_visible()]
        assert [each.evaluate("(each) => each.src.split('/').pop()") for each in shown] == images
        assert all(each.evaluate("(each) => each.naturalWidth") > 0 for each in shown)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("table >> nth=0").inner_text().split() == ["data_dir", *odd.split()]

    def go_on(steps, minutes=0.6):
        """Train, draw a sheet, and let time pass on the page."""
        add(run, steps)
        run.sheet({"real A": torch.zeros(2, 3, 64, 64), **dict.fromkeys("bcdefgh", torch.ones(2, 3, 64, 64))})
        page.clock.run_for(60000 * minutes)

    look("0 of 60", "", [])
    go_on(20)
    look("20 of 60", "after step 20", ["00000020.png", "curves.png"])
    assert page.locator("dl").inner_text().split("\n") == ["real", record.WORDS["real"]]
    go_on(10)
    look("30 of 60", "after step 30", ["00000030.png", "curves.png"])
    page.fill("#slider", "0")  # which stays while the run goes on
    look("30 of 60", "after step 20", ["00000020.png", "curves.png"])
    go_on(10)
    look("40 of 60", "after step 20", ["00000020.png", "curves.png"])
    page.click("summary")  # the settings are being read
    go_on(10)
    look("40 of 60", "after step 20", ["00000020.png", "curves.png"])
    page.click("summary")
    page.fill("#slider", "2")  # the last one gives way to newer ones
    go_on(10)
    run.page(final=True)
    (run.folder / "translated_AtoB #1").mkdir()
    (run.folder / "translated_AtoB #1" / "a.png").touch()
    draw_sheet({"real": torch.zeros(1, 3, 64, 64)}).save(run.folder / "evaluation_'é' 50%.png")
    record.update_links(run.folder)
    page.clock.run_for(36000)
    look("60 of 60: done", "after step 60", ["00000060.png", "curves.png"])
    bright = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))))
    assert (bright > 700) == (page.locator(".curves").evaluate("(e) => getComputedStyle(e).filter") != "none")
    assert (bright > 700) == (scheme == "dark")
    for link, there in (("evaluation_'é' 50%.png", "img"), ("translated_AtoB #1", "text=a.png")):
        page.get_by_role("link", name=link).click()
        page.wait_for_selector(there)
        page.go_back()
    run.close()
