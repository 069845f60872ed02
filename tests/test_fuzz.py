"""Every key of real files of weights changed in turn: the answer is always one line, never a traceback."""

import time
from itertools import islice

import pytest
import torch
from common import QUICK, run

import checkpoints
from models import AttentionGenerator

DROPPED = object()


def variants(value):
    """What may stand in the place of a value."""
    yield from (DROPPED, None, "text", [1], -1, 10**12, float("nan"), {})
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
        broken = value.clone(memory_format=torch.contiguous_format)
        broken.view(-1)[0] = float("nan")
        yield from (broken, value[..., :0], value[None], value.new_zeros(1).expand(value.shape), value.long())
    if isinstance(value, dict):
        yield {**value, "unknown": 1}


def places(value, depth, at=()):
    """The paths to all keys down to a depth; of many tensors in one dictionary only the first."""
    if isinstance(value, dict) and depth:
        tensors = [key for key, each in value.items() if isinstance(each, torch.Tensor)]
        for key in value:
            if key not in tensors[1:]:
                yield (*at, key)
                yield from places(value[key], depth - 1, (*at, key))
    if isinstance(value, list) and value and depth:
        yield (*at, 0)
        yield from places(value[0], depth - 1, (*at, 0))


def replaced(value, path, new):
    """A copy in which the value at a path is another one."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        copy[key] = replaced(copy[key], rest, new)
    elif new is DROPPED:
        del copy[key]
    else:
        copy[key] = new
    return copy


def changed_files(content, depth):
    for path in places(content, depth):
        value = content
        for key in path:
            value = value[key]
        for new in variants(value):
            yield ".".join(map(str, path)), replaced(content, path, new)


# In the ordinary tests a share of the cases, in ``make torture`` all of them.
EVERY = [9, pytest.param(1, marks=pytest.mark.torture)]


@pytest.mark.parametrize("every", EVERY)
def test_a_changed_generator_file_is_refused_in_one_line_or_opens(every):
    generator = AttentionGenerator(ngf=4, n_residual_blocks=1, n_masks=3)
    options = {"img_height": 32, "img_width": 32, "resize": "squash", "task": "translation", "system": "attentiongan"}
    content = {**checkpoints.pack_generator(generator), "direction": "AtoB", "options": options, "step": 7}
    opened = refused = 0
    for name, changed in islice(changed_files(content, 3), 0, None, every):
        torch.save(changed, "net.pt")
        start = time.monotonic()
        try:
            checkpoints.load_generator("net.pt")
            opened += 1
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "net.pt" in str(error), name
        assert time.monotonic() - start < 10, name
    print(f"generator files: {opened + refused} changed, {refused} refused, {opened} opened")
    assert refused > opened


@pytest.mark.parametrize("every", EVERY)
def test_a_changed_checkpoint_is_refused_in_one_line_or_resumed(small_set, every, capsys):
    command = f"{QUICK} --n_masks 3 --name r"
    assert run(f"{command} --n_epochs 1") == 0
    path = "saved_models/r/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    resumed = refused = 0
    for name, changed in islice(changed_files(content, 4), 0, None, every):
        torch.save(changed, path)
        capsys.readouterr()
        start = time.monotonic()
        status = run("--dataset_name small --resume --name r --max_steps 7")
        told = capsys.readouterr().err
        assert time.monotonic() - start < 10, name
        assert status in (0, 2), name
        if status == 2:
            refused += 1
            lines = [line for line in told.splitlines() if "error" in line]
            assert len(lines) == 1 and "Traceback" not in told, (name, told)
        else:
            resumed += 1
    print(f"checkpoints: {resumed + refused} changed, {refused} refused, {resumed} resumed")
    assert refused > resumed
