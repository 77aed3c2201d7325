"""Train one model: `python src/train.py model=llama_small attn=gqa`. Options: conf/train.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Train a run from this configuration, or go on with it."""
    from scantling.cli.train import train

    train(config)


if __name__ == "__main__":
    run_entry(main, config_name="train")
