"""Runs out of Hugging Face directories, such directories out of runs, and a run's weights as one file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from scantling import __version__
from scantling.config.composition import compose_config, resolved_config
from scantling.config.decoder import without_hydra_checks
from scantling.config.differences import different_leaves, leaves
from scantling.config.suggestions import nearest
from scantling.data.tokenizers import Tokenizer
from scantling.hub.family import Family, all_families
from scantling.hub.fields import Config, fill_nulls
from scantling.hub.files import TensorFiles, export_tensors, import_tensors, read_json, write_tensors
from scantling.hub.weights import rules_of, shapes_of
from scantling.inference.safe_loading import read_weights
from scantling.inference.stored_run import StoredRun
from scantling.model.decoder import Decoder
from scantling.runs.directory import RunDirectory

PADDING = 0.05
"""Share by which a model may have more rows than its tokenizer has entries.

Tables are padded to round sizes.
"""

IN_TRAINING = ("dropout", "drop_path", "load_balance", "z", "speed")
"""Settings that do not change what a trained model computes, and that few families can write down."""

IN_SHAPES = ("d_ff", "d_ff_dense", "multiple_of")
"""Settings that show in the shapes of tensors and nowhere else: more than one may give the same."""


def import_run(config: DictConfig) -> str:
    """Write a run directory; raises ValueError, with nothing written, for what does not fit."""
    source = Path(config.source).expanduser()
    target = Path(config.run or Path(config.paths.runs) / "imported" / source.resolve().name)
    check_target(target, "run")
    hf = read_json(source / "config.json")
    family = find_family(hf.get("model_type"), f"{source / 'config.json'}: model_type")
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    kept = str(target.resolve() / "tokenizer.json").replace("'", "\\'")
    overrides = [*train_overrides(family, hf), "tokenizer=pretrained", f"tokenizer.source='{kept}'"]
    run = compose_run(tuple(overrides))
    decoder = build_on_meta(run["decoder"])
    check_vocabulary(tokenizer, run["decoder"]["vocab_size"], source)
    state = import_tensors(family, decoder, TensorFiles(source))
    environment = {
        "scantling": __version__,
        "overrides": overrides,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "imported": {"source": str(source.resolve()), "family": family.model_type},
        "corpus": {"fingerprint": f"that of {source.resolve()}", "description": "unknown: an imported model"},
        "tokenizer": tokenizer.fingerprint,
    }
    with new_directory(target) as partial:
        directory = RunDirectory(partial)
        directory.begin(OmegaConf.to_yaml(OmegaConf.create(run)), environment)
        tokenizer.save(directory.tokenizer)
        weights = {f"decoder.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": weights, "global_step": 0}, directory.best)
    n = sum(tensor.numel() for tensor in state.values())
    return (
        f"{family.model_type}, {n:,} parameters: {target}\n"
        f"text       python src/sample.py run={target}\n"
        f"evaluate   python src/evaluate.py run={target}"
    )


def export_run(config: DictConfig) -> str:
    """Write a directory for `AutoModelForCausalLM` and `AutoTokenizer`.

    Raises ValueError, with nothing written, where the family cannot express the run.
    """
    target = Path(config.to).expanduser()
    check_target(target, "to")
    family = find_family(config.family, "family")
    run = StoredRun.load(config.run, config.checkpoint)
    state = read_weights(run.directory, config.checkpoint)
    decoder: Config = OmegaConf.to_container(run.config.decoder, resolve=True)  # type: ignore[assignment]
    decoder["vocab_size"] = len(state["embed.tokens.weight"])
    hf = express_decoder(family, decoder)
    theirs = export_tensors(rules_of(family.tensors, run.decoder), state)
    end_of_text = run.tokenizer.end_of_text
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    dtype = str(state["embed.tokens.weight"].dtype).removeprefix("torch.")
    with new_directory(target) as partial:
        partial.mkdir(parents=True)
        write_json(partial / "config.json", {**hf, **ids, "pad_token_id": None, "dtype": dtype})
        write_json(partial / "generation_config.json", ids)
        write_tensors(theirs, partial / "model.safetensors")
        run.tokenizer.save(partial / "tokenizer.json")
        write_json(partial / "tokenizer_config.json", tokenizer_config(run.tokenizer, decoder["seq_len"]))
    return f'{family.model_type}: {target}\nAutoModelForCausalLM.from_pretrained("{target}")'


def write_weights(config: DictConfig) -> str:
    """Write one safetensors file with the decoder's tensors under their own names."""
    target = Path(config.to).expanduser()
    check_target(target, "to")
    state = read_weights(RunDirectory(config.run), config.checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    write_tensors({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    os.replace(partial, target)
    return f"{len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} numbers: {target}"


# --- families ---


def find_family(model_type: Any, asked_by: str) -> Family:
    """The family of this `model_type`.

    Raises ValueError for an unknown one, with the key that asked for it and the nearest family.
    """
    families = all_families()
    if model_type not in families:
        near = nearest(str(model_type), list(families)) or f": known are {', '.join(families)}"
        raise ValueError(f"{asked_by}={model_type} is unknown{near}")
    return families[model_type]


def train_overrides(family: Family, hf: Config) -> list[str]:
    """The command line of a run with this model."""
    return ["model=llama_tiny", *family.overrides(hf)]


@cache
def compose_run(overrides: tuple[str, ...]) -> Config:
    """The resolved configuration of `train.py` with these overrides, and which option each group took."""
    return resolved_config(compose_config("train", overrides))


def build_on_meta(decoder: Config) -> Decoder:
    """The decoder of this configuration, its tensors without memory."""
    factory = without_hydra_checks(instantiate(decoder, _partial_=True))
    with torch.device("meta"):
        return factory()


def express_decoder(family: Family, decoder: Config) -> Config:
    """The family's `config.json` for this decoder.

    It is composed once more, and must give the same decoder: this finds whatever a family cannot write down,
    for parts that it never heard of too. Raises ValueError with what came out otherwise.
    """
    hf = family.hf_config(fill_nulls(decoder))
    try:
        again = compose_run(tuple(train_overrides(family, hf)))["decoder"]
        lost = settings_lost(decoder, again)
    except ValueError as error:
        raise ValueError(f"family {family.model_type} cannot express this run: {error}") from error
    if lost:
        raise ValueError(f"family {family.model_type} cannot express {', '.join(lost)}")
    ours, theirs = build_on_meta(decoder), build_on_meta(again)
    shapes = shapes_of(theirs)
    for name, shape in shapes_of(ours).items():
        if shapes.get(name) != shape:
            raise ValueError(
                f"family {family.model_type} cannot express {name} of shape {list(shape)}: "
                f"with these settings it has {list(shapes[name]) if name in shapes else 'none'}"
            )
    try:
        rules_of(family.tensors, ours)
    except ValueError as error:
        raise ValueError(f"family {family.model_type} cannot express this run: {error}") from error
    return hf


def settings_lost(decoder: Config, again: Config) -> list[str]:
    """`setting=value` where the second differs; for a part of another class only the class."""
    ours, theirs = fill_nulls(decoder), fill_nulls(again)
    different = {
        key: here
        for key, here, there in different_leaves(ours, theirs)
        if shows_in_outputs(key) and not is_same_number(here, there)
    }
    own = leaves(ours)
    wrong = [key for key in own if key in different] or [*different]
    classes = [key.removesuffix("_target_") for key in wrong if key.endswith("_target_")]
    return [
        f"{key}={own.get(key, '(nothing)')}"
        for key in wrong
        if key.endswith("_target_") or not any(key.startswith(part) for part in classes)
    ]


def shows_in_outputs(key: str) -> bool:
    """Whether a setting changes what a trained model computes."""
    return key.rpartition(".")[2] not in (*IN_TRAINING, *IN_SHAPES)


def is_same_number(a: Any, b: Any) -> bool:
    """Whether two values are numbers that differ by rounding at most."""
    return isinstance(a, float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-9)


# --- files ---


def check_vocabulary(tokenizer: Tokenizer, rows: int, source: Path) -> None:
    """Raise ValueError where the tokenizer has more entries than the model has rows, or far fewer."""
    n = tokenizer.vocab_size
    if not (1 - PADDING) * rows <= n <= rows:
        raise ValueError(
            f"{source / 'tokenizer.json'} has {n} entries, but by config.json the model has {rows} "
            "(vocab_size): they do not belong together"
        )


def check_target(target: Path, setting: str) -> None:
    """Raise ValueError where something is there: it is not overwritten. `setting` names another place."""
    if target.exists():
        raise ValueError(
            f"{target} exists already and is not overwritten: choose another place with {setting}=DIR"
        )


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` that becomes it in the end; after an error nothing is left of it."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def tokenizer_config(tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """What `AutoTokenizer` needs beside `tokenizer.json` to give the same ids and the same text."""
    name = tokenizer.end_of_text_name
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells a special token is ordinary text
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n")
