"""Tables of runs against the files of real ones."""

import json
import shutil
from typing import cast

import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

from scantling.report import terminal
from scantling.runs import table
from scantling.runs.directory import RunDirectory


@pytest.fixture
def study(command, tmp_path):
    """Two finished runs."""
    command()
    command("attn=gqa", "seed=1")
    return tmp_path / "runs" / "default"


def test_a_row_is_what_the_files_say(study):
    frame = table.load_runs(study)
    assert list(frame["status"]) == ["finished", "finished"]
    for row in frame.to_dict("records"):
        directory = RunDirectory(row["path"])
        summary, environment = directory.summary, directory.environment
        config = OmegaConf.load(directory.config)
        assert row["loss"] == summary["val/loss"]
        assert row["bpb"] == summary["val/bpb"]
        assert row["best_loss"] == summary["best"]["val/loss"]
        assert row["params"] == sum(summary["parameters"].values())
        assert row["params.attention"] == summary["parameters"]["attention"]
        assert row["tokens"] == 12 * 4 * 64
        assert row["seed"] == config.seed
        assert row["choice.attn"] == config.choices.attn
        assert row["d_model"] == config.model.d_model
        assert row["corpus"] == environment["corpus"]["fingerprint"]
        assert row["commit"] == environment["commit"]
    # Nothing that both share, no seed: the arm's name is what they differ in.
    assert sorted(frame["arm"]) == ["attn=gqa", "default"]
    curves = table.load_curves(study)
    for name, rows in curves.groupby("run"):
        expected = RunDirectory(study / str(name)).metrics()
        assert list(rows["train/loss"]) == [row["train/loss"] for row in expected]
        assert list(rows["val/loss"].dropna()) == [row["val/loss"] for row in expected if "val/loss" in row]


def test_what_is_no_whole_run_is_named(study):
    whole = table.load_runs(study)
    one = next(path for path in study.iterdir() if path.name.startswith("nano"))
    for name, damage in {
        "half": lambda d: (d / "summary.json").write_text('{"step": 1'),
        "empty": lambda d: [p.unlink() for p in d.iterdir() if p.is_file()],
        "older": lambda d: (d / "env.json").write_text("{}"),
        "foreign": lambda d: (d / "config.yaml").write_text("a: [1, 2]"),
        "hostile": lambda d: (d / "config.yaml").write_text("!!python/object/apply:os.system [exit]"),
        "going": lambda d: (d / "summary.json").unlink(),
    }.items():
        shutil.copytree(one, study / name)
        damage(study / name)
    (study / "wandb").mkdir()
    (study / "notes.txt").touch()
    frame = table.load_runs(study)
    assert frame.attrs["left_out"].keys() == {"half", "empty", "older", "foreign", "hostile"}
    assert frame.attrs["left_out"]["half"] == "a JSON file is cut short"
    assert frame.attrs["left_out"]["empty"] == "it has no config.yaml"
    assert frame.attrs["left_out"]["older"] == "its record lacks overrides"
    finished = cast(pd.DataFrame, frame[frame["status"] == "finished"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(finished, whole, check_dtype=False)
    going = frame[frame["run"] == "going"].iloc[0]
    assert (going["status"], going["steps"]) == ("unfinished", 12)
    assert going["loss"] == RunDirectory(one).summary["val/loss"]
    with pytest.raises(ValueError, match="is not a directory of a study"):
        table.load_runs(study / "nowhere")


def test_the_cache_is_read_and_follows_every_change(study, monkeypatch):
    first, curves = table.load_runs(study), table.load_curves(study)

    def forbidden(*_):
        raise AssertionError("parsed again")

    with monkeypatch.context() as patch:
        patch.setattr(table.yaml, "load", forbidden)
        patch.setattr(table, "read_rows", forbidden)
        pd.testing.assert_frame_equal(table.load_runs(study), first, check_dtype=False)
        pd.testing.assert_frame_equal(table.load_curves(study), curves, check_dtype=False)
    one = RunDirectory(first.to_dict("records")[0]["path"])
    one.finish(one.summary | {"val/loss": 1.5})
    shutil.copytree(one.path, study / "third")
    assert list(table.load_runs(study)["loss"])[::2] == [1.5, 1.5]
    shutil.rmtree(one.path)
    assert list(table.load_runs(study)["run"]) == [first["run"][1], "third"]
    (study / "runs.parquet").write_text("no parquet")
    assert len(table.load_runs(study)) == 2
    (study / "runs.parquet").unlink()
    pd.testing.assert_frame_equal(table.load_runs(study), table.load_runs(study), check_dtype=False)
    moved = study.rename(study.with_name("moved"))
    frame = table.load_runs(moved)
    assert list(frame["path"]) == [str(moved / run) for run in frame["run"]]


def test_runs_are_listed_compared_exported_and_removed(study, entry, tmp_path):
    frame = table.load_runs(study)
    one, two = frame["run"]
    code, out, _ = entry("runs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(frame.sort_values("bpb")["run"])
    code, out, _ = entry("runs", "action=show", f"run={one}")
    assert frame["commit"][0] in out
    code, out, _ = entry("runs", "action=diff", f"run=[{one},{two}]")
    assert {line.split()[0] for line in out.splitlines()[1:]} >= {"choices.attn", "seed"}
    assert "model.d_model" not in out
    for ending, read in {
        "csv": pd.read_csv,
        "parquet": pd.read_parquet,
        "jsonl": lambda path: pd.read_json(path, lines=True),
    }.items():
        assert entry("runs", "action=export", f"to=table.{ending}")[0] == 0
        assert list(read(tmp_path / f"table.{ending}")["loss"]) == pytest.approx(list(frame["loss"]))
    code, _, err = entry("runs", "action=rm", f"run={one}")
    assert code == 2
    assert "yes=true removes" in err
    lease = study / one / "lease-1.json"
    lease.touch()
    assert "is held by a launcher" in entry("runs", "action=rm", f"run={one}", "yes=true")[2]
    lease.unlink()
    assert entry("runs", "action=rm", f"run={one}", "yes=true")[0] == 0
    assert list(table.load_runs(study)["run"]) == [two]


def test_a_narrow_list_keeps_names_whole(study, entry, monkeypatch, tmp_path):
    names = set(table.load_runs(study)["run"])
    for width in (80, 50, 30):
        monkeypatch.setattr(terminal, "PRINTED_WIDTH", width)
        _, out, _ = entry("runs")
        assert {line.split()[0] for line in out.splitlines() if line.startswith("nano")} == names
        assert out.count("finished") == 2
        assert max(map(len, out.splitlines())) <= width or width == 30
        assert ("seconds" in out.splitlines()[0]) == (width > 80)
    (tmp_path / "runs" / "empty").mkdir()
    assert entry("runs", "study=empty")[1] == "no runs in runs/empty\n"


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, ["choices.ffn", "ffn._target_", "ffn.multiple_of", "lr", "model.d_ff"]),
        (
            {"decoder": {"d_ff": 256, "ffn": {"_target_": "Gated", "multiple_of": 4}}, "optim": {"lr": 5}},
            [
                *("choices.ffn", "decoder.ffn.multiple_of", "ffn._target_", "ffn.multiple_of"),
                *("lr", "model.d_ff", "optim.lr"),
            ],
        ),
    ],
)
def test_what_the_decoder_repeats_is_said_once(tmp_path, changed, shown):
    """Unless it is set apart; one of the parts has no `multiple_of`."""
    runs = []
    for name, d_ff, ffn in (("one", 128, {"_target_": "Plain"}), ("other", 256, GATED)):
        config = {"choices": {"ffn": name}, "model": {"d_ff": d_ff}, "ffn": ffn, "lr": d_ff, "seed": 0}
        config |= {"decoder": {"d_ff": d_ff, "ffn": ffn}, "optim": {"lr": d_ff}}
        runs.append(RunDirectory(tmp_path / name))
        runs[-1].path.mkdir()
        runs[-1].config.write_text(yaml.safe_dump(config | (changed if name == "other" else {})))
    assert [key for key, _, _ in table.differences(*runs)] == shown


GATED = {"_target_": "Gated", "multiple_of": 8}


def test_a_run_is_where_a_path_leads(study, entry, monkeypatch):
    """From inside of its directory, or its study's, as from anywhere."""
    frame = table.load_runs(study)
    one, two = frame["run"]
    shown = entry("runs", "action=show", f"run={study / one}")
    assert (shown[0], shown[2]) == (0, "")
    monkeypatch.chdir(study / one / "checkpoints")
    for path in ("..", "../", f"../../{one}"):
        assert entry("runs", "action=show", f"run={path}")[0] == 0
    monkeypatch.chdir(study / one)
    assert f"run {one} " in " ".join(entry("runs", "action=show", "run=.")[1].split())
    assert entry("runs", "action=diff", f"run=[.,../{two}]")[1].split()[:3] == ["setting", one, two]
    runs = f"paths.runs={study.parent}"
    assert f"yes=true removes {study / one} for good" in entry("runs", "action=rm", "run=.", runs)[2]
    code, _, err = entry("runs", "run=.")
    assert (code, err) == (2, "error: run= is of action=show, diff, rm: action=ls takes none\n")


def test_nothing_but_runs_is_removed(study, entry, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "study" / "run"
    shutil.copytree(next(p for p in study.iterdir() if p.is_dir()), elsewhere)
    (study / "link").symlink_to(elsewhere)
    for run in (str(elsewhere), "link"):
        code, _, err = entry("runs", "action=rm", f"run={run}", "yes=true")
        assert code == 2
        assert "is not a run in a study of runs/, and stays" in err
    assert (elsewhere / "config.yaml").exists()
    assert "nothing is not a run below runs/" in entry("runs", "action=show", "run=nothing")[2]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("action=list",), "action=list is unknown: use ls, show, diff, export, import, rm"),
        (("sort=beauty",), "sort=beauty is not a column"),
        (("study=none",), "runs/none is not a directory of a study: use one of default"),
        (("study=defualt",), "is not a directory of a study: did you mean default?"),
        (("action=diff", "run=a"), "action=diff wants run=[ONE,OTHER]; 1 are given"),
        (("action=export", "to=a.xls"), "name a file that ends in .csv, .jsonl, .parquet"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, entry, overrides, expected):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "default" / "one"
    directory.mkdir(parents=True)
    files = {
        "config.yaml": "{choices: {}, seed: 0, model: {}, batch_size: 1, lr: 1}",
        "env.json": json.dumps({"overrides": [], "corpus": {"fingerprint": "f"}}),
    }
    for name, text in files.items():
        (directory / name).write_text(text)
    code, _, err = entry("runs", *overrides)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
