"""Answers from runs: `python src/report.py study=attention`. Options: conf/report.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Print an answer from runs and write its page."""
    from scantling.cli.report import report  # here, so that a mistyped option need not wait for SciPy

    report(config)


if __name__ == "__main__":
    run_entry(main, config_name="report")
