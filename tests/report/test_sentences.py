"""Findings in words: each has a sentence, and these are some of them."""

from typing import get_args

import pytest

from scantling.analysis import findings as f
from scantling.report.sentences import sentence


def test_every_finding_has_a_sentence():
    assert {*sentence.registry} - {object} == {*get_args(f.Finding)}


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (f.FewBudgets(1), "only 1 budget: exponents of compute rest on 1 point"),
        (
            f.OptimaAtEdge((1e18, 3e19)),
            "the minimum lies at the edge of the grid of sizes at 1e+18, 3e+19 FLOPs",
        ),
        (f.HighestDropped((5, 31)), "left out as asked, the 2 highest losses: rows 5, 31"),
        (f.Unreadable("half", "a JSON file is cut short"), "left out: half, a JSON file is cut short"),
        (
            f.NotFinished("failed", tuple("abcdefghijkl")),
            "left out, failed: a, b, c, d, e, f, g, h, i, j and 2 more",
        ),
        (
            f.PartnerLost("failed", "", "gelu", 3, "llama"),
            "arm gelu is not compared: its seed 3 failed",
        ),
        (
            f.PartnerLost("unfinished", "model=nano", "llama", 3, "llama"),
            "seed 3 is not compared at model=nano: the run of llama is not finished",
        ),
        (
            f.OtherLength("model=nano", "gelu", "llama", -0.25),
            "at model=nano gelu trains on 25.0% fewer tokens than llama, and its difference is of these too",
        ),
        (
            f.BaselineLawDoubt(f.FloorLost(0.01)),
            "law of the baseline: E = 0.01: these runs do not bend enough to determine the irreducible loss",
        ),
    ],
)
def test_a_finding_is_worded(finding, text):
    assert sentence(finding) == text
