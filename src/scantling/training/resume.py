"""Which directory a command means: a new one, the one where it stopped, or that of `resume=DIR`."""

from __future__ import annotations

from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from scantling.config.command_line import SWEEPS
from scantling.config.identity import identity, path_of
from scantling.runs.directory import RunDirectory


def located(config: DictConfig) -> tuple[DictConfig, RunDirectory]:
    """The run's configuration and directory, as `resume` says.

    `resume=DIR` composes the overrides of the run in DIR again, with those of this command line after them.
    """
    typed = list(HydraConfig.get().overrides.task)
    if config.resume not in ("auto", "never"):
        directory = RunDirectory(config.resume)
        if not directory.config.exists():
            raise ValueError(
                f"resume={config.resume} holds no run: use auto, never, or a directory below {config.paths.runs}/"
            )
        config = composed_again(directory.environment["overrides"], typed)
        stored = OmegaConf.load(directory.config)
        assert isinstance(stored, DictConfig)
        differences = different_keys(typed_once(stored, config), typed_once(config, config))
        if differences:
            raise ValueError(
                f"{directory.path} is another run and cannot go on as this one: {'; '.join(differences)}"
            )
        return config, directory
    path = path_of(config)
    if config.resume == "never":
        others = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
        path = path if not path.exists() else next(other for other in others if not other.exists())
    return config, RunDirectory(path)


def composed_again(stored: list[str], typed: list[str]) -> DictConfig:
    """The configuration of a run's overrides and those of this command line, which Hydra from here on takes for typed."""
    anew = {override.partition("=")[0] for override in typed}
    kept = [override for override in stored if override.partition("=")[0] not in anew]
    config = compose("train", overrides=[*kept, *typed, SWEEPS], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def typed_once(config: DictConfig, here: DictConfig) -> dict[str, Any]:
    """A run's identity without what `decoder` repeats of other settings, as it does in `here`."""
    plain = identity(config)
    own = [key for key in plain["decoder"] if not OmegaConf.is_interpolation(here.decoder, key)]
    return {**plain, "decoder": {key: plain["decoder"][key] for key in own}}


def different_keys(stored: dict, here: dict, prefix: str = "") -> list[str]:
    """'key: value there, value here' for every leaf that differs."""
    found = []
    for key in sorted({*stored, *here}):
        there, now = stored.get(key), here.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            found += different_keys(there, now, f"{prefix}{key}.")
        elif there != now:
            found.append(f"{prefix}{key} is {there} there, {now} here")
    return found


def already_finished(directory: RunDirectory) -> str:
    summary = directory.summary
    return (
        f"This run is finished: {summary['val/bpb']:.4f} bits/byte after {summary['tokens']:,} tokens, in {directory.path}\n"
        "Change a setting (seed=1, say) for another run; trainer, logger, log_every, guard and sample make none. resume=never "
        "repeats it beside this one."
    )
