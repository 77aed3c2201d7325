"""What a run shows while it trains."""

import io
import re
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from scantling.training.callbacks import ProgressBar


def test_the_bar_is_up_to_date_before_a_validation_and_at_the_end():
    """However short the time since it was drawn last."""
    screen = io.StringIO()
    metrics = cast(Any, SimpleNamespace(row={}, total_steps=20, validates=lambda step: step % 10 == 0))
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=120), metrics)
    trainer = cast(Any, SimpleNamespace(global_step=0, sanity_checking=False))
    drawn = lambda: re.findall(r"(\d+)/20", re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()))  # noqa: E731
    bar.on_train_start(trainer, None)
    for trainer.global_step in range(1, 21):
        step = trainer.global_step
        metrics.row = {"step": step, "tokens": 64 * step, "seconds": 1, "tokens_per_second": 64.0}
        metrics.row |= {"train/loss": 6 - step / 100, "val/loss": 5.5, "val/bpb": 7.5}
        bar.on_step(trainer, None, step)
        if metrics.validates(step):
            assert drawn()[-1] == str(step)
            bar.on_validation_end(trainer, None)
    bar.on_train_end(trainer, None)
    assert drawn()[-1] == "20"
    assert "loss 5.800  val 7.500 bpb" in screen.getvalue()
    assert "1.28 k tokens" in screen.getvalue()
