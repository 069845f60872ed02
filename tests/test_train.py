import utils

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from common import BOTH_DIRECTIONS, QUICK, QUICK_PIX2PIX, checkpoint, log, quick, run, same, same_run, script, stop_at
from PIL import Image

import evaluate
import metrics
import train
from checkpoints import load_generator, open_generators, pack_generator
from datasets import UnpairedDataset
from metrics import Features, kernel_distance
from models import AttentionGenerator
from options import SMALL, all_options, make_parser, option_groups, parse_options
from pictures import normalise, quantise, unaugmented
from systems import SYSTEMS

# 3 steps an epoch: it takes the 6 pictures of trainA.
QUICK_DCGAN = (
    "--system dcgan --dataset_name small --img_height 16 --img_width 16 --nz 5 --ngf 4 --ndf 4 --batch_size 2 "
    "--log_interval 1 --n_cpu 0 --sample_interval 0"
)


# ----------------------------------------------------------------------------------------------------------
#  A run, and what it leaves
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.curves
@pytest.mark.parametrize("system", BOTH_DIRECTIONS)
def test_a_run_leaves_weights_log_sheets_curves_and_a_page(small_set, system):
    assert run(f"{quick(system)} --system {system} --n_epochs 2 --sample_interval 6") == 0
    name = f"small_{system}"
    entries = log(name)
    assert [e["step"] for e in entries] == [4, 8, 12]
    assert [e["epoch"] for e in entries] == [1, 2, 2]
    own = {
        "attentiongan1": {"guided_G_AB", "tv_BA", "pixel_AB", "guided_D_A"},
        "ugatit": {"identity_A", "cam_AB", "cam_BA", "rho_AB"},
    }.get(system, {"identity_A", "identity_B"})
    assert {"G_AB", "G_BA", "cycle_A", "cycle_B", "D_A", "D_B", "lr", *own} <= entries[0].keys()
    n_masks = {"attentiongan": 3, "attentiongan1": 2}.get(system, 0)
    if n_masks:
        assert len(entries[0]["mask_AB_mean"]) == len(entries[0]["mask_BA_entropy"]) == n_masks
        assert abs(sum(entries[0]["mask_AB_mean"]) - 1) < 1e-4
    with Image.open(f"images/{name}/00000006.png") as sheet:
        columns = {"cyclegan": 6, "ugatit": 12}.get(system, 8)
        zoom = 8  # 12 pixels become 96, two rows of test pictures
        assert sheet.size == (columns * (12 * zoom + 2) + 2, 2 * (12 * zoom + 2) + 2 + 18)
    with Image.open(f"images/{name}/curves.png") as curves:
        assert len(np.unique(np.asarray(curves))) > 10
    page = Path(f"images/{name}/index.html").read_text()
    sheets = ", ".join(f'"{step:08d}.png"' for step in (1, 2, 4, 6, 12))
    assert f"[{sheets}]" in page
    assert f"<th>system<td>{system}" in page and "step 12 of 12" in page
    assert not re.search(r"(src|href)=.?https?:", page)
    generator, about = load_generator(f"saved_models/{name}/AtoB.pt")
    assert about["step"] == 12 and about["options"]["img_height"] == 12
    same(dict(generator.state_dict()), dict(checkpoint(name)["networks"]["G_AB"]))


@pytest.mark.parametrize("system, columns", [("attentiongan", 8), ("ugatit --light", 12)])
def test_a_run_on_crops_shows_and_measures_whole_pictures(small_set, monkeypatch, capsys, system, columns):
    shapes, step = set(), train.training_step

    def spy(system, optimizers, autocast, batch):
        shapes.update(images.shape for images in batch.values())
        return step(system, optimizers, autocast, batch)

    monkeypatch.setattr(train, "training_step", spy)
    flags = f"{quick(system.split()[0])} --system {system} --img_height 32 --img_width 24 --crop_size 12 --name crops"
    assert run(f"{flags} --n_epochs 1") == 0
    assert shapes == {(1, 3, 12, 12)} and "32 x 24 in crops of 12, step 0 of 6" in capsys.readouterr().out
    with Image.open("images/crops/00000006.png") as sheet:
        zoom = (sheet.width - 2) // columns // 24
        assert sheet.size == (columns * (24 * zoom + 2) + 2, 2 * (32 * zoom + 2) + 2 + 18)
    about = load_generator("saved_models/crops/AtoB.pt")[1]
    assert evaluate.find_reading(about["options"], 3).size == (32, 24)
    assert run(f"{flags} --resume --crop_size 16") == 2
    assert "--crop_size 16 differs from the run's 12" in capsys.readouterr().err


def test_a_run_of_pix2pix_leaves_its_one_direction(pairs, capsys):
    assert run(f"{QUICK_PIX2PIX} --direction BtoA --n_epochs 2 --sample_interval 4") == 0
    entries = log("pairs_pix2pix")
    assert [e["step"] for e in entries] == list(range(1, 9)) and {"D", "G", "L1", "change"} <= entries[0].keys()
    with Image.open("images/pairs_pix2pix/00000004.png") as sheet:  # input, output, truth; two test pictures
        zoom = (sheet.width - 2) // 3 - 2
        assert zoom % 64 == 0 and sheet.size == (3 * (zoom + 2) + 2, 2 * (zoom + 2) + 2 + 18)
    assert [p.name for p in Path("saved_models/pairs_pix2pix").glob("?to?.pt")] == ["BtoA.pt"]
    generator, about = load_generator("saved_models/pairs_pix2pix/BtoA.pt")
    assert (about["direction"], about["step"], about["options"]["task"]) == ("BtoA", 8, "translation")
    weights = checkpoint("pairs_pix2pix")["networks"]["G"]
    same(dict(generator.state_dict()), dict(weights))
    # Others may start from it; at a rate of zero they stay there.
    again = f"{QUICK_PIX2PIX} --n_epochs 1 --lr 0 --init_from pairs_pix2pix --name next"
    assert run(f"{again} --direction BtoA") == 0
    same(dict(checkpoint("next")["networks"]["G"]), dict(weights))
    capsys.readouterr()
    assert run(f"{again.replace('--name next', '--name alone')} --direction BtoA --lambda_gan 0") == 0
    out = capsys.readouterr().out
    assert "G starts from pairs_pix2pix" in out and "start anew" not in out and "start from" not in out
    assert run(f"{again} --direction AtoB --overwrite") == 2  # no generator has the other direction


@pytest.mark.parametrize("system", ["cyclegan", "attentiongan"])
def test_unpaired_systems_colourise_from_disjoint_halves(pairs, system):
    assert run(f"{quick(system).replace('small', 'pairs')} --system {system} --task colorization --n_epochs 1") == 0
    assert checkpoint(f"pairs_{system}")["steps_per_epoch"] == 2
    opened = open_generators(f"pairs_{system}")
    assert {about["options"]["task"] for _, about in opened.values()} == {"colorization"}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_run_of_dcgan_leaves_its_generator_log_and_sheets(small_set, channels):
    assert run(f"{QUICK_DCGAN} --channels {channels} --n_epochs 2 --sample_interval 3") == 0
    entries = log("small_dcgan")
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6] and {e["lr"] for e in entries} == {2e-4}
    assert {"D_real", "D_fake", "G", "spread_real", "spread_fake"} <= entries[0].keys()
    with Image.open("images/small_dcgan/00000003.png") as sheet:  # a real one, six samples; two test pictures
        assert sheet.size == (7 * (16 * 6 + 2) + 2, 2 * (16 * 6 + 2) + 2 + 18)
    assert not list(Path("saved_models/small_dcgan").glob("?to?.pt"))
    generator, about = load_generator("saved_models/small_dcgan/generator.pt")
    assert about["step"] == 6 and about["direction"] == "generator" and about["options"]["nz"] == 5
    assert generator.settings["channels"] == channels
    weights = checkpoint("small_dcgan")["networks"]["G"]
    same(dict(generator.state_dict()), dict(weights))
    assert weights["layers.1.num_batches_tracked"] == 6 and weights["layers.1.running_mean"].abs().min() > 0
    # Others may start from it; at a rate of nearly zero they stay there.
    assert run(f"{QUICK_DCGAN} --channels {channels} --n_epochs 1 --lr 0 --init_from small_dcgan --name next") == 0
    assert torch.equal(checkpoint("next")["networks"]["G"]["layers.0.weight"], weights["layers.0.weight"])


def test_the_learning_rate_is_the_official_rule():
    options = parse_options([])
    assert (options.n_epochs, options.decay_epoch) == (200, 100)
    official = [1 - max(0, epoch + 1 - 100) / (100 + 1) for epoch in range(200) for _ in range(3)]
    assert [train.learning_rate(options, step, 3) / options.lr for step in range(600)] == pytest.approx(official)
    for unit in ("epoch", "step"):
        constant = parse_options(["--n_epochs", "60", "--decay_epoch", "60", "--decay_by", unit])
        assert {train.learning_rate(constant, step, 2) for step in range(120)} == {2e-4}


def test_u_gat_its_rate_falls_with_each_step_and_its_presets_are_the_official_ones():
    options = parse_options(["--system", "ugatit", "--n_epochs", "100"])
    assert (options.lr, options.weight_decay, options.b1, options.b2) == (1e-4, 1e-4, 0.5, 0.999)
    weights = (options.lambda_gan, options.lambda_cyc, options.lambda_id, options.lambda_cam)
    assert weights == (1, 10, 10, 1000) and options.batch_size == 1
    # 1,000 steps: the official code subtracts a 500th of the rate before each of the second half, and ends at zero.
    official = [1.0] * 500 + [1 - (k + 1) / 500 for k in range(500)]
    found = [train.learning_rate(options, step, 10) / 1e-4 for step in range(1000)]
    assert found == pytest.approx(official, abs=1 / 500)
    assert found[499] == 1 > found[500] and found[-1] == pytest.approx(1 / 501)
    assert parse_options(["--system", "ugatit"]).n_epochs * 3400 == pytest.approx(1e6, rel=1e-3)
    plain = parse_options([])
    assert (plain.lr, plain.weight_decay, plain.decay_by) == (2e-4, 0, "epoch")


def test_the_rate_reaches_the_optimizers(small_set):
    assert run(f"{QUICK} --n_epochs 3 --decay_epoch 1 --name r --log_interval 6") == 0
    rates = [e["lr"] for e in log("r")]
    assert rates == pytest.approx([2e-4, 2e-4 * 2 / 3, 2e-4 / 3])
    assert {g["lr"] for o in checkpoint("r")["optimizers"].values() for g in o["param_groups"]} == {rates[-1]}
    flags = "--n_epochs 2 --decay_epoch 1 --decay_by step --weight_decay 0.5 --b1 0.3 --b2 0.9 --log_interval 1"
    assert run(f"{QUICK} --name s {flags}") == 0
    rates = [e["lr"] for e in log("s")]
    assert rates == pytest.approx([2e-4] * 6 + [2e-4 * (1 - k / 7) for k in range(1, 7)])
    groups = [g for o in checkpoint("s")["optimizers"].values() for g in o["param_groups"]]
    assert {(g["lr"], g["weight_decay"], *g["betas"]) for g in groups} == {(rates[-1], 0.5, 0.3, 0.9)}


def test_the_seed_reaches_weights_buffers_order_and_crops(small_set, monkeypatch):
    orders = []
    make_loader = train.make_loader

    def note_order(dataset, sampler, *arguments, **options):
        orders.append(list(sampler))
        return make_loader(dataset, sampler, *arguments, **options)

    monkeypatch.setattr(train, "make_loader", note_order)
    weights, pools, crops = [], [], []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        command = f"{QUICK} --n_epochs 1 --seed {seed} --name {name}"
        random.seed(len(weights))  # a library may draw from it; nothing here may
        assert run(command) == 0
        options = parse_options(command.split())
        system, _, _ = train.set_up(options, torch.device("cpu"))
        weights.append(system.G_AB.encoder[0].weight)
        pools.append((system.pool_A.seed, system.pool_B.seed))
        crops.append(train.build_dataset(options)[0, 0]["A"])
    assert torch.equal(weights[0], weights[1]) and torch.equal(crops[0], crops[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(crops[0], crops[2])
    assert orders[0] == orders[1] != orders[2]
    assert pools == [((1, 0, 0), (1, 0, 1))] * 2 + [((2, 0, 0), (2, 0, 1))]
    same_run("first", "again")


def test_without_intervals_a_run_still_saves_and_shows_its_end(small_set):
    assert run(f"{QUICK} --n_epochs 2 --checkpoint_interval 0 --sample_interval 0 --name r") == 0
    assert checkpoint("r")["step"] == 12 and not Path("saved_models/r/checkpoint_previous.pt").exists()
    assert load_generator("saved_models/r/AtoB.pt")[1]["step"] == 12
    assert [p.name for p in Path("images/r").glob("0*.png")] == ["00000012.png"]


def test_presets_give_defaults_that_flags_change():
    options = parse_options(["--preset", "small", "--ngf", "16"])
    assert {**SMALL, "ngf": 16}.items() <= vars(options).items()
    assert parse_options(["--preset", "small", "--n_epochs", "16"]).decay_epoch == 10
    assert parse_options(["--preset", "small", "--n_epochs", "5"]).decay_epoch == 2  # 10 would be too late
    assert parse_options(["--preset", "small", "--system", "ugatit"]).img_width == 64
    assert parse_options([]).img_width == 256
    options = parse_options(["--system", "dcgan"])  # the paper's
    assert (options.lr, options.b1, options.b2, options.batch_size) == (2e-4, 0.5, 0.999, 128)
    assert (options.img_height, options.img_width, options.nz, options.upsample) == (64, 64, 100, "transposed")
    assert {train.learning_rate(options, step, 4) for step in range(100)} == {2e-4}


def test_help_shows_each_systems_own_defaults(capsys):
    for system, identity in (("attentiongan", "0.5"), ("cyclegan", "5.0")):
        with pytest.raises(SystemExit) as caught:
            parse_options(["--system", system, "--help"])
        assert caught.value.code == 0
        shown = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert re.search(rf"--lambda_id X weight of [^-]*\(default: {identity}\)", shown)
        assert ("--n_masks" in shown) == (system == "attentiongan")


def test_the_curriculum_reaches_the_losses(small_set):
    """In a run whose rate is nearly zero each cycle loss is the full one times its factor."""
    still = f"{quick('cyclegan')} --n_epochs 2 --log_interval 1 --lr 1e-12 --pool_size 0 --precision float32"
    runs = {}
    for name, epochs in (("plain", 0), ("led", 1)):
        assert run(f"{still} --system attentiongan1 --curriculum_epochs {epochs} --name {name}") == 0
        runs[name] = log(name)
    for step, (plain, led) in enumerate(zip(runs["plain"], runs["led"], strict=True)):
        leading, tying = (0.99, 0.01) if step < 6 else (0.5, 0.5)
        assert led["cycle_A"] == pytest.approx(tying * plain["cycle_A"], rel=1e-3)
        assert led["G_AB"] == pytest.approx(leading * plain["G_AB"], rel=1e-3)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_parser_is_made_of_options_that_are_declared_once(system):
    """With help and, where they are numbers, a least value; the defaults are those of the options."""
    options = all_options(system)
    assert sum(map(len, option_groups(system).values())) == len(options)  # in one group each
    parser = make_parser(system)
    assert vars(parser.parse_args([])) == {name: each.default for name, each in options.items()}
    for name, each in options.items():
        assert each.help and (each.type not in (int, float) or each.choices or each.least is not None), name
        each.check(name, each.default)
    assert all(action.help for action in parser._actions)


# ----------------------------------------------------------------------------------------------------------
#  Stopping and resuming
# ----------------------------------------------------------------------------------------------------------


DECAY = "--n_epochs 3 --decay_epoch 1"


@pytest.mark.parametrize(
    "command, step, loading",
    [
        (f"{QUICK} {DECAY}", 1, ""),
        (f"{QUICK} {DECAY} --attn_disc mask", 5, ""),
        (f"{QUICK} {DECAY}", 6, "--cache_gb 0"),
        (f"{QUICK} {DECAY}", 7, "--cache_gb 0 --n_cpu 2"),
        (f"{quick('attentiongan1')} {DECAY} --system attentiongan1 --curriculum_epochs 1", 8, ""),
        (f"{QUICK} {DECAY} --no_background --upsample nearest", 17, ""),
        (f"{quick('ugatit')} {DECAY} --system ugatit --init default", 10, ""),
        (f"{QUICK_PIX2PIX} --n_epochs 2", 2, ""),
        (f"{QUICK_PIX2PIX} --n_epochs 2 --task colorization --cache_gb 0 --n_cpu 2", 5, ""),
        (f"{QUICK_DCGAN} --n_epochs 3", 2, ""),
        (f"{QUICK_DCGAN} --n_epochs 3", 4, "--cache_gb 0 --n_cpu 2"),
    ],
)
def test_stopped_anywhere_and_resumed_is_straight_through(small_set, pairs, monkeypatch, command, step, loading):
    command = f"{command} --precision float32"
    assert run(f"{command} --name straight") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(f"{command} --name stopped") == 128 + signal.SIGTERM
    assert checkpoint("stopped")["step"] == step
    again = loading or command  # other loading, or the same flags once more
    assert run(f"{again} --name stopped --resume") == 0
    same_run("straight", "stopped")


def test_a_first_try_of_some_steps_goes_on_by_the_same_command(small_set, capsys):
    command = f"{QUICK} --n_epochs 2 --precision float32"
    assert run(f"{command} --name straight") == 0
    assert run(f"{command} --name r --auto_resume --max_steps 5") == 0
    assert checkpoint("r")["step"] == 5
    assert run(f"{command} --name r --auto_resume --max_steps 5") == 0
    assert "--max_steps 5: the run is at step 5 already" in capsys.readouterr().out and checkpoint("r")["step"] == 5
    for _ in range(2):  # to the end, and then there is nothing left to do
        assert run(f"{command} --name r --auto_resume") == 0
        same_run("straight", "r")


def test_a_restart_by_torchrun_goes_on_by_itself(small_set, monkeypatch):
    command = f"{QUICK} --n_epochs 2 --overwrite --name r"
    assert run(f"{command} --max_steps 5") == 0
    assert parse_options(command.split()).overwrite
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    options = parse_options(command.split())
    assert options.resume and not options.overwrite


@pytest.mark.parametrize("what", ["losses", "weights"])
def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_from_before(small_set, monkeypatch, capsys, what):
    training_step = train.training_step

    def diverge(system, *others):
        shown = training_step(system, *others)
        counted.append(0)
        if len(counted) == 8 and what == "losses":
            shown["G_AB"] = torch.tensor(float("nan"))
        if len(counted) == 12 and what == "weights":
            system.D_A.layers[0].bias.data[0] = float("inf")
        return shown

    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", diverge)
        assert run(f"{QUICK} --n_epochs 3 --name r") == 2
    step = {"losses": "G_AB not finite between step 5 and step 8", "weights": "weights are not finite after step 12"}
    assert f"the run has diverged: {step[what]}" in capsys.readouterr().err
    assert checkpoint("r")["step"] == 6 and not Path("saved_models/r/checkpoint_fresh.pt").exists()
    assert run("--name r --resume") == 0


def test_pictures_in_memory_need_no_loader_processes(small_set, monkeypatch):
    asked = []
    make_loader = train.make_loader
    monkeypatch.setattr(train, "make_loader", lambda *a, **k: asked.append(a[3]) or make_loader(*a, **k))
    command = f"{QUICK} --n_epochs 1 --n_cpu 1 --precision float32"
    assert run(f"{command} --name kept") == 0
    assert run(f"{command} --name read --cache_gb 0.000001") == 0
    assert asked == [0, 1]
    same_run("kept", "read")


@pytest.mark.filterwarnings("default")  # the tracer looks at gradients of tensors that have none, and is warned
@pytest.mark.parametrize("system, network", [("attentiongan", "G_AB"), ("pix2pix", "G")])
def test_compiling_changes_no_result_and_happens_in_the_first_step(
    small_set, pairs, monkeypatch, capsys, system, network
):
    """By a backend that runs the graphs as they are: the machine's compiler would round otherwise, and take minutes."""
    monkeypatch.setattr(metrics, "Extractor", PixelExtractor)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compile(self, backend="aot_eager", **k))
    torch._dynamo.reset()
    graphs = []
    training_step = train.training_step

    def count(*arguments):
        shown = training_step(*arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return shown

    # Sheets and validation have batches of their own, and in pix2pix another mode.
    command = f"{QUICK_PIX2PIX} --img_height 16 --img_width 16" if system == "pix2pix" else quick(system)
    command += f" --system {system} --n_epochs 2 --precision float32"
    command += " --sample_interval 2 --eval_interval 1 --extractor some"
    assert run(f"{command} --name plain") == 0
    monkeypatch.setattr(train, "training_step", count)
    torch._dynamo.utils.counters.clear()
    capsys.readouterr()
    assert run(f"{command} --name compiled --compile") == 0
    assert len(re.findall(r"compiled, and took the first step, in \d+ s", capsys.readouterr().out)) == 1
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
    assert [e["step"] for e in log("compiled") if "validation" in e] == [len(graphs) // 2, len(graphs) - 1]
    assert Path("images/compiled/00000002.png").exists()
    plain, compiled = (checkpoint(name)["networks"][network] for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key, weight in plain.items():
        torch.testing.assert_close(compiled[key], weight, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_every_graph_of_a_step_is_compiled(monkeypatch):
    """U-GAT-IT's discriminators want the most, in the default layout one more than the compiler allows unless told."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compile(self, backend="eager", **k))
    torch._dynamo.reset()
    options = parse_options(f"{quick('ugatit')} --system ugatit --compile".split())
    system, optimizers, autocast = train.set_up(options, torch.device("cpu"))
    batch = {side: torch.rand(1, 3, options.img_height, options.img_width) for side in "AB"}
    for _ in range(2):
        train.training_step(system, optimizers, autocast, batch)


def test_resuming_needs_only_the_name_and_cuts_the_log(small_set, monkeypatch, capsys):
    command = f"{QUICK} --n_epochs 3 --name r --lr 0.001 --log_interval 2"
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        run(command)
    with open("saved_models/r/log.jsonl", "a") as file:
        file.write(json.dumps({"step": 8, "epoch": 2}) + "\n" + '{"step": 10, "ep')
    capsys.readouterr()
    assert run("--name r --resume") == 0
    assert "resuming r: attentiongan on small, 12 x 12, step 7 of 18" in capsys.readouterr().out
    entries = log("r")
    assert [e["step"] for e in entries] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert all("G_AB" in e for e in entries)
    assert entries[0]["lr"] == 0.001


def test_more_epochs_and_other_machines_are_noted_other_changes_refused(small_set, capsys):
    assert run(f"{QUICK} --n_epochs 1 --decay_epoch 1 --name r") == 0
    for change, message in (
        ("--lr 0.1", r"--lr 0.1 differs from the run's 0.0002"),
        ("--ngf 8", r"--ngf 8 differs from the run's 4"),
        ("--seed 1", r"--seed 1 differs from the run's 0"),
        ("--system cyclegan", r"--system cyclegan differs from the run's attentiongan"),
        ("--img_width 16", r"--img_width 16 differs from the run's 12"),
    ):
        assert run(f"--name r --resume {change}") == 2
        assert re.search(message, capsys.readouterr().err)
    small_set.rename("moved")
    Path("data/other").mkdir()
    Path("moved").rename("data/other/small")
    assert run("--name r --resume --n_epochs 2 --data_dir data/other --cache_gb 0 --n_cpu 1") == 0
    out = capsys.readouterr().out
    assert "--n_epochs was 1, is now 2" in out and "--data_dir was data, is now data/other" in out
    assert checkpoint("r")["step"] == 12
    assert run("--name r --resume --n_epochs 1") == 2
    assert "--n_epochs 1: expected at least 2" in capsys.readouterr().err


def test_a_run_goes_on_where_a_graph_or_a_compiler_cannot_be_had(small_set, capsys, monkeypatch):
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0
    state = checkpoint("r")
    state["options"]["cuda_graph"] = True
    torch.save(state, "saved_models/r/checkpoint.pt")
    assert run("--name r --resume --n_epochs 2") == 2
    assert "(--no_cuda_graph goes on with a run without it), found --device cpu" in capsys.readouterr().err
    assert run("--name r --resume --n_epochs 2 --no_cuda_graph") == 0
    assert checkpoint("r")["step"] == 12

    def compile(self, **options):
        raise RuntimeError("InvalidCxxCompiler")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    assert run(f"{QUICK} --name r --overwrite --compile") == 2
    assert "--compile: expected what torch.compile needs" in capsys.readouterr().err
    assert checkpoint("r")["step"] == 12  # nothing is lost


def test_other_pictures_than_the_runs_are_refused(small_set, capsys):
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0
    (small_set / "trainA" / "5.png").unlink()
    assert run("--name r --resume --n_epochs 2") == 2
    message = "data/small has other pictures than the run's, expected the same. missing: trainA/5.png\n"
    assert message in capsys.readouterr().err
    (small_set / "trainA" / "4.png").rename(small_set / "trainA" / "5.png")
    (small_set / "trainB" / "0.png").rename(small_set / "trainA" / "6.png")  # as many steps, other pictures
    assert run("--name r --resume --n_epochs 2") == 2
    message = (
        "data/small has other pictures than the run's, expected the same. missing: trainA/4.png, trainB/0.png; new: "
    )
    assert f"{message}trainA/6.png" in capsys.readouterr().err


def test_what_another_process_saves_while_this_one_waits_for_its_end_stays(small_set, capsys, monkeypatch):
    def lock_folder(folder):
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(b"the other's")
        return nullcontext()

    monkeypatch.setattr(utils, "lock_folder", lock_folder)
    assert run(f"{QUICK} --n_epochs 1 --name r") == 2
    assert "a run named r exists already (saved_models/r/checkpoint.pt); go on with it" in capsys.readouterr().err
    assert Path("saved_models/r/checkpoint.pt").read_bytes() == b"the other's"


TAKEN = [f"saved_models/r/{name}" for name in ("best/AtoB.pt", "kept/00000004/BtoA.pt", "latest_net_G_A.pth")]
TAKEN += ["images/r/evaluation.json", "images/r/mine.png"]


@pytest.mark.parametrize("place", TAKEN)
def test_a_name_is_taken_where_anything_lies_that_a_dead_run_would_not_leave(small_set, capsys, place):
    Path(place).parent.mkdir(parents=True)
    Path(place).write_bytes(b"mine")
    assert run(f"{QUICK} --n_epochs 1 --name r") == 2
    error = capsys.readouterr().err
    assert f"a run named r exists already ({place}); choose another --name" in error and "(--overwrite)" in error
    assert "--resume" not in error and Path(place).read_bytes() == b"mine"
    assert run(f"{QUICK} --n_epochs 1 --name r --overwrite") == 0
    assert not Path(place).exists()


def test_overwriting_empties_a_folder_that_lies_elsewhere(small_set):
    Path("disk/kept/00000099").mkdir(parents=True)
    Path("disk/checkpoint_previous.pt").write_bytes(b"old")
    Path("saved_models").mkdir()
    Path("saved_models/r").symlink_to(Path("disk").resolve())
    assert run(f"{QUICK} --n_epochs 1 --name r --overwrite") == 0
    names = {path.name for path in Path("disk").iterdir()}
    assert names == {"checkpoint.pt", "AtoB.pt", "BtoA.pt", "log.jsonl"} and Path("saved_models/r").is_symlink()


def test_two_processes_never_train_one_run(small_set, capsys, monkeypatch):
    monkeypatch.setattr(utils, "LOCK_SECONDS", 0.3)
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0
    before = Path("saved_models/r/checkpoint.pt").read_bytes()
    lock = "import sys, utils\nwith utils.lock_folder(utils.Path('saved_models/r')): print('locked', flush=True)"
    lock += "; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        for flags in (f"{QUICK} --n_epochs 1 --name r --overwrite", "--name r --resume --n_epochs 2"):
            assert run(flags) == 2
            assert "saved_models/r: another process works here" in capsys.readouterr().err
        assert Path("saved_models/r/checkpoint.pt").read_bytes() == before
        other.kill()
    assert run("--name r --resume --n_epochs 2") == 0


def test_what_is_refused_costs_no_earlier_run(small_set, capsys):
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0
    before = Path("saved_models/r/checkpoint.pt").read_bytes()
    assert run(f"{QUICK} --n_epochs 1 --name r") == 2
    assert "a run named r exists already" in (error := capsys.readouterr().err) and "--resume" in error
    for flags in ("--init_from nowhere", "--batch_size 7", "--device nonsense", "--ngf 8 --init_from r"):
        assert run(f"{QUICK} --n_epochs 1 --name r --overwrite {flags}") == 2
    for flags in ("--overwrite", "--init_from r"):
        capsys.readouterr()
        assert run(f"--name r --resume {flags}") == 2
        assert "expected one of the two" in capsys.readouterr().err
    assert Path("saved_models/r/checkpoint.pt").read_bytes() == before and Path("images/r/index.html").exists()
    # The weights it starts from may be those it replaces.
    assert run(f"{QUICK} --n_epochs 1 --lr 0 --seed 9 --name r --overwrite --init_from r") == 0
    assert checkpoint("r")["options"]["seed"] == 9


def test_a_run_that_died_before_it_saved_anything_is_no_obstacle(small_set, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", None)
        with pytest.raises(TypeError):
            run(f"{QUICK} --n_epochs 1 --name r")
    half = Path("saved_models/r/.partial.checkpoint_fresh.pt")  # the end of the process in the middle of a save
    half.write_bytes(b"half")
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0 and not half.exists()


class PixelExtractor:
    """Stands for metrics.Extractor: means and deviations of the colours; building it draws random numbers."""

    suffix = "-pixels"
    tf32: ClassVar[set[bool]] = set()  # whether it has been asked with and without

    def __init__(self, name, weights, device):
        assert (name, weights) == ("some", None)
        torch.rand(3)

    def __call__(self, images):
        self.tf32.add(torch.backends.cudnn.allow_tf32)
        pixels = images.float().flatten(2) / 255
        return Features(torch.cat([pixels.mean(2), pixels.std(2)], dim=1), None)


EVALUATE = f"{QUICK} --n_epochs 3 --decay_epoch 3 --eval_interval 1 --keep_evaluated --extractor some"


def test_held_out_pictures_choose_the_best_generators(small_set, monkeypatch):
    monkeypatch.setattr(metrics, "Extractor", PixelExtractor)
    monkeypatch.setattr(PixelExtractor, "tf32", set())
    assert run(f"{EVALUATE} --name r") == 0
    assert PixelExtractor.tf32 == {False}
    dataset = UnpairedDataset(small_set, (12, 12), hold_out=True)
    reals = {
        side: torch.stack([unaugmented(p, (12, 12)) for p in pictures]) for side, pictures in dataset.held_out.items()
    }
    extract, sums = PixelExtractor("some", None, None), {}
    entries = [entry for entry in log("r") if "validation" in entry]
    assert [(e["step"], e["epoch"]) for e in entries] == [(4, 1), (8, 2), (12, 3)]  # 2 of 6 are held out
    for entry in entries:
        figures = {}
        for direction in ("AtoB", "BtoA"):
            generator, about = load_generator(f"saved_models/r/kept/{entry['step']:08d}/{direction}.pt")
            assert about["step"] == entry["step"]
            with torch.no_grad():
                fakes = quantise(generator(normalise(reals[direction[0]])).image)
            distance = kernel_distance(extract(fakes).vectors, extract(reals[direction[-1]]).vectors)
            figures[f"KID-pixels_{direction}"] = pytest.approx(distance, abs=1e-9)
            sums[entry["step"]] = sums.get(entry["step"], 0) + distance
        assert entry["validation"] == figures
    best = min(sums, key=sums.get)
    for direction in ("AtoB", "BtoA"):
        _, about = load_generator(f"saved_models/r/best/{direction}.pt")
        assert about["step"] == best
    assert checkpoint("r")["best"] == pytest.approx(sums[best] / 2)


@pytest.mark.parametrize("step", [6, 8])
def test_evaluations_go_on_after_a_stop(small_set, monkeypatch, step):
    monkeypatch.setattr(metrics, "Extractor", PixelExtractor)
    assert run(f"{EVALUATE} --name straight") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(f"{EVALUATE} --name stopped") == 128 + signal.SIGTERM
    assert run("--name stopped --resume") == 0
    same_run("straight", "stopped")
    assert checkpoint("straight")["best"] == checkpoint("stopped")["best"]
    for direction in ("AtoB", "BtoA"):
        one, other = (load_generator(f"saved_models/{name}/best/{direction}.pt") for name in ("straight", "stopped"))
        assert one[1]["step"] == other[1]["step"]
        same(one[0].state_dict(), other[0].state_dict())


def test_a_resumed_run_remembers_its_best(small_set, monkeypatch):
    monkeypatch.setattr(metrics, "Extractor", PixelExtractor)
    distances = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(metrics.Validation, "__call__", lambda self, system: {"KID": next(distances)})
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert run(f"{EVALUATE} --name r") == 128 + signal.SIGTERM
    assert run("--name r --resume") == 0
    assert load_generator("saved_models/r/best/AtoB.pt")[1]["step"] == 4 and checkpoint("r")["best"] == 1.0


class SilentExtractor(PixelExtractor):
    """Whose making draws nothing."""

    def __init__(self, name, weights, device):
        pass


def test_the_making_of_an_extractor_changes_no_run(small_set, monkeypatch):
    for name, kind in (("loud", PixelExtractor), ("silent", SilentExtractor)):
        monkeypatch.setattr(metrics, "Extractor", kind)
        assert run(f"{EVALUATE} --name {name}") == 0
    same_run("loud", "silent")


def test_held_out_pictures_are_translated_without_noise(pairs, monkeypatch):
    monkeypatch.setattr(metrics, "Extractor", PixelExtractor)
    flags = f"{QUICK_PIX2PIX} --n_epochs 1 --eval_interval 1 --extractor some --precision float32 --name r"
    assert run(flags) == 0
    options = parse_options([*flags.split(), "--name", "another"])
    validation = metrics.Validation("some", None, train.build_dataset(options), torch.device("cpu"))
    generator, _ = load_generator("saved_models/r/AtoB.pt")
    with torch.no_grad():
        fakes = quantise(generator.eval()(normalise(validation.images["A"])).image)
    expected = kernel_distance(validation.extractor(fakes).vectors, validation.features["B"])
    (entry,) = [e for e in log("r") if "validation" in e]
    assert entry["validation"] == {"KID-pixels_AtoB": pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize("how", ["ctrl-c", "terminal closed"])
def test_signals_from_outside_save_and_leave(small_set, start, how):
    """With loader processes, and with a real terminal for SIGHUP."""
    command = script(f"{QUICK} --n_epochs 500 --name r --cache_gb 0 --n_cpu 1")
    main_end, run_end = pty.openpty()
    process = start(command, claim_terminal, stdin=run_end, stdout=run_end, stderr=run_end, start_new_session=True)
    os.close(run_end)
    os.set_blocking(main_end, False)
    shown = b""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (Path("saved_models/r/log.jsonl").exists() and log("r")):
        shown += drain(main_end)
        time.sleep(0.05)
    if how == "ctrl-c":
        os.write(main_end, b"\x03")
        while process.poll() is None and time.monotonic() < deadline:
            shown += drain(main_end)
            time.sleep(0.05)
        shown += drain(main_end)
        assert b"stopped after step" in shown and b"--resume goes on" in shown
        assert b"Traceback" not in shown
    os.close(main_end)
    number = signal.SIGINT if how == "ctrl-c" else signal.SIGHUP
    assert process.wait(30) == 128 + number
    assert 0 < checkpoint("r")["step"] < 3000


def claim_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def drain(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_run_that_loses_the_reader_of_its_output_saves_and_leaves(small_set, monkeypatch, capsys, request, nohup):
    reader, writer = os.pipe()
    os.close(reader)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with open(writer, "w", buffering=1) as lost, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", lost)
        assert run(f"{QUICK} --n_epochs 1 --name r") == (0 if nohup else 128 + signal.SIGHUP)
        assert sys.stdout is lost
    assert checkpoint("r")["step"] == (6 if nohup else 1) and not capsys.readouterr().err.strip()
    assert run("--name r --resume") == 0


@pytest.mark.parametrize("flag, restarts", [("--auto_resume", "0"), ("", "1")])
def test_a_run_killed_after_its_first_evaluation_starts_again(small_set, capsys, monkeypatch, flag, restarts):
    Path("saved_models/r/best").mkdir(parents=True)
    Path("saved_models/r/best/AtoB.pt").touch()
    assert run(f"{QUICK} --name r --max_steps 1") == 2
    assert "a run named r exists already (saved_models/r/best/AtoB.pt)" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)  # as torchrun does
    assert run(f"{QUICK} --name r --max_steps 1 {flag}") == 0
    assert checkpoint("r")["step"] == 1 and not Path("saved_models/r/best").exists()


# ----------------------------------------------------------------------------------------------------------
#  What cannot be used is named
# ----------------------------------------------------------------------------------------------------------


REFUSED = {
    f"{QUICK} --n_epochs 2": [
        ("--img_height 14", r"--img_height 14: expected a multiple of 4, at least 12"),
        ("--img_width 8", r"--img_width 8: expected a multiple of 4, at least 12"),
        ("--crop_size 8", r"--crop_size 8: expected a multiple of 4, at least 12"),
        ("--crop_size 16", r"--crop_size 16: expected at most 12, the size of the pictures"),
        ("--n_epochs 3 --decay_epoch 4", r"--decay_epoch 4 lies beyond --n_epochs 3"),
        ("--decay_by never --decay_epoch 1", r"--decay_epoch: --decay_by never keeps the rate"),
        ("--extractor efficientnet-lite0", r"--extractor is for evaluations during training, expected --eval_interval"),
        ("--batch_size 7", r"6 samples in data/small do not fill one batch of 7"),
        ("--batch_size 0", r"--batch_size 0: expected at least 1"),
        ("--device nonsense", r"--device nonsense: not usable here"),
        ("--name a/b", r"--name a/b: expected a plain name"),
        ("--dataset_name small/", r"--dataset_name small/: expected a plain name"),
        ("--seed 9999999999999999999", r"--seed 9999999999999999999: expected at most 4611686018427387904"),
        ("--name ..", r"--name ..: expected a plain name"),
        ("--name pretrained", r"--name pretrained: expected a plain name"),
        ("--b1 1.5", r"--b1 1.5: expected below 1$"),
        ("--lr nan", r"--lr nan: expected at least 0"),
        ("--weight_decay inf", r"--weight_decay inf: expected a finite number"),
        ("--device meta", r"--device meta: not usable here \(expected cuda, mps or cpu\)"),
        ("--no_background --attn_disc concat", r"--attn_disc concat needs the background mask"),
        ("--attn_real partner", r"--attn_real partner needs --attn_disc concat or mask"),
        ("--attn_grad picture", r"--attn_grad picture needs --attn_disc concat or mask"),
        ("--resume --overwrite", r"no such checkpoint, nothing to resume"),
        ("--keep_evaluated", r"--keep_evaluated is for evaluations during training, expected --eval_interval with it"),
        ("--inception w.pth", r"--inception is for evaluations during training, expected --eval_interval with it"),
        ("--eval_interval 1 --extractor none", r"--extractor none: --eval_interval compares features"),
        (
            "--eval_interval 1 --inception w.pth --extractor efficientnet-lite0",
            r"--inception is for torch-fidelity's extractors, found --extractor efficientnet-lite0",
        ),
        # What the parser itself refuses.
        ("--channels 2", r"--channels: invalid choice: 2"),
        ("--attention_kernel 3", r"--attention_kernel: invalid choice: 3"),
        ("--system nonsense", "--system: invalid choice: 'nonsense'"),
        ("--batch_size many", "--batch_size: invalid int value: 'many'"),
        ("--light", "--light belongs to --system ugatit, found --system attentiongan"),
        ("--epochs=3", "--epochs: here --n_epochs"),
        ("--n_epoch 2", "--n_epoch: no flag of attentiongan; near: --n_epochs"),
    ],
    f"{quick('cyclegan')} --system cyclegan": [
        ("--n_masks 4", "--n_masks belongs to --system attentiongan, found --system cyclegan")
    ],
    f"{quick('attentiongan1')} --system attentiongan1": [
        ("--lambda_gan 0", "--lambda_gan 0: only a copy is left to train for")
    ],
    f"{quick('ugatit')} --system ugatit": [
        ("--init zero", "--init: invalid choice: 'zero'"),
        ("--n_residual_blocks 0", "--n_residual_blocks 0: expected at least 1"),
        ("--crop_size 12", "--crop_size 12: the full U-GAT-IT takes only pictures of its training size, 12 x 12"),
    ],
    QUICK_PIX2PIX: [
        ("--dataset_name small", r"data/small: expected pairs, .*; found 1 without a partner, .* 5"),
        ("--img_height 48", r"--img_height 48: expected a multiple of 32, at least 32"),
        ("--unet_depth 7", r"--unet_depth 7: expected 2 to 6 at 64 x 64, or 0 for the most"),
        ("--lambda_gan 0 --lambda_L1 0", r"nothing to train by"),
        ("--lambda_gan 0 --gan_loss lsgan", r"--gan_loss lsgan needs an adversarial term"),
        ("--unet_depth 1", r"--unet_depth 1: expected 2 to 6 at 64 x 64"),
        ("--img_height 2", r"--img_height 2, --img_width \d+: expected at least 4"),
        ("--task colorization --channels 1", r"colorization makes colours: --channels 1, expected 3"),
        ("--task colorization --dataset_name nothing", r"data/nothing: no such folder. Expected colour pictures"),
    ],
    QUICK_DCGAN: [
        ("--img_height 48", r"--img_height 48 --img_width 16: dcgan makes square pictures, .* 16, 32, 64, 128"),
        ("--img_height 24 --img_width 24", r"--img_height 24 --img_width 24: dcgan makes square pictures"),
        ("--img_height 256 --img_width 256", r"--img_height 256 --img_width 256: dcgan makes square pictures"),
        ("--task colorization", r"is for translations, and pictures from noise are none"),
        ("--crop_size 16", r"--crop_size 16: dcgan crops no pictures, expected 0"),
        ("--eval_interval 1", r"--eval_interval measures translations, and pictures from noise are none; expected 0"),
        ("--dataset_name nothing", r"data/nothing: no such folder. Expected pictures in data/nothing/train"),
        ("--init_from AtoB.pt", r"AtoB.pt: translates AtoB, expected a generator that draws from noise"),
    ],
}
CASES = [(f"{base} {flags}", message) for base, cases in REFUSED.items() for flags, message in cases]


@pytest.mark.parametrize("command, message", CASES, ids=[flags for cases in REFUSED.values() for flags, _ in cases])
def test_what_does_not_fit_is_named_in_one_line(small_set, pairs, capsys, command, message):
    torch.save({**pack_generator(AttentionGenerator(ngf=4)), "direction": "AtoB"}, "AtoB.pt")
    assert run(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: error: ") and re.search(message, error)
    assert not list(Path("saved_models").rglob("*.pt"))


def test_many_processes_need_the_other_script(small_set, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(QUICK) == 2
    assert "found WORLD_SIZE 2: expected train_dist.py" in capsys.readouterr().err


def test_out_of_memory_says_what_to_lower_and_no_other_error_is_hidden(small_set, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(train, "training_step", fail)
    message = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    assert run(f"{QUICK} --n_epochs 1") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory with --batch_size 1, --img_height 12" in error
    message = "a bug"
    with pytest.raises(RuntimeError, match="a bug"):
        run(f"{QUICK} --n_epochs 1")


def test_a_bug_ends_the_process_though_its_loader_ignores_signals(small_set):
    broken = (
        f"import train; train.training_step = None; train.main({[*QUICK.split(), '--cache_gb', '0', '--n_cpu', '1']})"
    )
    process = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "'NoneType' object is not callable" in process.stderr
