"""Text from a trained run: `python src/sample.py run=DIR prompt="def "`. Options: conf/sample.yaml."""

from omegaconf import DictConfig

from scantling.command_line import run_entry


def main(config: DictConfig) -> None:
    from scantling.trained import sample  # here, so that a mistyped option need not wait for PyTorch

    sample(config)


if __name__ == "__main__":
    run_entry(main, config_name="sample")
