"""Weights & Biases as a mirror of `metrics.jsonl`. TensorBoard's and the CSV logger are Lightning's own."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from scantling.runs.directory import Row
from scantling.runs.wandb_file import records

PATIENCE = 300
"""Seconds that W&B's own process has to start, where no server is waited for: 30 are few on a busy one."""


class Wandb(WandbLogger):
    """Online when a key is configured and the server answers, else offline, or left out where W&B does not
    start; never fatal.

    Rows carry an explicit step, because a run that is resumed offline is a second segment under the same id.
    `catch_up` makes the segments join: together they hold every step once.
    """

    def __init__(
        self, *, project: str, tags: list[str], save_dir: str, name: str, wandb_id: str, group: str
    ) -> None:
        import wandb  # here and below: a run without it need not wait for it

        # A process of W&B's that is shared with others outlives this one, and never lets go of a run whose
        # process was killed: this run has its own.
        os.environ.pop("WANDB_SERVICE", None)
        self.mode, self.reason = mode_and_reason()
        self.mirrored: set[int] = set()
        """Steps that earlier segments hold."""
        self.is_lost = False
        """Whether W&B's own process has gone: a SIGTERM ends it while the run still writes its checkpoint."""
        super().__init__(
            project=project,
            tags=tags,
            save_dir=save_dir,
            name=name,
            id=wandb_id,
            group=group,
            mode=self.mode,
            resume="allow" if self.mode == "online" else None,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=30 if self.mode == "online" else PATIENCE,
                x_transaction_log_flush_interval=1.0,
            ),
        )

        del self._wandb_init["anonymous"]  # Lightning's default, which W&B warns of

    def start(self, config: dict[str, Any]) -> str:
        """Open the run with its configuration; one line that says where it goes."""
        import wandb

        try:
            run = self.experiment
        except wandb.Error as error:
            if self.mode == "disabled":
                raise
            wandb.teardown()
            if self.mode == "online":
                self.mode, self.reason = "offline", f"warning: the server refused: {first_line(error)}"
            else:
                self.mode, self.reason = "disabled", f"warning: it did not start: {first_line(error)}"
            self._wandb_init |= {"mode": self.mode, "resume": None}
            return self.start(config)
        run.config.update(config, allow_val_change=True)
        for axis in ("tokens", "flops"):
            run.define_metric(axis, hidden=True)
        if self.mode == "disabled":
            return f"W&B disabled ({self.reason}): metrics.jsonl has every row"
        where = run.url if self.mode == "online" else os.path.dirname(run.dir)
        return f"W&B {self.mode} ({self.reason}): {where}"

    def catch_up(self, rows: list[Row], samples: list[Row]) -> None:
        """Log what the record so far, `rows` and `samples`, has and W&B has not.

        Offline that is what a killed process had not written. Online it is everything where the server does
        not know the run, else nothing: it keeps the steps in order.
        """
        if self.mode == "offline":
            self.mirrored = steps_in_segments(Path(self.experiment.dir).parent)
        elif self.mode != "online" or self.experiment.resumed:
            return
        texts = {sample["step"]: sample["text"] for sample in samples}
        for row in rows:
            self.log_metrics(row, step=row["step"])
            if row["step"] in texts:
                self.log_sample(texts[row["step"]], row["step"])

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        if step not in self.mirrored and not self.is_lost:
            try:
                # Lightning makes trainer/global_step the axis of every chart.
                self.experiment.log({**metrics, "trainer/global_step": step}, step=step)
            except OSError as error:
                self.lose(error)

    def lose(self, error: OSError) -> None:
        """Warn once that W&B has ended; from then on nothing is sent to it."""
        self.is_lost = True
        print(
            f"warning: W&B ended ({error}): metrics.jsonl goes on, and a resumed run mirrors what is missing",
            file=sys.stderr,
        )

    def log_sample(self, text: str, step: int) -> None:
        """Log a text, escaped, as preformatted HTML."""
        import wandb

        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self.log_metrics({"sample": wandb.Html(f"<pre>{escaped}</pre>", inject=False)}, step=step)

    def finish(self, succeeded: bool) -> None:
        """Close the run; without this the next run of the process would write into it."""
        import wandb

        try:
            wandb.finish(exit_code=0 if succeeded else 1)
        except OSError as error:
            self.lose(error)


def steps_in_segments(present: Path) -> set[int]:
    """Steps of the run's segments beside the present one, read back by W&B's own command."""
    steps = set()
    for segment in present.parent.glob(f"offline-run-*-{present.name.split('-', 3)[3]}/*.wandb"):
        if segment.parent != present:
            steps |= {r["history"]["item"]["_step"] for r in records(segment) if r["type"] == "history"}
    return steps


def mode_and_reason() -> tuple[str, str]:
    """W&B's mode, and why, for the user."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode, "WANDB_MODE"
    try:
        wandb.setup(wandb.Settings(silent=True, x_service_wait=PATIENCE))
    except wandb.Error as error:
        return "disabled", f"warning: it did not start: {first_line(error)}"
    if not wandb.login(prompt=False, verify=False):
        return "offline", "no API key; `wandb login` sends the next runs online"
    server = urlparse(wandb.setup().settings.base_url)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=5).close()
    except OSError:
        return "offline", "warning: the server cannot be reached; `wandb sync` sends the run later"
    return "online", "API key found"


def first_line(error: Exception) -> str:
    """What an error says, without the advice below it."""
    return str(error).split("\n", 1)[0]
