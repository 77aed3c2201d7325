"""Rotary settings: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of those before."""

from __future__ import annotations

import math

from scantling.hub.fields import MISSING, Config, Field, found, setting

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
"""Their name of each setting of `pos/scaling=`, and ours."""

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}


def overrides_of(
    parameters: Config, theta: float, fraction: float, interleaved: bool, node: str
) -> list[str]:
    """`node` is the part of the configuration that holds the rotation: `pos`, or one of several below it."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    option = "none" if kind == "default" else kind
    if option != "none" and kind not in KINDS:
        raise ValueError(f"config.json: rope_type={kind} is not supported, only default, {', '.join(KINDS)}")
    group = "pos/scaling" if node == "pos" else f"pos/scaling@{node}.scaling"
    written = [
        setting(f"{node}.theta", float(parameters.get("rope_theta", theta))),
        setting(f"{node}.fraction", float(parameters.get("partial_rotary_factor", fraction))),
        setting(f"{node}.interleaved", interleaved),
        f"{group}={option}",
    ]
    for theirs, ours in KINDS.get(kind, {}).items():
        if theirs not in parameters and theirs not in DEFAULTS:
            raise ValueError(f"config.json: rope_type={kind} lacks {theirs}")
        written.append(setting(f"{node}.scaling.{ours}", parameters.get(theirs, DEFAULTS.get(theirs))))
    return written


def parameters_of(decoder: Config, node: str) -> Config:
    """The inverse of `overrides_of`; what is no rotation gives nothing."""
    theta, fraction = found(decoder, f"{node}.theta"), found(decoder, f"{node}.fraction")
    kind = str(found(decoder, f"{node}.scaling._target_")).rpartition(".")[2]
    if MISSING in (theta, fraction):
        return {}
    parameters = {"rope_type": kind if kind in KINDS else "default", "rope_theta": theta}
    if fraction != 1.0:
        parameters["partial_rotary_factor"] = fraction
    for theirs, ours in KINDS.get(kind, {}).items():
        value = found(decoder, f"{node}.scaling.{ours}")
        if value is not None:
            parameters[theirs] = value
    return parameters


class Rope(Field):
    """`theta` and `fraction` are what the family takes where `config.json` is silent."""

    def __init__(
        self,
        *,
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        old_theta: str = "rope_theta",
        old_fraction: str = "partial_rotary_factor",
    ):
        self.theta, self.fraction, self.interleaved = theta, fraction, interleaved
        self.old_theta, self.old_fraction = old_theta, old_fraction

    def parameters(self, hf: Config) -> Config:
        """In the form of transformers 5, whatever the file's."""
        old = {"rope_theta": hf.get(self.old_theta), "partial_rotary_factor": hf.get(self.old_fraction)}
        known = {key: value for key, value in old.items() if value is not None}
        return known | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})

    def overrides(self, hf: Config) -> list[str]:
        return [
            "pos=rope",
            *overrides_of(self.parameters(hf), self.theta, self.fraction, self.interleaved, "pos"),
        ]

    def hf_config(self, decoder: Config) -> Config:
        parameters = parameters_of(decoder, "pos")
        if parameters and self.fraction != 1.0:  # for a family whose default is another, 1 must be said
            parameters["partial_rotary_factor"] = decoder["pos"]["fraction"]
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

    def __init__(self, *, local: float, whole: float, old_local: str):
        self.thetas = {"sliding_attention": local, "full_attention": whole}
        self.old_local = old_local

    def overrides(self, hf: Config) -> list[str]:
        old = {
            "sliding_attention": {"rope_theta": hf.get(self.old_local, self.thetas["sliding_attention"])},
            "full_attention": {
                "rope_theta": hf.get("rope_theta", self.thetas["full_attention"]),
                **(hf.get("rope_scaling") or {}),
            },
        }
        parameters = hf.get("rope_parameters") or old
        written = ["pos=rope_local_global"]
        for layer, node in LAYERS.items():
            written += overrides_of(parameters.get(layer, {}), self.thetas[layer], 1.0, False, node)
        return written

    def hf_config(self, decoder: Config) -> Config:
        return {"rope_parameters": {layer: parameters_of(decoder, node) for layer, node in LAYERS.items()}}

    @property
    def names(self) -> set[str]:
        return {"rope_parameters", "rope_scaling", "rope_theta", self.old_local}


def yarn_growth(factor: float, mscale: float) -> float:
    """0.1·m·ln(factor) + 1. Peng et al. 2023, arXiv:2309.00071, eq. 22, with DeepSeek's m."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
