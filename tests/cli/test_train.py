"""A run from the command line: what it computes, leaves behind, refuses, and takes up again."""

import inspect
import json
import os
import re
import resource
import shutil
import signal
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from shop import assert_same_training

from scantling.config.messages import one_line
from scantling.config.options import CONF
from scantling.config.settings import SETTINGS
from scantling.data.loading import BatchSizes, TrainBatches
from scantling.inference import stored_run
from scantling.runs.directory import RunDirectory
from scantling.training.optim import adamw
from scantling.training.schedule import linear

TIMES = ("seconds", "tokens_per_second", "mfu")


def only_run(path) -> RunDirectory:
    (directory,) = (path / "runs" / "default").glob("nano-*")
    return RunDirectory(directory)


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_losses_equal_a_plain_loop_and_the_record_is_whole(command, tmp_path):
    code, out, _ = command("batch_size=4", "micro_batch_size=2", "schedule.warmup=3")
    directory = only_run(tmp_path)
    rows = directory.metrics()
    assert code == 0
    assert [row["step"] for row in rows] == list(range(1, 13))

    run = stored_run.StoredRun.load(str(directory.path), "last")
    torch.manual_seed(0)
    decoder = stored_run.instantiate(run.config.decoder, vocab_size=257)
    decoder.initialise(0)
    corpus = run.corpus(None, tmp_path / "cache")
    optimizer = adamw(decoder.named_parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    batches = iter(
        TrainBatches(
            tokens=corpus.train.tokens,
            seq_len=64,
            sizes=BatchSizes(4),
            micro_batch_size=4,
            rank=0,
            world_size=1,
            seed=0,
            first_step=0,
        )
    )
    for step, row in enumerate(rows):
        rate = 3e-3 * linear(step, 12, warmup=3, floor=0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        loss = torch.nn.functional.cross_entropy(
            decoder(batch["inputs"]).flatten(0, 1), batch["targets"].flatten()
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["lr"] == pytest.approx(rate)
        assert row["tokens"] == (step + 1) * 4 * 64

    validated = [row["step"] for row in rows if "val/bpb" in row]
    assert validated == [5, 10, 12]
    loss = run.loss(corpus, split="val", n_windows=8, batch_size=3).results()
    assert rows[-1]["val/loss"] == pytest.approx(loss["loss"], rel=1e-6)
    # Bytes are tokens here, but for the end of a text: bits per byte is the loss in bits.
    assert rows[-1]["val/bpb"] == pytest.approx(rows[-1]["val/loss"] / np.log(2), rel=1e-2)
    assert directory.summary["val/loss"] == rows[-1]["val/loss"]
    speeds = [row["tokens_per_second"] for row in rows]  # each of one step
    assert directory.summary["tokens_per_second"] == pytest.approx(statistics.harmonic_mean(speeds), rel=0.05)
    flops = rows[-1]["flops"] / rows[-1]["tokens"] * directory.summary["tokens_per_second"]
    assert directory.summary["mfu"] == pytest.approx(flops / 1e12, abs=3e-4)
    assert directory.summary["corpus"] == directory.environment["corpus"]["fingerprint"] == corpus.fingerprint
    config = OmegaConf.load(directory.config)
    assert config.choices.attn == "mha"
    assert config.choices.ffn == "swiglu"
    assert f"{rows[-1]['val/bpb']:.4f} bits/byte" in out


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("optim=muon", "micro_batch_size=2", "model.dropout=0.1")])
def test_interrupted_run_goes_on_as_if_nothing_had_happened(command, tmp_path, overrides):
    long = ("budget.steps=60", "val_every=20", *overrides)
    command(*long, "paths.runs=whole")

    def interrupt():
        while not list(tmp_path.glob("runs/default/*/metrics.jsonl")):
            time.sleep(0.005)
        (metrics,) = tmp_path.glob("runs/default/*/metrics.jsonl")
        while metrics.read_text().count("\n") < 27:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, _ = command(*long)
    thread.join()
    directory = only_run(tmp_path)
    assert code == 130
    assert "interrupted after step" in out
    assert not directory.is_finished
    # Rows that no checkpoint stands behind, as a killed process leaves them.
    with (directory.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 59, "train/loss": 0}\n{"step": 60, "tr')

    code, out, _ = command(*long)
    assert code == 0
    assert "resuming after step" in out
    (whole,) = (tmp_path / "whole" / "default").iterdir()
    assert timeless(directory.metrics()) == timeless(RunDirectory(whole).metrics())
    ours, theirs = (
        torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (directory.path, whole)
    )
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name]), name


def test_finished_run_is_never_written_again(command, tmp_path):
    command()
    before = {p: p.read_bytes() for p in only_run(tmp_path).path.rglob("*") if p.is_file()}
    code, out, _ = command()
    assert code == 0
    assert "This run is finished" in out
    assert "trainer, logger, log_every, guard and sample make none" in out
    assert before == {p: p.read_bytes() for p in only_run(tmp_path).path.rglob("*") if p.is_file()}
    command("resume=never")
    first, second = sorted((tmp_path / "runs" / "default").iterdir(), key=lambda p: len(p.name))
    assert second.name == f"{first.name}-2"
    assert timeless(RunDirectory(first).metrics()) == timeless(RunDirectory(second).metrics())


def test_a_study_and_its_place_may_have_numbers_for_names(command, entry, tmp_path):
    assert command("study=7", "paths.runs=2026", "budget.steps=2")[0] == 0
    assert list((tmp_path / "2026" / "7").glob("nano-*"))
    code, out, err = entry("runs", "study=7", "paths.runs=2026")
    assert code == 0, err
    assert "nano-" in out


@pytest.mark.slow
def test_sweep_trains_every_arm_once(command, tmp_path):
    code, _, err = command("-m", "sweeps=attention", "seed=0,1", "budget.steps=2")
    assert code == 0, err
    runs = [RunDirectory(path) for path in (tmp_path / "runs" / "attention").glob("nano-*")]
    arms = sorted(
        (run.config.read_text().split("attn: ")[-1].split()[0], run.summary["step"]) for run in runs
    )
    assert arms == [("gqa", 2), ("gqa", 2), ("mha", 2), ("mha", 2), ("mqa", 2), ("mqa", 2)]
    again = command("-m", "sweeps=attention", "seed=0,1", "budget.steps=2")
    assert again[1].count("finished before") == 6
    assert len(list((tmp_path / "runs" / "attention").glob("nano-*"))) == 6
    one = runs[0].path
    (one / "summary.json").unlink()
    code, out, _ = command(f"resume={one}", "budget.steps=2")
    assert code == 0
    assert f"directory   {one}"[:40] in out


def test_one_part_changes_one_group_of_the_record(command, tmp_path):
    command("dry_run=false", "paths.runs=a")
    command("attn=gqa", "paths.runs=b")
    paths = (next((tmp_path / d / "default").iterdir()) / "config.yaml" for d in "ab")
    one, two = (cast(DictConfig, OmegaConf.load(path)) for path in paths)
    assert {key for key in one.choices if one.choices[key] != two.choices[key]} == {"attn"}
    changed = {key for key in one if one[key] != two[key]} - {"choices", "paths"}
    assert changed == {"attn", "decoder"}
    assert {key for key in one.decoder if one.decoder[key] != two.decoder[key]} == {"attn"}


def test_a_rung_more_of_a_ladder_makes_no_other_run(command):
    told = [command("dry_run=true", *more)[1] for more in ((), ("ladder={d32:{lr:1e-3}}",), ("lr=1e-3",))]
    first, longer, other = (re.findall(r"^directory +(\S+)", text, re.MULTILINE)[0] for text in told)
    assert first == longer != other


def test_dry_run_prints_the_plan_and_writes_nothing(command, tmp_path):
    code, out, _ = command(
        "dry_run=true", "budget=tokens_per_param", "budget.tokens_per_param=20", "budget.steps=1"
    )
    assert code == 2  # a setting of another budget
    code, out, _ = command("dry_run=true", "micro_batch_size=2")
    assert code == 0
    assert "12 of 4 sequences × 64 tokens, as 2 × 2" in out
    assert "3,072" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("attn=gqq",), "attn=gqq is unknown: did you mean gqa"),
        (("atn=gqa",), "atn is not a setting: did you mean attn"),
        (
            ("attn=performer", "attn/pattern=sliding"),
            "attn/pattern is a choice inside other options of attn=",
        ),
        (("budget.tokens=9",), "budget.tokens is a setting of budget=tokens: choose that too"),
        (("attn=mha,gqa",), "attn=mha,gqa holds a comma: train.py -m attn=mha,gqa runs each"),
        (("model.n_layer=3",), "did you mean model.n_layers"),
        (("model.n_heads=5",), "n_heads=5 does not divide d_model=32"),
        (("attn=gqa", "attn.n_kv_heads=3"), "n_kv_heads=3 does not divide n_heads=4: use one of [1, 2, 4]"),
        (("pos=learned", "pos.max_len=32"), "seq_len=64 is longer than the 32 positions"),
        (("model.seq_len=1000000",), "would fit"),
        (("data.files=nothing.txt",), "no file matches"),
        (("data.files=empty.txt",), "empty.txt"),
        (("data.files=binary.txt",), "binary.txt is binary"),
        (("data.files=short.txt",), "the val split has 3 tokens, but seq_len 64 needs 65"),
        (("study=../../etc",), "study=../../etc leaves paths.runs=runs: a name below it is meant"),
        (("budget.steps=0",), "budget.steps=0 must be positive"),
        (("budget.steps=many",), "budget.steps=many is not a number"),
        (("guard=off",), "guard holds settings, guard.action, guard.spike"),
        (("sample=null",), "sample holds settings, sample.prompt, sample.n_tokens"),
        (
            ("trainer.strategy=ddp",),
            "trainer.strategy holds settings, which come with trainer=: use one of ddp",
        ),
        (("attn.pattern=sliding",), "an option is chosen with a slash, attn/pattern=sliding"),
        (("budget.steps=0.5",), "below one optimiser step"),
        (("paths.runs=/proc/none",), "cannot be written"),
        (("micro_batch_size=3",), "batch_size 4 is not a multiple of micro_batch_size 3"),
        (
            ("trainer=ddp", "trainer.devices=2", "batch_size=7"),
            "batch_size 7 is not a multiple of 2 ranks; the nearest that fits is 6 or 8",
        ),
        (("batch_size=0",), "batch_size=0 must be a whole number, at least 1"),
        (("micro_batch_size=0",), "micro_batch_size=0 must be"),
        (("log_every=2.5",), "log_every=2.5 must be"),
        (("checkpoint.keep=1.5",), "checkpoint.keep=1.5 must be"),
        (("checkpoint.every_minutes=0",), "checkpoint.every_minutes=0 must be positive, or null"),
        (("clip=0",), "clip=0 must be positive, or null"),
        (("schedule.floor=1.5",), "schedule.floor=1.5 must be from 0 to 1"),
        (("sample.n_tokens=0",), "n_tokens=0 must be a whole number, at least 1"),
        (
            ("val_every=0",),
            "val_every=0 is neither a share of the run, up to 1.0, nor a whole number of steps",
        ),
        (("val_every=2.5",), "val_every=2.5 is neither"),
        (("trainer.precision=fp4",), "use auto, fp32, bf16, fp16, fp8"),
        (("trainer.precision=fp16",), "needs a GPU"),
        (("trainer.compile=maybe",), "trainer.compile=maybe must be true or false"),
        (("optim.betas=0.9",), "optim.betas=0.9 must be a list, as [0.9, 0.95]"),
        (("optim=lion", "optim.betas=0.9"), "optim.betas=0.9 must be a list, as [0.9, 0.99]"),
        (("optim.betas=[0.9]",), "optim.betas=[0.9] must be two numbers, as [0.9, 0.95]"),
        (("seed=[1,2]",), "seed=[1,2] is a list; one value is meant (for several runs: -m seed=1,2)"),
        (
            ("ffn=moe_deepseek_v3", "ffn.rest.n_experts=[4]"),
            "ffn.rest.n_experts=[4] is a list; one value is meant",
        ),
        (("ffn=moe_deepseek_v3", "ffn.dense.bias=null"), "ffn.dense.bias=null: a value is meant"),
        (("-m", "seed=[1,2]"), "seed=[1,2] is a list; one value is meant (for several runs: -m seed=1,2)"),
        (("log_every={a:1}",), "log_every={a:1} holds settings; one value is meant"),
        (("batch_size=null",), "batch_size=null: a value is meant; its default is 8"),
        (("data.files=null",), "data.files=null: a value is meant"),
        (("-m", "norm=null,rmsnorm"), "norm takes an option: use one of layernorm,"),
        (("optim=null",), "optim takes an option: use one of adamw, lion, muon, sgd"),
        (("norm.epsilon=1e-5",), "norm.epsilon is not a setting: did you mean norm.eps?"),
        (("model",), "model is not a setting with a value, such as seed=1: did you mean model"),
        (
            ("~budget.tokens",),
            "~budget.tokens: there is no budget.tokens to take away: did you mean budget.steps",
        ),
        (("budget.steps=1.5",), "budget.steps=1.5 must be a whole number"),
        (("seed=1.5",), "seed=1.5 must be a whole number, at least 0"),
        (("resume=nowhere",), "holds no run"),
        (("data.files=???",), "data.files is not set"),
        (("nonsense",), "nonsense"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, tmp_path, overrides, expected):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("twelve chars")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    code, _, err = command(*overrides)
    assert code == 2
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("runs/default/*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("program", "overrides", "expected"),
    [
        ("sample", ("run=x", "seed=[1,2]"), "seed=[1,2] is a list; one value is meant\n"),
        ("sample", ("run=[x,y]",), "run=[x,y] is a list; one value is meant"),
        ("evaluate", ("run=x", "lengths=[64]", "stride=[3]"), "stride=[3] is a list"),
        ("report", ("study=[a,b]",), "study=[a,b] is a list"),
        ("report", ("study=a", "resamples=[3]"), "resamples=[3] is a list"),
        ("report", ("study=a", "precision=[3]"), "precision=[3] is a list"),
        ("plan", ("model=nano", "cache.contexts=5"), "cache.contexts=5 must be a list, as [8192, 100000]"),
        ("plan", ("model=nano", "mfu=null"), "mfu=null: a value is meant; its default is 0.4"),
        ("runs", ("study=null",), "study=null: a value is meant"),
    ],
)
def test_one_value_and_several_are_told_apart(entry, tmp_path, monkeypatch, program, overrides, expected):
    monkeypatch.chdir(tmp_path)
    code, _, err = entry(program, *overrides)
    assert (code, err.count("\n")) == (2, 1), err
    assert expected in err


def test_null_and_lists_go_where_they_are_documented(command):
    taken = ("clip=null", "val_windows=null", "checkpoint.every_minutes=null", "sample.top_k=null")
    code, _, err = command("dry_run=true", *taken, "optim.betas=[0.8,0.9]", "micro_batch_size=null")
    assert code == 0, err
    documented = re.compile(r"^ *(\w+): (?!null).*# .*\bnull: ")
    for name in ("train", "sample", "evaluate", "plan", "report", "runs", "hub"):
        for line in (CONF / f"{name}.yaml").read_text().splitlines():
            if found := documented.match(line):
                assert any(key.endswith(found[1]) for key, known in SETTINGS.items() if known.nullable), line


def test_a_value_that_cannot_be_read_is_named():
    """Hydra's own error is empty where OmegaConf's grammar does not hold."""
    with pytest.raises(GrammarParseError) as cause:
        OmegaConf.create({"lr": "${ladder.d${width}.lr}"})
    error = ConfigCompositionException()
    error.__cause__ = cause.value
    assert "full_key: lr" in one_line(error, "train")


def test_gpu_without_one_is_a_mistake(command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, _, err = command("trainer=gpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "finds no CUDA device" in err


def test_too_little_disk_for_checkpoints_is_a_mistake(command, monkeypatch):
    usage = type("usage", (), {"free": 100_000})
    monkeypatch.setattr("scantling.training.plan.shutil.disk_usage", lambda path: usage)
    code, _, err = command()
    assert code == 2
    assert "4 checkpoints take" in err


def test_a_directory_is_resumed_by_its_own_record(command, tmp_path, entry):
    """Options and settings that only its first command named stay, however often it is interrupted."""
    command("optim=sgd", "norm=layernorm", "budget.steps=2")
    run = only_run(tmp_path)
    choices, typed = OmegaConf.load(run.config).choices, run.environment["overrides"]
    assert choices.optim == "sgd"
    for _ in range(2):
        (run.path / "summary.json").unlink()  # as if it had been interrupted
        code, out, err = entry("train", f"resume={run.path}", "trainer=auto")
        assert code == 0, err
        assert "nano: norm=layernorm" in out
        assert OmegaConf.load(run.config).choices == {**choices, "trainer": "auto"}
        kept = [override for override in typed if override != "trainer=cpu"]
        assert run.environment["overrides"] == [*kept, "trainer=auto"]


def test_resume_refuses_another_architecture_and_another_text(command, tmp_path, book):
    command()
    directory = only_run(tmp_path)
    (directory.path / "summary.json").unlink()  # as if it had been interrupted
    code, _, err = command(f"resume={directory.path}", "model.n_layers=3")
    assert code == 2
    assert err.strip().endswith("cannot go on as this one: model.n_layers is 2 there, 3 here")
    book.write_text(book.read_text().replace("parser", "reader"))
    code, _, err = command()
    assert code == 2
    assert "trained on another text" in err


def test_sampling_repeats_with_its_seed_and_takes_any_prompt(command, tmp_path, entry):
    command()
    path = only_run(tmp_path).path
    prompt = "prompt=def f(x, y): # it's 5$ {ok} "
    texts = [
        entry("sample", f"run={place}", prompt, "n_tokens=20", f"seed={seed}")[1]
        for place, seed in ((path, 1), (path.name, 1), (path, 2))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("def f(x, y): # it's 5$ {ok} ") for text in texts)


def test_evaluating_other_text_warns_only_of_unequal_training(command, tmp_path, entry):
    command()
    path = only_run(tmp_path).path
    other = tmp_path / "other.txt"
    other.write_text(inspect.getsource(json.decoder))
    code, out, _ = entry("evaluate", "paths.cache=cache", f"run={path}", "data=text", f"data.files={other}")
    assert code == 0
    assert "warning" not in out
    command(f"data.files={other}")
    second = next(p for p in path.parent.iterdir() if p != path)
    code, out, _ = entry(
        "evaluate", "paths.cache=cache", f"run=[{path},{second.name}]", "data=text", f"data.files={other}"
    )
    assert "trained on different texts" in " ".join(out.split())


def test_stored_configuration_cannot_name_foreign_code(command, tmp_path, entry):
    """Nor reach it through what a module of ours has imported, or call a function that handles files."""
    command()
    directory = only_run(tmp_path)
    stored = directory.config.read_text()
    for foreign in (
        "os.system",
        "scantling.model.attn.torch.load",
        "scantling.model.attn.nn.Linear",
        "scantling.model.attn.Linear",
        "scantling.model.attn.Attention.bias",
        "scantling.data.files.digest_file",
        "torch.nn.ReLU.register_module",
    ):
        directory.config.write_text(stored.replace("scantling.model.norm.RMSNorm", foreign))
        code, _, err = entry("sample", f"run={directory.path}")
        assert code == 2
        assert f"asks for {foreign}: only" in err


def test_failing_training_is_no_mistake_of_the_user(command, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("scantling.model.head.negative_log_likelihood", broken)
    with pytest.raises(ValueError, match="a bug"):
        command()


def leave_room(n_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
def test_out_of_memory_is_one_line_with_settings_that_fit(shop):
    """Where address space for 300 MB is left, 1 GB of activations does not fit; what the line says does."""
    large = ("model.d_model=128", "model.d_ff=512", "model.n_layers=4", "batch_size=256", "budget.steps=1")

    def limited(*overrides) -> tuple[int | None, str]:
        process = shop.start(*large, *overrides, runs="large", first=partial(leave_room, 300_000_000))
        _, err = process.communicate()
        return process.returncode, err

    code, err = limited()
    assert code == 1
    (line,) = err.strip().splitlines()
    assert line.startswith("error: out of memory: the forecast was about ")
    settings = re.search(r"; (\S+(?: \S+)*) would take about", line)
    assert settings is not None
    chosen = settings[1].split()
    code, err = limited(*chosen, "micro_batch_size=8")  # of the same kind, with room for all else
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: g++")
def test_a_compiled_run_trains_as_any_other(shop, alone):
    compiled = shop.run("trainer=cpu", "trainer.compile=true", runs="compiled")
    assert_same_training(compiled, alone)


def test_deterministic_kernels_are_taken_for_one_run(command, tmp_path):
    runs = []
    for chosen in ("true", "false"):
        assert command(f"trainer.deterministic={chosen}", f"paths.runs=runs-{chosen}")[0] == 0
        assert torch.are_deterministic_algorithms_enabled() == (chosen == "true")
        runs.append(RunDirectory(next((tmp_path / f"runs-{chosen}" / "default").iterdir())).metrics())
    losses, expected = ([row["train/loss"] for row in rows] for rows in runs)
    assert losses == expected


def test_zero_3_does_not_compute_activations_twice(command):
    code, _, err = command("trainer=zero3", "trainer.accelerator=cpu", "trainer.checkpoint_activations=true")
    assert code == 2
    assert "trainer.checkpoint_activations=true is not for ZeRO 3: use trainer=fsdp" in err
