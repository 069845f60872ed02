"""Pictures of any kind and size from files to files, and the export to ONNX."""

import utils
from utils import InputError

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import below, noise, official_attention_forward, official_attention_weights, save
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import translate
from checkpoints import pack_generator
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


def tiny(seed=0, network=AttentionGenerator, **settings):
    """A small generator with larger weights than at the start, where all masks are equal."""
    torch.manual_seed(seed)
    depth = {"depth": 6} if network is UNetGenerator else {"n_residual_blocks": 1}  # smaller U-Nets have no dropout
    generator = network(ngf=4, **depth, **settings).eval()
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return generator


def store(folder="net", more=None, **generators):
    """``folder/<direction>.pt`` for each, as train.py writes them, with ``more`` entries."""
    Path(folder).mkdir()
    for direction, generator in generators.items():
        about = {"direction": direction, **(more or {})}
        torch.save({**pack_generator(generator), **about}, f"{folder}/{direction}.pt")


@pytest.fixture
def net():
    """The generator that "net" holds for AtoB."""
    generator = tiny()
    store(AtoB=generator)
    return generator


@pytest.fixture
def onnxruntime():
    """Not yet there for the newest Python."""
    return pytest.importorskip("onnxruntime")


def run(command: str) -> int:
    return translate.main(["--checkpoint", "net", "--device", "cpu", "--precision", "float32", *command.split()])


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
def by_hand(generator, source):
    """The translation of a picture or file, (channels, H, W) in [-1, 1]."""
    image = Picture(source).open(generator.settings["channels"]) if isinstance(source, Path) else source
    height, width = image.height, image.width
    x = (tensor(image) / 127.5 - 1).float()[None]
    fitting = repeat_edges(x, max(8, -(-height // 4) * 4), max(8, -(-width // 4) * 4))
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
    generator = tiny(network=network)
    images = torch.rand(2, 3, *size) * 2 - 1
    translation, whole = translate_any_size(generator, images), generator(repeat_edges(images, *fitting))
    assert translation.image.shape == images.shape
    assert (translation.attention is None) == (network is not AttentionGenerator)
    for part, expected in zip(translation, whole, strict=True):
        assert (part is None) == (expected is None)
        if part is not None and part.ndim > 2:
            assert part.shape[-2:] == size
            assert torch.equal(part, expected[..., : size[0], : size[1]])
        elif part is not None:  # logits
            assert torch.equal(part, expected)


# ----------------------------------------------------------------------------------------------------------
#  From files to files
# ----------------------------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_keep_their_upright_size(net, capsys):
    folder, turned = Path("in"), Image.Exif()
    turned[274] = 6  # a quarter turn
    clear = noise(0, (11, 9))
    clear.putalpha(noise(1, (11, 9)).convert("L"))
    deep = np.random.default_rng(0).integers(0, 65536, (10, 18), dtype=np.uint16)
    save(noise(2, (1, 1)), folder / "one pixel.png")
    save(noise(3, (500, 8)), folder / "long.bmp")
    save(noise(4, (20, 16)).convert("CMYK"), folder / "ink.jpg")
    save(Image.fromarray(deep), folder / "deep.png")
    save(clear, folder / "clear.png")
    save(noise(5, (32, 16)), folder / "turned.jpg", exif=turned)
    save(noise(6, (13, 12)), folder / "Zèbre no. 2 斑馬.WEBP")
    save(noise(7), folder / "sub" / "deeper.png")
    sizes = {
        "one pixel": (1, 1),
        "long": (500, 8),
        "ink": (20, 16),
        "deep": (18, 10),
        "clear": (11, 9),
        "turned": (16, 32),
        "Zèbre no. 2 斑馬": (13, 12),
    }
    before = below(folder)
    assert run("--input in --output new/out --size native") == 0
    assert capsys.readouterr() == ("7 of 7 pictures translated into new/out\n", "")
    assert below(Path("new/out")).keys() == {f"{name}.png" for name in sizes}
    assert below(folder) == before
    for source in (path for path in folder.iterdir() if path.is_file()):
        output = f"new/out/{source.stem}.png"
        assert read(output).shape[:0:-1] == sizes[source.stem]
        if source.stem != "one pixel":  # only one colour: the norms leave rounding errors
            assert_shows(output, by_hand(net, source))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_cannot_be_read_is_named_and_the_others_are_done(net, capsys, batch_size):
    for i, name in enumerate(("a.png", "cut.png", "d.png", "e.png", "head.png")):
        save(noise(i, (24, 17)), Path("in") / name)
    Path("in/cut.png").write_bytes(Path("in/cut.png").read_bytes()[:-400])  # its size can be read
    Path("in/head.png").write_bytes(Path("in/head.png").read_bytes()[:20])
    Path("in/notes.jpg").write_text("milk, bread")
    assert run(f"--input in --output out --batch_size {batch_size}") == 1
    out, err = capsys.readouterr()
    assert out == "3 of 6 pictures translated into out\n"
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == ["in/cut.png", "in/head.png", "in/notes.jpg"]
    assert all(re.match(r"not translated: in/\w+\.\w+: \w+ ", line) for line in err.splitlines())
    assert below(Path("out")).keys() == {"a.png", "d.png", "e.png"}
    for name in ("a.png", "d.png", "e.png"):  # each its own, although a neighbour is missing
        assert_shows(f"out/{name}", by_hand(net, Path("in") / name))


def test_a_single_picture_that_cannot_be_read(net, capsys):
    Path("notes.jpg").write_text("milk, bread")
    assert run("--input notes.jpg --output out") == 1
    out, err = capsys.readouterr()
    assert out == "0 of 1 pictures translated into out\n" and "not translated: notes.jpg: cannot identify" in err


def test_sub_folders_are_the_same_in_the_output(net):
    names = ("same.png", "one/same.png", "two/deep/same.png")
    for i, name in enumerate(names):
        save(noise(i), Path("in") / name)
    assert run("--input in --output out --recursive") == 0
    assert {name for name, content in below(Path("out")).items() if content} == set(names)
    for name in names:
        assert_shows(f"out/{name}", by_hand(net, Path("in") / name))


def test_pictures_that_differ_in_their_ending_keep_it(net):
    for i, name in enumerate(("a.jpg", "a.png", "b.png")):
        save(noise(i), Path("in") / name)
    assert run("--input in --output out --masks") == 0
    written = {"a.jpg.png": "a.jpg", "a.png.png": "a.png", "b.png": "b.png"}
    assert {p.name for p in Path("out").iterdir()} == {*written, "a.jpg_masks", "a.png_masks", "b_masks", SHEET}
    for output, source in written.items():
        assert_shows(f"out/{output}", by_hand(net, Path("in") / source))


def test_grey_generators_write_grey_pictures():
    generator = tiny(channels=1, n_masks=3)
    store(AtoB=generator)
    save(noise(0, (21, 13)), Path("horse.png"))
    assert run("--input horse.png --output out --masks") == 0
    assert_shows("out/horse.png", by_hand(generator, Path("horse.png")))
    assert read("out/horse_masks/content_02.png").shape == (1, 13, 21)


def test_max_size_shrinks_what_is_larger(net):
    sizes = {
        "wide": ((100, 40), (50, 20)),
        "high": ((33, 99), (17, 50)),
        "thin": ((301, 1), (50, 1)),
        "equal": ((50, 50), (50, 50)),
        "small": ((30, 20), (30, 20)),
    }
    for i, (name, (size, _)) in enumerate(sizes.items()):
        save(noise(i, size), Path("in") / f"{name}.png")
    assert run("--input in --output out --max_size 50") == 0
    for i, (name, (size, shrunk)) in enumerate(sizes.items()):
        assert read(f"out/{name}.png").shape[:0:-1] == shrunk
        image = noise(i, size) if shrunk == size else resize(noise(i, size), shrunk[::-1], "squash")
        assert_shows(f"out/{name}.png", by_hand(net, image))


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


@pytest.mark.parametrize(
    "flags, about, seen",
    [
        ("", {}, (256, 128)),  # what official files were trained at
        ("", {"options": {"img_height": 64, "img_width": 128}}, (128, 64)),
        ("", {"options": {"img_height": 64, "img_width": 64}, "best_size": 96}, (96, 48)),
        ("--size 72", {"best_size": 96}, (72, 36)),
        ("--size native", {"best_size": 96}, (400, 200)),
        ("--size 512", {}, (400, 200)),  # nothing is enlarged
        ("--size 72 --max_size 200", {}, (72, 36)),
    ],
)
def test_larger_pictures_are_seen_at_a_size_and_brought_back_sharp(monkeypatch, capsys, flags, about, seen):
    generator = KeepsLeft()
    monkeypatch.setattr(translate, "open_generator", lambda *_: (generator, {"direction": "AtoB", **about}))
    image = noise(0, (400, 200))
    save(image, Path("in/a.png"))
    assert run(f"--input in --output out {flags}") == 0
    assert generator.seen == [seen]
    told = f"the generator saw larger ones at {seen[0]} pixels (--size); outputs have the size of their inputs\n"
    assert capsys.readouterr().out.endswith(told) == (seen != (400, 200))
    made, wanted = read("out/a.png"), tensor(image if "max_size" not in flags else resize(image, (100, 200), "squash"))
    assert made.shape == wanted.shape
    middle, border = wanted.shape[2] // 2, 3 * wanted.shape[2] // seen[0] + 2
    assert torch.equal(made[..., : middle - border], wanted[..., : middle - border])
    assert (made[..., middle + border :] == 255).all()


@pytest.mark.parametrize("ending, kind", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_translations_have_the_format_that_was_asked_for(monkeypatch, ending, kind):
    monkeypatch.setattr(translate, "open_generator", lambda *_: (KeepsLeft(), {"direction": "AtoB"}))
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
    assert run("--input in --output out --keep_alpha --format jpg") == 2
    assert "--keep_alpha: --format jpg has no transparency, expected png or webp" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size, halves, flags, taken",
    [
        ((64, 32), True, "", "left"),
        ((64, 32), True, "--direction BtoA", "right"),
        ((64, 32), True, "--half none", None),
        ((64, 32), False, "", None),
        ((64, 32), False, "--half right", "right"),
        ((40, 32), True, "", None),
    ],
)
def test_pictures_side_by_side_are_known_by_their_shape(size, halves, flags, taken, capsys):
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    store(more={"halves": halves, "options": {"img_height": 32, "img_width": 32}}, **generators)
    image = noise(0, size)
    save(image, Path("in/a.png"))
    assert run(f"--input in --output out --size native {flags}") == 0
    told = f"1 pictures side by side: translating the {taken} halves (--half none: all of each)"
    assert (told in capsys.readouterr().out) == (halves and taken is not None)
    left = 32 if taken == "right" else 0
    half = image if taken is None else image.crop((left, 0, left + 32, 32))
    assert_shows("out/a.png", by_hand(generators["BtoA" if "BtoA" in flags else "AtoB"], half))


def test_a_sheet_and_an_overlay_show_where_it_paints(monkeypatch):
    monkeypatch.setattr(translate, "open_generator", lambda *_: (KeepsLeft(), {"direction": "AtoB"}))
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
    with utils.lock_folder(Path("out")):
        assert run("--input in --output out") == 2
    assert "out: another process works here; wait for its end, or choose another --output" in capsys.readouterr().err
    assert run("--input in --output out") == 0


# ----------------------------------------------------------------------------------------------------------
#  Which generator
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, direction",
    [
        ("--checkpoint net", "AtoB"),
        ("--checkpoint net --direction BtoA", "BtoA"),
        ("--checkpoint net/BtoA.pt", "BtoA"),
        ("--checkpoint net/BtoA.pt --direction BtoA", "BtoA"),
    ],
)
def test_each_direction_has_its_weights(arguments, direction):
    generators = {"AtoB": tiny(0), "BtoA": tiny(1)}
    store(**generators)
    source = save(noise(0), Path("horse.png"))
    assert run(f"{arguments} --input horse.png --output out") == 0
    assert_shows("out/horse.png", by_hand(generators[direction], source))


@pytest.mark.parametrize("task", ["translation", "colorization"])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_a_run_of_one_direction_needs_no_other_and_takes_what_it_was_trained_on(direction, task):
    """Of colourisation the grey version of any picture; and sizes that are no multiples of the U-Net's."""
    torch.manual_seed(0)
    generator = UNetGenerator(ngf=4, depth=4).eval()
    store(more={"options": {"task": task}}, **{direction: generator})
    image = noise(0, (37, 20))
    save(image, Path("a.png"))
    assert run("--input a.png --output out") == 0
    if task == "colorization" and direction == "AtoB":
        image = image.convert("L").convert("RGB")
    x = (tensor(image) / 127.5 - 1).float()[None]
    with torch.no_grad():
        expected = generator(repeat_edges(x, 32, 48)).image[0, :, :20, :37]
    found = read("out/a.png")
    assert found.shape == (3, 20, 37) and (found - (expected + 1) * 127.5).abs().max() < 0.51
    assert run(f"--input a.png --output out --direction {'BtoA' if direction == 'AtoB' else 'AtoB'}") == 2


@pytest.mark.parametrize(
    "arguments, n_blocks",
    [
        ("--checkpoint official", 2),
        ("--checkpoint official --direction BtoA", 1),
        ("--checkpoint official/latest_net_G_A.pth", 2),
        ("--checkpoint official/latest_net_G_B.pth", 1),
    ],
)
def test_official_files_translate_as_the_official_network(arguments, n_blocks):
    Path("official").mkdir()
    weights = {n: official_attention_weights(n_blocks=n) for n in (1, 2)}
    for n, name in ((2, "latest_net_G_A.pth"), (1, "latest_net_G_B.pth")):
        torch.save({k: v.float() for k, v in weights[n].items()}, f"official/{name}")
    save(noise(0, (24, 16)), Path("horse.png"))
    assert run(f"{arguments} --input horse.png --output out") == 0
    x = tensor(noise(0, (24, 16)))[None] / 127.5 - 1
    assert_shows("out/horse.png", official_attention_forward(x, weights[n_blocks], n_blocks)[0])


# ----------------------------------------------------------------------------------------------------------
#  Masks
# ----------------------------------------------------------------------------------------------------------


def test_an_earlier_generators_masks_make_way(net):
    save(noise(0, (16, 16)), Path("in/a.png"))
    assert run("--input in --output out --masks") == 0
    assert len(list(Path("out/a_masks").iterdir())) > 5
    Path("out/a_masks/note.txt").write_text("mine")
    store("small", AtoB=tiny(n_masks=2))
    arguments = "--checkpoint small --device cpu --input in --output out --masks"
    assert translate.main(arguments.split()) == 0
    names = {path.name for path in Path("out/a_masks").iterdir()}
    assert names == {"attention.png", "overlay.png", "mask_01.png", "mask_02.png", "content_01.png", "note.txt"}


@pytest.mark.parametrize(
    "made_with, n, background",
    [
        (dict(n_masks=4), 4, True),
        (dict(n_masks=4, background=False), 4, False),
        (dict(network=SingleMaskGenerator), 2, True),
    ],
)
def test_masks_and_contents_make_the_picture(made_with, n, background):
    generator = tiny(**made_with)
    store(AtoB=generator)
    image = noise(0, (33, 21))
    save(image, Path("in/horse.png"))
    assert run("--input in --output out --masks") == 0
    assert {p.name for p in Path("out").iterdir()} == {"horse.png", "horse_masks", SHEET}
    parts = {path.name: read(path) for path in Path("out/horse_masks").iterdir()}
    contents = range(1, n if background else n + 1)
    names = {f"mask_{i:02d}.png" for i in range(1, n + 1)} | {f"content_{i:02d}.png" for i in contents}
    assert parts.keys() == names | ({"attention.png", "overlay.png"} if background else set())

    masks = torch.cat([parts[f"mask_{i:02d}.png"] for i in range(1, n + 1)])
    assert masks.shape == (n, 21, 33)
    assert all(mask.std() > 5 for mask in masks)  # else there is little to be seen
    assert (masks.sum(dim=0) - 255).abs().max() <= n / 2
    if background:
        assert torch.equal(parts["attention.png"][0], 255 - masks[-1])
    with torch.no_grad():
        attention = translate_any_size(generator, (tensor(image) / 127.5 - 1).float()[None]).attention[0]
    assert (masks - 255 * attention).abs().max() < 0.51

    made = tensor(image) * masks[-1] / 255 if background else torch.zeros(3, 21, 33, dtype=torch.float64)
    for i in contents:
        assert parts[f"content_{i:02d}.png"].shape == (3, 21, 33)
        made = made + parts[f"content_{i:02d}.png"] * masks[i - 1] / 255
    # Half a level for every mask, for the contents and for the picture.
    error = (made - read("out/horse.png")).abs()
    assert error.max() <= n / 2 + 1 and error.mean() < 0.5


def test_u_gat_its_heat_map_is_its_attention():
    generator = tiny(network=UGATITGenerator)
    store(AtoB=generator)
    for i in range(2):  # in one batch, each with its own
        save(noise(i, (33, 21)), Path(f"in/{i}.png"))
    assert run("--input in --output out --masks") == 0
    assert {p.name for p in Path("out").iterdir()} == {"0.png", "0_masks", "1.png", "1_masks", SHEET}
    for i in range(2):
        assert_shows(f"out/{i}.png", by_hand(generator, Path(f"in/{i}.png")))
        assert {p.name for p in Path(f"out/{i}_masks").iterdir()} == {"attention.png", "overlay.png"}
        with torch.no_grad():
            t = translate_any_size(generator, (tensor(noise(i, (33, 21))) / 127.5 - 1).float()[None])
        assert_shows(f"out/{i}_masks/attention.png", 2 * t.heat_map[0] - 1)


@torch.no_grad()
def test_the_full_u_gat_it_sees_every_picture_in_its_size(capsys):
    generator = tiny(network=UGATITGenerator, size=(16, 24))
    store(AtoB=generator)
    for i, size in enumerate([(24, 16), (48, 32), (16, 24)]):
        save(noise(i, size), Path(f"in/{i}.png"))
    assert run("--input in --output out --masks") == 0
    told = "the generator saw larger ones at 16 x 24, its only size; outputs have the size of their inputs\n"
    assert capsys.readouterr().out == "3 of 3 pictures translated into out\n" + told
    assert_shows("out/0.png", by_hand(generator, Path("in/0.png")))
    for i, size in ((1, (48, 32)), (2, (16, 24))):  # what it keeps is not known, so its whole answer is enlarged
        small = by_hand(generator, resize(noise(i, size), (16, 24), "squash"))[None]
        large = F.interpolate(small, size[::-1], mode="bicubic", antialias=True)[0]
        assert (read(f"out/{i}.png") - (large.clamp(-1, 1) + 1) * 127.5).abs().max() < 2


def test_generators_without_masks_are_refused(capsys):
    store(AtoB=tiny(network=ResNetGenerator))
    save(noise(0), Path("in/horse.png"))
    assert run("--input in --output out --masks") == 2
    message = "translate.py: error: --masks: net holds a ResNetGenerator, which has none\n"
    assert capsys.readouterr().err == message
    assert not Path("out").exists()
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
        assert run(arguments + masks) == 2
        assert message in capsys.readouterr().err
        assert below(Path("top")) == before


def test_a_single_picture_of_another_format_may_stay_beside_its_translation(net):
    source = save(noise(0), Path("in/a.jpg"))
    before = source.read_bytes()
    assert run("--input in/a.jpg --output in") == 0
    assert source.read_bytes() == before
    assert_shows("in/a.png", by_hand(net, source))


def test_a_picture_beside_the_input_is_not_overwritten_by_its_translation(net, capsys):
    source, other = save(noise(0), Path("in/a.jpg")), save(noise(1), Path("in/a.png"))
    before = below(Path("in"))
    assert run("--input in/a.jpg --output in") == 2
    message = "translate.py: error: --output in: in/a.png exists already, expected a folder of its own\n"
    assert capsys.readouterr().err == message and below(Path("in")) == before
    for _ in range(2):  # elsewhere an earlier translation gives way
        assert run("--input in/a.jpg --output out") == 0
    assert_shows("out/a.png", by_hand(net, source))
    assert run(f"--input {other} --output out") == 0
    assert_shows("out/a.png", by_hand(net, other))


def test_names_that_differ_only_in_letter_case_are_equal():
    def names(*sources):
        return list(map(str, name_outputs([Picture(Path("in") / s) for s in sources], Path("in"), Path("out"), False)))

    assert names("A.jpg", "a.png", "b.png") == ["out/A.jpg.png", "out/a.png.png", "out/b.png"]
    assert names("One/a.jpg", "one/A.png") == ["out/One/a.jpg.png", "out/one/A.png.png"]
    for pair in (("a.png", "A.png"), ("One/a.png", "one/a.png"), ("a.jpg", "A.JPG")):
        expected = f"^--input in: two pictures would be written to out/{pair[0]}.*; rename one$"
        with pytest.raises(InputError, match=expected):
            names(*pair)


@pytest.mark.parametrize("recursive", ["", " --recursive"])
def test_an_output_inside_the_input_is_no_input(net, capsys, recursive):
    save(noise(0), Path("in/a.png"))
    save(noise(1), Path("in/sub/b.png"))
    n = 2 if recursive else 1
    assert run(f"--input in --output in/out{recursive}") == 0
    assert capsys.readouterr().out == f"{n} of {n} pictures translated into in/out\n"
    after = below(Path("in"))
    assert [name for name, content in after.items() if content and name.startswith("out/")] == (
        ["out/a.png", "out/sub/b.png"] if recursive else ["out/a.png"]
    )
    assert run(f"--input in --output in/out{recursive}") == (2 if recursive else 0)
    refused = "--output in/out: lies in --input in and holds pictures (in/out/a.png)"
    assert (refused in capsys.readouterr().err) == bool(recursive)
    assert below(Path("in")) == after


def test_ones_own_pictures_in_the_output_are_not_overwritten(net, capsys):
    save(noise(0), Path("in/a.jpg"))
    save(noise(1), Path("in/sub/a.png"))
    before = below(Path("in"))
    assert run("--input in --output in/sub --recursive") == 2
    assert "holds pictures (in/sub/a.png), which --recursive would translate and overwrite" in capsys.readouterr().err
    assert below(Path("in")) == before


def test_masks_beside_the_input_replace_no_folder(net, capsys):
    save(noise(0), Path("in/a.jpg"))
    save(noise(1), Path("in/a_masks/attention.png"))
    before = below(Path("in"))
    assert run("--input in/a.jpg --output in --masks") == 2
    assert "--output in: in/a_masks exists already" in capsys.readouterr().err
    assert below(Path("in")) == before


def test_a_name_that_cannot_be_written_to_costs_no_other(net, capsys):
    for i, name in enumerate(("a", "b", "c")):
        save(noise(i), Path(f"in/{name}.png"))
    Path("out/b.png").mkdir(parents=True)
    assert run("--input in --output out") == 1
    shown = capsys.readouterr()
    assert shown.out == "2 of 3 pictures translated into out\n"
    assert shown.err.count("not translated") == 1 and "not translated: in/b.png: " in shown.err
    assert Path("out/a.png").is_file() and Path("out/c.png").is_file()


# ----------------------------------------------------------------------------------------------------------
#  Batches and memory
# ----------------------------------------------------------------------------------------------------------


def test_batches_have_one_size_and_the_largest_come_last():
    sizes = [(8, 16), (32, 32), (16, 8), (8, 16), (8, 16), (32, 32), (4, 4), (1, 200)]
    tasks = [Task(Picture(Path(str(i))), size, size, Path(f"{i}.png")) for i, size in enumerate(sizes)]
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
    tasks = [Task(Picture(Path(str(i))), size, size, Path(f"{i}.png")) for i in range(9)]
    batches = make_batches(tasks, batch_size)
    assert [len(batch) for batch in batches] == lengths
    assert [task for batch in batches for task in batch] == tasks


class Limited(nn.Module):
    """A generator with memory for ``most`` pixels at once; it keeps the shapes that it was given."""

    size_multiple, min_size = 4, 8

    def __init__(self, generator, most, error):
        super().__init__()
        self.generator, self.settings, self.most, self.error, self.seen = generator, generator.settings, most, error, []

    def forward(self, x):
        self.seen.append((len(x), *x.shape[2:]))
        if len(x) * x.shape[2] * x.shape[3] > self.most:
            raise self.error
        return self.generator(x)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_does_not_fit_in_memory_is_tried_singly_and_named(net, monkeypatch, capsys, error):
    save(noise(9, (40, 32)), Path("in/0.png"))
    for i in (1, 2, 3):
        save(noise(i, (16, 16)), Path(f"in/{i}.png"))
    limited = Limited(net, most=300, error=error)
    monkeypatch.setattr(translate, "open_generator", lambda *_: (limited, {"direction": "AtoB"}))
    assert run("--input in --output out --batch_size 2") == 1
    out, err = capsys.readouterr()
    assert out == "3 of 4 pictures translated into out\n"
    assert err == "not translated: in/0.png: out of memory at 40 x 32 pixels; --size or --max_size shrink\n"
    assert limited.seen == [(2, 16, 16), (1, 16, 16), (1, 16, 16), (1, 16, 16), (1, 32, 40)]
    assert below(Path("out")).keys() == {"1.png", "2.png", "3.png"}
    for i in (1, 2, 3):
        assert_shows(f"out/{i}.png", by_hand(net, noise(i, (16, 16))))
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
    assert run("--input in --output out") == 0
    assert capsys.readouterr().out == "1 of 1 pictures translated into out\n"
    assert run("--input in --output out2 --recursive") == 2
    assert "Permission denied: 'in/lost+found'" in capsys.readouterr().err


def test_a_full_disk_is_named(net, monkeypatch, capsys):
    save(noise(0), Path("in/a.png"))
    monkeypatch.setattr(Image.Image, "save", fail_to_write)
    assert run("--input in --output out") == 2
    expected = "translate.py: error: out/a.png: could not be written ([Errno 28] No space left on device)\n"
    assert capsys.readouterr().err.endswith(expected)


def fail_to_write(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Pillow's has no name


def test_other_errors_of_the_generator_are_not_hidden(net, monkeypatch):
    save(noise(0), Path("in/a.png"))
    limited = Limited(net, most=0, error=RuntimeError("shapes do not fit"))
    monkeypatch.setattr(translate, "open_generator", lambda *_: (limited, {"direction": "AtoB"}))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run("--input in --output out")


# ----------------------------------------------------------------------------------------------------------
#  Options
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "expected --input and --output, or --export"),
        ("--output out", "expected --input and --output, or --export"),
        ("--input in", "expected --input and --output, or --export"),
        ("--export m.onnx --input in", "--export writes a model, --input is for translating"),
        ("--export m.onnx --output out", "--export writes a model, --output is for translating"),
        ("--export m.onnx --batch_size 8", "--export writes a model, --batch_size is for translating"),
        ("--export m.pt", "--export m.pt: expected a name ending in .onnx, in a folder that exists"),
        ("--export nowhere/m.onnx", "--export nowhere/m.onnx: expected a name ending in .onnx, in a folder that"),
        ("--input in --output out --batch_size 0", "--batch_size: expected at least 1, found 0"),
        ("--input in --output out --max_size 0", "--max_size: expected at least 1, found 0"),
        ("--input in --output notes.txt", "--output notes.txt: is a file, expected a folder"),
        ("--input in --output out --device quantum", "--device quantum: not usable here"),
        ("--input in --output out --checkpoint nowhere", "nowhere: no generator for AtoB or BtoA found"),
        ("--input in --output out --checkpoint net --direction BtoA", "net: no generator for BtoA found"),
        ("--input in --output out --checkpoint notes.txt", "notes.txt: not a readable weights file"),
        ("--input in --output out --checkpoint net/AtoB.pt --direction BtoA", "translates AtoB, expected BtoA"),
        ("--input nowhere --output out", "--input nowhere: no such file or folder"),
        ("--input empty --output out", "--input empty: no pictures in it\n"),
        ("--input empty --output out --recursive", "--input empty: no pictures in it\n"),
        ("--input outer --output out", "no pictures in it; --recursive looks in its sub-folders, too\n"),
        ("--input alike --output out", "--input alike: two pictures would be written to out/a.jpg.png; rename one\n"),
    ],
)
def test_what_does_not_fit_is_named(net, capsys, arguments, message):
    for name in ("in/a.png", "outer/inner/a.png", "alike/a.jpg", "alike/a.webp", "alike/a.jpg.bmp"):
        save(noise(0), Path(name))
    Path("empty").mkdir()
    Path("notes.txt").write_text("milk, bread")
    before = below(Path())
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("translate.py: error: ") and message in err
    assert below(Path()) == before


def test_help_shows_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        translate.main(["--help"])
    assert stop.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "fewer of large ones (default: 8)" in shown and "cpu, or auto (default: auto)" in shown
    assert shown.count("(default: ") == 7  # None and False say nothing


def test_a_checkpoint_is_asked_for(capsys):
    assert translate.main(["--input", "in", "--output", "out"]) == 2
    assert "the following arguments are required: --checkpoint" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
#  ONNX
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made_with, names",
    [
        (dict(network=AttentionGenerator), ["translation", "attention"]),
        (dict(network=AttentionGenerator, background=False), ["translation"]),
        (dict(network=SingleMaskGenerator), ["translation", "attention"]),
        (dict(network=ResNetGenerator), ["translation"]),
        (dict(network=UGATITGenerator), ["translation", "attention"]),
        (dict(network=UNetGenerator), ["translation"]),
    ],
)
def test_onnx_computes_the_same_at_any_size(onnxruntime, made_with, names, capsys):
    generator = tiny(**made_with)
    store(AtoB=generator)
    assert run("--export model.onnx") == 0
    assert capsys.readouterr().out.startswith("model.onnx: image to translation")
    assert {p.name for p in Path().iterdir()} == {"net", "model.onnx"}  # the weights are in it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert [o.name for o in session.get_outputs()] == names
    for size in ((1, 3, 32, 48), (3, 3, 33, 50), (2, 3, 5, 300)):
        images = torch.rand(size)
        with torch.no_grad():
            translation, expected = translate_any_size(generator, 2 * images - 1), OnUnitRange(generator)(images)
        assert len(expected) == len(names)
        assert torch.equal(expected[0], (translation.image + 1) / 2)
        if "attention" in names:
            assert torch.equal(expected[1], translation.foreground)
        for found, part in zip(session.run(None, {"image": images.numpy()}), expected, strict=True):
            assert found.shape == part.shape and found.shape[2:] == size[2:]
            assert found.min() >= -1e-5 and found.max() <= 1 + 1e-5 and found.std() > 0.02
            assert np.abs(found - part.numpy()).max() < 1e-4


def test_onnx_of_the_full_u_gat_it_has_its_size(onnxruntime, capsys):
    generator = tiny(network=UGATITGenerator, size=(16, 24))
    store(AtoB=generator)
    assert run("--export model.onnx") == 0
    assert "any batch, pictures of 16 x 24" in capsys.readouterr().out
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 24]
    images = torch.rand(3, 3, 16, 24)
    with torch.no_grad():
        expected = OnUnitRange(generator)(images)
    for found, part in zip(session.run(None, {"image": images.numpy()}), expected, strict=True):
        assert found.std() > 0.02 and np.abs(found - part.numpy()).max() < 1e-4


def test_onnx_of_colourisation_makes_its_own_grey(onnxruntime):
    generator = tiny(network=ResNetGenerator)
    store(more={"options": {"task": "colorization"}}, AtoB=generator)
    source = save(noise(0, (48, 32)), Path("a.png"))
    assert run("--export model.onnx") == 0 and run("--input a.png --output out") == 0
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": (tensor(noise(0, (48, 32)))[None] / 255).float().numpy()})
    with torch.no_grad():
        image = to_tensor(Picture(source, grey=True).open())[None]
        expected = (translate_any_size(generator, normalise(image)).image + 1) / 2
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert (read("out/a.png") - 255 * torch.from_numpy(found[0])).abs().max() < 0.53


@pytest.mark.parametrize(
    "task, direction, grey",
    [("colorization", "AtoB", True), ("colorization", "BtoA", False), ("translation", "AtoB", False)],
)
def test_the_export_makes_grey_where_the_generator_wants_it(monkeypatch, task, direction, grey):
    made = []
    monkeypatch.setattr(translate, "export", lambda generator, path, grey: made.append((path.name, grey)))
    store(more={"options": {"task": task}}, **{direction: tiny()})
    assert run("--export model.onnx") == 0 and made == [("model.onnx", grey)]


def test_luminance_is_pillows():
    levels = torch.cartesian_prod(*(torch.arange(0, 256, 3),) * 3).to(torch.uint8)  # 636,056 colours
    image = levels.T.reshape(3, 1, -1)
    expected = to_tensor(to_pil_image(image).convert("L"))
    assert torch.equal((255 * luminance(image[None] / 255)).round().to(torch.uint8), expected.expand(1, 3, -1, -1))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_its_packages_the_export_says_how_to_get_them(net, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    assert run("--export model.onnx") == 2
    err = capsys.readouterr().err
    assert f"--export needs {package}" in err and "pip install -r requirements-extras.txt" in err
    assert re.search(rf"^{package}\b", (ROOT / "requirements-extras.txt").read_text(), re.MULTILINE)
    assert not Path("model.onnx").exists()


def test_needed_packages_are_handed_over_or_named():
    assert utils.import_optional("json", "--this").dumps([1]) == "[1]"
    with pytest.raises(InputError, match=r"^--this needs no_such_package, .*requirements-extras\.txt$"):
        utils.import_optional("no_such_package", "--this")


def test_a_killed_translation_leaves_no_half_picture(tmp_path):
    """A kill in the middle of writing is a file that stops short and a process that does not clean up."""
    code = (
        "import os, torch, translate\n"
        "from PIL import Image\n"
        "def half(self, path, *a, **k):\n"
        "    open(path, 'wb').write(b'half'); os._exit(9)\n"
        "Image.Image.save = half\n"
        "translate.save(Image.new('RGB', (4, 4)), translate.Path('out.png'))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 9
    assert not (tmp_path / "out.png").exists()
    translate.save(Image.new("RGB", (4, 4)), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (4, 4)
