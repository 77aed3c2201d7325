"""Rotary settings: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of those before."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scantling.hub.fields import MISSING, REQUIRED, Config, Field, Only, read_field, read_setting, setting


def yarn_growth(factor: float, mscale: float) -> float:
    """0.1·m·ln(factor) + 1. Peng et al. 2023, arXiv:2309.00071, eq. 22, with DeepSeek's m."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def attention_factor(parameters: Config) -> float | None:
    """YaRN's factor where no field says it: a ratio if both its terms are given, else null, the paper's."""
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not (above and below):
        return None
    return yarn_growth(parameters["factor"], above) / yarn_growth(parameters["factor"], below)


KINDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}
"""The family's name of each setting of `pos/scaling=`, and this project's."""

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": attention_factor}

WHOLE = Only("partial_rotary_factor", 1.0)
"""For code that turns all channels, whatever the field says."""


class Rope(Field):
    """The rotary settings of a family.

    `theta` and `fraction` are what the family takes where `config.json` is silent, `kinds` the scalings that
    it has, `unread` the fields that its code does not read, which must therefore have one value.
    """

    def __init__(
        self,
        *,
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        kinds: Sequence[str] = tuple(KINDS),
        unread: Sequence[Only] = (WHOLE,),
        old_theta: str = "rope_theta",
        old_fraction: str = "partial_rotary_factor",
    ) -> None:
        self.theta, self.fraction, self.interleaved = theta, fraction, interleaved
        self.kinds, self.unread = ("default", *kinds), unread
        self.old_theta, self.old_fraction = old_theta, old_fraction

    def parameters(self, hf: Config) -> Config:
        """The rotary settings in the form of transformers 5, whatever the file's."""
        old = {"rope_theta": hf.get(self.old_theta), "partial_rotary_factor": hf.get(self.old_fraction)}
        known = {key: value for key, value in old.items() if value is not None}
        return known | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})

    def read(self, parameters: Config, node: str) -> list[str]:
        """Overrides for the rotation at `node`, which is `pos`, or one of several below it."""
        given = {key: value for key, value in parameters.items() if value is not None}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in self.kinds:
            raise ValueError(f"config.json: rope_type={kind} is not supported, only {', '.join(self.kinds)}")
        for field in self.unread:
            field.overrides(given)
        group = "pos/scaling" if node == "pos" else f"pos/scaling@{node}.scaling"
        return [
            setting(f"{node}.theta", float(given.get("rope_theta", self.theta))),
            setting(f"{node}.fraction", float(given.get("partial_rotary_factor", self.fraction))),
            setting(f"{node}.interleaved", self.interleaved),
            f"{group}={'none' if kind == 'default' else kind}",
            *(
                setting(f"{node}.scaling.{ours}", read_field(given, theirs, DEFAULTS.get(theirs, REQUIRED)))
                for theirs, ours in KINDS.get(kind, {}).items()
            ),
        ]

    def written(self, decoder: Config, node: str) -> Config:
        """The inverse of `read`; a position that is not a rotation gives nothing."""
        theta, fraction = read_setting(decoder, f"{node}.theta"), read_setting(decoder, f"{node}.fraction")
        kind = str(read_setting(decoder, f"{node}.scaling._target_")).rpartition(".")[2]
        if MISSING in (theta, fraction):
            return {}
        parameters = {"rope_type": kind if kind in KINDS else "default", "rope_theta": theta}
        if fraction != 1.0 or self.fraction != 1.0:  # where the family's default is another, 1 must be said
            parameters["partial_rotary_factor"] = fraction
        for theirs, ours in KINDS.get(kind, {}).items():
            value = read_setting(decoder, f"{node}.scaling.{ours}")
            if value is not None:
                parameters[theirs] = value
        return parameters

    def overrides(self, hf: Config) -> list[str]:
        return ["pos=rope", *self.read(self.parameters(hf), "pos")]

    def hf_config(self, decoder: Config) -> Config:
        parameters = self.written(decoder, "pos")
        return {"rope_parameters": parameters} if parameters else {}

    @property
    def names(self) -> set[str]:
        return {"rope_parameters", "rope_scaling", self.old_theta, self.old_fraction}


LAYERS = {"sliding_attention": "pos.others", "full_attention": "pos.nth"}
"""Where the rotation of each kind of layer stands."""


class RopeLocalGlobal(Field):
    """One rotation in layers that see a window, another in those that see all. Gemma 3, OLMo 3.

    `old_local` is what files before transformers 5 call the base of the first.
    """

    def __init__(self, *, local: float, whole: float, old_local: str) -> None:
        # `transformers` looks for `truncate` beside the kinds of layers, where no file has it
        unread = (WHOLE, Only("truncate", True))
        thetas = {"sliding_attention": local, "full_attention": whole}
        self.ropes = {layer: Rope(theta=theta, unread=unread) for layer, theta in thetas.items()}
        self.old_local = old_local

    def overrides(self, hf: Config) -> list[str]:
        old = {
            "sliding_attention": {"rope_theta": hf.get(self.old_local)},
            "full_attention": {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})},
        }
        parameters = hf.get("rope_parameters") or old
        written = ["pos=rope_local_global"]
        for layer, node in LAYERS.items():
            written += self.ropes[layer].read(parameters.get(layer) or {}, node)
        return written

    def hf_config(self, decoder: Config) -> Config:
        parameters = {layer: self.ropes[layer].written(decoder, node) for layer, node in LAYERS.items()}
        return {"rope_parameters": parameters}

    @property
    def names(self) -> set[str]:
        return {"rope_parameters", "rope_scaling", "rope_theta", self.old_local}
