"""The part of a run's page that its checkpoints give, against what was read off them."""

import json
import re

import numpy as np
import pytest

from scantling.data.tokenizers import BPE
from scantling.inference.views import views_of
from scantling.report.html import UNITS
from scantling.report.view_charts import Attention, attention_table

PROMPT = 'def f(self, "x"):'


@pytest.fixture
def run(record, checkpointed):
    """A finished run with checkpoints after steps 40 and 100."""
    record("study", "seen", ["seed=0", "arm=a"], loss=3.0, arm="a")
    bpe = BPE(vocab_size=700, train_bytes=None)
    return checkpointed(record.runs / "study" / "seen", steps=(40, 100), kind=bpe)[0]


def written(run, name="report.html"):
    return (run.path.parents[1] / "reports" / "study" / "seen" / name).read_text()


def test_the_page_has_the_numbers_of_the_checkpoints(run, report):
    code, _, err = report("run=seen", "tokens=[de,self]", f"prompt={PROMPT}")
    assert (code, err) == (0, "")
    found = views_of(run, tokens=["de", "self"], prompt=PROMPT)
    shown, beside = written(run), written(run, "report.md")
    assert found.neighbours is not None
    assert found.map is not None
    assert found.attention is not None
    for of_step in found.neighbours.nearest:
        for nearest in of_step:
            listed = " · ".join(f"{word} {cosine:.2f}" for word, cosine in nearest)
            assert listed in beside
    assert re.findall(r"<th[^>]*>(step \d+)</th>", shown) == ["step 40", "step 100"]
    assert "| token | step 40 | step 100 |" in beside
    specs = [
        json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', shown)
    ]
    (map_,) = (spec for spec in specs if spec.get("frames"))
    for frame in (0, 1):
        points = {
            word: (x, y)
            for series in map_["series"]
            if series["frame"] == frame
            for word, x, y in zip(series["hover"], *series["values"].values(), strict=True)
        }
        assert len(points) == len(set(found.map.words))
        assert points["self"] == pytest.approx(found.map.places[frame][1], rel=1e-5)
    low, high = map_["x"][0]["range"]
    assert low < found.map.places[..., 0].min()
    assert high > found.map.places[..., 0].max()
    (maps,) = (spec for spec in specs if "units" in spec)
    n = len(found.attention.words)
    for layer, head in ((0, 0), (1, 3)):
        weights = np.zeros((n, n))
        weights[np.tril_indices(n)] = np.array(maps["weights"][layer][head]) / UNITS
        np.testing.assert_allclose(weights, found.attention.weights[layer, head], atol=0.5 / UNITS)
    assert maps["words"][0] == "&lt;|endoftext|&gt;"  # plotly would read a tag, but not &quot;
    assert "".join(maps["words"][1:]).replace("␣", " ") == PROMPT
    assert maps["ticks"][0] == "&lt;|endoft…"
    assert len(shown) < 6_000_000


def test_where_heads_look_by_hand():
    weights = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]])[None, None]
    found = Attention(step=1, words=("a", "b", "c"), layers=(2,), heads=(1,), weights=weights, note="")
    (row,) = attention_table(found).frame.to_dict("records")
    effective = [np.prod([w**-w for w in weights[0, 0, t] if w > 0]) for t in (1, 2)]
    assert row == pytest.approx(
        {
            "layer": 2,
            "head": 1,
            "itself": (0.75 + 0.2) / 2,
            "token before": (0.25 + 0.3) / 2,
            "first token": (0.25 + 0.5) / 2,
            "keys in effect": np.mean(effective),
        },
        abs=5e-4,
    )


def test_a_run_without_checkpoints_says_so(record, report):
    record("study", "seen", ["seed=0", "arm=a"], loss=3.0, arm="a")
    assert report("run=seen")[0] == 0
    page = (record.runs / "reports" / "study" / "seen" / "report.html").read_text()
    assert "No embeddings and no attention: runs/study/seen/checkpoints holds no checkpoint." in page
    code, _, err = report("run=seen", "tokens=[def]")
    assert (code, err) == (2, "error: runs/study/seen/checkpoints holds no checkpoint\n")


def test_a_configuration_that_asks_for_foreign_code_is_not_followed(run, report):
    run.config.write_text(run.config.read_text().replace("scantling.model.attn.Attention", "os.system"))
    assert report("run=seen")[0] == 0
    assert "asks for os.system: only parts of scantling.model" in written(run)


def test_what_cannot_be_shown_is_one_line(run, report):
    for asked, complaint in (
        ("prompt=", "the prompt is empty"),
        (
            "tokens=[self,selfself]",
            '"selfself" is not a token of this run, whose tokenizer cuts it into "self", "self"',
        ),
        ("tokens=def", "tokens=def must be a list, as tokens=[def,self]"),
        ("tokens=[]", "must be a list"),
    ):
        code, _, err = report("run=seen", asked)
        assert (code, err.count("\n")) == (2, 1)
        assert complaint in err


def test_views_are_of_one_run(record, report):
    for asked in ("prompt=def", "tokens=[def]"):
        code, _, err = report("runs=[a,b]", asked)
        assert (code, err) == (
            2,
            f"error: {asked.partition('=')[0]}= is of the page of one run: add run=NAME\n",
        )
