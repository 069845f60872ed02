"""app.py: what it makes of pictures, and the page in a headless Chromium (marker "browser")."""

from utils import InputError

import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from common import CPU, free_port, noise, save
from conftest import ROOT
from PIL import Image

import app
import checkpoints
import translate
from models import AttentionGenerator, DCGANGenerator, ResNetGenerator, UGATITGenerator, translate_any_size
from pictures import normalise, quantise, resize, to_tensor
from prepare import draw_scene

SIZE = dict(img_height=24, img_width=32)


def save_run(name="brown2striped", kind=AttentionGenerator, directions=("AtoB", "BtoA"), **options):
    """Generators with random weights in saved_models below the working directory."""
    for seed, direction in enumerate(directions):
        torch.manual_seed(seed)
        generator = kind(ngf=4, n_residual_blocks=1)
        for parameter in generator.parameters():  # larger than at the start, so that every output differs
            torch.nn.init.normal_(parameter, std=0.2)
        about = {"direction": direction, "options": {"dataset_name": name, **SIZE, **options}, "step": 1}
        checkpoints.save_generator(generator, about, Path("saved_models") / name)
    return f"saved_models/{name}"


def opened(where):
    return app.open_weights(str(Path(where).resolve()), CPU, 0)


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


# ----------------------------------------------------------------------------------------------------------
#  Pictures
# ----------------------------------------------------------------------------------------------------------


def test_without_gradio_or_with_a_port_that_is_taken_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"requirements-app.txt": free_port(), "already in use": taken.getsockname()[1]}
        for words, port in ports.items():
            assert app.main(["--device", "cpu", "--port", str(port)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("app.py: error: ") and words in line
            assert words != "requirements-app.txt" or "app.py needs gradio" in line


def test_an_answer_has_the_size_of_the_picture_and_is_what_the_generators_make(monkeypatch):
    weights = opened(save_run())
    picture = noise(1, (64, 40))  # width, height
    answer = app.translate(weights, "BtoA", save(picture, Path("a.png")), 32, CPU)
    with torch.inference_mode():
        small = normalise(to_tensor(resize(picture, (20, 32), "squash")))[None]
        there = translate_any_size(weights.generators["BtoA"], small)
    assert (pixels(answer.before) == pixels(picture)).all() and answer.after.size == answer.back.size == (64, 40)
    assert abs(pixels(answer.foreground).mean() / 255 - there.foreground.mean()) < 0.01
    assert len(answer.masks) == 10 and len(answer.contents) == 9
    assert (to_tensor(answer.masks[3][0]) == quantise(2 * there.attention[0, 3:4] - 1)).all()
    assert (to_tensor(answer.contents[3][0]) == quantise(there.content[0, 3])).all()
    assert sum(float(label.split(": ")[1].rstrip("%")) for _, label in answer.masks) == pytest.approx(100, abs=5)
    assert answer.remark == "a.png: 64 × 40 pixels; the network saw it at 32 × 20."
    own = app.translate(weights, "BtoA", Path("a.png"), 64, CPU)
    with torch.inference_mode():
        there = translate_any_size(weights.generators["BtoA"], normalise(to_tensor(picture))[None])
        shown = normalise(quantise(there.image))
        back = translate_any_size(weights.generators["AtoB"], shown).image
    assert (to_tensor(own.after) == quantise(there.image[0])).all() and own.remark == "a.png: 64 × 40 pixels."
    assert (to_tensor(own.back) == quantise(back[0])).all()
    monkeypatch.setattr(app, "LARGEST", 48)
    assert app.translate(weights, "BtoA", Path("a.png"), 32, CPU).after.size == (48, 30)


def test_the_page_and_translate_make_the_same(monkeypatch):
    save_run()
    picture = save(noise(1, (64, 40)), Path("a.png"))
    command = "--checkpoint brown2striped --direction BtoA --input a.png --output out --precision float32 --masks"
    assert translate.main([*command.split(), "--size", "32"]) == 0
    answer = app.translate(opened("saved_models/brown2striped"), "BtoA", picture, 32, CPU)
    for image, name in ((answer.after, "a.png"), (answer.foreground, "a_masks/attention.png")):
        assert (pixels(image) == pixels(Image.open(f"out/{name}"))).all()


def test_weights_without_masks_or_the_way_back_or_of_one_size_have_an_answer():
    save_run("one", ResNetGenerator, ["AtoB"])
    answer = app.translate(opened("saved_models/one"), "AtoB", save(noise(1), Path("a.png")), 32, CPU)
    assert (answer.foreground, answer.back, answer.masks, answer.contents) == (None, None, [], [])
    generator = UGATITGenerator(ngf=4, n_residual_blocks=1, size=(32, 32))
    checkpoints.save_generator(generator, {"direction": "AtoB"}, Path("full"))
    weights = opened("full")
    answer = app.translate(weights, "AtoB", Path("a.png"), 256, CPU)
    assert answer.after.size == answer.foreground.size == answer.before.size and not answer.masks
    assert app.name_sizes(weights, "AtoB") == ([("32 (the only one that these weights take)", 32)], 32)


def test_a_picture_to_colour_is_shown_in_grey():
    weights = opened(save_run("colours", task="colorization"))
    answer = app.translate(weights, "AtoB", save(noise(1), Path("a.png")), 32, CPU)
    assert np.ptp(pixels(answer.before), axis=2).max() == 0
    assert [label for label, _ in app.name_directions(weights)] == ["grey → colour", "colour → grey"]


def test_what_cannot_be_translated_gets_a_sentence(monkeypatch):
    weights = opened(save_run())
    Path("folder").mkdir()
    broken = Path("folder").resolve() / "broken.png"
    broken.write_bytes(b"no picture")
    huge = save(Image.new("1", (20000, 6000)), Path("huge.png"))
    for path, words in (
        (broken, "broken.png cannot be read"),
        (huge, "huge.png cannot be read as a picture: .*100"),
        (Path("gone.png"), "again"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            app.translate(weights, "AtoB", path, 32, CPU)
        assert "folder" not in str(raised.value)
    good = save(noise(1), Path("a.png"))
    with pytest.raises(InputError, match="direction"):
        app.translate(weights, None, good, 32, CPU)

    def full(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(translate, "translate_any_size", full)
    with pytest.raises(InputError, match="Choose a smaller one"):
        app.translate(weights, "AtoB", good, 32, CPU)


def test_names_and_sizes_are_in_plain_words():
    weights = opened(save_run("summer2winter_part"))
    assert app.name_directions(weights) == [("summer → winter", "AtoB"), ("winter → summer", "BtoA")]
    sizes = [(f"{n}", n) for n in (64, 128, 256, 512, 1024)]
    assert app.name_sizes(weights, "AtoB") == ([("32 (trained)", 32), *sizes], 32)
    both = weights._replace(about={"AtoB": {"best_size": 256}, "BtoA": {"best_size": 2048}})
    assert app.name_sizes(both, "AtoB") == ([*sizes[:2], ("256 (best)", 256), *sizes[3:]], 256)
    assert app.name_sizes(both, "BtoA")[1] == 1024  # the page has a bound
    assert app.name_directions(opened(save_run("facades")))[1] == ("B → A", "BtoA")


def test_only_weights_that_translate_are_offered():
    save_run("zoo")
    noisy = DCGANGenerator(nz=5, ngf=4, size=16)
    checkpoints.save_generator(noisy, {"direction": "generator"}, Path("saved_models/noisy"))
    Path("saved_models/unfinished").mkdir()
    labels = dict(app.list_weights())
    assert labels["zoo (a run)"] == "saved_models/zoo"
    assert next(iter(labels)) == "horse2zebra_attentiongan (shipped)"  # that is what the page starts with
    assert not any("noisy" in label or "unfinished" in label for label in labels)


def test_equal_names_stay_apart_in_the_zip():
    weights = opened(save_run())
    Path("other").mkdir()
    paths = [save(noise(i), Path(name)) for i, name in enumerate(["a.png", "other/A.png", "a_attention.JPG"])]
    answers = [app.translate(weights, "AtoB", path, 32, CPU) for path in paths]
    for chosen, stems in (([0], ["a"]), ([0, 1], ["01_a", "02_A"]), ([0, 2], ["01_a", "02_a_attention"])):
        app.pack([answers[i] for i in chosen], Path("all.zip"))
        with zipfile.ZipFile("all.zip") as archive:
            assert archive.namelist() == [f"{stem}{end}.png" for stem in stems for end in ("", "_attention")]
            image = Image.open(io.BytesIO(archive.read(f"{stems[-1]}.png")))
        assert (pixels(image) == pixels(answers[chosen[-1]].after)).all()


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".bmp", ".tif", ".gif", ""])
def test_uploads_may_be_of_any_format_that_is_read(ending):
    noise(0).save(path := Path(f"photo{ending}"), "JPEG" if ending == "" else None)
    assert app.translate(opened(save_run()), "AtoB", path, 32, CPU).after.size == (40, 36)


def test_examples_are_of_the_right_side_and_of_the_own_set_where_it_is_there(small_set):
    weights = opened(save_run("small"))
    (small_set / "testB" / "0.png").write_bytes(b"no picture")
    save(noise(7), small_set.parent / "another" / "testB" / "7.png", parents=True)
    found = dict(app.find_examples("saved_models/small", weights, "BtoA"))
    assert list(found) == ["small B 1"]
    assert (pixels(found["small B 1"]) == pixels(Image.open(small_set / "testB" / "1.png"))).all()
    for folder in ("train/A", "train/B", "test/A", "test/B"):  # not this layout
        save(noise(8), small_set.parent / "other_layout" / folder / "8.png", parents=True)
    found = dict(app.find_examples("saved_models/small", weights._replace(dataset="gone"), "BtoA"))
    assert list(found) == ["another B 7", "small B 1", *(f"solid2striped B {i}" for i in range(3))]
    scene = draw_scene(np.random.default_rng((4, 1, 1, 2)))
    assert (pixels(found["solid2striped B 2"]) == pixels(scene["B"])).all()


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_shipped_weights_bring_the_inputs_of_their_sheet(direction):
    """As large as the weights like them, without the white lines between them, changed little by the generator."""
    where = "pretrained/horse2zebra_attentiongan"
    weights = app.open_weights(where, CPU, 0)
    found = [image for name, image in app.find_examples(where, weights, direction) if "horse2zebra" in name]
    n = checkpoints.best_size(weights.about[direction])
    assert len(found) == 6 and {image.size for image in found} == {(n, n)}
    sheet = Image.open(ROOT / "docs" / f"horse2zebra_attentiongan_{direction}.webp").convert("RGB")
    for i, image in enumerate(found):
        for edge in (image.crop((0, 0, n, 1)), image.crop((0, 0, 1, n)), image.crop((n - 1, 0, n, n))):
            assert pixels(edge).mean() < 250
        left, top = sheet.width - (6 - i) * (n + 2), 20 + n + 2
        output = sheet.crop((left, top, left + n, top + n))
        assert abs(pixels(image) - pixels(output)).mean() < 20


def test_the_process_reaches_no_other_machine():
    code = """
import os, socket, app
os.environ["HTTP_PROXY"] = "http://192.0.2.1:1"
app.stay_here("127.0.0.1")
assert "HTTP_PROXY" not in os.environ
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
    socket.create_connection(("localhost", server.getsockname()[1])).close()
udp = socket.socket(type=socket.SOCK_DGRAM)
ways = [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: socket.getaddrinfo(b"example.org", 80),
    lambda: socket.gethostbyname("example.org"),
    lambda: udp.sendto(b"", ("192.0.2.1", 53)),
]
for way in ways:
    try:
        way()
    except PermissionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("this page reaches no other machine") == 5


# ----------------------------------------------------------------------------------------------------------
#  The page
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page of a folder with one run, brown2striped; at the end nothing is left and nothing was complained of."""
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    (folder / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_run()
    environment = {**os.environ, "TMPDIR": str(folder / "temporary"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu"]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as process,
    ):
        deadline = time.monotonic() + 60
        while "Open" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield folder, f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    lines = (folder / "log").read_text().splitlines()
    assert lines == [f"Open http://127.0.0.1:{port}/ in a browser. Ctrl-C ends the page."]
    assert list((folder / "temporary").iterdir()) == []


@pytest.fixture
def visit(site, browse):
    """Opens the page with weights chosen."""

    def start(*arguments, **others):
        page = browse(site[1], *arguments, **others)
        page.wait_for_selector("#size label")
        page.click("#weights input")
        page.get_by_role("option", name="brown2striped (a run)").click()
        page.get_by_text("32 (trained)").wait_for()
        return page

    return start


def give(page, path, where="#one", shown="#one img"):
    page.set_input_files(f"{where} input[type=file]", path)
    page.wait_for_selector(shown)


def fetch(page, selector, n=0):
    """A picture of the page."""
    address = page.locator(selector).nth(n).get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body()))


def answered(page, name):
    page.locator("#remark").get_by_text(name).wait_for()
    page.wait_for_selector("#answer img")


def expected(site, path, direction="AtoB"):
    return app.translate(opened(site[0] / "saved_models" / "brown2striped"), direction, path, 32, CPU)


def near(image, other):
    """Equal but for the rounding of other numbers of threads."""
    return image.size == other.size and abs(pixels(image) - pixels(other)).max() <= 1


@pytest.mark.browser
def test_one_picture_on_a_desktop(site, visit, tmp_path):
    path = save(noise(3, (80, 60)), tmp_path / "mine.png")
    answer, page = expected(site, path), visit()
    give(page, path)
    page.click("#go_one")
    answered(page, "mine.png: 80 × 60 pixels; the network saw it at 32 × 24.")
    assert near(fetch(page, "#answer img"), answer.before) and near(fetch(page, "#answer img", 1), answer.after)
    assert near(fetch(page, "#back img"), answer.back)
    # The line between before and after follows the mouse.
    after = page.locator("#answer img").nth(1)
    assert "50%" in after.get_attribute("style")
    line = page.locator("#answer .outer .inner").bounding_box()
    page.mouse.move(line["x"] + 1, line["y"] + 50)
    page.mouse.down()
    page.mouse.move(line["x"] + 101, line["y"] + 50, steps=4)
    page.mouse.up()
    assert "50%" not in after.get_attribute("style")
    assert near(fetch(page, "#attention img"), translate.overlay(answer.before, answer.foreground))
    assert "Orange is painted anew" in page.inner_text("#told")
    # All masks and contents.
    page.click("#inside button")
    page.wait_for_selector("#inside .tiles img >> nth=18")
    assert near(fetch(page, "#inside .tiles img", 9), answer.masks[9][0])
    assert near(fetch(page, "#inside .tiles img", 10), answer.contents[0][0])
    # The other direction.
    page.get_by_text("striped → brown").click()
    page.click("#go_one")
    other = expected(site, path, "BtoA").after
    deadline = time.monotonic() + 20
    while not near(fetch(page, "#answer img", 1), other):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.browser
def test_an_example_on_a_phone_at_night(site, visit):
    page = visit(390, 844, color_scheme="dark", has_touch=True)
    page.click(".gallery-item >> nth=0")
    answered(page, "solid2striped A 0.png: 128 × 128 pixels; the network saw it at 32 × 32.")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for selector in ("#weights", "#one", "#go_one", "#answer", "#attention", "#back"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, colour.strip("rgb()").split(","))) < 64
    assert "system-ui" in page.evaluate("getComputedStyle(document.querySelector('#go_one')).fontFamily")


@pytest.mark.browser
def test_several_pictures_come_back_as_a_zip(site, visit, tmp_path):
    paths = [save(noise(i), tmp_path / f"{i}.png") for i in range(3)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = visit()
    page.get_by_role("tab", name="Several pictures").click()
    give(page, [*paths, tmp_path / "broken.png"], "#many", "#many >> text=broken")
    page.click("#go_many")
    page.wait_for_selector("#archive a[download]")
    assert "Not translated: broken.png cannot be read" in page.inner_text("#remark")
    assert page.locator("#gallery img").count() == 3
    with page.expect_download() as download:
        page.click("#archive a[download]")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == [f"{i}{end}.png" for i in range(3) for end in ("", "_attention")]
        image = Image.open(io.BytesIO(archive.read("2.png")))
    assert near(image, expected(site, paths[2]).after)


@pytest.mark.browser
def test_what_cannot_be_done_is_said_in_a_sentence(site, visit, tmp_path):
    page = visit()

    def said(words):
        toast = page.locator(".toast-body", has_text=words)
        toast.wait_for()
        assert "Traceback" not in toast.inner_text() and "/" not in toast.inner_text()
        page.locator(".toast-close").first.click()
        toast.wait_for(state="detached")

    page.click("#go_one")
    said("Give a picture first")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    give(page, tmp_path / "broken.png")
    page.click("#go_one")
    said("broken.png cannot be read as a picture")
    page.click("#weights input")
    page.get_by_role("option", name="a file of mine").click()
    page.locator("#file input[type=file]").set_input_files(tmp_path / "broken.png")
    said("broken.png: not a readable weights file")
    page.locator("#file button[aria-label=Clear]").last.click(force=True)
    page.set_input_files("#file input[type=file]", site[0] / "saved_models/brown2striped/BtoA.pt")
    page.locator("#direction").get_by_text("striped → brown").wait_for()
    path = save(noise(3), tmp_path / "good.png")
    page.locator("#one button[aria-label=Clear], #one button[aria-label='Remove Image']").first.click()
    give(page, path)
    page.click("#go_one")
    answered(page, "good.png")
    assert near(fetch(page, "#answer img", 1), expected(site, path, "BtoA").after)
    assert not page.locator("#back").is_visible()  # a single file has no way back


@pytest.mark.browser
def test_eight_visitors_at_once_get_their_own_answers(site, visit, tmp_path):
    paths = [save(noise(20 + i), tmp_path / f"visitor{i}.png") for i in range(8)]
    pages = [visit() for _ in paths]
    for page, path in zip(pages, paths, strict=True):
        give(page, path)
    for page in pages:
        page.click("#go_one", no_wait_after=True)
    answers = [expected(site, path).after for path in paths]
    for page, path, answer in zip(pages, paths, answers, strict=True):
        answered(page, path.name)
        assert near(fetch(page, "#answer img", 1), answer)
        assert sum(near(answer, other) for other in answers) == 1


@pytest.mark.browser
@pytest.mark.parametrize("address", ["/etc/hostname", "log", "http://192.0.2.1/a.png", "https://example.org/a.png"])
def test_files_of_this_machine_and_addresses_elsewhere_are_refused(site, address):
    address = str(site[0] / address) if address == "log" else address
    with pytest.raises(HTTPError) as raised:
        urlopen(f"{site[1]}/gradio_api/file={address}", timeout=20)
    assert raised.value.code in (403, 404)
    raised.value.close()
