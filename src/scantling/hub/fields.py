"""The settings of a family, read both ways: a field of `config.json` <-> overrides as on the command line.

`overrides` turns a `config.json` into the overrides that make the same decoder; `hf_config` turns
the configuration of a decoder, its nulls filled in, into fields. A setting that `hf_config` does not
find is left out: export composes what it wrote once more and names what came out otherwise, so no
field needs to check itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scantling.model.checks import check_whole
from scantling.model.ffn import gated_width

Config = dict[str, Any]
REQUIRED = object()
MISSING = object()


def setting(path: str, value: Any) -> str:
    """`path=value` in Hydra's words."""
    if value is not None and not isinstance(value, bool | int | float):  # a file's text never reaches Hydra
        raise ValueError(f"config.json: {value!r} is not a number, and {path} takes nothing else")
    words = {None: "null", True: "true", False: "false"}
    return f"{path}={words[value] if value is None or isinstance(value, bool) else value}"


def read_setting(decoder: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or MISSING. `model.x` and `decoder.x` stand for the decoder's own `x`."""
    node: Any = decoder
    for key in path.removeprefix("model.").removeprefix("decoder.").split("."):
        if not isinstance(node, Mapping) or key not in node:
            return MISSING
        node = node[key]
    return node


def read_field(hf: Config, field: str, absent: Any, nullable: bool = False) -> Any:
    """What `config.json` says, or what `transformers` takes where it says nothing."""
    value = hf.get(field, MISSING)
    if value is MISSING or (value is None and not nullable):
        value = absent(hf) if callable(absent) else absent
    if value is REQUIRED:
        raise ValueError(f"config.json lacks {field}")
    return value


def fill_nulls(decoder: Config) -> Config:
    """The configuration with what its nulls stand for, so that two ways to say one thing are equal."""
    decoder = {**decoder, "attn": dict(decoder["attn"]), "head": dict(decoder["head"])}
    attn, head = decoder["attn"], decoder["head"]
    if decoder["d_head"] is None:
        decoder["d_head"] = decoder["d_model"] // decoder["n_heads"]
    if "scale" in attn and attn["scale"] is None:
        width = decoder["d_head"] + ("kv_rank" in attn and attn["d_rotated"])
        attn["scale"] = width**-0.5
    if "d_value" in attn and attn["d_value"] is None:
        attn["d_value"] = decoder["d_head"]
    if "scale" in head and head["scale"] is None:
        head["scale"] = 1.0
    return decoder


class Field(ABC):
    """Base of every kind of field: a setting of `config.json` and the overrides that stand for it."""

    @abstractmethod
    def overrides(self, hf: Config) -> list[str]:
        """What to add to the command line for the decoder of a `config.json`.

        Raises ValueError for a value that this project's parts cannot do, or a field that is missing.
        """

    @abstractmethod
    def hf_config(self, decoder: Config) -> Config:
        """The fields for a decoder's configuration; none where it does not have the setting."""

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """The fields of `config.json` that it reads."""


class Same(Field):
    """One number or switch. `ours` are set, the first of them (or `leaf`) is what export reads."""

    def __init__(
        self,
        theirs: str,
        *ours: str,
        absent: Any = REQUIRED,
        aliases: Sequence[str] = (),
        nullable: bool = False,
        leaf: str | None = None,
        read: Callable[[Any], Any] = lambda value: value,
        write: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.theirs, self.ours, self.absent, self.nullable = theirs, ours, absent, nullable
        self.leaf, self.read, self.write, self.aliases = leaf or ours[0], read, write, aliases

    def overrides(self, hf: Config) -> list[str]:
        theirs = next((name for name in self.aliases if name in hf), self.theirs)
        value = read_field(hf, theirs, self.absent, self.nullable)
        value = value if value is None else self.read(value)
        return [setting(path, value) for path in self.ours]

    def hf_config(self, decoder: Config) -> Config:
        value = read_setting(decoder, self.leaf)
        if value is MISSING:
            return {}
        return {self.theirs: value if value is None else self.write(value)}

    @property
    def names(self) -> set[str]:
        return {self.theirs, *self.aliases}


class Given(Field):
    """What all models of the family share and no field says."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings

    def overrides(self, hf: Config) -> list[str]:
        return list(self.settings)

    def hf_config(self, decoder: Config) -> Config:
        return {}

    @property
    def names(self) -> set[str]:
        return set()


class Only(Field):
    """A field that must have one value: another means a model that this project does not build."""

    def __init__(self, theirs: str, value: Any, absent: Any = MISSING) -> None:
        self.theirs, self.value = theirs, value
        self.absent = value if absent is MISSING else absent

    def overrides(self, hf: Config) -> list[str]:
        value = hf.get(self.theirs, self.absent)
        if value != self.value and (value or self.value):  # null and false both switch a thing off
            raise ValueError(f"config.json: {self.theirs}={value} is not supported, only {self.value}")
        return []

    def hf_config(self, decoder: Config) -> Config:
        return {self.theirs: self.value}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class Switch(Field):
    """A field of few values, each with overrides of its own; export finds the value by what is at `leaf`."""

    def __init__(
        self,
        theirs: str,
        leaf: str,
        choices: Mapping[Any, tuple[Any, Sequence[str]]],
        absent: Any = REQUIRED,
        nullable: bool = False,
    ) -> None:
        self.theirs, self.leaf, self.choices = theirs, leaf, choices
        self.absent, self.nullable = absent, nullable

    def overrides(self, hf: Config) -> list[str]:
        value = read_field(hf, self.theirs, self.absent, self.nullable)
        if value not in self.choices:
            known = ", ".join(str(choice) for choice in self.choices)
            raise ValueError(f"config.json: {self.theirs}={value} is not supported, only {known}")
        return list(self.choices[value][1])

    def hf_config(self, decoder: Config) -> Config:
        here = read_setting(decoder, self.leaf)
        return next(({self.theirs: v} for v, (there, _) in self.choices.items() if there == here), {})

    @property
    def names(self) -> set[str]:
        return {self.theirs}


def tied_embeddings(absent: bool, *untied: str) -> Switch:
    """`tie_word_embeddings`; `untied` are further settings of an output matrix of its own."""
    target = "scantling.model.embed."
    return Switch(
        "tie_word_embeddings",
        "embed._target_",
        {True: (target + "Tied", ["embed=tied"]), False: (target + "Untied", ["embed=untied", *untied])},
        absent=absent,
    )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Their names of the options of `ffn=`; those of one function differ over the years."""
CLASSES = {
    ("torch.nn.SiLU", None): "silu",
    ("torch.nn.GELU", None): "gelu",
    ("torch.nn.GELU", "tanh"): "gelu_pytorch_tanh",
    ("torch.nn.ReLU", None): "relu",
    ("scantling.model.ffn.ReLU2", None): "relu2",
}
"""The same names by this project's classes, for export."""
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


class Activation(Field):
    """`hidden_act` and the option of `ffn=`."""

    def __init__(self, theirs: str, *, gated: bool, absent: str) -> None:
        self.theirs, self.absent = theirs, absent
        self.options = GATED if gated else {option: option for option in ACTIVATIONS.values()}

    def overrides(self, hf: Config) -> list[str]:
        name = read_field(hf, self.theirs, self.absent)
        option = self.options.get(ACTIVATIONS.get(name, ""))
        if option is None:
            known = [theirs for theirs, ours in ACTIVATIONS.items() if ours in self.options]
            raise ValueError(f"config.json: {self.theirs}={name} is not supported, only {', '.join(known)}")
        return [f"ffn={option}"]

    def hf_config(self, decoder: Config) -> Config:
        approximate = read_setting(decoder, "ffn.activation.approximate")
        key = (
            read_setting(decoder, "ffn.activation._target_"),
            None if approximate is MISSING else approximate,
        )
        name = CLASSES.get(key, "")
        return {self.theirs: name} if ACTIVATIONS.get(name) in self.options else {}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class GatedWidth(Field):
    """The width of a gated feed-forward; `model.d_ff` is 3/2 of it, as gated options take two thirds."""

    def __init__(self, theirs: str, ours: str = "model.d_ff", node: str = "ffn") -> None:
        self.theirs, self.ours, self.node = theirs, ours, node

    def overrides(self, hf: Config) -> list[str]:
        width = read_field(hf, self.theirs, REQUIRED)
        # With a multiple of 1 the rounding finds every width again, also the odd ones.
        multiple_of = 8 if width % 8 == 0 else 1
        return [setting(self.ours, (3 * width + 1) // 2), setting(f"{self.node}.multiple_of", multiple_of)]

    def hf_config(self, decoder: Config) -> Config:
        d_ff, multiple_of = (
            read_setting(decoder, self.ours),
            read_setting(decoder, f"{self.node}.multiple_of"),
        )
        if MISSING in (d_ff, multiple_of):
            return {self.theirs: read_setting(decoder, "d_ff")}
        return {self.theirs: gated_width(d_ff, multiple_of)}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class Times(Field):
    """A width that the family fixes as a multiple of another field."""

    def __init__(self, theirs: str, factor: int, ours: str, aliases: Sequence[str] = ()) -> None:
        self.theirs, self.factor, self.ours, self.aliases = theirs, factor, ours, aliases

    def overrides(self, hf: Config) -> list[str]:
        theirs = next((name for name in self.aliases if name in hf), self.theirs)
        return [setting(self.ours, self.factor * read_field(hf, theirs, REQUIRED))]

    def hf_config(self, decoder: Config) -> Config:
        return {}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class Equal(Field):
    """A field that must equal another where it is given: models in which it differs are not built."""

    def __init__(self, theirs: str, other: str, ours: str) -> None:
        self.theirs, self.other, self.ours = theirs, other, ours

    def overrides(self, hf: Config) -> list[str]:
        value, other = hf.get(self.theirs), read_field(hf, self.other, REQUIRED)
        if value not in (None, other):
            raise ValueError(
                f"config.json: {self.theirs}={value} is not supported, only {other}, its {self.other}"
            )
        return []

    def hf_config(self, decoder: Config) -> Config:
        return {self.theirs: read_setting(decoder, self.ours)}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class Window(Field):
    """`sliding_window`, null for full attention."""

    def __init__(self, theirs: str, *, absent: int | None) -> None:
        self.theirs, self.absent = theirs, absent

    def overrides(self, hf: Config) -> list[str]:
        window = read_field(hf, self.theirs, self.absent, nullable=True)
        if window is None:
            return ["attn/pattern=full"]
        return ["attn/pattern=sliding", setting("model.window", window)]

    def hf_config(self, decoder: Config) -> Config:
        window = read_setting(decoder, "attn.pattern.window")
        return {self.theirs: None if window is MISSING else window}

    @property
    def names(self) -> set[str]:
        return {self.theirs}


class LayerTypes(Field):
    """Windows in all layers but each `every`-th.

    `config.json` lists the layers, or gives the period alone.
    """

    period = ("sliding_window_pattern", "_sliding_window_pattern")

    def __init__(self, *, every: int, window: int, also: Sequence[str] = ()) -> None:
        self.every, self.window, self.also = every, window, also

    def overrides(self, hf: Config) -> list[str]:
        every = next((hf[key] for key in self.period if key in hf), self.every)
        n_layers = read_field(hf, "num_hidden_layers", REQUIRED)
        types = hf.get("layer_types") or self.types(n_layers, every)
        if "full_attention" in types:
            every = types.index("full_attention") + 1
        if types != self.types(n_layers, every):
            raise ValueError(
                f"config.json: layer_types={types} is not supported, only full attention every n-th layer"
            )
        return [
            "attn/pattern=local_global",
            setting("model.window", read_field(hf, "sliding_window", self.window)),
            *(setting(path, every) for path in ("attn.pattern.every", *self.also)),
        ]

    @staticmethod
    def types(n_layers: int, every: int) -> list[str]:
        """[n_layers]: full attention in every `every`-th layer, a window in the others."""
        check_whole("config.json: sliding_window_pattern", every)
        return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)]

    def hf_config(self, decoder: Config) -> Config:
        window, every = (
            read_setting(decoder, "attn.pattern.window"),
            read_setting(decoder, "attn.pattern.every"),
        )
        if MISSING in (window, every):
            return {}
        types = self.types(decoder["n_layers"], every)
        return {"sliding_window": window, "sliding_window_pattern": every, "layer_types": types}

    @property
    def names(self) -> set[str]:
        return {"sliding_window", "layer_types", *self.period}


def change_fields(fields: Sequence[Field], *changes: Field, without: Sequence[str] = ()) -> tuple[Field, ...]:
    """A family's fields with those of the same names changed, others added, and some left out."""
    replaced = set(without).union(*(change.names for change in changes))
    return (*(field for field in fields if not field.names & replaced), *changes)
