import utils
from utils import InputError

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import (
    QUICK,
    QUICK_PIX2PIX,
    build,
    checkpoint,
    free_port,
    log,
    make_batch,
    quick,
    same_run,
    stop_at,
    wait_for_log,
)
from conftest import ROOT
from torch import nn

import train
import train_dist
from options import parse_options
from systems import System


@pytest.fixture
def launch(start):
    def launch(flags: str, launcher: str = "") -> subprocess.Popen:
        command = [sys.executable, *launcher.split(), str(ROOT / "train_dist.py"), *QUICK.split(), *flags.split()]
        return start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return launch


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------
#  Two ranks take the step of one process
# ----------------------------------------------------------------------------------------------------------


def three_steps(system: System, players: System, part: slice) -> dict[str, list[torch.Tensor]]:
    """The gradients of the first step, and the weights after three."""
    optimizers = {
        t.player: torch.optim.Adam(train.trained_parameters(system, t.networks), 2e-4, (0.5, 0.999), fused=True)
        for t in system.turns
    }
    dtype = next(system.parameters()).dtype
    results: dict[str, list[torch.Tensor]] = {}
    for step in range(3):
        batch = {side: pictures[part].to(dtype) for side, pictures in make_batch(step, n=4).items()}
        train.training_step(players, optimizers, lambda: torch.autocast("cpu", enabled=False), batch)
        if step == 0:
            results["gradients"] = [p.grad.clone() for p in system.parameters()]
    results["weights"] = [p.detach() for p in system.parameters()]
    return results


CASES = {
    "II": ("attentiongan", {}, torch.float64),
    "II in float32": ("attentiongan", {}, torch.float32),
    "II, guided": ("attentiongan", {"attn_disc": "concat"}, torch.float64),
    "I, guided": ("attentiongan1", {"attn_disc": "mask"}, torch.float64),
    "U-GAT-IT": ("ugatit", {"light": True}, torch.float64),
    "pix2pix": ("pix2pix", {}, torch.float64),  # too small for dropout, which every rank draws for itself
}
# A system has a replay buffer, or it has not.
NO_POOL = {"attentiongan": {"pool_size": 0}, "attentiongan1": {"pool_size": 0}, "ugatit": {}, "pix2pix": {}}


def be_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for case, (name, settings, dtype) in CASES.items():
        # Rank 1 starts from other weights, to see that it is given rank 0's.
        system = build(name, seed=rank, **NO_POOL[name], **settings).to(dtype)
        half = slice(2 * rank, 2 * rank + 2)
        results[case] = three_steps(system, train_dist.distribute(system), half)
        assert all("module" not in name for name in system.state_dict())
    assert utils.any_rank([rank == 0, False, rank == 1, True]) == [True, False, True, True]
    assert utils.mean_over_ranks(torch.tensor([rank, 4.0 * rank])).tolist() == [0.5, 2.0]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_the_batch_take_the_step_of_one_process(tmp_path):
    mp.spawn(be_a_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, (name, settings, dtype) in CASES.items():
        system = build(name, seed=0, **NO_POOL[name], **settings).to(dtype)
        single = three_steps(system, system, slice(0, 4))
        for what in ("gradients", "weights"):
            for one, first, second in zip(single[what], ranks[0][case][what], ranks[1][case][what], strict=True):
                assert torch.equal(first, second)
                if dtype == torch.float64:
                    assert (one - first).abs().max() < 1e-9
                elif what == "gradients":
                    assert (one - first).norm() < 1e-5 * one.norm()


def train_as_a_rank(rank: int, folder: str) -> None:
    """A run straight through, the same stopped and resumed; a step's translations of one picture on each rank; a run
    under a curriculum.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    command = f"{QUICK_PIX2PIX} --n_epochs 2 --precision float32"
    ends = {f"{command} --name straight": 0, f"{command} --name stopped": signal.SIGTERM, "--name stopped --resume": 0}
    for flags, end in ends.items():
        with pytest.MonkeyPatch.context() as patch:
            if end:
                stop_at(patch, 3)
            assert train.train(parse_options(flags.split()), train_dist.distribute, "cpu") == end
        dist.barrier()  # rank 0 has written what all go on from
    system, _, _ = train.set_up(parse_options(command.split()), torch.device("cpu"))
    with torch.no_grad():
        fake = system({"A": torch.ones(1, 3, 64, 64)})
    torch.save({"fake": fake, "weights": list(system.parameters())}, f"{folder}/{rank}.pt")
    command = (
        f"{quick('cyclegan')} --system attentiongan1 --curriculum_epochs 1 --n_epochs 2 --log_interval 1 --lr 1e-12"
    )
    assert train.train(parse_options(f"{command} --name led".split()), train_dist.distribute, "cpu") == 0
    dist.destroy_process_group()


def test_every_rank_draws_its_own_dropout_and_resumes_it_and_counts_epochs(pairs, small_set, tmp_path):
    mp.spawn(train_as_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert not torch.equal(first["fake"], second["fake"])
    assert checkpoint("stopped")["step"] == 4 and len(checkpoint("stopped")["ranks"]) == 2
    same_run("straight", "stopped")
    # The rate is nearly zero: when the weight of the cycle changes from 0.01 to 0.5, so does the loss.
    cycles = [entry["cycle_A"] for entry in log("led")]
    assert len(cycles) == 6 and min(cycles[3:]) > 20 * max(cycles[:3])


# ----------------------------------------------------------------------------------------------------------
#  The launcher
# ----------------------------------------------------------------------------------------------------------


def test_two_ranks_stopped_and_resumed_and_under_torchrun_are_straight_through(small_set, launch):
    command = "--n_epochs 6 --precision float32 --log_interval 1"
    code, out, err = finish(launch(f"{command} --name straight --n_procs 2 --port_num {free_port()}"))
    assert (code, re.search(r"\w+Warning:", err)) == (0, None), err  # gloo's own have no such name
    assert "batch 1 x 2 process(es) = 2" in out and out.count("done:") == 1

    stopped = launch(f"{command} --name stopped --n_procs 2 --port_num {free_port()}")
    wait_for_log("stopped", 5, stopped)
    stopped.send_signal(signal.SIGTERM)
    code, out, err = finish(stopped)
    assert code == 128 + signal.SIGTERM, err
    assert 4 < checkpoint("stopped")["step"] < 18 and len(checkpoint("stopped")["ranks"]) == 2
    code, out, err = finish(launch(f"{command} --name stopped --resume --n_procs 2 --port_num {free_port()}"))
    assert code == 0, err
    same_run("straight", "stopped")

    torchrun = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()}"
    code, out, err = finish(launch(f"{command} --name torchrun", torchrun))
    assert code == 0, err
    same_run("straight", "torchrun")

    pools = [rank["children"]["pool_A"]["_extra_state"] for rank in checkpoint("straight")["ranks"]]
    assert all(pool["seen"] == 18 for pool in pools)
    assert not torch.equal(pools[0]["stored"], pools[1]["stored"])

    code, _, err = finish(
        launch(f"{command} --name stopped --resume --n_epochs 7 --n_procs 1 --port_num {free_port()}")
    )
    assert code == 2 and "the run had 2 processes, this one has 1" in err


@pytest.mark.skipif(not Path("/proc").exists(), reason="ranks are found in /proc, which only Linux has")
def test_a_rank_that_dies_ends_all_with_one_error(small_set, launch):
    run = launch(f"--n_epochs 1000 --name r --n_procs 2 --port_num {free_port()}")
    wait_for_log("r", 1, run)
    ranks = [pid for pid in children(run.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = finish(run)
    assert code == 2
    errors = re.findall(r"train_dist.py: error: .*", err)
    assert errors == ["train_dist.py: error: rank 1 died (SIGKILL); all ranks ended; --resume goes on"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_error_in_the_ranks_is_told_once_and_clearly(small_set, launch):
    code, _, err = finish(launch(f"--batch_size 4 --n_procs 2 --name r --port_num {free_port()}"))
    assert code == 2
    assert "6 samples in data/small do not fill one batch of 4 on each of 2 process(es)" in err
    assert "Traceback" not in err and err.count("do not fill") == 1


class Ranks:
    """Two that have ended, one of them in an error where there is one; ``stuck`` only once they are killed."""

    def __init__(self, error: Exception | None, stuck: bool = False):
        self.error, self.stuck, self.killed = error, stuck, 0
        self.processes = [SimpleNamespace(kill=self.kill)] * 2

    def kill(self):
        self.killed += 1

    def join(self, **_):
        if self.stuck and self.killed < 2:
            return False
        if self.error:
            raise self.error
        return True


def ended(monkeypatch, reports: list[tuple[int, int | str]], error: Exception | None = None, stuck=False) -> int:
    def spawn(work, arguments, n, join):
        for report in reports:
            arguments[-1].put(report)
        return Ranks(error, stuck)

    monkeypatch.setattr(mp, "spawn", spawn)
    flags = [*QUICK.split(), "--name", "r", "--n_procs", "2", "--device", "cpu", "--port_num", str(free_port())]
    return train_dist.main(flags)


def test_the_first_rank_to_fail_is_told_not_one_that_fails_for_it(small_set, monkeypatch, capsys):
    broken = mp.ProcessRaisedException("Connection closed by peer", 1, 99)
    reports = [(2, signal.SIGTERM), (0, "the disk is full"), (1, "Connection closed by peer")]  # one saved and left
    assert ended(monkeypatch, reports, broken) == 2
    expected = "train_dist.py: error: rank 0 failed, all ranks ended: the disk is full\n"
    assert capsys.readouterr().err == expected
    assert ended(monkeypatch, [], broken) == 2  # before it had joined the others
    assert "rank 1 failed, all ranks ended: Connection closed by peer" in capsys.readouterr().err


def test_a_rank_that_has_failed_and_does_not_end_is_killed_after_a_while(small_set, monkeypatch, capsys):
    """It may wait for the others, and they for it."""
    monkeypatch.setattr(train_dist, "GRACE", 0.05)
    killed = mp.ProcessExitedException("", 0, 99, exit_code=-9, signal_name="SIGKILL")
    assert ended(monkeypatch, [(1, "the disk is full")], killed, stuck=True) == 2
    assert capsys.readouterr().err == "train_dist.py: error: rank 1 failed, all ranks ended: the disk is full\n"


def test_a_rank_tells_what_fails_before_the_group_breaks(small_set, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    told = []

    def tell(error):
        assert dist.is_initialized()
        told.append(str(error))

    options = parse_options([*QUICK.split(), "--device", "cpu"])
    with pytest.raises(OSError, match="the disk is full"):
        train_dist.join(options, 0, 0, 1, f"tcp://127.0.0.1:{free_port()}", tell=tell)
    assert told == ["the disk is full"]
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_reads_a_checkpoint_before_the_first_has_the_run(small_set, monkeypatch, rank):
    """Another process may be saving there as long as it has."""
    done = []
    monkeypatch.setattr(utils, "lock_folder", lambda _: nullcontext(done.append("locked")))
    monkeypatch.setattr(utils, "barrier", lambda: done.append("met"))
    monkeypatch.setattr(train, "train", lambda *_: done.append("trained") or 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, rank, 2)]))
    options = parse_options([*QUICK.split(), "--device", "cpu"])
    assert train_dist.join(options, rank, rank, 2, "tcp://nowhere") == 0
    assert done == (["locked", "met", "trained"] if rank == 0 else ["met", "trained"])


def test_a_signal_to_only_one_rank_is_the_status_of_all(small_set, monkeypatch):
    assert ended(monkeypatch, []) == 0
    assert ended(monkeypatch, [(0, signal.SIGTERM), (1, signal.SIGTERM)]) == 128 + signal.SIGTERM


def test_under_torchrun_every_rank_tells_its_own_error(small_set, capsys, monkeypatch):
    def fail(*_):
        raise InputError("out of memory")

    monkeypatch.setattr(train_dist, "join", fail)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, local_rank, told in ((9, 1, "error on rank 9: out of memory"), (0, 0, "error: out of memory")):
        for key, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 16}.items():
            monkeypatch.setenv(key, str(value))
        assert train_dist.main([*QUICK.split(), "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"train_dist.py: {told}\n"
    monkeypatch.setattr(train_dist, "pick_kind", lambda _: "cuda")
    assert train_dist.main([*QUICK.split(), "--device", "cuda:0"]) == 2
    assert "--device cuda:0 names one device, found 16 processes; expected cuda" in capsys.readouterr().err


def test_batch_norm_over_several_processes_needs_cuda(small_set, capsys, monkeypatch):
    tiny = "--system dcgan --img_height 16 --img_width 16 --ngf 4 --ndf 4 --batch_size 2 --dataset_name small"
    command = [*tiny.split(), "--device", "cpu"]
    assert train_dist.main([*command, "--n_procs", "2", "--port_num", str(free_port())]) == 2
    error = capsys.readouterr().err
    assert "--system dcgan has BatchNorm, whose statistics 2 processes can share only on CUDA" in error
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(key, str(value))
    assert train_dist.main(command) == 2
    assert "whose statistics 3 processes" in capsys.readouterr().err
    assert not Path("saved_models").exists()
    options = parse_options(command)
    train_dist.check_batch_norm(options, 1)
    train_dist.check_batch_norm(parse_options(QUICK.split()), 2)
    monkeypatch.setattr(train_dist, "pick_kind", lambda _: "cuda")
    train_dist.check_batch_norm(options, 2)


def test_distribute_synchronises_batch_norm_on_cuda_in_place(monkeypatch):
    """The bare system, the optimizers and the files know nothing of it."""
    system, plain, batch = build("dcgan"), build("dcgan"), make_batch(0)
    parameters = list(system.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(train_dist, "DistributedDataParallel", lambda network, **_: network)
        patch.setattr(train_dist.dist, "broadcast", lambda *_: None)
        patch.setattr(nn.Parameter, "device", property(lambda _: torch.device("cuda", 0)), raising=False)
        twin = train_dist.distribute(system)
    for network, wrapped in zip(system.children(), twin.children(), strict=True):
        assert wrapped is network
        kinds = {type(m) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert kinds == {nn.SyncBatchNorm}
    assert all(a is b for a, b in zip(parameters, system.parameters(), strict=True))
    assert system.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(system.state_dict())
    assert torch.equal(system.sheet(batch)["sample 1"], plain.sheet(batch)["sample 1"])


def test_a_port_in_use_is_named(small_set, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert train_dist.main([*QUICK.split(), "--n_procs", "2", "--port_num", str(port)]) == 2
    assert f"--port_num {port}: cannot be used" in capsys.readouterr().err
    assert not Path("saved_models").exists()
    for port in (0, 70000):
        with pytest.raises(InputError, match=f"--port_num {port}: cannot be used"):
            train_dist.check_port(port)


def test_devices_that_ranks_cannot_use_are_refused():
    def kind(device: str) -> str:
        return train_dist.pick_kind(train_dist.argparse.Namespace(device=device))

    assert kind("cpu") == "cpu"
    assert kind("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="--device mps: not usable here by many processes"):
        kind("mps")


def test_missing_data_is_told_before_anything_starts(capsys):
    flags = ["--dataset_name", "horse2zebra", "--multi_gpu_flag", "True", "--port_num", str(free_port())]
    assert train_dist.main(flags) == 2
    error = capsys.readouterr().err
    assert "python prepare.py --dataset_name horse2zebra" in error and "make demo" in error


def test_the_number_of_processes(monkeypatch, capsys):
    def count(flags: str, gpus: int) -> int:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(train_dist, "pick_kind", lambda _: "cuda" if gpus else "cpu")
        options = parse_options(flags.split(), train_dist.add_launch_flags)
        return train_dist.count_processes(options)

    assert count("--multi_gpu_flag True", gpus=8) == 8
    assert count("--multi_gpu_flag True --n_procs 2", gpus=8) == 2
    assert count("--multi_gpu_flag False", gpus=8) == count("--multi_gpu_flag False --n_procs 1", gpus=8) == 1
    with pytest.raises(InputError, match="--n_procs 4 with --multi_gpu_flag False: expected 1"):
        count("--multi_gpu_flag False --n_procs 4", gpus=8)
    with pytest.raises(InputError, match="--n_procs -1: expected at least 0"):
        count("--n_procs -1", gpus=0)
    assert count("--multi_gpu_flag true --n_procs 3", gpus=0) == 3
    assert count("", gpus=0) == 1
    assert "no GPU here: one process on the CPU" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--n_procs 3: this machine has 2 GPU"):
        count("--n_procs 3", gpus=2)
    options = parse_options([], train_dist.add_launch_flags)
    options.resume = True  # a run of three ranks
    monkeypatch.setattr(train_dist.checkpoints, "find_run", lambda name: {"processes": 3})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert train_dist.count_processes(options) == 3
    with pytest.raises(InputError, match="--device cuda:1 names one device"):
        count("--device cuda:1", gpus=2)
    assert count("--device cuda:1 --n_procs 1", gpus=2) == 1
    with pytest.raises(InputError, match="'maybe': expected True or False"):
        count("--multi_gpu_flag maybe", gpus=2)
