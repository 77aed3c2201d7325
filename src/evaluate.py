"""Loss of trained runs on any text: `python src/evaluate.py run=DIR`. Options: conf/evaluate.yaml."""

from omegaconf import DictConfig

from scantling.command_line import run_entry


def main(config: DictConfig) -> None:
    from scantling.trained import evaluate  # here, so that a mistyped option need not wait for PyTorch

    evaluate(config)


if __name__ == "__main__":
    run_entry(main, config_name="evaluate")
