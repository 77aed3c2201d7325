"""What is asked of a trained run, against the same model read window by window."""

import csv
import inspect
import json
import string

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scantling.cli import sample
from scantling.config.composition import resolved_config
from scantling.data.context_windows import ContextWindows
from scantling.data.tokenizers import Byte, Char
from scantling.inference.stored_run import StoredRun
from scantling.runs.directory import RunDirectory


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(inspect.getsource(inspect)[:30_000])
    return path


@pytest.fixture
def stored(tmp_path, text, nano, composed):
    """`stored("name", "pos=alibi")` is the directory of a run with the nano model as it was initialised."""

    def stored(name, *overrides, tokenizer=Byte, seed=0):
        codec = tokenizer().train(iter([string.printable]))
        overrides = (f"model.vocab_size={codec.vocab_size}", "embed=untied", *overrides)
        config = composed("model=nano", "data=text", f"data.files={text}", *overrides)
        directory = RunDirectory(tmp_path / name)
        choices = {"pos": "rope"} | dict(o.split("=") for o in overrides if "." not in o)
        record = OmegaConf.to_yaml(resolved_config(config) | {"choices": choices})
        directory.begin(record, {"corpus": {"fingerprint": "none"}})
        codec.save(directory.tokenizer)
        weights = nano(*overrides, gain=8, seed=seed).state_dict()
        torch.save(
            {"state_dict": {f"decoder.{key}": value for key, value in weights.items()}}, directory.best
        )
        return str(directory.path)

    return stored


@pytest.fixture
def command(tmp_path, monkeypatch, entry):
    """`command("evaluate", "run=DIR")` -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def command(name, *overrides):
        usual = ["paths.cache=cache"] if name == "evaluate" else []
        return entry(name, *usual, *overrides)

    return command


# --- loss by length of context


@pytest.mark.parametrize(
    ("lengths", "stride"), [([8, 16, 64], None), ([12, 8], 8), ([6, 4, 30], 3), ([5], 1)]
)
@pytest.mark.parametrize("n_windows", [None, 2])
def test_every_length_scores_the_same_tokens_once(lengths, stride, n_windows):
    tokens = np.arange(1000)  # a token is its own position
    windows = ContextWindows(tokens, lengths, stride=stride, n_windows=n_windows)
    n_inputs, scored_before = 0, None
    for length, step in windows.cuts:
        scored = []
        for inputs, targets in windows.batches(length, step, batch_size=3):
            assert inputs.shape[1] == length
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            context = targets[:, -step:] - inputs[:, :1]
            assert context.min() == length - step + 1
            assert context.max() == length
            scored += targets[:, -step:].flatten().tolist()
            n_inputs += inputs.numel()
        assert len(scored) == len(set(scored)) == windows.n_targets
        assert scored_before in (None, sorted(scored))
        scored_before = sorted(scored)
    assert n_inputs == windows.n_inputs
    if n_windows is None:
        assert (
            windows.n_targets > 1000 - max(lengths) - windows.stretch - 1
        )  # no more is left out than must be


def test_windows_side_by_side_are_those_of_validation():
    from scantling.data.loading import validation_batches

    tokens = np.arange(1000) % 37
    (expected,) = validation_batches(tokens, 16, None, 100)
    windows = ContextWindows(tokens, [16], stride=None, n_windows=None)
    ((inputs, targets),) = windows.batches(16, 16, 100)
    assert torch.equal(inputs, expected["inputs"])
    assert torch.equal(targets, expected["targets"])


@torch.no_grad()
def test_losses_by_length_equal_one_token_at_a_time(stored, tmp_path):
    """-log p of each token given exactly the tokens that its window shows, far beyond the training length of
    64.
    """
    run = StoredRun.load(stored("run", "pos=rope"), "best")
    corpus = run.corpus(None, tmp_path / "cache")
    windows = ContextWindows(corpus.val.tokens, [32, 96], stride=24, n_windows=1)
    tokens = torch.from_numpy(corpus.val.tokens.astype(np.int64))
    found = list(run.loss_by_length(corpus, windows, batch_size=2))
    assert [cut[:2] for cut in found] == [(32, 32), (96, 96), (32, 24), (96, 24)]
    for length, stride, loss in found:
        each = []
        for start in windows.starts:
            for i in range(windows.stretch):  # token start + i + 1 is scored
                begin = start + i // stride * stride - (length - stride)
                seen = tokens[begin : start + i + 1]
                assert length - stride < len(seen) <= length
                each.append(-run.decoder(seen[None])[0, -1].log_softmax(-1)[tokens[start + i + 1]])
        assert loss.n_tokens == len(each) == windows.n_targets
        assert loss.nats == pytest.approx(torch.stack(each).sum().item(), rel=1e-5)


def test_evaluating_by_length_writes_table_and_figure(command, stored, tmp_path):
    one, two = stored("one"), stored("two", "pos=alibi", seed=1)
    wanted = ("lengths=[32,64,128]", "stride=16", "n_windows=3", "to=out")
    code, out, err = command("evaluate", f"run=[{one},{two}]", *wanted)
    assert (code, err) == (0, "")
    for row in json.loads((tmp_path / "out" / "lengths.json").read_text()):
        shown = [row["run"], str(row["length"]), *(["*"] if row["length"] == 64 else [])]
        shown += [str(row["stride"])] * row["sliding"] + [f"{row['bpb']:.4f}", f"{row['loss']:.4f}"]
        assert " ".join(shown) in " ".join(out.split())
    rows = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert [(r["run"], r["length"], r["sliding"], r["stride"]) for r in rows] == [
        (run, length, sliding, 16 if sliding else length)
        for run in ("pos=rope", "pos=alibi")  # by what they differ in
        for sliding in (False, True)
        for length in (32, 64, 128)
    ]
    assert {row["tokens"] for row in rows} == {3 * 128}
    with (tmp_path / "out" / "lengths.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = command("evaluate", f"run={one}", "lengths=[64]", "to=out")
    assert code == 2
    assert "holds a lengths.json already" in err


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["lengths=[64,128]"],
            "has a table of 64 positions and cannot read lengths=128: take lengths up to 64",
        ),
        (["lengths=64"], "must be a list"),
        (["lengths=[0,64]"], "must be whole numbers of tokens, at least 1"),
        (["lengths=[16,32]", "stride=17"], "stride=17 must be between 1 and the shortest length, 16"),
        (["lengths=[61,63,64]"], "take shorter lengths"),
        (["stride=16"], "add lengths="),
    ],
)
def test_lengths_that_cannot_be_are_refused(command, stored, overrides, complaint):
    code, _, err = command("evaluate", f"run={stored('run', 'pos=learned')}", *overrides)
    assert code == 2
    assert complaint in err
    assert len(err.splitlines()) == 1


def test_runs_of_other_tokenizers_compare_by_byte(command, stored, tmp_path):
    runs = f"run=[{stored('one')},{stored('two', tokenizer=Char)}]"
    code, _, err = command("evaluate", runs, "lengths=[32,64]", "n_windows=2", "to=out")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "lengths.png").exists()


# --- sampling


def test_prompts_of_a_list_and_of_a_file_give_the_texts_of_each_alone(command, stored, tmp_path):
    run = stored("run")
    alone = [
        command("sample", f"run={run}", f"prompt={prompt}", "n_tokens=20", "temperature=0")[1]
        for prompt in ("def [x", "class A")
    ]
    assert alone[0].startswith("def [x")
    (tmp_path / "prompts.txt").write_text("def [x\nclass A\n")
    for prompts in ('prompts=["def [x",class A]', "prompts=prompts.txt"):
        code, out, _ = command("sample", f"run={run}", prompts, "n_tokens=20", "temperature=0")
        assert code == 0
        assert out == "\n".join(alone)


def test_a_draft_and_a_low_cache_write_and_a_stop_string_ends(command, stored):
    run, draft = stored("run"), stored("draft", "model.n_layers=1", seed=1)
    text = command("sample", f"run={run}", "prompt=def ", "n_tokens=40", "temperature=0")[1]
    drafted = command(
        "sample", f"run={run}", "prompt=def ", "n_tokens=40", "temperature=0", f"draft={draft}"
    )[1]
    assert drafted == text
    stop = text[len("def ") + 10 : len("def ") + 12]
    code, out, _ = command(
        "sample", f"run={run}", "prompt=def ", "temperature=0", f"stops=['{stop}']", "beams=1"
    )
    assert code == 0
    assert out == text[: text.index(stop, len("def "))] + "\n"
    code, out, _ = command("sample", f"run={run}", "n_tokens=10", "cache=int8", "min_p=0.05")
    assert code == 0


def test_escapes_in_stop_strings():
    assert sample.unescape(r"a\n\tb\\n\x é") == "a\n\tb\\n\\x é"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("temperature=-1", "temperature=-1 must be at least 0"),
        ("top_p=1.2", "top_p=1.2 must be above 0 and at most 1"),
        ("cache=fp4", "cache=fp4 is unknown: use one of full, int8, fp8"),
        ("n_tokens=0", "n_tokens=0 must be a whole number"),
        ("draft=nowhere", "nowhere is not a run below runs/"),
        ("draft=chars", "has another tokenizer"),
        ("prompts=nowhere.txt", "nowhere.txt"),
        ("prompts=[]", "holds none"),
        (f"prompt={'x' * 70}", "71 tokens and the model reads 64"),
    ],
    ids=str,
)
def test_samples_that_cannot_be_are_refused_in_a_line(command, stored, override, complaint):
    run = stored("run")
    stored("chars", tokenizer=Char)
    code, out, err = command("sample", f"run={run}", override)
    assert (code, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1
