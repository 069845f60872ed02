"""The order of the house: what may import what, how long files are, and that the pages say what the code does."""

import utils

import argparse
import ast
import importlib
import re
import shlex
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from common import checkpoint, log, run, same_run, stop_at
from conftest import ROOT
from packaging.version import Version

import benchmark
import checkpoints
import models
import options
import prepare
import systems
import train_dist

MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = [name for name, path in MODULES.items() if "\ndef main(" in path.read_text()]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

# ----------------------------------------------------------------------------------------------------------
#  Rooms
# ----------------------------------------------------------------------------------------------------------

# What each module may import of the others. It names only modules above it, so there are no circles.
BELOW_TRAIN = "utils models systems pictures datasets prepare record checkpoints metrics"
LADDER = {
    "utils": "",
    "models": "utils",
    "systems": "utils models",
    "pictures": "utils",
    "datasets": "utils pictures",
    "prepare": "utils pictures datasets",
    "record": "utils pictures",
    "checkpoints": "utils models pictures datasets",
    "metrics": "utils models pictures datasets",
    "options": "utils models systems pictures datasets checkpoints metrics",
    "evaluate": BELOW_TRAIN,
    "translate": BELOW_TRAIN,
    "generate": BELOW_TRAIN,
    "app": f"{BELOW_TRAIN} translate",
    "train": f"{BELOW_TRAIN} options",
    "train_dist": f"{BELOW_TRAIN} options train",
    "benchmark": f"{BELOW_TRAIN} options train translate",
    "experiments": f"{BELOW_TRAIN} options train evaluate",
}


def imports(path):
    """The names of all packages and modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add(node.module.split(".")[0])
    return found


def test_the_ladder_has_every_module_and_no_circle():
    assert LADDER.keys() == MODULES.keys()
    for i, allowed in enumerate(LADDER.values()):
        assert set(allowed.split()) <= set(list(LADDER)[:i])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_above_it(name):
    assert (imports(MODULES[name]) & MODULES.keys()) <= set(LADDER[name].split())


def test_networks_know_no_files():
    assert not imports(MODULES["models"]) & {"os", "pathlib", "io", "shutil", "tempfile", "glob"}
    assert not re.search(r"\bopen\(|torch\.(load|save)", MODULES["models"].read_text())


def test_utils_names_no_network_no_data_set_and_no_file_of_weights():
    text = MODULES["utils"].read_text()
    networks = {cls.__name__ for cls in vars(models).values() if isinstance(cls, type) and cls.__module__ == "models"}
    assert len(networks) > 20  # else this tests nothing
    sets = {*prepare.PUBLIC_SETS, *prepare.BY_HAND, prepare.BUILT_IN}
    names = networks | systems.SYSTEMS.keys() | sets | {*checkpoints.DIRECTIONS, ".pt", ".pth", "saved_models"}
    assert [name for name in sorted(names) if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for_and_can_be_read_in_one_sitting(name):
    text = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 900


# ----------------------------------------------------------------------------------------------------------
#  Pages
# ----------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def find_commands(text):
    """Commands of this repository's scripts, as "SCRIPT.py FLAGS"; lines of nice and make are left out."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not re.match(r"\s*(nice|make)\b", line)]
    command = r"(?:(?<!\S)(?:\S*/)?python3? |(?<!\S)torchrun\s[^;&|]*?)(\w+\.py(?:\s[^;&|>#]*)?)"
    return [found.strip() for line in lines for found in re.findall(command, line)]


def commands_of(page):
    text = page.read_text()
    if page.name == "Makefile":
        (demo,) = re.findall(r"^DEMO := ((?:.*\\\n)*.*)", text, re.MULTILINE)
        text = text.replace("$(DEMO)", demo.replace("\\\n", " ")).replace("$(BIN)/", "").replace("$$seed", "0")
        return find_commands(text)
    shown = "\n".join(block for language, block in BLOCK.findall(text) if language not in ("python", "text", "bibtex"))
    return find_commands("\n".join([shown, *inline_codes(text), *re.findall(r"<!-- begin \w+: (.*) -->", text)]))


def inline_codes(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


COMMANDS = dict.fromkeys((page.name, each) for page in [*PAGES, ROOT / "Makefile"] for each in commands_of(page))


def test_commands_are_found_on_the_pages():
    assert {page for page, _ in COMMANDS} >= {"README.md", "Makefile", "training.md", "systems.md", "data.md"}
    assert {command.split()[0] for _, command in COMMANDS} == {f"{name}.py" for name in SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_shows_its_parser(name):
    assert "\ndef make_parser(" in MODULES["options" if name.startswith("train") else name].read_text()


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_of_a_page_is_accepted_by_its_script(page, command):
    script, *argv = shlex.split(command)
    if script in ("train.py", "train_dist.py"):
        extend = train_dist.add_launch_flags if script == "train_dist.py" else lambda parser: None
        if "--resume" in argv:  # of a run that is not here
            parser = options.make_parser(*(name for flag, name in pairwise(argv) if flag == "--system"))
            extend(parser)
            parser.parse_args(argv)
        else:
            options.parse_options(argv, extend)
    elif script == "benchmark.py":
        own, others = benchmark.make_parser().parse_known_args(argv)
        benchmark.refuse_ignored(own, others)
        for system in own.systems:
            options.make_parser(system).parse_args(others)
    else:
        importlib.import_module(Path(script).stem).make_parser().parse_args(argv)


def all_flags():
    parsers = [options.make_parser(system) for system in systems.SYSTEMS]
    modules = [importlib.import_module(name) for name in SCRIPTS]
    parsers += [module.make_parser() for module in modules if hasattr(module, "make_parser")]
    train_dist.add_launch_flags(parsers[0])
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


# Of the official code, of Docker, and those that train.py explains.
OF_OTHERS = {"--norm", "--shm-size", "--time", *options.FOREIGN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page):
    ours = [code for code in inline_codes(page.read_text()) if re.match(r"--|(python )?\w+\.py ", code)]
    assert set(re.findall(r"(?<!\S)--[\w-]+", " ".join(ours))) <= all_flags() | OF_OTHERS


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "saved_models/pretrained/README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_and_pictures_of_a_page_exist(page):
    text = BLOCK.sub("", page.read_text())
    links = [*re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)]
    missing = []
    for link in (link for link in links if not re.match(r"\w+:", link)):
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            missing.append(link)
        elif section:
            headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", target.read_text()), re.MULTILINE)
            if section not in map(anchor, headings):
                missing.append(link)
    assert missing == []


def test_the_readme_is_short_and_names_every_module():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    (listed,) = (block for _, block in BLOCK.findall(text) if block.startswith("models.py"))
    assert sorted(re.findall(r"^(\w+)\.py ", listed, re.MULTILINE)) == sorted(MODULES)


def test_the_system_of_the_page_on_new_systems_trains_and_resumes(small_set, monkeypatch):
    monkeypatch.setitem(systems.SYSTEMS, "wgan", None)  # so that it goes afterwards
    (code,) = (
        block for language, block in BLOCK.findall((ROOT / "docs/new_system.md").read_text()) if language == "python"
    )
    exec(code, {**vars(models), **vars(systems), "option": utils.option})
    command = (
        "--system wgan --dataset_name small --img_height 16 --img_width 16 --nz 5 --ngf 4 --ndf 4 --batch_size 2 "
        "--log_interval 1 --n_cpu 0 --sample_interval 0 --n_epochs 2 --decay_epoch 2 --clip 0.02 --precision float32"
    )
    assert run(f"{command} --name straight") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run(f"{command} --name stopped") == 128 + signal.SIGTERM
    assert run("--name stopped --resume") == 0
    same_run("straight", "stopped")
    weights = checkpoint("straight")["networks"]["D"]["layers.0.weight"]
    assert weights.abs().max() <= 0.02 and {"D", "G"} <= log("straight")[0].keys()
    assert {e["lr"] for e in log("straight")} == {5e-5}


def test_the_lock_pins_every_package_within_the_lower_bounds():
    lines = (ROOT / "requirements-lock.txt").read_text().splitlines()[1:]
    pinned = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)
    wanted = [*(ROOT / "requirements.txt").read_text().splitlines()]
    wanted += [line for line in (ROOT / "requirements-extras.txt").read_text().splitlines() if line[0] not in "-#"]
    for name, least in (line.split(">=") for line in wanted):
        assert Version(pinned[name]) >= Version(least)
