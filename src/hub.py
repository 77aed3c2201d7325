"""Hugging Face models in and out: `python src/hub.py action=import source=DIR`. Options: conf/hub.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Import a model, export a run or write its weights, as `action=` says."""
    from scantling.cli.hub import hub

    hub(config)


if __name__ == "__main__":
    run_entry(main, config_name="hub")
