"""Loss of trained runs on any text: `python src/evaluate.py run=DIR`. Options: conf/evaluate.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Print the losses of trained runs."""
    from scantling.cli.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run_entry(main, config_name="evaluate")
