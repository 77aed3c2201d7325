"""What hub.py does: `action=import`, `action=export` or `action=weights`."""

from __future__ import annotations

from omegaconf import DictConfig

from scantling.config.mistakes import mistakes
from scantling.hub.runs import export_run, import_run, write_weights


def hub(config: DictConfig) -> None:
    """The entry: `action=import`, `action=export` or `action=weights`."""
    with mistakes():
        actions = {"import": import_run, "export": export_run, "weights": write_weights}
        if config.action not in actions:
            raise ValueError(f"action={config.action} is unknown: use import, export or weights")
        needed = {"import": ("source",), "export": ("run", "family", "to"), "weights": ("run", "to")}
        for key in needed[config.action]:
            if config[key] is None:
                raise ValueError(f"action={config.action} needs {key}=…")
        print(actions[config.action](config))
