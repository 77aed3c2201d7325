"""Runs each command of README.md and docs/, each page in a fresh copy of the project: `make docs-check`.

    python tests/docs/docs_check.py                    all of them, a quarter of an hour on two cores
    python tests/docs/docs_check.py docs/sweeps.md     those of a page

Commands are read off the pages, and run in order. What is changed before they run, and what is not run here,
stands in the three tables below and nowhere else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from documented import PAGES, ROOT, Command, blocks, commands, write_files

NOT_HERE = {
    r"^source ": "every command here runs in that environment",
    r"^pip install": "needs a package index",
    r"^sbatch": "needs SLURM; tests/cluster/test_slurm.py starts one, with the file of the page",
    r"launcher=ray": "needs ray",
    r"data=wikitext103": "needs Hugging Face's server",
    r"ENTITY/PROJECT": "needs W&B's server; tests/runs/test_wandb_import.py is one",
    r"publish=wandb": "needs W&B's server; tests/report/test_wandb_report.py is one",
}
"""What commands say -> why they cannot run."""

SHORTER = {
    r"^(?:srun|torchrun --nnodes).*? (?:python )?(src/train\.py .*)$": r"python \1",  # as a process is given
    r"^make train$": 'make train ARGS="model=llama_small attn=gqa"',  # as the Makefile has it
    r"^(make train ARGS=.*)\"$": r'\1 dry_run=true"',
    r"^make test$": "make test ARGS_TEST=tests/test_architecture.py",
    r"^(python src/train\.py (?!.*(budget\.steps=|sweeps=smoke|dry_run=)).*)$": r"\1 dry_run=true",
    r"^(python src/report\.py .*)$": r"\1 resamples=200",
    r"^(.* watch=true.*)$": r"timeout --foreground --preserve-status --signal=INT 20 \1",
}
"""What would take long: built, planned and checked, not trained; or less of it."""

STANDS_FOR = {
    r"\[\S*(NAME|DIR1),\S*(NAME|OTHER|DIR2)\]": "[{newest},{other}]",
    r"(run|resume)=(runs/default/NAME|NAME|DIR)\b": r"\1={newest}",
    r"SMALLER_RUN": "{other}",
    r"(src/hub\.py .*)source=DIR": r"\1source=models/another",
    r"(src/runs\.py .*)source=DIR": r"\1source=offline",
}
"""What a reader puts in. `{newest}` and `{other}` are the runs of `runs/default` that finished last."""

TINY = "model=nano tokenizer=byte logger=none data=text data.files=books/*.txt budget=steps"
PREPARED = (
    "python src/train.py -m model=nano data=text data.files=books/*.txt budget=steps budget.steps=20 "
    "ema.decay=0.9 seed=0,1",
    "cp -r runs/default/wandb offline",
    "python src/hub.py action=export run={newest} family=llama to=models/pythia-160m",
    "cp -r models/pythia-160m models/another",
    f"python src/train.py -m sweeps=attention attn=mha,gqa seed=0,1 {TINY} budget.steps=4",
    f"python src/train.py -m sweeps=norms norm=rmsnorm,layernorm seed=0,1 ~budget.tokens {TINY} "
    "budget.steps=4",
    f"python src/train.py -m sweeps=parts arm=llama,gelu seed=0,1 {TINY} budget.steps=4",
    f"python src/train.py -m study=law {TINY} budget.steps=4,8,16 model.d_model=16,32,64",
)
"""What pages take for granted: runs, studies, a model of transformers."""

SECONDS = 600
"""That a command may take."""


def main(chosen: list[str]) -> int:
    """How many failed."""
    counts = {"passed": 0, "FAILED": 0, "not run": 0}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        copy_project(clone)
        write_inputs(clone)
        for i, text in enumerate(PREPARED):
            state = carried_out(Command("prepared", i + 1, text), clone)
            if state != "passed":
                return 1
        for page in chosen:
            tree = Path(folder) / page.replace("/", "_")
            shutil.copytree(clone, tree, symlinks=True)
            write_files(page, tree)
            for block in blocks(page):
                for command in commands(block) if block.is_commands else ():
                    counts[carried_out(command, tree)] += 1
            shutil.rmtree(tree)
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return counts["FAILED"]


def carried_out(command: Command, tree: Path) -> str:
    """Run it as it stands, but for the tables, and say what became of it."""
    for pattern, reason in NOT_HERE.items():
        if re.search(pattern, command.text):
            print(f"not run           {command}  {command.text}: {reason}", flush=True)
            return "not run"
    text = as_run(command.text, tree)
    begun = time.monotonic()
    code, output = run(text, tree)
    state = "passed" if code == 0 else "FAILED"
    print(f"{state}  {time.monotonic() - begun:6.1f} s  {command}  {text}", flush=True)
    if code != 0:
        print("    " + "\n    ".join(output.splitlines()[-15:]) + f"\n    exit code {code}", flush=True)
    return state


def as_run(text: str, tree: Path) -> str:
    """The command with its placeholders filled and its length cut."""
    for pattern, replacement in SHORTER.items():
        text = re.sub(pattern, replacement, text)
    for pattern, replacement in STANDS_FOR.items():
        text = re.sub(pattern, replacement, text)
    if "{newest}" in text or "{other}" in text:
        ended = sorted((tree / "runs/default").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
        other, newest = (path.parent.relative_to(tree).as_posix() for path in ended[-2:])
        text = text.replace("{newest}", newest).replace("{other}", other)
    return text


def run(text: str, tree: Path) -> tuple[int, str]:
    environment = os.environ | {
        "PATH": f"{tree}/.venv/bin:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tree.parent / "cache"),
        "COLUMNS": "160",
    }
    try:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        return 124, f"{(late.output or b'').decode()}\nnot done after {SECONDS} s"
    return done.returncode, done.stdout


def copy_project(clone: Path) -> None:
    """What git would give somebody else, and an environment that is installed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    environment = clone / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in ("python", "runtime", "development"):
            (environment / path.name).symlink_to(path)
    for stamp in ("python", "runtime", "development"):
        (environment / stamp).touch()


def write_inputs(clone: Path) -> None:
    """Text to train on, prompts, and a table of somebody's runs."""
    (clone / "books").mkdir()
    for name in ("argparse", "ast", "typing"):
        source = Path(sys.modules["os"].__file__ or "").parent / f"{name}.py"
        shutil.copy(source, clone / "books" / f"{name}.txt")
    (clone / "prompts.txt").write_text("def \nclass \n")
    rng = np.random.default_rng(0)
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e6, 1e9, 7), np.geomspace(1e8, 1e11, 6)))
    loss = (1.8 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.002 * rng.standard_normal(n.size))
    table = pd.DataFrame({"params": n, "tokens": d, "flops": 6 * n * d, "loss": loss, "final_loss": loss})
    table["params_without_embeddings"], table["name"] = 0.9 * n, [f"run{i}" for i in range(n.size)]
    table.to_csv(clone / "runs.csv", index=False)
    table.to_json(clone / "runs.jsonl", orient="records", lines=True)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:] or PAGES), 1))
