"""The notebook is executed unchanged, on runs with untrained generators."""

from utils import InputError

import builtins
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image

import prepare
from checkpoints import PRETRAINED, open_generators, pack_generator
from models import (
    AttentionGenerator,
    DCGANGenerator,
    ResNetGenerator,
    SingleMaskGenerator,
    UGATITGenerator,
    UNetGenerator,
)
from options import parse_options
from pictures import Picture, normalise, unaugmented
from prepare import draw_built_in, draw_scene

NOTEBOOK = ROOT / "inference.ipynb"


@pytest.fixture(autouse=True)
def _a_plain_kernel(tmp_path, monkeypatch):
    """Without start-up files of the user, and with the notebook's own way of drawing pictures."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)


def make_run(folder, generator_class, size=32, flags="", directions=("AtoB", "BtoA"), **settings):
    """A run named demo with untrained generators, as training leaves it, and the built-in set, small."""
    if generator_class is not UNetGenerator:
        settings = {"n_residual_blocks": 1, **settings}
    draw_built_in(folder / "data" / "solid2striped", n_train=1, n_test=4)
    run = folder / "saved_models" / "demo"
    run.mkdir(parents=True)
    command = f"--dataset_name solid2striped --name demo --img_height {size} --img_width {size} {flags}"
    torch.manual_seed(0)
    for direction in directions:
        packed = pack_generator(generator_class(ngf=8, **settings))
        about = {"direction": direction, "options": vars(parse_options(command.split())), "step": 12345}
        torch.save({**packed, **about}, run / f"{direction}.pt")


def read_notebook(**settings):
    """The notebook, unchanged except for these settings."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in settings.items():
        pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
        assert sum(len(pattern.findall(cell.source)) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = pattern.sub(lambda _, new=f"{name} = {value!r}": new, cell.source)
    return notebook


def execute(folder, **settings):
    """``read_notebook`` executed in ``folder``: (text, number of pictures)."""
    notebook = read_notebook(**settings)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not warnings
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return text, sum("image/jpeg" in output.get("data", {}) for output in outputs)


def test_shows_the_parts_of_the_demo_run(tmp_path):
    make_run(tmp_path, AttentionGenerator)
    text, pictures = execute(tmp_path)
    assert pictures == 4  # both directions, masks, contents, fusion
    assert text.count("AttentionGenerator") == 2
    assert text.count("step 12345, pictures of 32 x 32 pixels") == 2
    assert "4 pictures of data/solid2striped, 10 masks each" in text
    assert "OWN_PICTURE is None" in text
    (difference,) = re.findall(r"max \|fusion - output\| = (\S+)", text)
    assert float(difference) < 1e-5


def test_shows_the_weights_of_this_repository_when_there_is_no_run(tmp_path, execute_here):
    draw_built_in(tmp_path / "data" / "solid2striped", n_train=1, n_test=4)
    text, names = execute_here(N_PICTURES=1)
    assert "There is no demo run yet (make demo trains one). These are the horse2zebra weights" in text
    assert text.count("from pretrained/horse2zebra_attentiongan\n") == 2 and "pictures of 256 x 256 pixels" in text
    expected, _ = open_generators(PRETRAINED / "horse2zebra_attentiongan")["BtoA"]
    for name, weight in expected.state_dict().items():
        assert torch.equal(names["generators"]["BtoA"].state_dict()[name], weight)
    assert list(names["columns"]["AtoB"]) == ["input A", "foreground attention", "output B", "truth B", "recovered A"]
    with pytest.raises(InputError, match=r"runn: no generator for AtoB found.*pretrained/horse2zebra_attentiongan"):
        execute_here(CHECKPOINT="runn")


def test_draws_the_built_in_pictures_on_first_use(tmp_path, execute_here, monkeypatch):
    monkeypatch.setattr(prepare, "draw_built_in", partial(draw_built_in, n_train=1, n_test=2))
    make_run(tmp_path, AttentionGenerator)
    execute_here(N_PICTURES=1, DATA="elsewhere/solid2striped")
    picture = draw_scene(np.random.default_rng((4, 1, 0, 0)))["A"]
    with Image.open("elsewhere/solid2striped/testA/000.png") as file:
        assert np.array_equal(np.asarray(file), np.asarray(picture))


def test_generators_without_masks_and_a_picture_of_ones_own(tmp_path, execute_here):
    make_run(tmp_path, ResNetGenerator)
    noise = np.random.default_rng(0).integers(0, 256, (61, 93), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")
    text, names = execute_here(OWN_PICTURE="own.png")
    assert names["n_shown"] == 2  # both directions, the own picture
    assert text.count("ResNetGenerator") == 2
    assert len(re.findall(r"this generator has no .*", text)) == 5
    assert "fusion - output" not in text


@pytest.mark.parametrize(
    "network, settings, n_masks",
    [(SingleMaskGenerator, {}, 2), (AttentionGenerator, {"n_masks": 3, "background": False}, 3)],
    ids=["one mask", "no background"],
)
def test_other_ways_to_fuse_masks_and_contents(tmp_path, execute_here, network, settings, n_masks):
    make_run(tmp_path, network, **settings)
    text, names = execute_here()
    assert names["n_shown"] == 4 and f"4 pictures of data/solid2striped, {n_masks} masks each" in text
    (difference,) = re.findall(r"max \|fusion - output\| = (\S+)", text)
    assert float(difference) < 1e-5
    assert text.count("has no background mask") == 2 * ("background" in settings)


@pytest.fixture
def execute_here(monkeypatch, capsys):
    """Executes ``read_notebook`` in this process, because a kernel takes seconds to start: (text, its variables).

    The variable ``n_shown`` counts the figures.
    """

    def run(**settings):
        names = {"n_shown": 0}

        def show():
            names["n_shown"] += 1
            plt.close("all")

        monkeypatch.setattr(plt, "show", show)
        for cell in read_notebook(**settings).cells:
            if cell.cell_type == "code":
                exec(re.sub(r"(?m)^%.*$", "", cell.source), names)  # lines of IPython only
        return capsys.readouterr().out, names

    with matplotlib.rc_context({"backend": "agg"}):
        yield run
    plt.close("all")


def read_side(folder, grey=False):
    """The pictures of a folder of the built-in set as generators see them, (4, 3, 32, 32) in [-1, 1]."""
    paths = sorted(Path("data/solid2striped", folder).iterdir())
    return normalise(torch.stack([unaugmented(Picture(path, grey=grey), (32, 32)) for path in paths]))


@pytest.mark.parametrize(
    "direction, task, source, truth",
    [("BtoA", "translation", "testB", "testB_truth"), ("AtoB", "colorization", "testB", "testB")],
)
def test_a_run_of_one_direction_leaves_the_other_out(tmp_path, execute_here, direction, task, source, truth):
    flags = f"--system pix2pix --direction {direction} --task {task}"
    make_run(tmp_path, UNetGenerator, flags=flags, directions=(direction,), depth=5)
    Image.new("RGB", (93, 61), "red").save(tmp_path / "own.png")
    text, names = execute_here(OWN_PICTURE="own.png")
    assert "There is only one direction. What needs the other generator is left out." in text
    assert f"{direction}: UNetGenerator" in text and len(re.findall(r"this generator has no .*", text)) == 4
    a, b = direction.split("to")
    columns = names["columns"][direction]
    assert list(columns) == [f"input {a}", f"output {b}", f"truth {b}"]  # and none translated back
    assert torch.equal(columns[f"input {a}"], read_side(source, grey=task == "colorization"))
    assert torch.equal(columns[f"truth {b}"], read_side(truth))
    assert names["own"].shape == (3, 32, 49) and (names["own"].std(dim=0).max() == 0) == (task == "colorization")


def test_a_generator_of_one_size_has_the_picture_brought_to_it(tmp_path, execute_here):
    make_run(tmp_path, partial(UGATITGenerator, size=(32, 32)), flags="--system ugatit")
    Image.new("RGB", (93, 61), "red").save(tmp_path / "own.png")
    text, names = execute_here(OWN_PICTURE="own.png")
    assert text.count("UGATITGenerator") == 2 and "only one direction" not in text
    assert names["own"].shape == names["t"].image[0].shape == (3, 32, 32)
    columns = names["columns"]["BtoA"]
    assert list(columns) == ["input B", "foreground attention", "output A", "truth A", "recovered B"]
    for direction, folder in (("AtoB", "testA_truth"), ("BtoA", "testB_truth")):
        assert torch.equal(names["columns"][direction][f"truth {direction[-1]}"], read_side(folder))


def test_a_run_of_dcgan_is_refused(tmp_path, execute_here):
    run = tmp_path / "saved_models" / "demo"
    run.mkdir(parents=True)
    packed = pack_generator(DCGANGenerator(nz=4, ngf=4, size=16))
    torch.save({**packed, "direction": "generator", "options": {}, "step": 1}, run / "generator.pt")
    with pytest.raises(InputError, match=r"generator\.pt: draws pictures from noise \(see generate\.py\) and"):
        execute_here()


@pytest.fixture
def set_up(monkeypatch):
    """The notebook's first code cell, in Colab as far as it can tell; ``sys.path`` is put back afterwards."""
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("how", ["asked", "set"])
def test_colab_asks_for_the_repository_and_fetches_it_once(set_up, tmp_path, monkeypatch, how):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("models.py", "requirements.txt"):
        (source / name).touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=source, check=True)
    run, installed = subprocess.run, []

    def run_git_alone(command, **settings):
        return run(command, **settings) if command[0] == "git" else installed.append(command)

    monkeypatch.setattr(subprocess, "run", run_git_alone)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda prompt: asked.append(prompt) or str(source))
    if how == "set":
        set_up = set_up.replace('REPOSITORY = ""', f"REPOSITORY = {str(source)!r}")
    for _ in range(2):
        exec(set_up, {})
        assert Path.cwd() == tmp_path / "attentiongan"
        assert sys.path[0] == str(tmp_path / "attentiongan")
    assert [command[-2:] for command in installed] == [["-r", "requirements.txt"]]
    assert len(asked) == (how == "asked") and all("address of the repository" in prompt for prompt in asked)


def test_is_small_and_holds_no_absolute_path():
    assert NOTEBOOK.stat().st_size < 700_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", ""), *output.get("traceback", [])]
    texts.append(str(notebook.metadata))
    found = [match.group() for text in texts for match in re.finditer(r"(?<![\w.:/<])/\w.*|~/.*|\b[A-Za-z]:\\.*", text)]
    assert not found
