# ruff: noqa: F401
"""What commands import sooner or later, imported: with this the server of `warm` begins."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # with PyTorch's compiler, in every engine's first seconds
from parsed_once import parse_once

import scantling.cli.train
import scantling.hub.runs
import scantling.inference.stored_run
import scantling.sweep.outlook
from scantling.config.composition import compose_config

parse_once()
compose_config("train", ["data=text", "tokenizer=byte", "budget=steps", "trainer=cpu", "logger=none"])

gc.set_threshold(50_000, 20, 50)
gc.freeze()  # a process that is forked does not look through all this, so that its memory stays shared
