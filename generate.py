"""Draw pictures from noise with a trained generator (``train.py --system dcgan``).

    python generate.py --checkpoint faces_dcgan --output out
    python generate.py --checkpoint faces_dcgan --output out --base 3 17 40 --minus 5 8 61 --plus 9 20 33

writes ``samples.png``, ``interpolation.png`` and ``arithmetic.png``. Samples are numbered from 1. A seed always gives
the same samples; the first ones are those on the sheets of a run with this seed.
"""

from __future__ import annotations

import utils
from utils import InputError

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import open_generator
from datasets import draw_noise, fixed_noise
from models import NOISE
from record import draw_sheet

N_SAMPLES, N_COLUMNS = 64, 8
GROUPS = {"base": (1, 2, 3), "minus": (4, 5, 6), "plus": (7, 8, 9)}  # default numbers of samples
NEAR = 0.25  # the noise on the neighbours of a result, uniform in ±NEAR, as in the paper


def interpolate(noise: Tensor, n_steps: int = 10) -> Tensor:
    """Straight lines from each noise vector to the next, with both ends: (n, nz) to (n - 1, n_steps, nz).

    They stay in the cube of the uniform noise. Great circles, which suit normal noise, would leave it.
    """
    share = torch.linspace(0, 1, n_steps)[:, None]
    return torch.lerp(noise[:-1, None], noise[1:, None], share)


def arithmetic(noise: Tensor, groups: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """mean(base) - mean(minus) + mean(plus) of noise vectors (Radford et al., ICLR 2016, Sec. 6.3.2).

    ``noise`` is (N, nz), and ``groups`` holds numbers of its vectors from 1. Returns columns of (exemplars + 1, nz)
    vectors: for each group the exemplars and below them their mean, and for the result its neighbours and below them
    the result.
    """
    columns = {}
    for name, numbers in groups.items():
        exemplars = noise[[number - 1 for number in numbers]]
        columns[name] = torch.cat([exemplars, exemplars.mean(dim=0, keepdim=True)])
    base, minus, plus = (column[-1:] for column in columns.values())
    result = base - minus + plus
    near = draw_noise((11, seed), len(columns["base"]) - 1, noise.shape[1])
    return columns | {"base - minus + plus": torch.cat([result + NEAR * near, result])}


@torch.no_grad()
def generate(options: argparse.Namespace) -> None:
    """Write the three pictures. Raises InputError where the checkpoint is no generator from noise."""
    device = utils.pick_device(options.device)
    generator, _ = open_generator(options.checkpoint, NOISE)
    generator.to(device).eval()
    noise = fixed_noise(N_SAMPLES, generator.settings["nz"], options.seed)
    groups = {name: getattr(options, name) for name in GROUPS}

    def pictures(vectors: Tensor) -> Tensor:
        return generator(vectors.to(device))

    samples, ways = pictures(noise), interpolate(noise[: N_COLUMNS + 1])
    sheets = {
        "samples": draw_sheet(
            {str(i + 1): samples[i::N_COLUMNS] for i in range(N_COLUMNS)},
            "the number of a sample is its row's plus its column's",
            [str(i) for i in range(0, N_SAMPLES, N_COLUMNS)],
        ),
        "interpolation": draw_sheet(
            {f"{i / (ways.shape[1] - 1):.2f}": pictures(ways[:, i]) for i in range(ways.shape[1])},
            "from one sample to the next",
            [f"{i} to {i + 1}" for i in range(1, len(ways) + 1)],
        ),
        "arithmetic": draw_sheet(
            {name: pictures(vectors) for name, vectors in arithmetic(noise, groups, options.seed).items()},
            "; ".join(f"{name} {' '.join(map(str, numbers))}" for name, numbers in groups.items()),
            ["", "", "", "mean"],
            least_width=160,
        ),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, sheet in sheets.items():
        with utils.name_file(path := options.output / f"{name}.png"):
            sheet.save(path)
    print(f"{', '.join(f'{name}.png' for name in sheets)} written to {options.output}")


def make_parser() -> utils.Parser:
    parser = utils.Parser("Draw samples, interpolations and arithmetic of noise vectors.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, shipped weights, a folder or a generator file")
    add("--output", type=Path, required=True, help="folder for the pictures")
    add("--seed", type=utils.at_least(0), default=0, help="seed of the noise")
    what = {"base": "is the start", "minus": "is subtracted", "plus": "is added"}
    for name, verb in what.items():
        default = " ".join(map(str, GROUPS[name]))
        add(
            f"--{name}",
            type=int,
            nargs=3,
            metavar="NUMBER",
            default=GROUPS[name],
            help=f"numbers of three samples whose mean noise {verb} (default: {default})",
        )
    add("--device", default="auto", help="cuda, cuda:1, mps, cpu, or auto")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for numbers that no sample has, and for an output that is a file."""
    for name in GROUPS:
        wrong = [number for number in getattr(options, name) if not 1 <= number <= N_SAMPLES]
        if wrong:
            raise InputError(f"--{name} {wrong[0]}: expected numbers of samples, 1 to {N_SAMPLES}")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output {options.output}: is a file, expected a folder")


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        options = make_parser().parse_args(argv)
        check_options(options)
        generate(options)
        return 0

    return utils.run_script("generate.py", work)


if __name__ == "__main__":
    sys.exit(main())
