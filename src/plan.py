"""What a model takes: `python src/plan.py model=llama3_8b attn=gqa`. Options: conf/plan.yaml."""

from omegaconf import DictConfig

from scantling.config.command_line import run_entry


def main(config: DictConfig) -> None:
    """Print what a model takes, or plan a study of many."""
    from scantling.cli.plan import plan  # here, so that a mistyped option need not wait for PyTorch

    plan(config)


if __name__ == "__main__":
    run_entry(main, config_name="plan")
