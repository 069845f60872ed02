import re
from pathlib import Path

import pytest
import torch

import evaluate
from datasets import draw_built_in, find_pictures, normalise, unaugmented
from metrics import intersection_over_union, mean_absolute_error
from models import AttentionGenerator, ResNetGenerator, Translation, pack_generator


def test_intersection_over_union():
    attention = torch.zeros(4, 1, 4, 4)
    masks = torch.zeros(4, 1, 4, 4)
    attention[0, :, :2], masks[0, :, 1:3] = 0.6, 1  # two rows each, one shared: 1 / 3
    attention[1], masks[1] = 0.5, 1  # 0.5 is not above the threshold
    attention[2], masks[2] = 0.7, 1
    assert intersection_over_union(attention, masks).tolist() == pytest.approx([1 / 3, 0, 1, 1])
    assert intersection_over_union(attention, masks, threshold=0.65).tolist() == pytest.approx([0, 0, 1, 1])


def test_mean_absolute_error_is_per_picture():
    errors = mean_absolute_error(torch.tensor([[[[0.0, 1.0]]], [[[2.0, 2.0]]]]), torch.zeros(2, 1, 1, 2))
    assert errors.tolist() == [0.5, 2.0]


class Perfect(torch.nn.Module):
    """Stands for a trained generator: finds the brown pixels and knows the truth of each test picture."""

    def __init__(self, root: Path):
        super().__init__()
        self.settings = {"channels": 3}
        self.answers = []
        for name in ("testA", "testA_truth", "testA_mask"):
            pictures = find_pictures(root / name)
            self.answers.append(
                [normalise(unaugmented(p, (64, 64), 1 if name == "testA_mask" else 3)) for p in pictures]
            )

    def forward(self, x):
        for real, truth, mask in zip(*self.answers, strict=True):
            if torch.equal(real, x[0]):
                foreground = mask[None] / 2 + 0.5
                return Translation(truth[None], torch.cat([foreground, 1 - foreground], dim=1))
        raise AssertionError("a picture that is no test picture")


def test_a_perfect_translator_is_measured_as_perfect(tmp_path, monkeypatch):
    root = tmp_path / "data" / "solid2striped"
    draw_built_in(root, n_train=1, n_test=3)
    about = {"options": {"img_height": 64, "img_width": 64}}
    monkeypatch.setattr(evaluate, "open_generator", lambda *_: (Perfect(root), about))
    figures = evaluate.evaluate(root, "any", "AtoB", torch.device("cpu"))
    assert figures["iou"] == 1 and figures["error"] == 0
    assert 0.05 < figures["untranslated"] < 0.5


def save(folder: str, generator, **about) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for direction in ("AtoB", "BtoA"):
        options = {"options": {"img_height": 32, "img_width": 32}}
        torch.save(
            {**pack_generator(generator), "direction": direction, **options, **about}, f"{folder}/{direction}.pt"
        )


def test_the_table_has_a_row_for_each_checkpoint_then_median_and_worst(tmp_path, capsys):
    draw_built_in(tmp_path / "data" / "solid2striped", n_train=1, n_test=2)
    for seed in range(3):
        torch.manual_seed(seed)
        save(f"saved_models/run_{seed}", AttentionGenerator(ngf=4, n_residual_blocks=1))
    assert evaluate.main(["--checkpoint", "run_0", "run_1", "run_2", "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["checkpoint", "direction", "iou", "error", "untranslated"]
    assert [r[:2] for r in rows[1:6]] == [[n, "AtoB"] for n in ("run_0", "run_1", "run_2", "median", "worst")]
    assert [r[1] for r in rows[6:]] == ["BtoA"] * 5
    values = [[float(v) for v in r[2:]] for r in rows[1:6]]
    for column, worst in ((0, min), (1, max)):
        singly = sorted(v[column] for v in values[:3])
        assert values[3][column] == singly[1] and values[4][column] == worst(singly)
    assert len({v[1] for v in values[:3]}) == 3


def test_generators_without_masks_have_no_iou(tmp_path, capsys):
    draw_built_in(tmp_path / "data" / "solid2striped", n_train=1, n_test=1)
    save("folder", ResNetGenerator(ngf=4, n_residual_blocks=1))
    assert evaluate.main(["--checkpoint", "folder", "--direction", "BtoA"]) == 0
    assert re.search(r"folder +BtoA +- +\d\.\d{3} +\d\.\d{3}\n$", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--checkpoint nowhere", "nowhere: no generator for AtoB found"),
        ("--checkpoint folder/BtoA.pt", "folder/BtoA.pt: translates BtoA, expected AtoB (a folder serves both)"),
        ("--checkpoint folder --dataset_name other", "data/other/testA: no test pictures there"),
        ("--checkpoint folder --dataset_name small", "data/small/testA_mask: 0 pictures, expected 2"),
    ],
)
def test_what_does_not_fit_is_named(small_set, capsys, arguments, message):
    save("folder", AttentionGenerator(ngf=4, n_residual_blocks=1))
    assert evaluate.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
