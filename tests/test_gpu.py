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


def prepare(flags):
    """A system as ``train.py`` sets it up, its optimizers and autocast, and a batch of random pictures."""
    options = parse_options(f"{SMALL} --device {DEVICE} {flags}".split())
    batch = {key: value.float().to(DEVICE) for key, value in make_batch(1, size=64).items()}
    return *set_up(options, torch.device(DEVICE)), batch


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


def first_turn(flags, contiguous=False):
    """The generators' losses in the first step, and all gradients in one vector, in float64."""
    system, _, autocast, batch = prepare(flags)
    if contiguous:
        system.to(memory_format=torch.contiguous_format)
    turn = system.turns[0]
    with autocast():
        losses = turn.losses(batch, system(batch))
    parts = torch.autograd.grad(sum(losses.values()), trained_parameters(system, turn.networks))
    return {k: v.item() for k, v in losses.items()}, torch.cat([part.flatten().double() for part in parts])


@pytest.mark.parametrize("system", ["attentiongan", "cyclegan"])
def test_precision_and_layout_change_no_more_than_rounding(system):
    """Near the start the signs of L1's gradients are easily turned; in bf16 on the CPU the cosine is 0.92."""
    losses, plain = first_turn(f"--system {system} --precision float32", contiguous=True)
    for precision, alike, near in (("float32", 0.99, 0.002), ("bf16", 0.85, 0.02)):
        found, gradient = first_turn(f"--system {system} --precision {precision}")
        assert found == pytest.approx(losses, rel=near), precision
        assert torch.cosine_similarity(gradient, plain, dim=0) > alike, precision


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_never_waits_for_the_device(name):
    extra = {"ugatit": "--light", "dcgan": "--nz 5"}.get(name, "")
    system, optimizers, autocast, batch = prepare(f"--system {name} {extra}")
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
    draw_built_in(Path("data/solid2striped"), n_train=10, n_test=1)
    short = f"{SMALL} --device {DEVICE} --precision float32 --log_interval 10 --sample_interval 0 --decay_epoch 2"
    for epochs, name in ((4, "straight"), (2, "stopped")):
        assert train.main(f"{short} --n_epochs {epochs} --name {name}".split()) == 0
    assert train.main(["--name", "stopped", "--resume", "--n_epochs", "4"]) == 0
    ends = []
    for name in ("straight", "stopped"):
        entries = [json.loads(line) for line in Path(f"saved_models/{name}/log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in entries] == [10, 20, 30, 40]
        ends.append({key: entries[-1][key] for key in ("cycle_A", "cycle_B", "D_A", "D_B", "lr")})
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
