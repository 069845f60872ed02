"""Pictures of any kind and size from files to files, and the export to ONNX."""

import utils
from utils import InputError

import errno
import multiprocessing
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    below,
    noise,
    official_attention_forward,
    official_attention_weights,
    same,
    save,
    save_generators,
    tiny,
)
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import translate
from models import (
    AttentionGenerator,
    ResNetGenerator,
    SingleMaskGenerator,
    Translation,
    UGATITGenerator,
    UNetGenerator,
    translate_any_size,
)
from pictures import Picture, normalise, resize, to_tensor
from translate import SHEET, OnUnitRange, Task, luminance, make_batches, name_outputs


@pytest.fixture
def net():
    """The generator that "net" holds for AtoB."""
    generator = tiny()
    save_generators(AtoB=generator)
    return generator


def run(command: str, native: bool = True) -> int:
    """Translate; where the command does not say how large pictures are seen, they are seen as they are."""
    how = [] if "--export" in command else ["--precision", "float32", "--device", "cpu"]
    how += ["--size", "native"] if native and how and "--size" not in command else []
    return translate.main(["--checkpoint", "net", *how, *command.split()])


def printed(capsys, command: str, native: bool = True) -> str:
    """What is said of a translation of everything."""
    assert run(command, native) == 0
    return capsys.readouterr().out


def refused(capsys, command: str) -> str:
    """Why nothing is translated."""
    assert run(command) == 2
    return capsys.readouterr().err


def tensor(image: Image.Image) -> torch.Tensor:
    """(channels, H, W), float64 in [0, 255]."""
    return torch.from_numpy(np.array(image, dtype=float)).reshape(image.height, image.width, -1).permute(2, 0, 1)


def read(path) -> torch.Tensor:
    with Image.open(path) as file:
        assert file.format == "PNG" and file.mode in ("L", "RGB")
        return tensor(file)


def repeat_edges(images, height, width):
    rows, columns = (torch.arange(n).clamp(max=m - 1) for n, m in zip((height, width), images.shape[-2:], strict=True))
    return images[..., rows, :][..., columns].contiguous()


@torch.no_grad()
def by_hand(generator, source, multiple=4):
    """The translation of a picture or file, (channels, H, W) in [-1, 1]."""
    image = Picture(source).open(generator.settings["channels"]) if isinstance(source, Path) else source
    height, width = image.height, image.width
    x = (tensor(image) / 127.5 - 1).float()[None]
    fitting = repeat_edges(x, *(max(8, -(-n // multiple) * multiple) for n in (height, width)))
    return generator(fitting).image[0, :, :height, :width]


def assert_shows(path, values):
    """The file has ``values`` in [-1, 1], each at the nearest of 256 levels."""
    found, expected = read(path), (values + 1) * 127.5
    assert found.shape == expected.shape
    assert found.std() > 5  # else there is little to be seen
    assert (found - expected).abs().max() < 0.51


# ----------------------------------------------------------------------------------------------------------
#  Any size
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, fitting",
    [((8, 8), (8, 8)), ((12, 20), (12, 20)), ((33, 50), (36, 52)), ((5, 300), (8, 300)), ((1, 1), (8, 8))],
)
@pytest.mark.parametrize("network", [AttentionGenerator, ResNetGenerator, UGATITGenerator])
@torch.no_grad()
def test_what_does_not_fit_is_the_generators_answer_to_repeated_edges(network, size, fitting):
    generator, images = tiny(network=network), torch.rand(2, 3, *size) * 2 - 1
    whole = generator(repeat_edges(images, *fitting))
    assert (whole.attention is None) == (network is not AttentionGenerator)
    height, width = size
    same(
        list(translate_any_size(generator, images)),
        [part if part is None or part.ndim == 2 else part[..., :height, :width] for part in whole],  # 2: logits
    )


# ----------------------------------------------------------------------------------------------------------
#  From files to files
# ----------------------------------------------------------------------------------------------------------


def test_pictures_of_any_size_and_name_keep_both(net, capsys):
    sizes = {"one pixel.png": (1, 1), "long.bmp": (500, 8), "Zèbre no. 2 斑馬.WEBP": (13, 12)}
    for i, (name, size) in enumerate(sizes.items()):
        save(noise(i, size), Path("in") / name)
    save(noise(7), Path("in/sub/deeper.png"))
    before = below(Path("in"))
    assert run("--input in --output new/out --size native") == 0
    assert capsys.readouterr() == ("3 of 3 pictures translated (AtoB) into new/out\n", "")
    assert below(Path("new/out")).keys() == {f"{Path(name).stem}.png" for name in sizes}
    assert below(Path("in")) == before
    for name, size in sizes.items():
        output = f"new/out/{Path(name).stem}.png"
        assert read(output).shape[:0:-1] == size
        if size != (1, 1):  # only one colour: the norms leave rounding errors
            assert_shows(output, by_hand(net, Path("in") / name))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_cannot_be_read_or_written_is_named_and_the_others_are_done(net, capsys, batch_size):
    good, bad = ("a.png", "d.png", "e.png"), ("cut.png", "head.png", "notes.jpg", "taken.png")
    for i, name in enumerate((*good, *bad)):
        save(noise(i, (24, 17)), Path("in") / name)
    Path("in/cut.png").write_bytes(Path("in/cut.png").read_bytes()[:-400])  # its size can be read
    Path("in/head.png").write_bytes(Path("in/head.png").read_bytes()[:20])
    Path("in/notes.jpg").write_text("milk, bread")
    Path("out/taken.png").mkdir(parents=True)
    assert run(f"--input in --output out --batch_size {batch_size}") == 1
    out, err = capsys.readouterr()
    assert out == "3 of 7 pictures translated (AtoB) into out\n"
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == [f"in/{name}" for name in bad]
    assert all(re.match(r"not translated: in/\w+\.\w+: \[?\w+ ", line) for line in err.splitlines())
    assert below(Path("out")).keys() == {*good, "taken.png"}
    for name in good:  # each its own, although a neighbour is missing
        assert_shows(f"out/{name}", by_hand(net, Path("in") / name))
    assert run("--input in/notes.jpg --output out") == 1
    out, err = capsys.readouterr()
    assert (
        out == "0 of 1 pictures translated (AtoB) into out\n" and "not translated: in/notes.jpg: cannot identify" in err
    )


def test_outputs_have_the_places_and_names_of_their_inputs_or_keep_the_endings_that_tell_them_apart(net):
    sources = {name: name for name in ("same.png", "one/same.png", "two/deep/same.png")}
    sources |= {"two/a.jpg.png": "two/a.jpg", "two/a.png.png": "two/a.png"}
    for i, source in enumerate(sources.values()):
        save(noise(i), Path("in") / source)
    assert run("--input in --output out --recursive --masks") == 0
    folders = {f"{name.removesuffix('.png')}_masks" for name in sources}
    written = [name for name in below(Path("out")) if Path(name).parent.name[-6:] != "_masks"]
    assert {*written} == {*sources, *folders, "one", "two", "two/deep", SHEET}
    for name, source in sources.items():
        assert_shows(f"out/{name}", by_hand(net, Path("in") / source))


def test_max_size_shrinks_what_is_larger(net):
    sizes = {(100, 40): (50, 20), (33, 99): (17, 50), (301, 1): (50, 1), (50, 50): (50, 50), (30, 20): (30, 20)}
    for i, size in enumerate(sizes):
        save(noise(i, size), Path(f"in/{i}.png"))
    assert run("--input in --output out --max_size 50") == 0
    for i, (size, shrunk) in enumerate(sizes.items()):
        assert read(f"out/{i}.png").shape[:0:-1] == shrunk
        image = noise(i, size) if shrunk == size else resize(noise(i, size), shrunk[::-1], "squash")
        assert_shows(f"out/{i}.png", by_hand(net, image))


class KeepsLeft(nn.Module):
    """A generator that keeps the left half of a picture and paints the right half white; it notes the shapes."""

    size_multiple, min_size, settings = 4, 8, {"channels": 3}

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((x.shape[-1], x.shape[-2]))
        kept = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).float().expand(len(x), 1, *x.shape[-2:])
        white = torch.ones_like(x)
        return Translation(x * kept + white * (1 - kept), torch.cat([1 - kept, kept], dim=1), white[:, None])


def stand_in(monkeypatch, generator, **about):
    """Every checkpoint holds this generator, from A to B."""
    monkeypatch.setattr(translate, "open_generator", lambda *_: (generator, {"direction": "AtoB", **about}))


@pytest.mark.parametrize(
    "flags, about, seen",
    [
        ("", {}, (256, 128)),  # what official files were trained at
        ("", {"options": {"img_height": 64, "img_width": 128}}, (128, 64)),
        ("", {"options": {"img_height": 64, "img_width": 64}, "best_size": 96}, (96, 48)),
        ("--size 72", {"best_size": 96}, (72, 36)),
        ("--size native", {"best_size": 96}, (400, 200)),
        ("--size 512", {}, (512, 256)),
        ("--size 72 --max_size 200", {}, (72, 36)),
    ],
)
def test_pictures_are_seen_at_a_size_and_brought_back_sharp(monkeypatch, capsys, flags, about, seen):
    generator, image = KeepsLeft(), noise(0, (400, 200))
    stand_in(monkeypatch, generator, **about)
    save(image, Path("in/a.png"))
    most = ", at most 200 pixels (--max_size)" if "max_size" in flags else ""
    told = f"the generator saw them at {seen[0]} pixels (--size); outputs have the size of their inputs{most}\n"
    said = printed(capsys, f"--input in --output out {flags}", native=False)
    assert said.endswith(told) == (seen != (400, 200))
    assert generator.seen == [seen]
    made, wanted = read("out/a.png"), tensor(image if "max_size" not in flags else resize(image, (100, 200), "squash"))
    assert made.shape == wanted.shape
    middle, border = wanted.shape[2] // 2, 3 * wanted.shape[2] // seen[0] + 2
    assert torch.equal(made[..., : middle - border], wanted[..., : middle - border])
    assert (made[..., middle + border :] == 255).all()


@pytest.mark.parametrize("ending, kind", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_translations_have_the_format_that_was_asked_for(monkeypatch, ending, kind):
    stand_in(monkeypatch, KeepsLeft())
    image = save(noise(0, (4, 4)).resize((64, 48), Image.Resampling.BICUBIC), Path("in/a.bmp"))
    assert run(f"--input in --output out --format {ending}") == 0
    expected = torch.cat([tensor(Image.open(image))[..., :32], torch.full((3, 48, 32), 255)], dim=2)
    with Image.open(f"out/a.{ending}") as made:
        assert made.format == kind
        assert (tensor(made) - expected).abs().mean() < (8 if ending != "png" else 0.01)


def test_transparency_is_kept_where_asked(net, capsys):
    clear, turned = noise(0, (40, 24)), Image.Exif()
    clear.putalpha(noise(1, (40, 24)).convert("L"))
    turned[274] = 6  # a quarter turn
    save(clear, Path("in/clear.png"), exif=turned)
    save(noise(2, (16, 16)), Path("in/plain.png"))
    assert run("--input in --output out --keep_alpha --max_size 20") == 0
    with Image.open("out/clear.png") as made, Image.open("out/plain.png") as plain:
        assert (made.mode, made.size, plain.mode) == ("RGBA", (12, 20), "RGB")
        alpha = clear.getchannel("A").transpose(Image.Transpose.ROTATE_270)
        assert torch.equal(tensor(made)[3:], tensor(resize(alpha, (20, 12), "squash")))
    message = "--keep_alpha: --format jpg has no transparency, expected png or webp"
    assert message in refused(capsys, "--input in --output out --keep_alpha --format jpg")


def test_a_transparent_picture_of_which_all_is_kept_keeps_its_colours():
    generator, picture = tiny(), noise(0, (24, 16))
    generator.attention_head[-1].bias.data[-1] = 1000  # the background mask holds all
    save_generators(AtoB=generator)
    picture.putalpha(noise(1, (24, 16)).convert("L"))
    save(picture, Path("clear.png"))
    assert run("--input clear.png --output out --keep_alpha") == 0
    with Image.open("out/clear.png") as made:
        seen = tensor(picture)[3] >= 64  # below, 8 bits of colour on white do not tell the colour
        assert 0 < seen.sum() < seen.numel()
        assert (tensor(made) - tensor(picture)).abs()[:, seen].max() <= 2


@pytest.mark.parametrize(
    "size, halves, flags, taken",
    [
        ((64, 32), True, "", "left"),
        ((64, 32), True, "--direction BtoA", "right"),
        ((64, 32), True, "--checkpoint net/BtoA.pt", "right"),
        ((64, 32), True, "--checkpoint net/BtoA.pt --direction BtoA", "right"),
        ((64, 32), True, "--half none", None),
        ((64, 32), False, "", None),
        ((64, 32), False, "--half right", "right"),
        ((40, 32), True, "", None),
    ],
)
def test_pictures_side_by_side_are_known_by_their_shape(size, halves, flags, taken, capsys):
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    trained = {"img_height": 32, "img_width": 32} if "BtoA.pt" not in flags else {}  # or what official files have
    save_generators(about={"halves": halves, "options": trained}, **generators)
    image = noise(0, size)
    save(image, Path("in/a.png"))
    told = f"1 of 1 pictures look like two side by side: translating the {taken} halves (--half none: all of each)"
    out = printed(capsys, f"--input in --output out --size native {flags}")
    assert (told in out) == (halves and taken is not None)
    left = 32 if taken == "right" else 0
    half = image if taken is None else image.crop((left, 0, left + 32, 32))
    assert_shows("out/a.png", by_hand(generators["BtoA" if "BtoA" in flags else "AtoB"], half))


def test_a_picture_too_narrow_to_be_halved_is_named(capsys):
    save_generators(AtoB=tiny(0))
    save(noise(0, (64, 32)), Path("in/a.png"))
    save(noise(0, (1, 1)), Path("in/dot.png"))
    assert run("--input in --output out --half left") == 1
    assert "in/dot.png: 1 pixel wide, too narrow to be halved" in capsys.readouterr().err and Path("out/a.png").exists()


def test_pictures_of_which_only_some_are_side_by_side_are_taken_whole(capsys):
    generator = tiny()
    save_generators(about={"halves": True, "options": {"img_height": 32, "img_width": 32}}, AtoB=generator)
    for i, size in enumerate([(64, 32), (64, 32), (32, 32)]):
        save(noise(i, size), Path(f"in/{i}.png"))
    told = "2 of 3 pictures look like two side by side: translating all of each (--half left or right: a half of each)"
    assert told in printed(capsys, "--input in --output out")
    assert_shows("out/0.png", by_hand(generator, noise(0, (64, 32))))


def test_a_sheet_and_an_overlay_show_where_it_paints(monkeypatch):
    stand_in(monkeypatch, KeepsLeft())
    for i in range(translate.SHOWN + 2):
        save(Image.new("RGB", (32, 32), (0, 0, 10 * i)), Path(f"in/{i:02d}.png"))
    assert run("--input in --output out --masks") == 0
    overlay = read("out/03_masks/overlay.png")
    assert (overlay.argmax(dim=0)[:, 17:] == 0).all() and (overlay.std(dim=0)[:, :15] == 0).all()  # orange, and grey
    with Image.open(f"out/{SHEET}") as sheet:
        assert sheet.height == translate.SHOWN * 226 + 2 + 18 and sheet.width > 3 * 226
        rows = [sheet.getpixel((sheet.width - 3 * 226 + 40, 20 + 226 * i + 100)) for i in range(translate.SHOWN)]
    assert [round(row[2] / 10) for row in rows] == list(range(translate.SHOWN))


def test_half_precision_changes_few_levels(net):
    save(noise(0, (64, 64)), Path("in/a.png"))
    assert run("--input in --output out") == 0
    assert run("--input in --output half --precision bf16") == 0
    error = (read("out/a.png") - read("half/a.png")).abs()
    assert 0 < error.mean() < 4


def test_two_processes_do_not_write_into_one_folder(net, monkeypatch, capsys):
    save(noise(0), Path("in/a.png"))
    monkeypatch.setattr(utils, "LOCK_SECONDS", 0)
    message = "out: another process works here; wait for its end, or choose another --output"
    with utils.lock_folder(Path("out")):
        assert message in refused(capsys, "--input in --output out")
    assert run("--input in --output out") == 0


# ----------------------------------------------------------------------------------------------------------
#  Which generator
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["translation", "colorization"])
@pytest.mark.parametrize("direction, other", [("AtoB", "BtoA"), ("BtoA", "AtoB")])
def test_a_run_of_one_direction_needs_no_other_and_takes_what_it_was_trained_on(capsys, direction, other, task):
    """Of colourisation the grey version of any picture; and sizes that are no multiples of the U-Net's."""
    generator, image = tiny(network=UNetGenerator, depth=4), noise(0, (37, 20))
    save_generators(about={"options": {"task": task}}, **{direction: generator})
    save(image, Path("a.png"))
    assert run("--input a.png --output out") == 0
    if task == "colorization" and direction == "AtoB":
        image = image.convert("L").convert("RGB")
    assert_shows("out/a.png", by_hand(generator, image, multiple=16))
    message = f"net: no generator for {other} found"
    assert message in refused(capsys, f"--input a.png --output out --direction {other}")


def test_official_files_translate_as_the_official_network():
    image, expected = noise(0, (24, 16)), {}
    save(image, Path("horse.png"))
    Path("official").mkdir()
    for letter, n_blocks in (("A", 2), ("B", 1)):
        weights = official_attention_weights(n_blocks=n_blocks)
        torch.save({k: v.float() for k, v in weights.items()}, f"official/latest_net_G_{letter}.pth")
        expected[letter] = official_attention_forward(tensor(image)[None] / 127.5 - 1, weights, n_blocks)[0]
    files = {"official/latest_net_G_A.pth": "A", "official/latest_net_G_B.pth": "B"}
    for where, letter in {**files, "official": "A", "official --direction BtoA": "B"}.items():
        assert run(f"--checkpoint {where} --input horse.png --output out") == 0
        assert_shows("out/horse.png", expected[letter])


# ----------------------------------------------------------------------------------------------------------
#  Masks
# ----------------------------------------------------------------------------------------------------------


def test_an_earlier_generators_masks_make_way():
    save(noise(0, (16, 16)), Path("in/a.png"))
    names = {"attention.png", "overlay.png", "mask_01.png", "mask_02.png", "content_01.png"}
    for n_masks, more in ((4, {"mask_03.png", "mask_04.png", "content_02.png", "content_03.png"}), (2, {"note.txt"})):
        save_generators(AtoB=tiny(n_masks=n_masks))
        assert run("--input in --output out --masks") == 0
        assert {path.name for path in Path("out/a_masks").iterdir()} == names | more
        Path("out/a_masks/note.txt").write_text("mine")


@pytest.mark.parametrize(
    "made_with, parts",
    [
        (dict(n_masks=4), {"attention": 1, "mask": 4, "content": 3}),
        (dict(n_masks=3, channels=1), {"attention": 1, "mask": 3, "content": 2}),
        (dict(n_masks=4, background=False), {"attention": 0, "mask": 4, "content": 4}),
        (dict(network=SingleMaskGenerator), {"attention": 1, "mask": 2, "content": 1}),
        (dict(network=UGATITGenerator), {"attention": 1, "mask": 0, "content": 0}),
    ],
)
def test_attention_masks_and_contents_are_those_of_each_picture(made_with, parts):
    generator = tiny(**made_with)
    save_generators(AtoB=generator)
    for i in range(2):  # in one batch, each with its own
        save(noise(i, (33, 21)), Path(f"in/{i}.png"))
    assert run("--input in --output out --masks") == 0
    assert {p.name for p in Path("out").iterdir()} == {"0.png", "0_masks", "1.png", "1_masks", SHEET}
    for i in range(2):
        picture, folder = Picture(Path(f"in/{i}.png")).open(generator.settings["channels"]), Path(f"out/{i}_masks")
        with torch.no_grad():
            made = translate_any_size(generator, (tensor(picture) / 127.5 - 1).float()[None])
        expected = {}
        if made.attention is not None:
            expected = {f"mask_{j:02d}.png": 2 * mask[None] - 1 for j, mask in enumerate(made.attention[0], 1)}
            expected |= {f"content_{j:02d}.png": content for j, content in enumerate(made.content[0], 1)}
        if parts["attention"]:
            foreground = made.heat_map if made.attention is None else 1 - made.attention[:, -1:]
            expected["attention.png"] = 2 * foreground[0] - 1
        assert {kind: sum(name.startswith(kind) for name in expected) for kind in parts} == parts
        assert {p.name for p in folder.iterdir()} == {*expected, *["overlay.png"] * parts["attention"]}
        for name, values in expected.items():
            assert_shows(folder / name, values)
        assert_shows(f"out/{i}.png", by_hand(generator, picture))


@torch.no_grad()
def test_the_full_u_gat_it_sees_every_picture_in_its_size(capsys):
    generator = tiny(network=UGATITGenerator, size=(16, 24))
    save_generators(AtoB=generator)
    sizes = [(24, 16), (48, 32), (16, 24)]
    for i, size in enumerate(sizes):
        save(noise(i, size), Path(f"in/{i}.png"))
    told = "the generator saw them at 16 x 24, its only size; outputs have the size of their inputs\n"
    out = printed(capsys, "--input in --output out --masks", native=False)
    assert out == "3 of 3 pictures translated (AtoB) into out\n" + told
    assert "--size: the full U-GAT-IT takes only" in refused(capsys, "--input in --output out --size 32")
    assert_shows("out/0.png", by_hand(generator, Path("in/0.png")))
    for i, size in enumerate(sizes[1:], 1):  # what it keeps is not known, so its whole answer is enlarged
        small = by_hand(generator, resize(noise(i, size), (16, 24), "squash"))[None]
        large = F.interpolate(small, size[::-1], mode="bicubic", antialias=True)[0]
        assert (read(f"out/{i}.png") - (large.clamp(-1, 1) + 1) * 127.5).abs().max() < 2


def test_generators_without_masks_are_refused(capsys):
    save_generators(AtoB=tiny(network=ResNetGenerator))
    save(noise(0), Path("in/horse.png"))
    message = "translate.py: error: --masks: net holds a ResNetGenerator, which has none\n"
    assert refused(capsys, "--input in --output out --masks") == message and not Path("out").exists()
    assert run("--input in --output out") == 0
    assert [p.name for p in Path("out").iterdir()] == ["horse.png"]


# ----------------------------------------------------------------------------------------------------------
#  No input is overwritten
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--input top/in --output top/in", "--output top/in: holds the --input"),
        ("--input top/in --output top", "--output top: holds the --input"),
        ("--input top/same --output top/in", "--output top/in: holds the --input"),
        ("--input top/in --output top/out", "--output top/out: top/out/a.png is an input"),
        ("--input top/in --output top/hard", "--output top/hard: top/hard/a.png is an input"),
        ("--input top/in/a.png --output top/in", "--output top/in: top/in/a.png exists already"),
        ("--input top/in/a.png --output top/same", "--output top/same: top/same/a.png exists already"),
        ("--input top/in/a.png --output top/out", "--output top/out: top/out/a.png is an input"),
    ],
)
def test_inputs_are_not_overwritten(net, capsys, arguments, message):
    save(noise(0), Path("top/in/a.png"))
    save(noise(1), Path("top/in/sub/b.png"))
    Path("top/same").symlink_to("in")
    Path("top/out").mkdir()
    Path("top/out/a.png").symlink_to("../in/a.png")
    Path("top/hard").mkdir()
    os.link("top/in/a.png", "top/hard/a.png")
    before = below(Path("top"))
    for masks in ("", " --masks"):
        assert message in refused(capsys, arguments + masks)
        assert below(Path("top")) == before


def test_a_single_picture_is_translated_beside_itself_where_that_overwrites_nothing(net, capsys):
    source = save(noise(0), Path("in/a.jpg"))
    content = source.read_bytes()
    assert run("--input in/a.jpg --output in") == 0
    assert below(Path("in")).keys() == {"a.jpg", "a.png"} and source.read_bytes() == content
    assert_shows("in/a.png", by_hand(net, source))
    save(noise(1), Path("in/a_masks/attention.png"))
    before = below(Path("in"))
    message = "translate.py: error: --output in: in/a.png exists already, expected a folder of its own\n"
    assert refused(capsys, "--input in/a.jpg --output in") == message and below(Path("in")) == before
    Path("in/a.png").unlink()
    del before["a.png"]
    assert "--output in: in/a_masks exists already" in refused(capsys, "--input in/a.jpg --output in --masks")
    assert below(Path("in")) == before


def test_elsewhere_an_earlier_translation_gives_way(net):
    for source in (save(noise(0), Path("in/a.jpg")), save(noise(1), Path("in/a.png"))):
        assert run(f"--input {source} --output out --masks") == 0
        assert_shows("out/a.png", by_hand(net, source))
    assert {p.name for p in Path("out").iterdir()} == {"a.png", "a_masks"}  # one picture needs no sheet


def test_no_two_outputs_are_one_file_even_where_letter_case_is_nothing():
    def names(*sources):
        return list(map(str, name_outputs([Picture(Path("in") / s) for s in sources], Path("in"), Path("out"), False)))

    assert names("A.jpg", "a.png", "b.png") == ["out/A.jpg.png", "out/a.png.png", "out/b.png"]
    assert names("One/a.jpg", "one/A.png") == ["out/One/a.jpg.png", "out/one/A.png.png"]
    for alike in ("a.png A.png", "One/a.png one/a.png", "a.jpg A.JPG", "a.jpg a.webp a.jpg.bmp"):
        expected = f"^--input in: two pictures would be written to out/{alike.split()[0]}.*; rename one$"
        with pytest.raises(InputError, match=expected):
            names(*alike.split())


@pytest.mark.parametrize("flag, outputs", [("", ["out/a.png"]), (" --recursive", ["out/a.png", "out/sub/b.png"])])
def test_an_output_inside_the_input_is_no_input_and_not_overwritten(net, capsys, flag, outputs):
    save(noise(0), Path("in/a.png"))
    save(noise(1), Path("in/sub/b.png"))
    n, command = len(outputs), f"--input in --output in/out{flag}"
    assert printed(capsys, command) == f"{n} of {n} pictures translated (AtoB) into in/out\n"
    after = below(Path("in"))
    assert [name for name, content in after.items() if content and name.startswith("out/")] == outputs
    message = "in/out: lies in --input in and holds pictures (in/out/a.png), which --recursive would translate and over"
    assert run(command) == (2 if flag else 0)
    assert (message in capsys.readouterr().err) == bool(flag) and below(Path("in")) == after


# ----------------------------------------------------------------------------------------------------------
#  Batches and memory
# ----------------------------------------------------------------------------------------------------------


def tasks_of(*sizes) -> list[Task]:
    return [Task(Picture(Path(f"{i}.jpg")), size, size, Path(f"{i}.png")) for i, size in enumerate(sizes)]


def test_batches_have_one_size_and_the_largest_come_last():
    tasks = tasks_of((8, 16), (32, 32), (16, 8), (8, 16), (8, 16), (32, 32), (4, 4), (1, 200))
    batches = make_batches(tasks, batch_size=2)
    assert [[tasks.index(task) for task in batch] for batch in batches] == [[6], [0, 3], [4], [2], [7], [1, 5]]


@pytest.mark.parametrize(
    "size, batch_size, lengths",
    [
        ((256, 256), 8, [8, 1]),
        ((512, 512), 8, [4, 4, 1]),
        ((512, 512), 3, [3, 3, 3]),
        ((512, 513), 8, [3, 3, 3]),
        ((1024, 1024), 8, [1] * 9),
        ((3000, 4000), 8, [1] * 9),
    ],
)
def test_a_batch_has_no_more_than_a_million_pixels(size, batch_size, lengths):
    tasks = tasks_of(*[size] * 9)
    batches = make_batches(tasks, batch_size)
    assert [len(batch) for batch in batches] == lengths
    assert [task for batch in batches for task in batch] == tasks


def test_a_batch_of_photographs_is_small_however_small_the_generator_sees_them():
    tasks = [task._replace(output_size=(3000, 4000)) for task in tasks_of(*[(64, 64)] * 5)]
    assert [len(batch) for batch in make_batches(tasks, 8)] == [2, 2, 1]


def test_what_a_format_cannot_hold_or_memory_while_writing_is_named_and_the_others_are_done(monkeypatch, capsys):
    stand_in(monkeypatch, KeepsLeft())
    save(noise(0, (17000, 8)), Path("in/wide.png"))
    save(noise(1, (40, 32)), Path("in/large.png"))
    save(noise(2, (16, 16)), Path("in/small.png"))

    def write(task, *others):
        if task.picture.path.name == "large.png":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(task, *others)

    original = translate.write
    monkeypatch.setattr(translate, "write", write)
    assert run("--input in --output out --format webp --size 16") == 1
    err = capsys.readouterr().err
    assert "in/wide.png: webp has at most 16383 pixels a side, expected --max_size 16383" in err
    assert "in/large.png: out of memory while writing 32 x 40 pixels; --max_size shrinks" in err
    assert below(Path("out")).keys() == {"small.webp"}


def test_a_picture_has_not_the_name_of_the_sheet(net, capsys):
    save(noise(0), Path("in/Before_After.png"))
    assert "is the sheet's, expected another name" in refused(capsys, "--input in --output out --format jpg --masks")
    assert run("--input in --output out --format jpg") == run("--input in --output out --masks") == 0


def limit_memory(monkeypatch, generator, most, error):
    """A generator that runs out of memory above ``most`` pixels at once; returns the shapes that it is given."""
    seen, forward = [], generator.forward

    def limited(x):
        seen.append((len(x), *x.shape[2:]))
        if x[:, 0].numel() > most:
            raise error
        return forward(x)

    monkeypatch.setattr(generator, "forward", limited)
    stand_in(monkeypatch, generator)
    return seen


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_does_not_fit_in_memory_is_tried_singly_and_named(net, monkeypatch, capsys, error):
    save(noise(0, (40, 32)), Path("in/0.png"))
    small = [save(noise(i, (16, 16)), Path(f"in/{i}.png")) for i in (1, 2, 3)]
    seen = limit_memory(monkeypatch, net, 300, error)
    assert run("--input in --output out --batch_size 2") == 1
    assert seen == [(2, 16, 16), (1, 16, 16), (1, 16, 16), (1, 16, 16), (1, 32, 40)]
    out, err = capsys.readouterr()
    assert out == "3 of 4 pictures translated (AtoB) into out\n"
    assert err == "not translated: in/0.png: out of memory at 40 x 32 pixels; --size or --max_size shrink\n"
    assert below(Path("out")).keys() == {path.name for path in small}
    for path in small:
        assert_shows(f"out/{path.name}", by_hand(net, path))
    assert run("--input in --output out --max_size 16") == 0
    assert read("out/0.png").shape == (3, 13, 16)


def test_sub_folders_are_not_opened_without_recursive(net, monkeypatch, capsys):
    """A folder that may not be read, such as a disk's lost+found, is no error then."""
    for place in ("in/a.png", "in/lost+found/b.png"):
        save(noise(0), Path(place))
    scandir = os.scandir

    def refuse(path):
        if "lost+found" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert printed(capsys, "--input in --output out") == "1 of 1 pictures translated (AtoB) into out\n"
    assert "Permission denied: 'in/lost+found'" in refused(capsys, "--input in --output out2 --recursive")


def test_a_full_disk_is_named(net, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Pillow's has no name

    save(noise(0), Path("in/a.png"))
    monkeypatch.setattr(Image.Image, "save", fail)
    expected = "translate.py: error: out/a.png: could not be written ([Errno 28] No space left on device)\n"
    assert refused(capsys, "--input in --output out").endswith(expected)


def test_other_errors_of_the_generator_are_not_hidden(net, monkeypatch):
    save(noise(0), Path("in/a.png"))
    limit_memory(monkeypatch, net, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("--input in --output out")


# ----------------------------------------------------------------------------------------------------------
#  Options
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--output out", "expected --input and --output, or --export"),
        ("--input in", "expected --input and --output, or --export"),
        ("--export m.onnx --input in", "--export writes a model, --input is for translating"),
        ("--export m.onnx --output out", "--export writes a model, --output is for translating"),
        ("--export m.onnx --device cpu", "--export writes a model, --device is for translating"),
        ("--export m.onnx --batch_size 8", "--export writes a model, --batch_size is for translating"),
        ("--export m.onnx --precision bf16", "--export writes a model, --precision is for translating"),
        ("--export m.onnx --size native", "--export writes a model, --size is for translating"),
        ("--export m.pt", "--export m.pt: expected a name ending in .onnx, in a folder that exists"),
        ("--export nowhere/m.onnx", "--export nowhere/m.onnx: expected a name ending in .onnx, in a folder that"),
        ("--input in --output out --batch_size 0", "--batch_size: expected at least 1, found 0"),
        ("--input in --output out --max_size 0", "--max_size: expected at least 1, found 0"),
        ("--input in --output notes.txt", "--output notes.txt: is a file, expected a folder"),
        ("--input in --output out --device quantum", "--device quantum: not usable here"),
        ("--input in --output out --checkpoint nowhere", "nowhere: no generator for AtoB or BtoA found"),
        ("--input in --output out --checkpoint net/AtoB.pt --direction BtoA", "translates AtoB, expected BtoA"),
        ("--input nowhere --output out", "--input nowhere: no such file or folder"),
        ("--input empty --output out", "--input empty: no pictures in it\n"),
        ("--input empty --output out --recursive", "--input empty: no pictures in it\n"),
        ("--input outer --output out", "no pictures in it; --recursive looks in its sub-folders, too\n"),
    ],
)
def test_what_does_not_fit_is_named(net, capsys, arguments, message):
    for name in ("in/a.png", "outer/inner/a.png"):
        save(noise(0), Path(name))
    Path("empty").mkdir()
    Path("notes.txt").write_text("milk, bread")
    before = below(Path())
    err = refused(capsys, arguments)
    assert err.startswith("translate.py: error: ") and message in err
    assert below(Path()) == before


def test_help_shows_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = " ".join(translate.make_parser().format_help().split())
    assert "fewer of large ones (default: 8)" in shown and "cpu, or auto (default: auto)" in shown
    assert shown.count("(default: ") == 7  # None and False say nothing


def test_a_checkpoint_is_asked_for(capsys):
    assert translate.main(["--input", "in", "--output", "out"]) == 2
    assert "the following arguments are required: --checkpoint" in capsys.readouterr().err


@pytest.fixture
def export(capsys):
    """Writes model.onnx and opens it; returns what was said of it, too."""
    onnxruntime = pytest.importorskip("onnxruntime")  # not yet there for the newest Python
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1

    def export():
        out = printed(capsys, "--export model.onnx")
        return onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"]), out

    return export


# ----------------------------------------------------------------------------------------------------------
#  ONNX
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made_with, names",
    [
        (dict(n_masks=3), ["translation", "attention"]),
        (dict(n_masks=3, background=False), ["translation"]),
        (dict(network=SingleMaskGenerator), ["translation", "attention"]),
        (dict(network=UGATITGenerator), ["translation", "attention"]),
        (dict(network=UGATITGenerator, size=(16, 24)), ["translation", "attention"]),
        (dict(network=UNetGenerator), ["translation"]),
    ],
)
def test_onnx_computes_the_same_at_any_size_that_the_generator_takes(export, made_with, names):
    generator, only_size = tiny(**made_with), made_with.get("size")
    save_generators(AtoB=generator)
    session, out = export()
    sizes = "pictures of 16 x 24" if only_size else "height and width"
    assert out == f"model.onnx: image to translation, values in [0, 1], any batch, {sizes}\n"
    assert {p.name for p in Path().iterdir()} == {"net", "model.onnx"}  # the weights are in it
    (image,) = session.get_inputs()
    assert (image.name, image.shape) == ("image", ["batch", 3, *(only_size or ("height", "width"))])
    assert [o.name for o in session.get_outputs()] == names
    for n, *size in [(3, *only_size)] if only_size else [(1, 32, 48), (3, 33, 50), (2, 5, 300)]:
        images = torch.rand(n, 3, *size)
        with torch.no_grad():
            translation, expected = translate_any_size(generator, 2 * images - 1), OnUnitRange(generator)(images)
        same(list(expected), [(translation.image + 1) / 2, translation.foreground][: len(names)])
        for found, part in zip(session.run(None, {"image": images.numpy()}), expected, strict=True):
            assert found.shape == part.shape and list(found.shape[2:]) == size
            assert found.min() >= -1e-5 and found.max() <= 1 + 1e-5 and found.std() > 0.02
            assert np.abs(found - part.numpy()).max() < 1e-4


def test_onnx_of_colourisation_makes_its_own_grey(export):
    generator, image = tiny(network=ResNetGenerator), noise(0, (50, 33))
    save_generators(about={"options": {"task": "colorization"}}, AtoB=generator)
    source = save(image, Path("a.png"))
    assert run("--input a.png --output out") == 0
    session, _ = export()
    assert [o.name for o in session.get_outputs()] == ["translation"]
    (found,) = session.run(None, {"image": (tensor(image)[None] / 255).float().numpy()})
    with torch.no_grad():
        grey = to_tensor(Picture(source, grey=True).open())[None]
        expected = (translate_any_size(generator, normalise(grey)).image + 1) / 2
    assert found.shape == (1, 3, 33, 50) and np.abs(found - expected.numpy()).max() < 1e-4
    assert (read("out/a.png") - 255 * torch.from_numpy(found[0])).abs().max() < 0.53


def test_the_export_makes_no_grey_where_the_generator_wants_colours(monkeypatch):
    made = []
    monkeypatch.setattr(translate, "export", lambda generator, path, grey: made.append((path.name, grey)))
    save_generators(about={"options": {"task": "colorization"}}, BtoA=tiny())
    assert run("--export model.onnx") == 0 and made == [("model.onnx", False)]


def test_luminance_is_pillows():
    levels = torch.cartesian_prod(*(torch.arange(0, 256, 3),) * 3).to(torch.uint8)  # 636,056 colours
    image = levels.T.reshape(3, 1, -1)
    expected = to_tensor(to_pil_image(image).convert("L"))
    assert torch.equal((255 * luminance(image[None] / 255)).round().to(torch.uint8), expected.expand(1, 3, -1, -1))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_its_packages_the_export_says_how_to_get_them(net, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    err = refused(capsys, "--export model.onnx")
    assert f"--export needs {package}" in err and "pip install -r requirements-extras.txt" in err
    assert re.search(rf"^{package}\b", (ROOT / "requirements-extras.txt").read_text(), re.MULTILINE)
    assert not Path("model.onnx").exists()


def test_a_killed_translation_leaves_no_half_picture():
    """A kill in the middle of writing is a file that stops short and a process that does not clean up."""
    image = Image.new("RGB", (4, 4))

    def save_half():
        Image.Image.save = lambda image, path, **_: Path(path).write_bytes(b"half") and os._exit(9)
        translate.save(image, Path("out.png"))

    process = multiprocessing.get_context("fork").Process(target=save_half)
    process.start()
    process.join()
    assert process.exitcode == 9 and not Path("out.png").exists()
    translate.save(image, Path("out.png"))
    with Image.open("out.png") as written:
        assert written.size == (4, 4)
