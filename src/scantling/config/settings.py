"""What is known of settings beyond their values."""

from __future__ import annotations

NOT_TRAINED = (
    "study",
    "arm",
    "ladder",
    "match",
    "matched",
    "tune",
    "tuned",
    "resume",
    "dry_run",
    "log_every",
    "sample",
    "checkpoint",
    "guard",
    "noise_scale",
    "profile",
    "paths",
    "logger",
    "trainer",
)
"""Settings that are no part of a run's name: they do not change what is trained, but for `trainer`'s precision, which is a
part, and for `guard`, with which a run that stopped goes on.
"""
