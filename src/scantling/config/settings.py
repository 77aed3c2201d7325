"""What is known of settings beyond their values: one table, which everybody asks.

A setting that the table does not have is of the kind of its default in `conf/`, takes null where that is
null, and is part of what is trained and of what an arm is; at null it is left out of a run's identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """How a setting differs from most others. It holds for a key and all settings below it."""

    kind: Literal["name", "free text"] | None = None
    """A name: 7 is one, and not a number. Free text: anything, with its brackets and spaces.

    None: the kind of the default.
    """
    nullable: bool = False
    """Whether null is a value although the default is not null."""
    several: tuple[str, ...] = ()
    """The entries where it takes a list, or one value, whatever its default.

    `report.py` has its own words for what it refuses.
    """
    neutral: Any = None
    """The value that leaves training as it would be without the setting.

    At this value, or at null, the setting is not in a run's identity.
    """
    trained: bool = True
    """Whether it is part of a run's identity.

    Of `trainer` only the precision is. `guard` is not, so that a run which it stopped can go on with another.
    """
    arm: bool = True
    """Whether it is part of what an arm is; what is not trained never is."""
    size: Literal["shape", "length", "tuned", "fitted"] | None = None
    """Whether it makes a model larger or a run longer, or follows these.

    What follows is tuned, as it moves the loss, or fitted to a device.
    """
    column: bool = False
    """Whether the table of runs has a column for it, under its last name."""
    own_reference: bool = False
    """Whether `match=` matches jobs that differ in it to different references."""
    notes: str | None = None
    """The other setting whose value a launcher explains in this one."""


CORPORA = ("train", "plan", "evaluate")
"""The entries that take a corpus."""

SETTINGS = {
    # of every entry
    "study": Setting("name", trained=False),
    "paths": Setting(trained=False),
    "paths.runs": Setting("name"),
    "paths.cache": Setting("name"),
    # of a run
    "model": Setting(own_reference=True),
    "model.n_layers": Setting(size="shape", column=True),
    "model.d_model": Setting(size="shape", column=True),
    "model.n_heads": Setting(size="shape", column=True),
    "model.n_kv_heads": Setting(size="shape", column=True),
    "model.d_head": Setting(size="shape"),
    "model.d_ff": Setting(size="shape", column=True),
    "model.vocab_size": Setting(column=True),
    "model.seq_len": Setting(column=True),
    "embed": Setting(own_reference=True),
    "tokenizer": Setting(own_reference=True),
    "data": Setting(own_reference=True),
    "data.files": Setting(several=CORPORA),
    "data.data_files": Setting(several=CORPORA),
    "budget": Setting(size="length", own_reference=True),
    "lr": Setting(size="tuned"),
    "batch_size": Setting(size="tuned"),
    "micro_batch_size": Setting(size="fitted"),
    "clip": Setting(nullable=True),
    "val_windows": Setting(nullable=True),
    "seed": Setting(arm=False),
    "guard": Setting(trained=False),
    "noise_scale": Setting(trained=False),
    "profile": Setting(trained=False),
    "log_every": Setting(trained=False),
    "checkpoint": Setting(trained=False),
    "checkpoint.every_minutes": Setting(nullable=True),
    "sample": Setting(trained=False),
    "sample.prompt": Setting("free text"),
    "sample.top_k": Setting(nullable=True),
    "logger": Setting(trained=False),
    "trainer": Setting(trained=False),
    "resume": Setting(trained=False),
    "dry_run": Setting(trained=False),
    "hydra": Setting(arm=False),
    # of a sweep
    "arm": Setting(trained=False),
    "ladder": Setting(trained=False),
    "match": Setting(trained=False),
    "matched": Setting(trained=False, notes="model.d_ff"),
    "tune": Setting(trained=False),
    "tuned": Setting(trained=False, notes="lr"),
    # of what reads runs
    "run": Setting(several=("evaluate", "runs", "report")),
    "runs": Setting(several=("report",)),
    "lengths": Setting(several=("evaluate",)),
    "prompt": Setting("free text", nullable=True),
    "prompts": Setting(several=("sample",)),
    "stop": Setting("free text"),
    "stops": Setting(several=("sample",)),
    "top_k": Setting(nullable=True),
    "baseline": Setting("free text"),
    "law": Setting("name"),
    "tokens": Setting(several=("report",)),
    "n": Setting(several=("report",)),
    "budgets": Setting(several=("report",)),
}

NULL_IN_IDENTITY = (
    *("clip", "z_loss", "val_windows", "micro_batch_size", "batch_warmup.start", "ema.decay"),
    *("model.d_head", "d_head", "embed.norm", "head.scale", "head.softcap", "pos.scaling.attention_factor"),
    *("attn.clip_qkv", "attn.d_value", "attn.q_rank", "attn.scale", "attn.softcap"),
    *("data.data_files", "data.max_documents", "data.name", "data.revision", "data.val_split"),
    "tokenizer.train_bytes",
)
"""The settings that were null in some run before null ones were left out of identities.

They stay in, and what `decoder` repeats of them too, so that these runs are found again. No
setting is ever added here.
"""

# What the packages ask of the table:
NOT_TRAINED = tuple(key for key, known in SETTINGS.items() if not known.trained)
NOT_AN_ARM = tuple(key for key, known in SETTINGS.items() if not (known.trained and known.arm))
NOTES = {key: known.notes for key, known in SETTINGS.items() if known.notes is not None}

SHAPE = tuple(key.removeprefix("model.") for key, known in SETTINGS.items() if known.size == "shape")
"""What makes a model larger, of `model`."""
FOLLOWS_SIZE = tuple(key for key, known in SETTINGS.items() if known.size in ("tuned", "fitted"))
"""What a study of sizes changes along with them."""
TUNED = tuple(key for key, known in SETTINGS.items() if known.size == "tuned")
"""Those of `FOLLOWS_SIZE` that move the loss.

Where one size has several values, most of its runs are not the best that it can do.
"""

COLUMNS = tuple(key.removeprefix("model.") for key, known in SETTINGS.items() if known.column)
OWN_REFERENCE = tuple(key for key, known in SETTINGS.items() if known.own_reference)


def setting(key: str) -> Setting:
    """What is known of a dotted key."""
    return SETTINGS.get(key, Setting())


def is_neutral(key: str, value: Any) -> bool:
    """Whether a setting has the value at which identities leave it out; also where `decoder` repeats it."""
    key = key.removeprefix("decoder.")
    if value is None:
        return key not in NULL_IN_IDENTITY
    return setting(key).neutral is not None and value == setting(key).neutral
