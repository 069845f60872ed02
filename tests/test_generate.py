"""Pictures from noise: which vectors they are made from, and their places on the sheets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

import evaluate
import generate
import translate
from checkpoints import pack_generator
from datasets import draw_noise, fixed_noise
from models import DCGANGenerator, ResNetGenerator

GROUPS = {"base": (1, 5, 9), "minus": (2, 6, 64), "plus": (3, 7, 11)}
FLAGS = " ".join(f"--{name} {' '.join(map(str, numbers))}" for name, numbers in GROUPS.items())


@pytest.fixture
def generator():
    """What the run "net" holds, with running statistics of its own."""
    torch.manual_seed(0)
    generator = DCGANGenerator(nz=5, ngf=4, channels=1, size=16)
    for parameter in generator.parameters():  # at the start all is grey
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=0.5)
    for _ in range(20):
        generator(torch.rand(8, 5) * 2 - 1)
    folder = Path("saved_models/net")
    folder.mkdir(parents=True)
    torch.save({**pack_generator(generator), "direction": "generator"}, folder / "generator.pt")
    return generator.eval()


def run(flags: str) -> int:
    return generate.main(["--checkpoint", "net", "--device", "cpu", *flags.split()])


def shown(path: str, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """One picture of a sheet, enlarged as it is there; 2 pixels of border, headings above and on the left."""
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("L"))
    side = sheet.shape[0] // rows // 16 * 16
    step = side + 2
    top, left = sheet.shape[0] - rows * step + row * step, sheet.shape[1] - columns * step + column * step
    return sheet[top : top + side, left : left + side]


@torch.no_grad()
def expected(generator: nn.Module, vector: torch.Tensor, side: int) -> np.ndarray:
    picture = generator(vector[None])[0]
    zoom = side // 16
    enlarged = picture.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return np.asarray(to_pil_image(enlarged / 2 + 0.5))


def assert_shows(path, row, column, rows, columns, generator, vector):
    found = shown(path, row, column, rows, columns).astype(int)
    by_hand = expected(generator, vector, len(found)).astype(int)
    assert by_hand.std() > 10 and abs(found - by_hand).max() <= 1


def test_the_three_pictures_hold_what_the_generator_makes_of_the_vectors(generator, capsys):
    assert run(f"--output out --seed 3 {FLAGS}") == 0
    assert "samples.png, interpolation.png, arithmetic.png written to out" in capsys.readouterr().out
    noise = fixed_noise(64, 5, 3)
    for number in (1, 8, 9, 30, 64):
        row, column = divmod(number - 1, 8)
        assert_shows("out/samples.png", row, column, 8, 8, generator, noise[number - 1])
    for row in (0, 7):
        for column in (0, 4, 9):
            between = noise[row] + column / 9 * (noise[row + 1] - noise[row])
            assert_shows("out/interpolation.png", row, column, 8, 10, generator, between)
    means = {name: sum(noise[n - 1] for n in numbers) / 3 for name, numbers in GROUPS.items()}
    for column, (name, numbers) in enumerate(GROUPS.items()):
        for row, number in enumerate(numbers):
            assert_shows("out/arithmetic.png", row, column, 4, 4, generator, noise[number - 1])
        assert_shows("out/arithmetic.png", 3, column, 4, 4, generator, means[name])
    result = means["base"] - means["minus"] + means["plus"]
    assert_shows("out/arithmetic.png", 3, 3, 4, 4, generator, result)
    near = draw_noise((11, 3), 3, 5)
    for row in range(3):
        assert_shows("out/arithmetic.png", row, 3, 4, 4, generator, result + 0.25 * near[row])


def test_the_pictures_depend_only_on_the_seed(generator):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(f"--output {folder} --seed {seed}") == 0
    for name in ("samples", "interpolation", "arithmetic"):
        one, same, other = (Path(folder, f"{name}.png").read_bytes() for folder in "abc")
        assert one == same != other


def test_interpolation_goes_straight_from_sample_to_sample():
    noise = fixed_noise(4, 6, 0)
    ways = generate.interpolate(noise, 5)
    assert ways.shape == (3, 5, 6)
    torch.testing.assert_close(ways[:, 0], noise[:-1])
    torch.testing.assert_close(ways[:, -1], noise[1:])
    torch.testing.assert_close(ways[1, 1], 0.75 * noise[1] + 0.25 * noise[2])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--minus 1 0 2", "--minus 0: expected numbers of samples, 1 to 64"),
        ("--plus 65 1 2", "--plus 65: expected numbers of samples, 1 to 64"),
        ("--seed -1", "--seed: expected at least 0, found -1"),
        ("--output file", "--output file: is a file, expected a folder"),
        ("--checkpoint nothing", "nothing: no generator for noise found"),
        ("--checkpoint AtoB.pt", "AtoB.pt: translates AtoB, expected a generator that draws from noise (dcgan)"),
    ],
)
def test_what_cannot_be_generated_is_named(generator, capsys, flags, message):
    Path("file").write_text("")
    torch.save({**pack_generator(ResNetGenerator(ngf=4, n_residual_blocks=1)), "direction": "AtoB"}, "AtoB.pt")
    assert run(f"--output out {flags}") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("out").exists()


def test_translate_and_evaluate_refuse_generators_from_noise(generator, small_set, capsys):
    for main, flags in (
        (translate.main, "--input data/small/testA --output out"),
        (translate.main, "--export net.onnx"),
        (evaluate.main, "--dataset_name small --extractor none --device cpu"),
    ):
        assert main([*flags.split(), "--checkpoint", "net"]) == 2
        error = capsys.readouterr().err
        assert "net/generator.pt: draws pictures from noise (see generate.py) and translates none" in error
        assert error.count("\n") == 1
