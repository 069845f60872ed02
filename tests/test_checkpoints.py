from utils import InputError

import copy
import os
import re
import resource
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import (
    QUICK,
    QUICK_PIX2PIX,
    checkpoint,
    convolve,
    norm_relu,
    official_attention_forward,
    official_attention_weights,
    official_ugatit_weights,
    plain_layer_instance_norm,
    quick,
    run,
    same,
    same_run,
    trunk,
    upsample,
)
from conftest import ROOT

import checkpoints
import train
from checkpoints import (
    CheckpointFiles,
    find_generator,
    find_run,
    load_generator,
    open_generator,
    open_generators,
    pack_generator,
    save_atomic,
)
from models import (
    AttentionGenerator,
    DCGANGenerator,
    ResNetGenerator,
    SingleMaskGenerator,
    UGATITGenerator,
    UNetGenerator,
    heat_map,
)
from options import MACHINE, parse_options, stored_options

# ----------------------------------------------------------------------------------------------------------
#  Names
# ----------------------------------------------------------------------------------------------------------


def put_generators(*folders):
    for folder in folders:
        checkpoints.save_generator(AttentionGenerator(ngf=4, n_residual_blocks=1), {"direction": "AtoB"}, Path(folder))


def test_generators_are_found_by_run_shipped_name_folder_and_file(monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", Path("none"))
    put_generators("saved_models/run", "saved_models/pretrained/shipped", "folder")
    Path("official").mkdir()
    torch.save({}, "official/latest_net_G_B.pth")
    for where, direction, expected in (
        ("run", "AtoB", "saved_models/run/AtoB.pt"),
        ("saved_models/run", "AtoB", "saved_models/run/AtoB.pt"),
        ("shipped", "AtoB", "saved_models/pretrained/shipped/AtoB.pt"),
        ("pretrained/shipped", None, "saved_models/pretrained/shipped/AtoB.pt"),
        ("folder", None, "folder/AtoB.pt"),
        ("folder/AtoB.pt", "AtoB", "folder/AtoB.pt"),
        (Path("folder").resolve(), "AtoB", Path("folder/AtoB.pt").resolve()),
        ("official", "BtoA", "official/latest_net_G_B.pth"),
        ("official", None, "official/latest_net_G_B.pth"),
    ):
        assert find_generator(where, direction) == Path(expected)
    with pytest.raises(InputError, match=r"^official/latest_net_G_B.pth: translates the other way"):
        find_generator("official/latest_net_G_B.pth", "AtoB")
    with pytest.raises(InputError, match=r"no generator for BtoA found.*saved_models/run, .*are: none$"):
        find_generator("run", "BtoA")


@pytest.mark.parametrize("shipped", ["saved_models/pretrained/horse", "code/horse"])
def test_a_run_and_shipped_weights_of_one_name_are_refused_as_ambiguous(monkeypatch, shipped):
    monkeypatch.setattr(checkpoints, "PRETRAINED", Path("code").resolve())
    put_generators("saved_models/horse", shipped)
    message = "^horse is a run and the name of shipped weights: expected saved_models/horse or pretrained/horse$"
    for call in (partial(find_generator, direction=None), open_generator, open_generators, checkpoints.is_shipped):
        with pytest.raises(InputError, match=message):
            call("horse")
    for where, expected in (("saved_models/horse", "saved_models/horse"), ("pretrained/horse", shipped)):
        assert find_generator(where, "AtoB").resolve() == Path(expected, "AtoB.pt").resolve()
        assert list(open_generators(where)) == ["AtoB"] and checkpoints.is_shipped(where) == (expected == shipped)


@pytest.mark.parametrize("where", ["horse2zebra_attentiongan", "pretrained/horse2zebra_attentiongan"])
@pytest.mark.parametrize("folder", [".", ROOT])
def test_shipped_weights_are_found_from_any_working_directory(monkeypatch, where, folder):
    monkeypatch.chdir(folder)
    shipped = ROOT / "saved_models/pretrained/horse2zebra_attentiongan"
    assert find_generator(where, "BtoA").resolve() == shipped / "BtoA.pt"
    assert checkpoints.is_shipped(where) and list(open_generators(where)) == ["AtoB", "BtoA"]


# ----------------------------------------------------------------------------------------------------------
#  Generator files
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "generator",
    [
        AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3, attention_kernel=7, upsample="nearest"),
        AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3, background=False),
        SingleMaskGenerator(3, 4, 1),
        ResNetGenerator(1, 4, 2),
        UNetGenerator(1, 4, 3),
        UGATITGenerator(1, 4, 1),
        UGATITGenerator(3, 4, 1, size=(16, 16), init="default"),
    ],
    ids=lambda g: type(g).__name__,
)
def test_our_own_files_open_as_the_same_network(generator, half, tmp_path):
    packed = pack_generator(generator)
    if half:
        packed["weights"] = {k: v.half() for k, v in packed["weights"].items()}
        generator = copy.deepcopy(generator).half().float()  # the same rounding
    torch.save({**packed, "direction": "AtoB", "step": 3}, tmp_path / "AtoB.pt")
    loaded, about = load_generator(tmp_path / "AtoB.pt")
    assert about == {"direction": "AtoB", "step": 3}
    assert type(loaded) is type(generator) and loaded.settings == generator.settings
    x = torch.rand(1, generator.settings["channels"], 16, 16) * 2 - 1
    assert torch.equal(loaded(x).image, generator(x).image)
    assert next(loaded.parameters()).dtype == torch.float32


def test_a_file_of_dcgans_generator_holds_the_running_statistics_and_translates_none(tmp_path):
    generator = DCGANGenerator(nz=3, ngf=4, channels=1, size=16, upsample="nearest")
    noise = torch.rand(4, 3) * 2 - 1
    for _ in range(5):
        generator(noise)
    path = tmp_path / "generator.pt"
    torch.save({**pack_generator(generator), "direction": "generator"}, path)
    for where in (path, tmp_path):
        opened, about = open_generator(where, "generator")
        assert about["direction"] == "generator"
        assert torch.equal(opened.eval()(noise[:1]), generator.eval()(noise[:1]))
        for call in (open_generator, partial(open_generator, direction="BtoA"), open_generators):
            with pytest.raises(
                InputError, match=r"generator\.pt: draws pictures from noise \(.*\) and translates none"
            ):
                call(where)
    packed = {**pack_generator(ResNetGenerator(ngf=4, n_residual_blocks=1)), "direction": "AtoB"}
    for weights in (packed, official_ugatit_weights(1)):
        torch.save(weights, tmp_path / "AtoB.pt")
        with pytest.raises(InputError, match=r"AtoB\.pt: translates AtoB, expected a generator that draws from noise"):
            open_generator(tmp_path / "AtoB.pt", "generator")
    path.unlink()
    with pytest.raises(InputError, match=r"no generator for noise found\. Looked for a file, or generator\.pt in"):
        open_generator(tmp_path, "generator")


# ----------------------------------------------------------------------------------------------------------
#  Checkpoints on disk
# ----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    save_atomic({"value": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match=r"state\.pt: could not be written"):
            save_atomic({"value": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def make_state(step, **networks):
    """The least that is a checkpoint."""
    options = dict.fromkeys(("system", "dataset_name", "data_dir"), "") | {"n_epochs": 9}
    state = {"options": options, "step": step, "steps_per_epoch": 1, "picture_names": [], "networks": networks}
    return state | {"optimizers": {}, "ranks": [{"children": {}, "record": {}, "random": torch.get_rng_state()}]}


def write(files, step, **networks):
    files.save(make_state(step, **networks))
    files.rotate()


def test_two_checkpoints_are_kept(tmp_path):
    files = CheckpointFiles(tmp_path)
    assert not files.exist()
    with pytest.raises(InputError, match="no such checkpoint, nothing to resume"):
        files.load()
    for step in (1, 2, 3):
        write(files, step=step)
    assert files.load()["step"] == 3
    assert torch.load(files.previous)["step"] == 2
    os.replace(files.newest, files.fresh)  # killed between the two renames
    assert files.load()["step"] == 3
    write(files, step=3)
    files.save(make_state(4))  # killed before them
    assert files.load()["step"] == 4
    files.newest.unlink()
    os.truncate(files.fresh, 100)
    assert files.load()["step"] == 2
    files.previous.unlink()
    assert files.exist()


@pytest.mark.parametrize("step", [2, 3])
def test_damage_inside_is_noticed_and_never_becomes_the_previous_checkpoint(tmp_path, capsys, step):
    weights = torch.arange(100_000.0)
    for at in range(step):
        write(CheckpointFiles(tmp_path), step=at, weights=weights + at)
    path = tmp_path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[200_000:200_100] = bytes(100)  # which torch.load does not see
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["networks"]["weights"], weights + step - 1)

    files = CheckpointFiles(tmp_path)
    state = files.load()
    assert state["step"] == step - 2 and torch.equal(state["networks"]["weights"], weights + step - 2)
    assert f"{path}: damaged" in (out := capsys.readouterr().out) and f"going back to {files.previous}" in out
    write(files, step=9)
    assert files.load()["step"] == 9 and torch.load(files.previous)["step"] == step - 2
    write(files, step=10)
    assert torch.load(files.previous)["step"] == 9


# ----------------------------------------------------------------------------------------------------------
#  The state of a run
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "another lr"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_set, capsys, damage):
    command = f"{QUICK} --n_epochs 3 --precision float32"
    assert run(f"{command} --name straight") == 0
    assert run(f"{command} --name r") == 0
    newest = Path("saved_models/r/checkpoint.pt")
    if damage == "missing":
        newest.unlink()
    elif damage == "another lr":  # which the unpickler does not see
        content = newest.read_bytes()
        assert content.count(struct.pack(">d", 0.0002)) == 1
        newest.write_bytes(content.replace(struct.pack(">d", 0.0002), struct.pack(">d", 0.0001)))
    else:
        os.truncate(newest, newest.stat().st_size // 2 if damage == "truncated" else 0)
    capsys.readouterr()
    assert run("--name r --resume") == 0
    out = capsys.readouterr().out
    assert "step 12 of 18" in out
    assert damage == "missing" or (
        out.count("checkpoint.pt: damaged") == 1 and "checkpoint_previous.pt, step 12" in out
    )
    same_run("straight", "r")
    for file in ("checkpoint.pt", "checkpoint_previous.pt"):
        os.truncate(f"saved_models/r/{file}", 10)
    assert run("--name r --resume") == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt: damaged" in error and "checkpoint_previous.pt: damaged" in error


def test_resuming_what_is_not_there_or_of_another_format(small_set, capsys):
    assert run(f"{QUICK} --name r --resume") == 2
    assert "saved_models/r/checkpoint.pt: no such checkpoint" in capsys.readouterr().err
    assert run(f"{QUICK} --n_epochs 1 --name r") == 0
    state = checkpoint("r")
    torch.save({**state, "options": {**state["options"], "gone": 7}}, "saved_models/r/checkpoint.pt")
    assert run("--name r --resume") == 2
    assert "--resume: the run has --gone 7, which this version does not know" in capsys.readouterr().err
    torch.save({**state, "options": {**state["options"], "decay_epoch": "1"}}, "saved_models/r/checkpoint.pt")
    assert run("--name r --resume") == 2
    assert "--decay_epoch 1: expected int" in capsys.readouterr().err
    torch.save({**state, "options": {**state["options"], "gone": 0}}, "saved_models/r/checkpoint.pt")
    assert run("--name r --resume") == 0
    torch.save({**state, "format": 99}, "saved_models/r/checkpoint.pt")
    assert run("--name r --resume") == 2
    assert "checkpoint format 99, this code reads format 2" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_resumed_run_keeps_nothing_of_its_file_which_windows_could_not_replace(small_set, monkeypatch):
    assert run(f"{QUICK} --n_epochs 1 --log_interval 4 --max_steps 3 --name r") == 0
    maps = Path("/proc/self/maps")

    def look(files, state, save=CheckpointFiles.save):
        assert "saved_models/r/checkpoint" not in maps.read_text()
        return save(files, state)

    state = CheckpointFiles(Path("saved_models/r")).load()
    assert "saved_models/r/checkpoint" in maps.read_text()
    del state
    monkeypatch.setattr(CheckpointFiles, "save", look)
    assert run("--name r --resume") == 0


class Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


@pytest.mark.parametrize(
    "owner, function, call",
    [
        (checkpoints.RunState, "save_generators", 1),  # the first checkpoint is written, no generator yet
        (checkpoints, "save_generator", 2),  # one of the first two generators
        (CheckpointFiles, "rotate", 1),  # both of them
        (checkpoints.RunState, "save_generators", 2),  # the last checkpoint, with the generators of the one before
        (CheckpointFiles, "rotate", 2),
    ],
)
def test_a_run_killed_within_a_save_is_resumed_as_if_undisturbed(small_set, monkeypatch, capsys, owner, function, call):
    command = f"{QUICK} --n_epochs 2 --precision float32"
    assert run(f"{command} --name straight") == 0
    original, calls = getattr(owner, function), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, killed)
        with pytest.raises(Killed):
            run(f"{command} --name killed")
    assert not find_run("killed")["finished"]  # even where it has taken its last step
    assert run(f"{command} --name killed") == 2
    assert "a run named killed exists already" in (error := capsys.readouterr().err) and "(--resume)" in error
    assert run("--name killed --resume") == 0
    same_run("straight", "killed")
    straight, resumed = Path("saved_models/straight"), Path("saved_models/killed")
    assert {p.name for p in resumed.iterdir()} >= {"AtoB.pt", "BtoA.pt"} and find_run("killed")["finished"]
    assert not [*resumed.glob("checkpoint_fresh.pt"), *resumed.glob(".*")]
    for name in ("AtoB.pt", "BtoA.pt"):
        (one, about), (other, about_other) = (load_generator(folder / name) for folder in (straight, resumed))
        same(dict(one.state_dict()), dict(other.state_dict()))
        assert about == about_other and about["step"] == 12


def test_checkpoints_within_an_epoch_are_minutes_apart(small_set, monkeypatch):
    options = parse_options(f"{QUICK} --name r".split())
    system, optimizers, _ = train.set_up(options, torch.device("cpu"))
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    own, dataset = stored_options(options), train.build_dataset(options)
    state = checkpoints.RunState(Path("r"), own, MACHINE, system, optimizers, 6, dataset, torch.device("cpu"))
    now += 59
    assert not state.is_due(1)
    now += 2
    assert state.is_due(1) and not state.is_due(0)
    Path("r").mkdir()
    state.save(1, {})
    assert not state.is_due(1)


def test_moments_from_another_layout_take_their_parameters():
    """A checkpoint from CUDA holds channels_last moments; the step on the CPU must be the same."""
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(4, 3, 5, 5))
        first = torch.optim.Adam([parameter], fused=True)
        parameter.grad = torch.randn(4, 3, 5, 5)
        first.step()
        state = first.state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].contiguous(memory_format=layout)
        state["param_groups"][0] |= {"betas": "unused", "amsgrad": True}  # settings are those of the run
        second = torch.optim.Adam([parameter], fused=True)
        checkpoints.load_moments(second, state)
        second.step()
        steps.append(parameter.detach().clone())
    assert torch.equal(*steps)


def test_moments_that_do_not_fit_the_parameters_are_refused():
    weight, bias = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight, bias], fused=True)
    (weight.sum() + bias.sum()).backward()
    optimizer.step()
    sound = optimizer.state_dict()["state"]
    for change, problem in (
        ({1: {}}, "missing: exp_avg, exp_avg_sq, step"),
        ({2: sound[1]}, "moments of weights 0, 1, 2, expected those of 0 to 1"),
        ({1: sound[0]}, r"exp_avg of shape \(2, 3\), expected \(2,\)"),
        ({1: {**sound[1], "exp_avg_sq": torch.full((2,), torch.inf)}}, "exp_avg_sq is not finite"),
        ({1: {**sound[1], "step": 3}}, "step: expected a tensor"),
    ):
        with pytest.raises(ValueError, match=problem):
            checkpoints.load_moments(optimizer, {"state": {**sound, **change}})


def test_a_parameter_that_never_had_a_gradient_does_not_hinder_resuming():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    first, second = (torch.optim.Adam([unused, used], fused=True) for _ in range(2))
    used.sum().backward()
    first.step()
    checkpoints.load_moments(second, first.state_dict())
    assert torch.equal(second.state[used]["exp_avg"], first.state[used]["exp_avg"]) and unused not in second.state


# ----------------------------------------------------------------------------------------------------------
#  Starting from other weights
# ----------------------------------------------------------------------------------------------------------


def test_init_from_takes_generators_and_the_discriminators_that_fit(small_set, capsys):
    assert run(f"{QUICK} --n_epochs 1 --name first") == 0
    assert run(f"{QUICK} --n_epochs 1 --lr 0 --name second --seed 5 --init_from first") == 0
    for network in ("G_AB", "G_BA", "D_A", "D_B"):
        same(checkpoint("first")["networks"][network], checkpoint("second")["networks"][network])
    out = capsys.readouterr().out
    assert "G_AB starts from first" in out and "D_A, D_B start from saved_models/first/checkpoint.pt" in out
    with pytest.raises(ValueError, match=r"first/checkpoint.pt: networks of a training, expected .* AtoB.pt"):
        load_generator("saved_models/first/checkpoint.pt")
    assert run(f"{QUICK} --n_epochs 1 --ndf 8 --name wider --init_from first") == 0
    why = "--init_from saved_models/first/checkpoint.pt: D_A: layers.0.weight has shape (4, 3, 4, 4), expected (8, 3,"
    out = capsys.readouterr().out
    assert "D_A, D_B start anew: docs/training.md" in out
    assert re.search(rf"come from a run with --ndf 4 --n_layers_D \d --attn_disc none; {re.escape(why)}", out)
    assert run(f"{QUICK} --n_epochs 1 --lr 0 --attn_disc mask --name guided --init_from first") == 0
    out = capsys.readouterr().out
    assert "D_A, D_B start from saved_models/first/checkpoint.pt" in out and "guided_D_A, guided_D_B start anew" in out
    same(checkpoint("first")["networks"]["D_B"], checkpoint("guided")["networks"]["D_B"])
    shutil.copytree("saved_models/first", "bare")
    for path in Path("bare").glob("checkpoint*.pt"):
        path.unlink()
    assert run(f"{QUICK} --n_epochs 1 --name fresh --init_from bare") == 0
    assert "D_A, D_B start anew: docs/training.md" in capsys.readouterr().out
    Path("bare/discriminators.pt").write_bytes(b"x")
    assert run(f"{QUICK} --n_epochs 1 --name third --init_from bare") == 2
    assert "bare/discriminators.pt: not a readable weights file" in capsys.readouterr().err
    assert run(f"{QUICK} --n_epochs 1 --name third --n_masks 4 --init_from first") == 2
    message = (
        r"first holds another AttentionGenerator for AtoB .*; these flags fit: --system attentiongan .*--n_masks 3 "
        r".*--ndf 4 --n_layers_D \d"
    )
    assert re.search(message, capsys.readouterr().err)
    assert run(f"{QUICK} --n_epochs 1 --name fourth --init_from nowhere") == 2
    err = capsys.readouterr().err
    assert "nowhere: no generator for AtoB found" in err
    # Refused ones are no runs.
    assert Path("saved_models/third").exists() and "first, fresh, guided, second, wider" in err
    assert run(f"{QUICK} --n_epochs 1 --name fourth --init_from saved_models/first/AtoB.pt") == 2
    assert "AtoB.pt translates only AtoB, expected a run or folder with a generator for BtoA" in capsys.readouterr().err
    Path("bad").mkdir()
    Path("bad/AtoB.pt").write_bytes(b"x")
    assert run(f"{QUICK} --n_epochs 1 --name fifth --init_from bad") == 2
    assert "bad/AtoB.pt: not a readable weights file" in capsys.readouterr().err


def test_init_from_a_checkpoint_takes_all_networks_along(small_set, capsys):
    """To pictures of another size, too."""
    assert run(f"{QUICK} --n_residual_blocks 2 --n_epochs 1 --name first") == 0
    start = "--n_residual_blocks 2 --n_epochs 1 --lr 0 --seed 5 --img_width 16 --init_from first/checkpoint.pt"
    assert run(f"{QUICK} {start} --name second") == 0
    assert "G_AB, G_BA, D_A, D_B start from saved_models/first/checkpoint.pt" in capsys.readouterr().out
    before, after = (checkpoint(name)["networks"] for name in ("first", "second"))
    assert before.keys() == after.keys() == {"G_AB", "G_BA", "D_A", "D_B"}
    for network in before:
        same(before[network], after[network])
    for flags, message in (
        ("--ndf 8", r"D_A: layers.0.weight has shape \(4, 3, 4, 4\), expected \(8, 3, 4, 4\)"),
        ("--attn_disc mask", "no network guided_D_A, found D_A, D_B, G_AB, G_BA"),
        ("--n_residual_blocks 1", r"G_AB: .*encoder\.10"),
    ):
        assert run(f"{QUICK} {start} {flags} --name third") == 2
        fitting = "these flags fit: --system attentiongan .*--n_residual_blocks 2 .*--ndf 4"
        assert re.search(
            rf"--init_from saved_models/first/checkpoint.pt: {message}.*{fitting}", capsys.readouterr().err
        )
    assert run(f"{QUICK} --n_epochs 1 --attn_disc mask --name guided") == 0
    assert run(f"{QUICK} --n_epochs 1 --init_from guided/checkpoint.pt --name unguided") == 0
    assert "guided_D_A, guided_D_B of that checkpoint are not used: this system has none" in capsys.readouterr().out
    assert run(f"{QUICK} --n_epochs 1 --name third --init_from nowhere/checkpoint.pt") == 2
    assert "--init_from nowhere/checkpoint.pt: no such checkpoint" in capsys.readouterr().err
    for name in ("checkpoint_previous.pt", "checkpoint_fresh.pt"):  # all that a kill has left
        folder = Path("saved_models", name.partition(".")[0])
        shutil.copytree("saved_models/first", folder)
        for path in folder.glob("checkpoint*"):
            path.rename(folder / name) if path.name == "checkpoint.pt" else path.unlink()
        for where in (f"{folder.name}/checkpoint.pt", folder.name):
            assert run(f"{QUICK} --n_residual_blocks 2 --n_epochs 1 --name on --overwrite --init_from {where}") == 0
            assert re.search(rf"D_A, D_B start from .*{folder.name}/checkpoint.pt", capsys.readouterr().out)


@pytest.mark.parametrize(
    "command, own, other",
    [
        (
            f"{quick('ugatit')} --system ugatit --light",
            "--img_height 16 --img_width 16",
            "--img_height 64 --img_width 64",
        ),
        (QUICK_PIX2PIX, "--lambda_gan 0", ""),
    ],
)
def test_flags_that_fit_a_checkpoint_are_named(small_set, pairs, capsys, command, own, other):
    command += " --n_epochs 1 --max_steps 1"
    assert run(f"{command} {own} --name first") == 0
    assert run(f"{command} {other} --name second --init_from first/checkpoint.pt") == 2
    assert re.search(rf"these flags fit: --system .*{own}", capsys.readouterr().err)
    assert run(f"{command} {own} --name second --init_from first/checkpoint.pt") == 0


def test_init_from_an_official_u_gat_it_file_that_holds_both(small_set):
    weights = {name: official_ugatit_weights(seed, n_blocks=1) for seed, name in enumerate(("genA2B", "genB2A"))}
    torch.save(weights, "official.pt")
    still = "--n_epochs 1 --lr 0 --system ugatit --light --init_from official.pt --name r"
    assert run(f"{quick('ugatit')} {still}") == 0
    for network, name in (("G_AB", "genA2B"), ("G_BA", "genB2A")):
        found = checkpoint("r")["networks"][network]
        assert torch.equal(found["encoder.0.weight"], weights[name]["DownBlock.1.weight"])
        assert torch.equal(found["decoder.8.weight"], weights[name]["UpBlock2.11.weight"])


# ----------------------------------------------------------------------------------------------------------
#  Official checkpoints: the official networks, written from their description, with all their biases
# ----------------------------------------------------------------------------------------------------------


def official_cyclegan_weights(ngf=4, n_blocks=9):
    names = {"conv1": "model.1", "conv2": "model.4", "conv3": "model.7"}
    for i in range(n_blocks):
        names |= {f"resnet_blocks.{i}.conv{j}": f"model.{10 + i}.conv_block.{k}" for j, k in ((1, 1), (2, 5))}
    last = {f"deconv{j}_attention": f"model.{10 + n_blocks + k}" for j, k in ((1, 0), (2, 3))}
    source = official_attention_weights(ngf, n_blocks)
    weights = {}
    for ours, theirs in {**names, **last}.items():
        for kind in ("weight", "bias"):
            weights[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"]
    weights[f"model.{17 + n_blocks}.weight"] = source["deconv3_content.weight"][:3].clone()
    weights[f"model.{17 + n_blocks}.bias"] = source["deconv3_content.bias"][:3].clone()
    return weights


def official_cyclegan_forward(x, weights, n_blocks=9):
    blocks = [(f"model.{10 + i}.conv_block.1", f"model.{10 + i}.conv_block.5") for i in range(n_blocks)]
    x = trunk(x, weights, ("model.1", "model.4", "model.7"), blocks)
    x = norm_relu(upsample(x, weights, f"model.{10 + n_blocks}"))
    x = norm_relu(upsample(x, weights, f"model.{13 + n_blocks}"))
    return torch.tanh(convolve(x, weights, f"model.{17 + n_blocks}", reflect=3))


OFFICIAL = {
    "attentiongan": (official_attention_weights, official_attention_forward, AttentionGenerator),
    "attentiongan-geo": (
        partial(official_attention_weights, n_contents=10),
        partial(official_attention_forward, n_contents=10),
        AttentionGenerator,
    ),
    "cyclegan": (official_cyclegan_weights, official_cyclegan_forward, ResNetGenerator),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_compute_the_same_function(name, prefix, tmp_path):
    make, forward, network = OFFICIAL[name]
    weights = make()
    path = tmp_path / "latest_net_G_A.pth"
    # Stored as float32, so the comparison starts from float32 values.
    weights = {k: v.float().double() for k, v in weights.items()}
    torch.save({prefix + k: v.float() for k, v in weights.items()}, path)
    generator, about = load_generator(path)
    assert type(generator) is network and about == {}
    x = torch.rand(2, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    difference = (generator.double()(x).image - forward(x, weights)).abs().max()
    assert difference < 1e-9


def official_ugatit_forward(x, weights, n_blocks=2):
    """Picture, CAM logits, sum of the attended features."""

    def conv(x, name, reflect, stride=1):
        return F.conv2d(F.pad(x, (reflect,) * 4, mode="reflect"), weights[f"{name}.weight"], stride=stride)

    def norm(x, rho, gamma, beta):
        return plain_layer_instance_norm(x, rho.flatten(), *(s.flatten(1).expand(len(x), -1) for s in (gamma, beta)))

    x = norm_relu(conv(x, "DownBlock.1", 3))
    x = norm_relu(conv(x, "DownBlock.5", 1, stride=2))
    x = norm_relu(conv(x, "DownBlock.9", 1, stride=2))
    for i in range(n_blocks):
        y = norm_relu(conv(x, f"DownBlock.{12 + i}.conv_block.1", 1))
        x = x + F.instance_norm(conv(y, f"DownBlock.{12 + i}.conv_block.5", 1))
    by_average, by_maximum = weights["gap_fc.weight"], weights["gmp_fc.weight"]
    logits = torch.cat([x.mean(dim=(2, 3)) @ by_average.T, x.amax(dim=(2, 3)) @ by_maximum.T], dim=1)
    x = torch.cat([x * by_average[..., None, None], x * by_maximum[..., None, None]], dim=1)
    x = F.relu(F.conv2d(x, weights["conv1x1.weight"], weights["conv1x1.bias"]))
    total = x.sum(dim=1, keepdim=True)
    light = weights["FC.0.weight"].shape[1] == x.shape[1]
    style = x.mean(dim=(2, 3)) if light else x.reshape(len(x), -1)
    for name in ("FC.0", "FC.2"):
        style = F.relu(style @ weights[f"{name}.weight"].T)
    gamma, beta = style @ weights["gamma.weight"].T, style @ weights["beta.weight"].T
    for i in range(1, n_blocks + 1):
        y = F.relu(norm(conv(x, f"UpBlock1_{i}.conv1", 1), weights[f"UpBlock1_{i}.norm1.rho"], gamma, beta))
        x = x + norm(conv(y, f"UpBlock1_{i}.conv2", 1), weights[f"UpBlock1_{i}.norm2.rho"], gamma, beta)
    for i in (2, 7):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = conv(x, f"UpBlock2.{i}", 1)
        x = F.relu(norm(x, *(weights[f"UpBlock2.{i + 1}.{name}"] for name in ("rho", "gamma", "beta"))))
    return torch.tanh(conv(x, "UpBlock2.11", 3)), logits, total


@pytest.mark.parametrize("size", [None, 16], ids=["light", "full"])
def test_official_u_gat_it_files_hold_both_directions(size, tmp_path):
    path = tmp_path / "selfie2anime_params_0100000.pt"
    weights = {"genA2B": official_ugatit_weights(1, size), "genB2A": official_ugatit_weights(2, size)}
    judges = {name: {"model.1.bias": torch.zeros(4)} for name in ("disGA", "disGB", "disLA", "disLB")}
    torch.save({**weights, **judges}, path)
    x = torch.rand(2, 3, size or 24, size or 12, dtype=torch.float64) * 2 - 1
    opened = open_generators(path)
    assert list(opened) == ["AtoB", "BtoA"]
    for (direction, (generator, about)), state in zip(opened.items(), weights.values(), strict=True):
        assert about["direction"] == direction
        assert about.get("options") == (None if size is None else {"img_height": 16, "img_width": 16})
        t = generator.double()(x)
        image, logits, total = official_ugatit_forward(x, {k: v.double() for k, v in state.items()})
        assert image.std() > 0.1 and (t.image - image).abs().max() < 1e-9
        assert (t.cam_logits - logits).abs().max() < 1e-9
        assert (t.heat_map - heat_map(total, x.shape[-2:])).abs().max() < 1e-9
    # One of them in a file of its own, with DataParallel's prefix.
    torch.save({f"module.{k}": v for k, v in weights["genB2A"].items()}, path)
    single, about = load_generator(path)
    assert torch.equal(single.double()(x).image, opened["BtoA"][0](x).image)
    assert "direction" not in about and list(open_generators(path)) == ["AtoB"]
    torch.save({"genA2B": {**weights["genA2B"], "gap_fc.bias": torch.zeros(1)}, "genB2A": {}}, path)
    with pytest.raises(ValueError, match=r"not expected: gap_fc\.bias"):  # no norm would cancel it
        load_generator(path)


@pytest.mark.parametrize(
    "weights, kept",
    [(official_attention_weights(), "deconv3_"), (official_cyclegan_weights(), "model.26.")],
    ids=["attentiongan", "cyclegan"],
)
def test_official_weights_trained_without_norms_are_refused(weights, kept, tmp_path):
    """Then no layer but the last has a bias, and InstanceNorm would compute another function."""
    path = tmp_path / "latest_net_G_A.pth"
    biases = [key for key in weights if key.endswith("bias") and not key.startswith(kept)]
    torch.save({key: value for key, value in weights.items() if key not in biases}, path)
    with pytest.raises(
        ValueError, match=rf"^{path}: \w+: expected but missing: (.*); found but .*: nothing$"
    ) as caught:
        load_generator(path)
    assert sorted(biases)[0] in str(caught.value) and f"({len(biases)} in all)" in str(caught.value)


def test_running_statistics_of_old_checkpoints_are_dropped(tmp_path):
    weights = official_cyclegan_weights(n_blocks=6)
    weights |= {"model.2.running_mean": torch.zeros(4), "model.2.num_batches_tracked": torch.tensor(3)}
    torch.save(weights, tmp_path / "g.pth")
    assert load_generator(tmp_path / "g.pth")[0].settings["n_residual_blocks"] == 6


def test_files_that_are_no_generator_are_refused_by_name(tmp_path):
    path = tmp_path / "g.pth"

    def refusal():
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            load_generator(path)
        return str(caught.value)

    torch.save({"foo.weight": torch.zeros(1), "bar": torch.zeros(1)}, path)
    assert all(part in refusal() for part in ("conv1.weight", "model.1.weight", "found bar, foo.weight"))

    weights = official_attention_weights()
    del weights["deconv2_content.weight"]
    torch.save(weights | {"extra.weight": torch.zeros(1)}, path)
    message = refusal()
    assert "missing: deconv2_content.weight" in message and "not expected: extra.weight" in message

    weights = official_attention_weights() | {"conv2.weight": torch.zeros(8, 4, 5, 5)}
    torch.save(weights, path)
    assert "conv2.weight has shape (8, 4, 5, 5), expected (8, 4, 3, 3)" in refusal()

    for content in (b"not a checkpoint", b""):  # which torch's own words would have one open unsafely
        path.write_bytes(content)
        reason = "it holds other Python objects than weights.*|EOFError|Ran out of input"
        assert re.fullmatch(rf"{path}: not a readable weights file \(({reason})\)", refusal())
    torch.save(official_attention_weights(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(content)
    assert re.search(r"not a readable weights file \(Bad CRC-32 for file", refusal())
    for content, kind in (([1, 2], "list"), ({0: torch.zeros(1)}, "dict")):
        torch.save(content, path)
        assert f"expected a dictionary of weights by their names, found {kind}" in refusal()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_generator(path)


def test_init_from_takes_networks_in_half_precision_without_the_rest_of_a_state(small_set):
    """As a checkpoint is made small enough to send: what only resuming needs is left out."""
    assert run(f"{QUICK} --n_epochs 1 --name whole") == 0
    state = torch.load("saved_models/whole/checkpoint.pt", weights_only=True)
    state["networks"] = {n: {k: v.half() for k, v in net.items()} for n, net in state["networks"].items()}
    Path("small").mkdir()
    torch.save({k: v for k, v in state.items() if k not in ("optimizers", "ranks")}, "small/checkpoint.pt")
    assert run(f"{QUICK} --n_epochs 1 --lr 0 --name next --init_from small/checkpoint.pt") == 0
    for name, weights in checkpoint("next")["networks"].items():
        for key, value in weights.items():
            assert torch.equal(value, state["networks"][name][key].float()), (name, key)
    Path("saved_models/small").mkdir()
    shutil.copy("small/checkpoint.pt", "saved_models/small/checkpoint.pt")
    assert run("--dataset_name small --resume --name small") == 2
