"""Recorded runs: `python src/runs.py action=ls study=attention`. Options: conf/runs.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """List, show, compare, export, import or remove runs, as `action=` says."""
    from scantling.cli.runs import manage_runs  # here, so that a mistyped option need not wait for pandas

    manage_runs(config)


if __name__ == "__main__":
    run_entry(main, config_name="runs")
