"""Steps that the guard does not let pass: recorded, and training stopped or taken back behind them."""

from __future__ import annotations

import filecmp
import sys
from typing import NoReturn

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from scantling.data.loading import place_in_order
from scantling.runs.directory import RunDirectory
from scantling.training.assembly import Run, places_left_out
from scantling.training.checkpoints import newest_whole_checkpoint
from scantling.training.guard import BadStep
from scantling.training.ranks import is_first_process


def count_guarded(run: Run, step: int) -> int:
    """How often training was rolled back, or skipped a step up to `step`."""
    rows = run.directory.guarded()
    return sum(
        row["action"] == "rollback" or (row["action"] == "skip" and row["step"] <= step) for row in rows
    )


def samples_of(run: Run, first: int, last: int) -> list[int]:
    """The half-open range of samples of the steps `first` to `last`, counted from 1."""
    places = places_left_out(run)
    begin, end = (place_in_order(step - 1, places) for step in (max(1, first), last))
    return [run.plan.sizes.before(begin), run.plan.sizes.before(end + 1)]


@rank_zero_only
def record_bad_step(run: Run, bad: BadStep, action: str) -> None:
    """Append to `guards.jsonl` the step with its samples; for a rollback, with all that
    are left out from here on.
    """
    first = bad.step - run.guard.batches + 1 if action == "rollback" else bad.step
    samples = samples_of(run, first, bad.step)
    run.directory.guard({"step": bad.step, "reason": str(bad), "action": action, "samples": samples})


def stop_run(run: Run, bad: BadStep) -> NoReturn:
    """Record the step, say what it was and what may help, and end the process with code 1."""
    record_bad_step(run, bad, "stop")
    if is_first_process():
        first, end = samples_of(run, bad.step, bad.step)
        before = count_guarded(run, bad.step)
        others = f", after {before} others" if before else ""
        print(
            f"error: {bad}{others}: a lower lr, more warm-up, a smaller clip or guard.action=skip or "
            f"rollback may help; its samples {first} to {end - 1} are noted in {run.directory.guards}",
            file=sys.stderr,
        )
    sys.exit(1)


def roll_back(run: Run, bad: BadStep) -> None:
    """Go back to the newest checkpoint before the batches that are to be left out, or to the start."""
    if is_first_process():
        # First these, then the record: whenever the process dies, what is left fits together.
        remove_after(run.directory, bad.step - run.guard.batches)
        record_bad_step(run, bad, "rollback")
    if dist.is_initialized():
        # Also waits for the first. With resume=never another process, which started later, may have found its
        # directory and taken the next for its own.
        place = [run.directory.path]
        dist.broadcast_object_list(place, src=0)
        run.directory = RunDirectory(place[0])
    run.checkpoint, run.damaged = newest_whole_checkpoint(run.directory)
    run.first_step = 0 if run.checkpoint is None else run.directory.step_of(run.checkpoint)


def remove_after(directory: RunDirectory, step: int) -> None:
    """Remove checkpoints of later steps, by all their names."""
    checkpoints = directory.step_checkpoints()
    void = [path for path in checkpoints if directory.step_of(path) > step]
    # `last` alone, without a checkpoint of its own, would be taken for a run of an older version.
    if len(void) == len(checkpoints):
        directory.last.unlink(missing_ok=True)
    # `best` is one file with its checkpoint, or a copy where there are no links.
    if directory.best.exists() and any(filecmp.cmp(directory.best, path) for path in void):
        directory.best.unlink()
    for path in void:
        path.unlink()
