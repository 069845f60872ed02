"""Shared by the tests: small data, systems and runs, the textbook step, weights in the official layouts."""

import hashlib
import io
import json
import re
import signal
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

import record
import train
from checkpoints import pack_generator
from metrics import Extractor
from models import AttentionGenerator, UNetGenerator
from pictures import Picture
from prepare import PUBLIC_SETS, PublicSet
from systems import SYSTEMS

# ----------------------------------------------------------------------------------------------------------
#  Systems and the textbook step
# ----------------------------------------------------------------------------------------------------------

SMALL = dict(ngf=4, ndf=4, n_residual_blocks=2, n_layers_D=2)
SYSTEM_SETTINGS = {
    "attentiongan": {**SMALL, "n_masks": 4},
    "attentiongan1": SMALL,
    "cyclegan": SMALL,
    "ugatit": dict(ngf=4, ndf=4, n_residual_blocks=2, light=True),
    "pix2pix": dict(ngf=4, ndf=4, n_layers_D=2),
    "dcgan": dict(nz=5, ngf=4, ndf=4),
}
BOTH_DIRECTIONS = ("attentiongan", "attentiongan1", "cyclegan", "ugatit")


def build(name, seed=0, size=(16, 16), pool_seed=(0,), **settings):
    torch.manual_seed(seed)
    system = SYSTEMS[name](**{**SYSTEM_SETTINGS[name], **settings}).build(size, pool_seed).double()
    for key, parameter in system.named_parameters():  # larger than at the start, so that every term matters
        if parameter.ndim in (2, 4) and not key.endswith((".rho", ".gamma", ".beta")):
            nn.init.normal_(parameter, std=0.15)
    return system


def make_batch(seed, n=2, size=16):
    """What any kind of data may hold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**dict.fromkeys(("A", "B", "image"), (3, size, size)), "noise": (5,)}
    return {
        key: torch.rand(n, *shape, dtype=torch.float64, generator=generator) * 2 - 1 for key, shape in shapes.items()
    }


def guided_input(picture, mask, attn_disc):
    """What the attention-guided discriminator is shown: [M, picture] as the paper writes it, or their product."""
    return torch.cat([mask, picture], dim=1) if attn_disc == "concat" else picture * mask


def textbook_losses(
    system, batch, *, gan=1.0, cyc=10.0, identity=0.0, pixel=0.0, tv=0.0, attn_disc="none", own=True, through_mask=True
):
    """The objective as the papers and the official code have it: every call made singly.

    ``own``: a real picture comes with its own mask, else with that of the translation it is compared with.
    ``through_mask``: gradients reach the generator through the mask, too. Returns the generators' and the
    discriminators' terms (no replay buffer).
    """
    mse, l1 = nn.MSELoss(), nn.L1Loss()
    generators, discriminators = {}, {}
    for source, target in ("AB", "BA"):
        G, back = getattr(system, f"G_{source}{target}"), getattr(system, f"G_{target}{source}")
        D = getattr(system, f"D_{target}")
        real, real_target = batch[source], batch[target]
        fake = G(real).image
        logits = D(fake)[0]
        generators[f"G_{source}{target}"] = gan * mse(logits, torch.ones_like(logits))
        generators[f"cycle_{source}"] = cyc * l1(back(fake).image, real)
        if identity:
            generators[f"identity_{source}"] = identity * l1(back(real).image, real)
        if pixel:
            generators[f"pixel_{source}{target}"] = pixel * l1(fake, real)
        on_real, on_fake = D(real_target)[0], D(fake.detach())[0]
        loss = mse(on_real, torch.ones_like(on_real)) + mse(on_fake, torch.zeros_like(on_fake))
        discriminators[f"D_{target}"] = loss * 0.5
        if tv or attn_disc != "none":
            mask = 1 - G(real).attention[:, -1:]
        if tv:
            size = mask.shape[-1]
            places = [(m[0], i, j) for m in mask for i in range(size) for j in range(size)]
            total = sum(abs(m[i + 1, j] - m[i, j]) for m, i, j in places if i + 1 < size)
            total += sum(abs(m[i, j + 1] - m[i, j]) for m, i, j in places if j + 1 < size)
            generators[f"tv_{source}{target}"] = tv * total / len(mask)
        if attn_disc != "none":
            guided_D = getattr(system, f"guided_D_{target}")
            logits = guided_D(guided_input(fake, mask if through_mask else mask.detach(), attn_disc))[0]
            generators[f"guided_G_{source}{target}"] = gan * mse(logits, torch.ones_like(logits))
            real_mask = (1 - back(real_target).attention[:, -1:]) if own else mask
            on_real = guided_D(guided_input(real_target, real_mask.detach(), attn_disc))[0]
            on_fake = guided_D(guided_input(fake.detach(), mask.detach(), attn_disc))[0]
            loss = mse(on_real, torch.ones_like(on_real)) + mse(on_fake, torch.zeros_like(on_fake))
            discriminators[f"guided_D_{target}"] = loss * 0.5
    return generators, discriminators


def gradients(losses, parameters):
    return torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)


ONE = dict(gan=0.5, pixel=1.0, tv=1e-6)  # scheme I's published weights
CONCAT = dict(attn_disc="concat")
PLAIN, MASK = dict(curriculum_epochs=0), dict(**ONE, attn_disc="mask")
TEXTBOOK = [
    ("attentiongan", {}, dict(identity=0.5)),
    ("attentiongan", dict(lambda_id=0.0), {}),
    ("attentiongan", dict(no_background=True, upsample="nearest"), dict(identity=0.5)),
    ("attentiongan", dict(attn_disc="concat"), dict(identity=0.5, attn_disc="concat")),
    ("attentiongan", dict(attn_disc="mask", attn_real="partner"), dict(identity=0.5, attn_disc="mask", own=False)),
    ("attentiongan", CONCAT | dict(attn_grad="picture"), CONCAT | dict(identity=0.5, through_mask=False)),
    ("cyclegan", {}, dict(identity=5.0)),
    ("attentiongan1", PLAIN, dict(**ONE, attn_disc="concat")),
    ("attentiongan1", dict(**PLAIN, attn_disc="mask"), MASK),
    ("attentiongan1", {**PLAIN, "attn_disc": "mask", "attn_grad": "picture"}, dict(**MASK, through_mask=False)),
    ("attentiongan1", dict(**PLAIN, attn_disc="none", lambda_tv=0.01), dict(gan=0.5, pixel=1.0, tv=0.01)),
    ("attentiongan", dict(lambda_cyc=3.0, lambda_id=7.0), dict(cyc=3.0, identity=7.0)),
    ("cyclegan", dict(lambda_cyc=4.0, lambda_id=0.25), dict(cyc=4.0, identity=0.25)),
    (
        "attentiongan1",
        dict(**PLAIN, lambda_gan=2.0, lambda_cyc=3.0, lambda_pixel=5.0),
        dict(ONE, gan=2.0, cyc=3.0, pixel=5.0, attn_disc="concat"),
    ),
]


# ----------------------------------------------------------------------------------------------------------
#  Pictures and folders
# ----------------------------------------------------------------------------------------------------------

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(path, colour=RED, size=(8, 8)):
    return save(Image.new("RGB", size, colour), path)


def noise(seed, size=(40, 36)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def pixels(path, channels=3, half=None):
    return np.asarray(Picture(path, half).open(channels)).tolist()


def names_below(pictures, root):
    return [str(picture.path.relative_to(root)) for picture in pictures]


def below(folder):
    """Everything in a folder, links and hidden files included: relative path to bytes (None for folders)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def make_set(root, nA=3, nB=2, size=(40, 36), tests=0):
    for side, n in (("A", nA), ("B", nB)):
        for i in range(n):
            save(noise(i + 100 * (side == "B"), size), root / f"train{side}" / f"{i}.png")
        for i in range(tests):
            save(noise(i + 200 + 100 * (side == "B"), size), root / f"test{side}" / f"{i}.png")
    return root


def publish(web, monkeypatch, members, name="apple2orange", checksum=False, counts=None):
    """Put an archive of ``members`` where ``name`` is fetched from; no checksum is expected unless asked for."""
    archive = PUBLIC_SETS[name].archive
    path = web.folder / archive
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
    else:
        with tarfile.open(path, "w:gz") as file:
            for member, content in members.items():
                entry = tarfile.TarInfo(member) if isinstance(member, str) else member
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if checksum else None
    monkeypatch.setitem(PUBLIC_SETS, name, PublicSet(archive, sha256, counts or {}))
    return path


# ----------------------------------------------------------------------------------------------------------
#  Generators and their files
# ----------------------------------------------------------------------------------------------------------


def tiny(seed=0, network=AttentionGenerator, **settings):
    """A small generator with larger weights than at the start, where all masks are equal; of 2 masks none dominates."""
    torch.manual_seed(seed)
    size = {"depth": 6} if network is UNetGenerator else {"n_residual_blocks": 1}  # smaller U-Nets have no dropout
    if network is AttentionGenerator:
        size["n_masks"] = 2
    generator = network(ngf=4, **{**size, **settings}).eval()
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return generator


def save_generators(folder="net", about=None, **generators):
    """``folder/<direction>.pt`` for each, as train.py writes them, with what else is known ``about`` them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for direction, generator in generators.items():
        content = {**pack_generator(generator), "direction": direction, **(about or {})}
        torch.save(content, f"{folder}/{direction}.pt")


# ----------------------------------------------------------------------------------------------------------
#  Extractors
# ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


class Tiny(FeatureExtractorBase):
    """Twelve features: the global averages of two seeded random convolutions, one on top of the other."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        draw = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, stride=2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 3

    @staticmethod
    def get_provided_features_list():
        return ("averages",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "averages"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        first = self.first(images / 127.5 - 1).relu()
        return (torch.cat([first.mean(dim=(2, 3)), self.second(first).relu().mean(dim=(2, 3))], dim=1),)


if "tiny" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("tiny", Tiny)


class Classifier(Extractor):
    """An extractor that knows the classes of its two logits: how dark and how bright a picture is."""

    def __init__(self, *_):
        self.name, self.suffix, self.device, self.categories = "brightness", "-bright", CPU, ["sorrel", "zebra"]
        self.tiny = Tiny("tiny", ["averages"])

    def network(self, images):
        bright = images.float().mean(dim=(1, 2, 3)) / 127.5 - 1
        return self.tiny(images)[0], torch.stack([-bright, bright], dim=1)


# ----------------------------------------------------------------------------------------------------------
#  Weights in the official layouts
# ----------------------------------------------------------------------------------------------------------


def official_attention_weights(ngf=4, n_blocks=2, n_masks=10, n_contents=9):
    """State dict of the official AttentionGAN generator, random weights and biases."""
    rng = torch.Generator().manual_seed(0)
    weights = {}

    def conv(name, out_channels, in_channels, kernel, transposed=False):
        shape = (in_channels, out_channels) if transposed else (out_channels, in_channels)
        weights[f"{name}.weight"] = torch.randn(*shape, kernel, kernel, generator=rng, dtype=torch.float64) * 0.3
        weights[f"{name}.bias"] = torch.randn(out_channels, generator=rng, dtype=torch.float64)

    conv("conv1", ngf, 3, 7)
    conv("conv2", 2 * ngf, ngf, 3)
    conv("conv3", 4 * ngf, 2 * ngf, 3)
    for i in range(n_blocks):
        conv(f"resnet_blocks.{i}.conv1", 4 * ngf, 4 * ngf, 3)
        conv(f"resnet_blocks.{i}.conv2", 4 * ngf, 4 * ngf, 3)
    for head, out, kernel in (("content", 3 * n_contents, 7), ("attention", n_masks, 1)):
        conv(f"deconv1_{head}", 2 * ngf, 4 * ngf, 3, transposed=True)
        conv(f"deconv2_{head}", ngf, 2 * ngf, 3, transposed=True)
        conv(f"deconv3_{head}", out, ngf, kernel)
    return weights


def convolve(x, weights, name, stride=1, reflect=0, zero=0):
    if reflect:
        x = F.pad(x, (reflect,) * 4, mode="reflect")
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=zero)


def upsample(x, weights, name):
    return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1, 1)


def norm_relu(x):
    return F.relu(F.instance_norm(x))


def trunk(x, weights, names, blocks):
    x = norm_relu(convolve(x, weights, names[0], reflect=3))
    x = norm_relu(convolve(x, weights, names[1], stride=2, zero=1))
    x = norm_relu(convolve(x, weights, names[2], stride=2, zero=1))
    for first, second in blocks:
        y = norm_relu(convolve(x, weights, first, reflect=1))
        x = x + F.instance_norm(convolve(y, weights, second, reflect=1))
    return x


def official_attention_forward(x, weights, n_blocks=2, n_contents=9):
    blocks = [(f"resnet_blocks.{i}.conv1", f"resnet_blocks.{i}.conv2") for i in range(n_blocks)]
    features = trunk(x, weights, ("conv1", "conv2", "conv3"), blocks)
    c = norm_relu(upsample(features, weights, "deconv1_content"))
    c = norm_relu(upsample(c, weights, "deconv2_content"))
    c = torch.tanh(convolve(c, weights, "deconv3_content", reflect=3))
    a = norm_relu(upsample(features, weights, "deconv1_attention"))
    a = norm_relu(upsample(a, weights, "deconv2_attention"))
    a = torch.softmax(convolve(a, weights, "deconv3_attention"), dim=1)
    out = x * a[:, 9:].repeat(1, 3, 1, 1) if n_contents == 9 else 0
    for i in range(n_contents):
        out = out + c[:, 3 * i : 3 * i + 3] * a[:, i : i + 1].repeat(1, 3, 1, 1)
    return out


def plain_layer_instance_norm(x, rho, gamma, beta):
    """Picture by picture and channel by channel; variances over n - 1, as torch.var."""
    out = torch.empty_like(x)
    for b, picture in enumerate(x):
        layer_mean = picture.sum() / picture.numel()
        layer_var = ((picture - layer_mean) ** 2).sum() / (picture.numel() - 1)
        for c, channel in enumerate(picture):
            mean = channel.sum() / channel.numel()
            var = ((channel - mean) ** 2).sum() / (channel.numel() - 1)
            instance, layer = (channel - mean) / (var + 1e-5) ** 0.5, (channel - layer_mean) / (layer_var + 1e-5) ** 0.5
            out[b, c] = gamma[b, c] * (rho[c] * instance + (1 - rho[c]) * layer) + beta[b, c]
    return out


def official_ugatit_weights(seed, size=None, ngf=4, n_blocks=2):
    """State dict of a generator of the official PyTorch code of U-GAT-IT; ``size`` is that of the full network."""
    rng = torch.Generator().manual_seed(seed)
    dim = 4 * ngf
    shapes = {"DownBlock.1.weight": (ngf, 3, 7, 7)}
    shapes |= {"DownBlock.5.weight": (2 * ngf, ngf, 3, 3), "DownBlock.9.weight": (dim, 2 * ngf, 3, 3)}
    for i in range(n_blocks):
        shapes |= {f"DownBlock.{12 + i}.conv_block.{j}.weight": (dim, dim, 3, 3) for j in (1, 5)}
        for j in (1, 2):
            shapes |= {f"UpBlock1_{i + 1}.conv{j}.weight": (dim, dim, 3, 3)}
            shapes |= {f"UpBlock1_{i + 1}.norm{j}.rho": (1, dim, 1, 1)}
    shapes |= {"gap_fc.weight": (1, dim), "gmp_fc.weight": (1, dim)}
    shapes |= {"conv1x1.weight": (dim, 2 * dim, 1, 1), "conv1x1.bias": (dim,)}
    shapes |= {"FC.0.weight": (dim, dim if size is None else dim * (size // 4) ** 2), "FC.2.weight": (dim, dim)}
    shapes |= {"gamma.weight": (dim, dim), "beta.weight": (dim, dim)}
    for i, out in ((2, 2 * ngf), (7, ngf)):
        shapes |= {f"UpBlock2.{i}.weight": (out, 2 * out, 3, 3)}
        shapes |= {f"UpBlock2.{i + 1}.{name}": (1, out, 1, 1) for name in ("rho", "gamma", "beta")}
    shapes |= {"UpBlock2.11.weight": (3, ngf, 7, 7)}
    weights = {k: 0.3 * torch.randn(shape, generator=rng) for k, shape in shapes.items()}
    return {k: v.abs().clamp(0, 1) if k.endswith("rho") else v for k, v in weights.items()}


# ----------------------------------------------------------------------------------------------------------
#  Runs
# ----------------------------------------------------------------------------------------------------------

# 4 steps an epoch. 64 pixels, because smaller U-Nets have no dropout.
QUICK_PIX2PIX = (
    "--system pix2pix --dataset_name pairs --img_height 64 --img_width 64 --ngf 2 --ndf 2 --n_layers_D 2 "
    "--log_interval 1 --n_cpu 0 --sample_interval 0"
)
TINY = "--img_height 12 --img_width 12 --ngf 4 --ndf 4 --n_residual_blocks 1 --n_layers_D 2 --n_masks 3 --pool_size 3"
QUICK = f"--dataset_name small --log_interval 4 --n_cpu 0 --sample_interval 0 {TINY}"  # 6 samples an epoch


def quick(system: str) -> str:
    """QUICK for a system: none of the options that it does not have."""
    lacking = {"attentiongan": (), "ugatit": ("n_masks", "n_layers_D", "pool_size")}.get(system, ("n_masks",))
    return re.sub(rf" --({'|'.join(lacking)}) \d+", "", QUICK) if lacking else QUICK


def run(command: str) -> int:
    return train.main(command.split())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def script(command: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *command.split(), "--device", "cpu"]


def checkpoint(name: str) -> dict:
    return torch.load(f"saved_models/{name}/checkpoint.pt", weights_only=True)


def log(name: str) -> list[dict]:
    lines = Path(f"saved_models/{name}/log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def same(a, b, at="") -> None:
    """Assert that two nested states are equal to the bit."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


def same_run(one: str, other: str) -> None:
    """Networks, optimizers, pools, random states, position and log are equal; options may say how it was started."""
    a, b = checkpoint(one), checkpoint(other)
    for key in ("step", "steps_per_epoch", "networks", "optimizers", "ranks"):
        same(a[key], b[key], key)
    same(log(one), log(other), "log")


def wait_for_log(name: str, lines: int, process) -> None:
    deadline = time.monotonic() + 90
    while not (Path(f"saved_models/{name}/log.jsonl").exists() and len(log(name)) >= lines):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send the process a signal once, right after the given step."""
    add = record.Record.add

    def add_and_stop(self, *arguments):
        add(self, *arguments)
        if self.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(record.Record, "add", add_and_stop)
