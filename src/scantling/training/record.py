"""What a run writes of itself: where it came from, its loggers, samples, summary and last screen."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from scantling import __version__
from scantling.config.composition import PARTS, resolved_config
from scantling.config.decoder import build_decoder
from scantling.inference.continuation import continue_text
from scantling.model import hardware
from scantling.model.decoder import Decoder
from scantling.report.figures import draw_curves
from scantling.runs.directory import of_whole_training, read_rows
from scantling.training.assembly import Run
from scantling.training.loggers import Wandb
from scantling.training.ranks import is_first_process
from scantling.training.rollback import count_guarded
from scantling.training.strategies import WholeCheckpoints


@rank_zero_only
def set_up_directory(run: Run) -> None:
    """Set the run's directory up, so that it explains itself.

    Raises ValueError where it cannot be written, or has no room.
    """
    run.directory.begin(OmegaConf.to_yaml(resolved_config(run.config)), environment(run))
    there = len(run.directory.step_checkpoints())
    wanted = run.config.checkpoint.keep + 2  # the best, the next
    run.plan.check_disk(run.directory.path, checkpoints=wanted - min(there, wanted - 1))
    run.corpus.tokenizer.save(run.directory.tokenizer)


def environment(run: Run) -> dict[str, Any]:
    """What `env.json` holds: versions, device, plan and text of the run."""
    return {
        "scantling": __version__,
        "commit": git_commit(),
        "overrides": [o for o in run.config.overrides if not o.startswith("resume=")],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "device": hardware.describe(run.device),
        "precision": run.precision,
        "world_size": run.plan.world_size,
        "steps": run.plan.steps,
        "parameters": run.plan.counts,
        "corpus": {
            "fingerprint": run.corpus.fingerprint,
            "description": run.corpus.description,
            "train_tokens": len(run.corpus.train.tokens),
        },
        "tokenizer": run.corpus.tokenizer.fingerprint,
    }


def git_commit() -> str | None:
    """The commit of this project's checkout, marked when files differ from it; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_loggers(run: Run, console: Console, was_begun: bool) -> list[Logger]:
    """The chosen logger, told where to write and under which name; W&B is opened and says where it goes."""
    config = run.config.logger
    if config._target_ is None or not is_first_process():
        return []
    name, study = run.directory.name, str(run.directory.path.parent)
    if not config._target_.endswith(".Wandb"):
        return [instantiate(config)(save_dir=study, name=name)]
    logger: Wandb = instantiate(config)(
        save_dir=study,
        name=name,
        wandb_id=run.directory.wandb_id,
        group=run.config.study,
        tags=[*config.tags, *tags_of_arm(run.config.arm, run.config.overrides)],
    )
    recorded = {"environment": environment(run), "parameters": run.plan.counts}
    console.print(logger.start(resolved_config(run.config) | recorded))
    if was_begun:
        logger.catch_up(run.directory.metrics(), read_rows(run.directory.samples))
    return [logger]


def tags_of_arm(arm: str | None, typed: Sequence[str]) -> list[str]:
    """Tags of an arm: its name, else the parts that were typed for it, as `attn=gqa`."""
    if arm is not None:
        return [arm]
    return [text for text in typed if re.split(r"[/.=]", text)[0] in PARTS]


@rank_zero_only
def write_summary(run: Run, peak: float, peak_source: str, *, best_step: int) -> None:
    """Write `summary.json` and draw the curves.

    `best_step` is that of the best checkpoint; where no loss was a number, the last row is best.
    """
    rows = run.directory.metrics()
    draw_curves(rows, run.directory.curves, title=run.directory.name)
    best = next((row for row in rows if row["step"] == best_step), rows[-1])
    run.directory.finish(
        {
            **of_whole_training(rows[-1]),
            "best": {key: best[key] for key in ("step", "tokens", "val/loss", "val/bpb")},
            "parameters": run.plan.counts,
            "flops_convention": "exact",
            "peak_flops": {"flops": peak, "source": peak_source},
            "corpus": run.corpus.fingerprint,
            "guarded": count_guarded(run, run.plan.steps),
        }
    )


def draw_sample(run: Run, decoder: Decoder, strategy: Strategy | None) -> str | None:
    """A sample, in the first process; None in the others.

    Where each has a part of the weights all must call this: the first gathers them into a model of its own.
    """
    if isinstance(strategy, WholeCheckpoints) and strategy.shards_weights:
        state = strategy.lightning_module_state_dict()
        if is_first_process():
            decoder = build_decoder(run.config, run.corpus.tokenizer.vocab_size, "cpu").eval()
            decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in state.items()})
    return continue_prompt(run, decoder) if is_first_process() else None


def continue_prompt(run: Run, decoder: Decoder) -> str:
    """The configured prompt and its continuation, the same at every call for the same weights."""
    settings: dict[str, Any] = dict(run.config.sample)
    prompt = settings.pop("prompt")
    if prompt is None:
        prompt = run.corpus.tokenizer.decode(run.corpus.val.tokens[:8].tolist())
    return prompt + "".join(
        continue_text(decoder, run.corpus.tokenizer, prompt, seed=run.config.seed, **settings)
    )


def last_screen(run: Run) -> str:
    """Final numbers, one sample, and where things are."""
    summary, path = run.directory.summary, run.directory.path
    return (
        f"\n[bold]{summary['val/bpb']:.4f} bits/byte[/bold]  (loss {summary['val/loss']:.4f} nats/token, "
        f"perplexity {summary['val/perplexity']:.2f}) "
        f"after {summary['tokens']:,} tokens, {summary['flops']:.3g} FLOPs, "
        f"{summary['seconds']:.0f} s of training\n\n"
        f"[dim]a sample of at most {run.config.sample.n_tokens} tokens:[/dim]\n"
        f"{escape(run.directory.last_sample)}\n\n"
        f"run        {path}\n"
        f"curves     {run.directory.curves}\n"
        f"more text  python src/sample.py run={path}\n"
        f"evaluate   python src/evaluate.py run={path}"
    )
