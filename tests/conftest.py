"""Shared by all tests: the repository on the path, few threads, small data."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

# The networks of the tests are too small for a second thread, and two busy test processes would spin in wait of it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.manual_seed(0)  # for networks that are parameters of tests, made when these are collected

import record


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch, request):
    """Runs are read and written relative to the working directory; scripts are found from anywhere, a GPU is not.

    What a test draws from chance is the same every time. Curves take longer than a small run, so they stay blank.
    """
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if request.node.get_closest_marker("gpu") is None:  # the bits of the CPU are tested, wherever the tests run
        for backend in (torch.cuda, torch.backends.mps):
            # torch.compile, where it is imported later, expects what these functions wrap.
            monkeypatch.setattr(backend, "is_available", wraps(backend.is_available)(lambda: False))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not any(map(request.node.get_closest_marker, ("browser", "curves"))):
        blank = Image.new("1", (8, 8))
        monkeypatch.setattr(record, "draw_curves", lambda history, validations, path: blank.save(path))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start():
    """``subprocess.Popen`` with signals as in a shell's foreground, whatever is ignored here, as under nohup.

    What still runs after the test is killed.
    """
    started = []

    def start(command: list[str], prepare: Callable[[], None] = lambda: None, **options) -> subprocess.Popen:
        def first() -> None:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            prepare()

        started.append(subprocess.Popen(command, preexec_fn=first, **options))
        return started[-1]

    yield start
    for process in started:
        with process:
            process.kill()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium():
    lacking = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    if lacking := lacking + ["chromium"] * (CHROMIUM is None):
        pytest.skip(f"{', '.join(lacking)} not found: make test-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens pages; at the end none of them has met an error or asked another machine for anything."""
    met, asked, pages = [], set(), []

    def start(address, width=1280, height=900, **others):
        page = chromium.new_page(viewport={"width": width, "height": height}, **others)
        pages.append(page)
        page.set_default_timeout(30000)
        page.on("console", lambda message: met.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: met.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(address)
        return page

    yield start
    for page in pages:
        page.close()
    assert met == []
    assert {urlparse(url).hostname for url in asked} <= {"127.0.0.1", None}  # None: data, blob, file


@pytest.fixture
def small_set(tmp_path) -> Path:
    """data/small with 6 pictures in trainA, 5 in trainB, 2 in each test folder, all of 40 x 36 pixels."""
    root = tmp_path / "data" / "small"
    rng = np.random.default_rng(0)
    for folder, n in (("trainA", 6), ("trainB", 5), ("testA", 2), ("testB", 2)):
        (root / folder).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(root / folder / f"{i}.png")
    return root


@pytest.fixture
def pairs(tmp_path) -> Path:
    """data/pairs with 4 pictures in train, 2 in test, each with two sides of 20 x 18 pixels."""
    root, rng = tmp_path / "data" / "pairs", np.random.default_rng(0)
    for folder, n in (("train", 4), ("test", 2)):
        (root / folder).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (18, 40, 3), dtype=np.uint8)).save(root / folder / f"{i}.png")
    return root


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder. ``server.send`` makes the pieces that are sent of a file's content.

    ``server.length`` says how their end is told: by its "Content-Length", "chunked", or only by hanging up ("").
    """

    def do_GET(self):
        self.server.asked.append(self.path)
        path, how = Path(self.translate_path(self.path)), self.server.length
        if not path.is_file():
            return self.send_error(404)
        self.send_response(200)
        if how:
            size = str(path.stat().st_size)
            self.send_header(*(("Transfer-Encoding", how) if how == "chunked" else (how, size)))
        self.end_headers()
        for piece in self.server.send(path.read_bytes()):  # a cut shows as a missing last chunk
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if how == "chunked" else piece)
        return None

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):  # a client that hangs up early is none of the tests' business
        pass


@pytest.fixture
def past_any_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")


@pytest.fixture
def web(tmp_path_factory, past_any_proxy):
    """A server on the loopback interface, of the files in its ``folder``."""
    folder = tmp_path_factory.mktemp("web")
    server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.folder, server.url = folder, f"http://127.0.0.1:{server.server_port}"
    server.asked, server.send, server.length = [], lambda content: [content], "Content-Length"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
