"""Text from a trained run: `python src/sample.py run=DIR prompt="def "`. Options: conf/sample.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Print prompts and the texts that continue them."""
    from scantling.cli.sample import sample

    sample(config)


if __name__ == "__main__":
    run_entry(main, config_name="sample")
