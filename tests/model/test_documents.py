"""Documents of one window that do not see each other, against each document alone."""

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from scantling.model.cache import Placement
from scantling.model.pattern import Full
from scantling.model.scores import Scores

FIRST = 0
LENGTHS = [(5, 20, 7), (32,), (1, 1, 30)]
"""Of the documents of each row."""


def rows() -> torch.Tensor:
    """Each document opens with `FIRST`, but for the first of a row, which a window may have cut."""
    tokens = torch.randint(1, 512, (len(LENGTHS), 32), generator=torch.Generator().manual_seed(0))
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        for start in torch.tensor(lengths).cumsum(0)[:-1]:
            row[start] = FIRST
    return tokens


@pytest.mark.parametrize(
    "parts",
    [
        "attn=gqa",
        "attn=sliding",
        "attn=mha_softcap",
        "attn=mla",
        "pos=alibi",
        "pos=t5_relative",
        "pos=none attn=mqa",
    ],
)
def test_logits_are_those_of_each_document_alone(nano, parts):
    """Where a position says only how far apart tokens are, a document in the middle of a row is one from the
    start."""
    decoder, tokens = nano(*parts.split(), gain=8), rows()
    decoder.separate_documents(FIRST)
    logits = decoder(tokens)
    alone = [
        decoder(part[None])[0]
        for row, lengths in zip(tokens, LENGTHS, strict=True)
        for part in row.split(lengths)
    ]
    assert_close(logits.flatten(0, 1), torch.cat(alone), rtol=1e-4, atol=1e-4)
    decoder.first_of_document = None
    assert not torch.allclose(decoder(tokens), logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_hides_the_same(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # flex cannot trace the checks of shapes
    placement = Placement.whole(rows(), FIRST)
    q, k, v = torch.randn(3, len(LENGTHS), 2, 32, 8, generator=torch.Generator().manual_seed(0))
    scores = Scores(bias=None, n_heads=2, placement=placement)
    flex = scores.flex(q, k, v, Full(0), 0.3, None)
    assert_close(
        flex, scores.attend(q, k, v, keys=None, pattern=Full(0), scale=0.3, softcap=None, dropout=0.0)
    )


def test_a_run_with_document_masks(command, tmp_path, entry):
    """It trains, and is evaluated afterwards as it was validated; what forms no scores is refused."""
    from scantling.runs.directory import RunDirectory

    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        (texts / f"{i}.txt").write_text(f"document {i} has a number: {i * i}\n")
    files = ("data.files=texts/*.txt", "data.split=documents", "document_mask=true", "attn=gqa")
    code, _, err = command(*files)
    assert code == 0, err
    (path,) = (tmp_path / "runs" / "default").iterdir()
    row = RunDirectory(path).metrics()[-1]
    code, out, _ = entry("evaluate", "paths.cache=cache", f"run={path}", "checkpoint=last", "n_windows=8")
    assert code == 0
    assert f"{row['val/bpb']:.4f}" in out
    assert command("data.files=texts/*.txt", "data.split=documents", "attn=gqa", "paths.runs=without")[0] == 0
    (other,) = (tmp_path / "without" / "default").iterdir()
    assert RunDirectory(other).metrics()[-1]["val/loss"] != row["val/loss"]
    code, _, err = command("document_mask=true", "attn=performer")
    assert code == 2
    assert "document_mask=true hides scores, and this attention forms none" in err
