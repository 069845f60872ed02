"""The demo learns: ``make demo`` by the Makefile's own flags, judged by the exact masks of the drawn pictures."""

import json
import re
from pathlib import Path

import pytest
from common import ROOT

import evaluate
import train


@pytest.mark.learns
def test_the_demo_finds_the_objects_in_both_directions():
    (flags,) = re.findall(r"^DEMO := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert train.main([*flags.replace("\\\n", " ").split(), "--name", "demo"]) == 0
    assert evaluate.main(["--dataset_name", "solid2striped", "--checkpoint", "demo", "--extractor", "none"]) == 0
    rows = json.loads(Path("images/demo/evaluation.json").read_text())["rows"]
    overlap = {row["direction"]: row["figures"]["IoU"] for row in rows}
    print(overlap)
    assert overlap.keys() == {"AtoB", "BtoA"}
    assert min(overlap.values()) > 0.8
