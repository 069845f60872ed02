"""What only a CUDA device can show: `make test-gpu`. Elsewhere all of it is passed over."""

import json
from pathlib import Path

import pytest
import torch
from test_systems import TEXTBOOK, build, gradients, make_batch, textbook_losses

import train
from datasets import draw_built_in
from systems import SYSTEMS
from train import parse_options, play, set_up, trained_parameters

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SMALL = "--dataset_name solid2striped --img_height 64 --img_width 64 --ngf 8 --ndf 8"


def prepare(flags, size=64, batch=2):
    """A system as ``train.py`` sets it up, its optimizers and autocast, and a batch of random pictures."""
    options = parse_options(f"{SMALL} --device {DEVICE} {flags}".split())
    generator = torch.Generator().manual_seed(1)
    pictures = {s: torch.rand(batch, 3, size, size, generator=generator) * 2 - 1 for s in "AB"}
    return *set_up(options, torch.device(DEVICE)), {s: p.to(DEVICE) for s, p in pictures.items()}


@pytest.mark.parametrize("name, settings, terms", TEXTBOOK)
def test_losses_and_gradients_are_the_textbook_steps(name, settings, terms):
    """As in test_systems.py, where the CPU has to pass."""
    system = build(name, pool_size=0, **settings).to(DEVICE)
    batch = {side: pictures.to(DEVICE) for side, pictures in make_batch(1).items()}
    expected = textbook_losses(system, batch, **terms)
    fakes = system(batch)
    for turn, theirs in zip(system.turns, expected, strict=True):
        ours = turn.losses(batch, fakes)
        for key in ours:
            assert abs(ours[key] - theirs[key]) < 1e-11, key
        parameters = trained_parameters(system, turn.networks)
        for mine, textbook in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
            assert (mine - textbook).abs().max() < 1e-8 * textbook.abs().max()


def gradient_of_first_step(flags, contiguous=False):
    """All gradients of the generators' turn, in one vector, in float64."""
    system, _, autocast, batch = prepare(flags)
    if contiguous:
        system.to(memory_format=torch.contiguous_format)
    with autocast():
        fakes = system(batch)
        losses = system.turns[0].losses(batch, fakes)
    parts = torch.autograd.grad(sum(losses.values()), trained_parameters(system, system.turns[0].networks))
    return torch.cat([part.flatten().double() for part in parts])


@pytest.mark.parametrize("system", ["attentiongan", "cyclegan"])
def test_precision_and_layout_change_no_more_than_rounding(system):
    plain = gradient_of_first_step(f"--system {system} --precision float32", contiguous=True)
    for flags, bound in (("--precision float32", 0.01), ("--precision bf16", 0.25)):
        found = gradient_of_first_step(f"--system {system} {flags}")
        assert (found - plain).norm() < bound * plain.norm(), flags
        assert torch.cosine_similarity(found, plain, dim=0) > 1 - bound / 4, flags


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_never_waits_for_the_device(name):
    system, optimizers, autocast, batch = prepare(f"--system {name}" + (" --light" if name == "ugatit" else ""))
    for _ in range(2):
        play(system, optimizers, autocast, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            play(system, optimizers, autocast, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_steps_are_the_plain_ones_and_compile_once():
    """With this device's real compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = {}
    for flags in ("", "--compile"):
        system, optimizers, autocast, batch = prepare(f"--precision float32 {flags}")
        graphs = []
        for _ in range(4):
            shown = play(system, optimizers, autocast, batch)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found[flags] = {key: value.mean().item() for key, value in shown.items()}
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
    assert found[""] == pytest.approx(found["--compile"], rel=0.05, abs=0.01)


def test_resuming_goes_on_as_if_nothing_had_happened():
    """To rounding: gradients of reflection padding add up in no fixed order on CUDA."""
    draw_built_in(Path("data/solid2striped"))
    short = f"{SMALL} --device {DEVICE} --precision float32 --log_interval 10 --sample_interval 0 --n_cpu 0"
    short += " --batch_size 50 --decay_epoch 4"
    for epochs, name in ((4, "straight"), (2, "stopped")):
        assert train.main(f"{short} --n_epochs {epochs} --name {name}".split()) == 0
    assert train.main(["--name", "stopped", "--resume", "--n_epochs", "4"]) == 0
    ends = []
    for name in ("straight", "stopped"):
        entries = [json.loads(line) for line in Path(f"saved_models/{name}/log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in entries] == [10, 20, 30, 40]
        ends.append({key: entries[-1][key] for key in ("cycle_A", "cycle_B", "D_A", "D_B", "lr")})
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
