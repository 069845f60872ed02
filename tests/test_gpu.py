"""What only a CUDA device can show: `make test-gpu`. Elsewhere all of it is passed over."""

from utils import pick_device

import json
import shutil
from pathlib import Path

import pytest
import torch
from common import TEXTBOOK, build, gradients, make_batch, textbook_losses

import train
from benchmark import Variant, Worker
from options import all_options, parse_options
from prepare import draw_built_in
from systems import SYSTEMS
from train import CapturedStep, set_up, trained_parameters, training_step

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
    return *set_up(options, pick_device(DEVICE)), batch


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
    for precision, alike, near in (("float32", 0.98, 0.002), ("bf16", 0.85, 0.02)):
        found, gradient = first_turn(f"--system {system} --precision {precision}")
        assert found == pytest.approx(losses, rel=near), precision
        assert torch.cosine_similarity(gradient, plain, dim=0) > alike, precision


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype
@pytest.mark.parametrize(
    "name, extra",
    [
        ("attentiongan", "--pool_size 2"),  # full after two steps
        ("attentiongan", "--pool_size 2 --attn_disc mask --attn_real partner --attn_grad picture"),
        ("attentiongan", "--no_background"),
        ("attentiongan1", "--pool_size 2"),
        ("cyclegan", "--pool_size 2"),
        ("ugatit", "--light"),
        ("pix2pix", ""),
        ("dcgan", "--nz 5"),
    ],
)
def test_a_step_never_waits_for_the_device(name, extra):
    system, optimizers, autocast, batch = prepare(f"--system {name} {extra}")
    for _ in range(2):
        training_step(system, optimizers, autocast, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(8):
            training_step(system, optimizers, autocast, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SYSTEMS)
def test_replayed_steps_are_the_plain_ones(name):
    """To the rounding of some steps; the bits on the CPU: test_systems.py."""
    flags = f"--system {name} --precision float32" + (" --pool_size 2" if "pool_size" in all_options(name) else "")
    found = []
    for extra in ("", " --cuda_graph"):
        system, optimizers, autocast, batch = prepare(flags + extra)
        captured = CapturedStep(system, optimizers, autocast)
        steps = []
        for i in range(CapturedStep.WARM_UP + 2):
            for group in (group for optimizer in optimizers.values() for group in optimizer.param_groups):
                group["lr"] = 1e-5 / (i + 1)
            turned = {key: value.roll(i, dims=-1) for key, value in batch.items()}
            shown = captured(turned) if extra else training_step(system, optimizers, autocast, turned)
            steps.append({key: value.mean().item() for key, value in shown.items()})
        assert all(type(g["lr"]) is float for o in optimizers.values() for g in o.state_dict()["param_groups"])
        found.append(steps)
    for plain, replayed in zip(*found, strict=True):
        assert replayed == pytest.approx(plain, rel=0.02, abs=0.002)


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
            shown = training_step(system, optimizers, autocast, batch)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found[flags] = {key: value.mean().item() for key, value in shown.items()}
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
    assert found[""] == pytest.approx(found["--compile"], rel=0.05, abs=0.01)


def test_resuming_goes_on_as_if_nothing_had_happened():
    """For some steps, to rounding: gradients of reflection padding add up in no fixed order on CUDA."""
    draw_built_in(Path("data/solid2striped"), n_train=10, n_test=1)
    command = f"{SMALL} --device {DEVICE} --precision float32 --pool_size 4 --log_interval 1 --sample_interval 0"
    assert train.main(f"{command} --n_epochs 3 --decay_epoch 2 --name straight".split()) == 0
    straight, stopped = Path("saved_models/straight"), Path("saved_models/stopped")
    stopped.mkdir()
    shutil.copy(straight / "checkpoint_previous.pt", stopped / "checkpoint.pt")  # after two epochs
    assert train.main(["--name", "stopped", "--resume"]) == 0
    logs = []
    for run in (straight, stopped):
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append(
            {e["step"]: {k: v for k, v in e.items() if type(v) is float and k != "images_per_s"} for e in entries}
        )
    before, after = logs
    for step, near in ((21, 0.002), (22, 0.02), (23, 0.05)):
        assert "cycle_A" in after[step] and after[step] == pytest.approx(before[step], rel=near, abs=1e-5), step


def test_the_benchmark_counts_kernels_and_memory():
    device = pick_device(DEVICE)
    assert device.index == torch.cuda.current_device()
    figures = []
    for kind in ("textbook", "step"):
        options = parse_options(f"{SMALL} --device {DEVICE}".split())
        worker = Worker(Variant(kind, kind, fused=kind == "step"), options, device)
        for another_turn in (True, False):
            worker.ask(another_turn)
        assert "trouble" not in worker.figures
        figures.append(worker.figures)
    assert 0 < figures[1]["kernels"] < figures[0]["kernels"]
    for each in figures:
        assert each["peak memory"] > each["kept for backward"] > 0
