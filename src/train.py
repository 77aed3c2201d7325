"""Train one model: `python src/train.py model=llama_small attn=gqa`. Options: conf/train.yaml."""

from omegaconf import DictConfig

from scantling.command_line import run_entry


def main(config: DictConfig) -> None:
    from scantling.run import train  # here, so that a mistyped option need not wait for PyTorch

    train(config)


if __name__ == "__main__":
    run_entry(main, config_name="train")
