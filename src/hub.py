"""Hugging Face models in and out: `python src/hub.py action=import source=DIR`. Options: conf/hub.yaml."""

from omegaconf import DictConfig

from scantling.command_line import run_entry


def main(config: DictConfig) -> None:
    from scantling.hub.runs import hub  # here, so that a mistyped option need not wait for PyTorch

    hub(config)


if __name__ == "__main__":
    run_entry(main, config_name="hub")
