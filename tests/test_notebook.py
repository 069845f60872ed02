"""The notebook is executed as it stands, on runs that are built and not trained."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from datasets import draw_built_in
from models import AttentionGenerator, ResNetGenerator, SingleMaskGenerator, pack_generator
from train import parse_options

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "inference.ipynb"


@pytest.fixture(autouse=True)
def _a_plain_kernel(tmp_path, monkeypatch):
    """No start-up files of the user's, and pictures drawn into the notebook whatever this shell asks for."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)


def make_run(folder, generator_class, size=32, **settings):
    """A run named demo with untrained generators, as training leaves it, and the built-in set, small."""
    draw_built_in(folder / "data" / "solid2striped", n_train=1, n_test=4)
    run = folder / "saved_models" / "demo"
    run.mkdir(parents=True)
    flags = ["--dataset_name", "solid2striped", "--name", "demo", "--img_height", str(size), "--img_width", str(size)]
    torch.manual_seed(0)
    for direction in ("AtoB", "BtoA"):
        packed = pack_generator(generator_class(ngf=8, n_residual_blocks=1, **settings))
        about = {"direction": direction, "options": vars(parse_options(flags)), "step": 12345}
        torch.save({**packed, **about}, run / f"{direction}.pt")


def execute(folder, **settings):
    """The notebook executed in ``folder``, untouched but for the settings named: (text, number of pictures)."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in settings.items():
        pattern = re.compile(rf"^{name} = .*$", re.MULTILINE)
        assert sum(len(pattern.findall(cell.source)) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = pattern.sub(lambda _, new=f"{name} = {value!r}": new, cell.source)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not warnings
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_shows_the_parts_of_the_demo_run(tmp_path):
    make_run(tmp_path, AttentionGenerator)
    text, pictures = execute(tmp_path)
    assert pictures == 4  # both directions, masks, contents, fusion
    assert text.count("AttentionGenerator") == 2
    assert text.count("step 12345, pictures of 32 x 32 pixels") == 2
    assert "4 pictures, 10 masks each" in text
    assert "OWN_PICTURE is None" in text
    (difference,) = re.findall(r"max \|fusion - output\| = (\S+)", text)
    assert float(difference) < 1e-5


def test_says_how_to_make_a_run_when_there_is_none(tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path)
    assert caught.value.ename == "InputError"
    for way_out in ("make demo", "CHECKPOINT", "latest_net_G_A.pth"):
        assert way_out in caught.value.evalue


def test_generators_without_masks_and_a_picture_of_ones_own(tmp_path):
    make_run(tmp_path, ResNetGenerator)
    noise = np.random.default_rng(0).integers(0, 256, (61, 93), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")
    text, pictures = execute(tmp_path, OWN_PICTURE="own.png")
    assert pictures == 2  # both directions, the own picture
    assert text.count("ResNetGenerator") == 2
    assert len(re.findall(r"this generator has no .*", text)) == 5
    assert "fusion - output" not in text


@pytest.mark.parametrize(
    "network, settings, n_masks",
    [(SingleMaskGenerator, {}, 2), (AttentionGenerator, {"n_masks": 3, "background": False}, 3)],
    ids=["one mask", "no background"],
)
def test_other_ways_to_fuse_masks_and_contents(tmp_path, network, settings, n_masks):
    make_run(tmp_path, network, **settings)
    text, pictures = execute(tmp_path)
    assert pictures == 4 and f"4 pictures, {n_masks} masks each" in text
    (difference,) = re.findall(r"max \|fusion - output\| = (\S+)", text)
    assert float(difference) < 1e-5
    assert text.count("has no background mask") == 2 * ("background" in settings)


@pytest.fixture
def set_up(monkeypatch):
    """The notebook's first code cell, in Colab as far as it can tell; ``sys.path`` is put back afterwards."""
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def test_colab_asks_for_the_repository(set_up):
    with pytest.raises(ValueError, match="REPOSITORY is empty"):
        exec(set_up, {})


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_colab_fetches_the_code_once(set_up, tmp_path, monkeypatch):
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
    set_up = set_up.replace('REPOSITORY = ""', f"REPOSITORY = {str(source)!r}")
    for _ in range(2):
        exec(set_up, {})
        assert Path.cwd() == tmp_path / "attentiongan"
        assert sys.path[0] == str(tmp_path / "attentiongan")
    assert [command[-2:] for command in installed] == [["-r", "requirements.txt"]]


def test_holds_no_absolute_path():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", ""), *output.get("traceback", [])]
    texts.append(str(notebook.metadata))
    found = [match.group() for text in texts for match in re.finditer(r"(?<![\w.:/<])/\w.*|~/.*|\b[A-Za-z]:\\.*", text)]
    assert not found
