"""The runs of a study as tables: one row a run, and their curves; all is read from `runs/<study>/`.

`load_runs` gives these columns, `None` or NaN where a run does not say:

    run, path, status        status: finished, failed, or unfinished
    arm                      the study's name for it; without names, the settings in which its runs differ
    seed, overrides          overrides: what was typed, in one string
    choice.<group>           the option of every group, `choice.attn`
    d_model … batch_size     sizes, and the peak learning rate `lr`
    params, params.<group>   parameters, all and by group; params_without_embeddings leaves out embeddings,
                             positions, head
    steps, tokens, flops     trained so far; FLOPs forward and backward, by the `exact` convention
    loss, bpb                validation at the last step: nats per token, bits per byte; train_loss beside it
    best_loss, best_bpb, best_step
    seconds, tokens_per_second, mfu, device, precision, world_size
    scantling, commit, torch the versions it ran with
    corpus, tokenizer        fingerprints; unique_tokens, how many the training text has
    matched_by, matched_off  `match=`: the quantity, and how far from its reference, as a fraction of it
    tuned                    `tune=`: the search behind `lr`, JSON; `load_tuning` makes a table of it

`load_curves` gives run, step and every number of `metrics.jsonl`, a row a step. Both keep a Parquet file
beside the runs, and read anew only the directories that have changed since.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from scantling.config.differences import leaves, varying_leaves
from scantling.config.settings import COLUMNS
from scantling.runs.directory import RunDirectory, read_rows
from scantling.runs.overrides import names_by_difference

FORMAT = 3
"""Version of the Parquet files; a file of another one is made anew."""

FILES = ("summary.json", "metrics.jsonl", "config.yaml", "env.json", "failed.json")
"""What a run's rows depend on."""

UNITS = {"loss": "nats per token", "bpb": "bits per byte"}
"""Units of the losses that runs are compared by."""

NOT_RUNS = ("wandb", "checkpoints", "tuning")
"""Directories among the runs that are not runs."""

APART = ("embedding", "position", "head")
"""Groups of parameters that `params_without_embeddings` leaves out."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_runs(study: Path | str) -> pd.DataFrame:
    """A row for every run below `study`, sorted by name.

    `attrs["left_out"]` names the directories that are not whole runs, each with the reason. Raises ValueError
    where `study` is not a directory.
    """
    frame, left_out = cached(Path(study), "runs.parquet", lambda directory: [run_row(directory)])
    if len(frame):
        frame.insert(1, "path", [str(Path(study) / run) for run in frame["run"]])  # a study may be moved
        unnamed = frame["arm"].isna()
        frame.loc[unnamed, "arm"] = names_by_difference(frame.loc[unnamed, "overrides"])
    frame.attrs["left_out"] = left_out
    return frame


def load_curves(study: Path | str) -> pd.DataFrame:
    """A row for every recorded step of every run; `attrs["left_out"]` as in `load_runs`."""
    frame, left_out = cached(Path(study), "curves.parquet", curve_rows)
    frame.attrs["left_out"] = left_out
    return frame


def load_tuning(study: Path | str) -> pd.DataFrame:
    """A row for every learning rate that `tune=lr` tried: arm, lr, bpb, chosen, edge.

    `bpb` is NaN where training diverged. `edge`: whether the chosen rate is the lowest or highest tried, so
    that a better one may lie beyond.
    """
    return rates_tried(load_runs(study))


def rates_tried(runs: pd.DataFrame) -> pd.DataFrame:
    """`load_tuning` of runs at hand, with their `scale` where they have one."""
    rows: list[dict[str, Any]] = []
    of_run = [name for name in ("arm", "scale") if name in runs]
    noted = runs.dropna(subset="tuned").drop_duplicates([*of_run, "tuned"]) if len(runs) else runs
    for _, run in noted.iterrows():
        note = json.loads(str(run["tuned"]))
        for lr, bpb in zip(note["lr"], note["bpb"], strict=True):
            chosen = lr == run["lr"]
            tried = {"lr": lr, "bpb": bpb, "chosen": chosen, "edge": chosen and note["edge"]}
            rows.append({name: run[name] for name in of_run} | tried)
    return pd.DataFrame(rows, columns=[*of_run, "lr", "bpb", "chosen", "edge"])


# --- a run's rows ---


def run_row(directory: RunDirectory) -> dict[str, Any]:
    """A run's row. Raises ValueError or KeyError for a directory that is not a run, or not yet."""
    config = yaml.load(directory.config.read_text(), Loader)
    if not isinstance(config, dict) or "choices" not in config:
        raise ValueError("config.yaml is not that of a run")
    environment = directory.environment
    last = directory.summary if directory.is_finished else last_validated(directory)
    best = last.get("best", {})
    groups = last.get("parameters") or environment.get("parameters") or {}
    matched = config.get("matched") or {}
    failed = (directory.path / "failed.json").exists()
    row = {
        "run": directory.name,
        "status": "finished" if directory.is_finished else "failed" if failed else "unfinished",
        "arm": config.get("arm"),
        "seed": config["seed"],
        "overrides": "\n".join(environment["overrides"]),
    }
    row |= {f"choice.{group}": option for group, option in config["choices"].items()}
    row |= {name: config["model"].get(name) for name in COLUMNS}
    row |= {
        "batch_size": config["batch_size"],
        "lr": config["lr"],
        "params": sum(groups.values()) if groups else None,
        "params_without_embeddings": sum(n for group, n in groups.items() if group not in APART) or None,
    }
    row |= {f"params.{group}": count for group, count in groups.items()}
    row |= {
        "steps": last.get("step"),
        "tokens": last.get("tokens"),
        "flops": last.get("flops"),
        "loss": last.get("val/loss"),
        "bpb": last.get("val/bpb"),
        "train_loss": last.get("train/loss"),
        "best_loss": best.get("val/loss"),
        "best_bpb": best.get("val/bpb"),
        "best_step": best.get("step"),
        "seconds": last.get("seconds"),
        "tokens_per_second": last.get("tokens_per_second"),
        "mfu": last.get("mfu"),
    }
    row |= {
        key: environment.get(key)
        for key in ("device", "precision", "world_size", "scantling", "commit", "torch", "tokenizer")
    }
    row |= {
        "corpus": environment["corpus"]["fingerprint"],
        "unique_tokens": environment["corpus"].get("train_tokens"),
    }
    row |= {"matched_by": matched.get("by"), "matched_off": matched.get("off")}
    return row | {"tuned": json.dumps(config["tuned"]) if config.get("tuned") else None}


def last_validated(directory: RunDirectory) -> dict[str, Any]:
    """The numbers of the last validation of a run which is not finished."""
    rows = directory.metrics()
    validated = [row for row in rows if "val/loss" in row]
    return {**(validated[-1] if validated else {}), **(rows[-1] if rows else {})}


def curve_rows(directory: RunDirectory) -> list[dict[str, Any]]:
    """A row for each step of `metrics.jsonl`. Raises ValueError for what is not a run."""
    if not directory.config.exists():
        raise ValueError("it has no config.yaml")
    rows = read_rows(directory.path / "metrics.jsonl")
    return [{"run": directory.name, **row} for row in rows]


# --- the cache ---


def cached(
    study: Path, name: str, rows_of: Callable[[RunDirectory], list[dict[str, Any]]]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows of all directories, and the reason for each directory that was left out.

    Directories that have not changed since have their rows from the Parquet file.
    """
    if not study.is_dir():
        raise ValueError(f"{study} is not a directory of a study")
    stamps = {entry.name: stamp(entry.path) for entry in os.scandir(study) if is_candidate(entry)}
    before = read_cache(study / name)
    known = dict(zip(before["run"], before["stamp"], strict=True)) if len(before) else {}
    stale = [run for run, now in stamps.items() if known.get(run) != now]
    kept = before.loc[before["stamp"] == before["run"].map(stamps.get)] if len(before) else before
    new: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for run in stale:
        try:
            new += [{**row, "stamp": stamps[run]} for row in rows_of(RunDirectory(study / run))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            left_out[run] = reason(error)
    parts = [frame for frame in (kept, pd.DataFrame(new)) if len(frame)]
    frame: pd.DataFrame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if new or len(kept) < len(before):
        frame = in_order(frame)
        with contextlib.suppress(OSError):  # a folder of somebody else's is read all the same
            write_cache(frame, study / name)
    return frame.drop(columns="stamp", errors="ignore"), left_out


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted by run, and by step where there are steps."""
    if not len(frame):
        return frame
    by = ["run", "step"] if "step" in frame else ["run"]
    return frame.sort_values(by, ignore_index=True)


def is_candidate(entry: os.DirEntry) -> bool:
    """Whether an entry of a study's directory may be a run."""
    return entry.is_dir() and entry.name not in NOT_RUNS and not entry.name.startswith(".")


def stamp(path: str) -> str:
    """A text that changes whenever one of `FILES` does."""
    found = []
    for file in FILES:
        try:
            status = os.stat(f"{path}/{file}")
        except OSError:
            continue
        found.append(f"{file[0]}{status.st_mtime_ns:x}.{status.st_size:x}")
    return " ".join(found)


def read_cache(path: Path) -> pd.DataFrame:
    """The cached rows; empty where there is no file, or one of another format."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError):
        return pd.DataFrame()
    return frame if frame.attrs.get("format") == FORMAT else pd.DataFrame()


def write_cache(frame: pd.DataFrame, path: Path) -> None:
    """Write the file whole or not at all, as others may read it now."""
    frame.attrs["format"] = FORMAT
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    frame.to_parquet(partial, index=False)
    os.replace(partial, path)


def reason(error: Exception) -> str:
    """Why a directory is not a whole run, in words."""
    if isinstance(error, FileNotFoundError):
        return f"it has no {Path(str(error.filename)).name}"
    if isinstance(error, json.JSONDecodeError):
        return "a JSON file is cut short"
    if isinstance(error, KeyError):
        return f"its record lacks {error.args[0]}"
    return " ".join(str(error).split()) or type(error).__name__


# --- two runs ---


def differences(one: RunDirectory, other: RunDirectory) -> list[tuple[str, Any, Any]]:
    """(setting, here, there) for every leaf of the configurations that differs and repeats no other."""
    ours, theirs = (leaves(yaml.load(run.config.read_text(), Loader)) for run in (one, other))
    return [(key, ours.get(key), theirs.get(key)) for key in sorted(varying_leaves([ours, theirs]))]


def find(runs: Path, names: Sequence[str]) -> list[RunDirectory]:
    """Runs by their directory, or by their name in any study below `runs`. Raises ValueError for others."""
    found = []
    for name in names:
        below = sorted(path.parent for path in runs.glob(f"*/{name}/config.yaml"))
        places = [Path(name)] if (Path(name) / "config.yaml").exists() else below
        if len(places) != 1:
            raise ValueError(
                f"{name} is not a run below {runs}/"
                if not places
                else f"{name} is in several studies: {', '.join(map(str, places))}"
            )
        found.append(RunDirectory(places[0]))
    return found
