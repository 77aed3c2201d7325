"""Which directory a command means: a new one, the one where it stopped, or that of `resume=DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scantling.config.composition import compose_config
from scantling.config.differences import different_leaves
from scantling.config.identity import identity, path_of
from scantling.runs.directory import RunDirectory


def locate_run(config: DictConfig) -> tuple[DictConfig, RunDirectory]:
    """The run's configuration and directory, as `resume` says.

    `resume=DIR` composes the overrides of the run in DIR again, with those of this command line after them.
    """
    if config.resume not in ("auto", "never"):
        directory = RunDirectory(config.resume)
        if not directory.config.exists():
            raise ValueError(
                f"resume={config.resume} holds no run: use auto, never, or a directory below "
                f"{config.paths.runs}/"
            )
        config = compose_again(directory.environment["overrides"], config.overrides)
        stored = OmegaConf.load(directory.config)
        assert isinstance(stored, DictConfig)
        different = different_leaves(own_identity(stored, config), own_identity(config, config))
        if different:
            said = [f"{key} is {there} there, {here} here" for key, there, here in different]
            raise ValueError(
                f"{directory.path} is another run and cannot go on as this one: {'; '.join(said)}"
            )
        return config, directory
    path = path_of(config)
    if config.resume == "never":
        others = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
        path = path if not path.exists() else next(other for other in others if not other.exists())
    return config, RunDirectory(path)


def compose_again(stored: Sequence[str], typed: Sequence[str]) -> DictConfig:
    """The configuration of a run's overrides, replaced by those of this command line where both are given."""
    anew = {override.partition("=")[0] for override in typed}
    kept = [override for override in stored if override.partition("=")[0] not in anew]
    return compose_config("train", [*kept, *typed])


def own_identity(config: DictConfig, here: DictConfig) -> dict[str, Any]:
    """A run's identity without what `decoder` repeats of other settings, as it does in `here`."""
    whole = identity(config)
    own = [key for key in whole["decoder"] if not OmegaConf.is_interpolation(here.decoder, key)]
    return {**whole, "decoder": {key: whole["decoder"][key] for key in own}}


def already_finished(directory: RunDirectory) -> str:
    """What to say of a finished run: its result, and how to train another."""
    summary = directory.summary
    return (
        f"This run is finished: {summary['val/bpb']:.4f} bits/byte after {summary['tokens']:,} tokens, in "
        f"{directory.path}\nChange a setting (seed=1, say) for another run; "
        "trainer, logger, log_every, guard and sample make none. resume=never repeats it beside this one."
    )
