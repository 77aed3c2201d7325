"""What sample.py does: text that continues prompts, by a run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from scantling.config.mistakes import mistakes
from scantling.inference.continuation import continue_prompts
from scantling.inference.decoding_layout import lay_out_for_decoding
from scantling.inference.sampling import GenerationSettings
from scantling.inference.stored_run import StoredRun, find_run


def sample(config: DictConfig) -> None:
    """Print each prompt and its continuation.

    The first text that is not done is printed as it comes, others when they are done.
    """
    with mistakes():
        settings = GenerationSettings(
            **{name: config[name] for name in SAMPLING},
            stop=tuple(unescape(stop) for stop in one_or_more(config.stop, config.stops, "stop")),
            precision=config.cache,
        )
        prompts = one_or_more(config.prompt, read_prompts(config.prompts), "prompt") or [""]
        run = StoredRun.load(find_run(config.run, config), config.checkpoint)
        draft = None
        if config.draft is not None:
            draft = StoredRun.load(find_run(config.draft, config), config.draft_checkpoint)
        if draft is not None and draft.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(
                f"draft={config.draft} has another tokenizer than {config.run}: use a run that shares it"
            )
        for each in (run, draft):
            if each is not None:
                lay_out_for_decoding(each.decoder, rows=len(prompts) * settings.beams)
        pieces = continue_prompts(
            run.decoder,
            run.tokenizer,
            prompts,
            settings=settings,
            seed=config.seed,
            draft=None if draft is None else draft.decoder,
        )
    print_texts(prompts, pieces)


SAMPLING = (
    *("n_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "context"),
    *("beams", "length_penalty", "draft_tokens"),
)
"""Settings of conf/sample.yaml that go to generation as they are."""


def one_or_more(one: str | None, several: list[str] | None, name: str) -> list[str]:
    """`one` and `several` as a list. Raises ValueError where both are set."""
    if one and several is not None:
        raise ValueError(f"{name} and {name}s are both set: put all into {name}s")
    return several if several is not None else [one] if one else []


def read_prompts(prompts: ListConfig | str | None) -> list[str] | None:
    """The prompts of a list, or the lines of a file."""
    if prompts is None:
        return None
    found = list(prompts) if isinstance(prompts, ListConfig) else Path(prompts).read_text().splitlines()
    if not found:
        raise ValueError(f"prompts={prompts} holds none: give a list, or a file with a prompt on each line")
    return [str(prompt) for prompt in found]


def unescape(text: str) -> str:
    r"""Line breaks and tabs may be typed as \n and \t."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def print_texts(prompts: list[str], pieces: Iterator[tuple[int, str | None]]) -> None:
    """Print texts one below the other: what comes of a later one waits until those before it are done."""
    waiting, done, shown = list(prompts), set(), 0
    print(waiting[0], end="", flush=True)
    for row, piece in pieces:
        if piece is None:
            done.add(row)
        elif row == shown:
            print(piece, end="", flush=True)
        else:
            waiting[row] += piece
        while shown in done and shown + 1 < len(prompts):
            shown += 1
            print(f"\n\n{waiting[shown]}", end="", flush=True)
    print()
