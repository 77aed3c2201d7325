"""Train one model: `python src/train.py model=llama_small attn=gqa`. Options: conf/train.yaml."""

import hydra
from omegaconf import DictConfig

from scantling.command_line import run_entry


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    from scantling.run import train  # here, so that a mistyped option need not wait for PyTorch

    train(config)


if __name__ == "__main__":
    run_entry(main)
