"""Configurations and models that tests share."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import runpy
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from parsed_once import parse_once

from scantling.config.composition import compose_config, resolved_config
from scantling.data.tokenizers import Byte
from scantling.model import processors
from scantling.model.decoder import Decoder
from scantling.runs.directory import RunDirectory

torch.set_num_threads(1)
"""These tensors are small: a second thread costs more than it brings, and on a busy machine 30 times more."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # as a shell's background command has it, and its children


def pytest_addoption(parser):
    parser.addoption(
        "--processor",
        choices=processors.PROCESSORS,
        help="take the kernels of this processor, whatever the machine",
    )


def pytest_configure(config):
    parse_once()
    if (forced := config.getoption("processor")) is not None:
        os.environ[warm.PROCESSOR] = forced  # for processes that tests start
        warm.take_processor()


def pytest_collection_finish():
    """The collector of garbage, a sixth of the time, looks through less, and less often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(params=processors.PROCESSORS)
def processor(request, monkeypatch) -> processors.Processor:
    """Each processor in turn, in the place of this machine's."""
    monkeypatch.setattr(processors, "HERE", request.param)
    return request.param


ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(inspect.getsource(argparse))
    return path


@pytest.fixture
def entry(monkeypatch, capsys):
    """`entry("plan", "model=nano")` runs `src/plan.py` in this process -> (exit code, output, errors)."""

    def entry(name, *overrides):
        monkeypatch.setattr(sys, "argv", [name, *overrides])
        code = 0
        try:
            runpy.run_path(str(ROOT / "src" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return entry


@pytest.fixture
def command(tmp_path, book, monkeypatch, entry):
    """`command("lr=1e-3")` is `entry("train", …)` with the settings of a small run. The machine's speed is
    not measured, and no figure is drawn.
    """
    from scantling.model import hardware
    from scantling.training import record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "peak_flops", warm.assumed_peak)
    monkeypatch.setattr(record, "draw_curves", lambda *_, **__: None)
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    small = (
        *("model=nano", "data=text", f"data.files={book}", "tokenizer=byte", "logger=none", "log_every=1"),
        *("budget=steps", "budget.steps=12", "trainer=cpu", "trainer.precision=fp32"),
        *("batch_size=4", "val_windows=8", "val_every=5", "sample.n_tokens=8", "paths.cache=cache"),
    )

    def call(*overrides):
        given = {override.partition("=")[0] for override in overrides}
        kept = [o for o in small if o.partition("=")[0] not in given]
        return entry("train", *kept, *overrides)

    yield call
    for which, handler in signals.items():
        signal.signal(which, handler)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    from shop import Shop

    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def alone(shop):
    """20 steps of one process, which several processes repeat."""
    return shop.run("trainer=cpu", runs="alone")


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """`composed("model=nano", "attn=gqa")` is what `train.py model=nano attn=gqa` runs with."""

    @cache
    def composed(*overrides: str) -> DictConfig:
        return compose_config("train", overrides)

    return composed


@pytest.fixture(scope="session")
def nano(composed) -> Callable[..., Decoder]:
    """`nano("attn=gqa", seed=1)` is the `nano` preset with these overrides, initialised.

    `gain` multiplies its matrices: at the standard deviation of 0.02 that they start with, attention is
    nearly uniform and logits nearly zero, so that a comparison would miss most mistakes.
    """

    @cache
    def factory(*overrides: str) -> Callable[[], Decoder]:
        config = composed("model=nano", *overrides)
        return instantiate(config.decoder, vocab_size=config.model.vocab_size, _partial_=True)

    def nano(*overrides: str, seed: int = 0, gain: float = 1.0) -> Decoder:
        decoder = factory(*overrides)()
        decoder.initialise(seed)
        with torch.no_grad():
            for p in decoder.parameters():
                if p.ndim >= 2:
                    p.mul_(gain)
        return decoder

    return nano


@pytest.fixture(scope="session")
def gpt2_pair(nano) -> Callable[[], tuple[Decoder, torch.nn.Module]]:
    """The nano Decoder with GPT-2's parts, and `transformers`' GPT-2 whose random weights it holds."""

    def gpt2_pair():
        from transformers import GPT2Config, GPT2LMHeadModel

        ours = nano(*GPT, "block=pre")
        theirs = randomised(
            GPT2LMHeadModel,
            GPT2Config(
                vocab_size=512,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            ),
        )
        body = theirs.transformer
        weights = {"embed.tokens.weight": body.wte.weight, "pos.weight": body.wpe.weight}
        for i, theirs_block in enumerate(body.h):
            weights |= conv_block(f"blocks.{i}", theirs_block)
        weights |= named("norm", body.ln_f)
        ours.load_state_dict(weights)
        return ours.eval(), theirs

    return gpt2_pair


@pytest.fixture(scope="session")
def gpt1_pair(nano) -> Callable[[], tuple[Decoder, torch.nn.Module]]:
    """As `gpt2_pair`, with GPT-1: norms behind the residual sums, none before the head."""

    def gpt1_pair():
        from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

        ours = nano(*GPT, "block=post")
        theirs = randomised(
            OpenAIGPTLMHeadModel,
            OpenAIGPTConfig(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4),
        )
        body = theirs.transformer
        weights = {
            "embed.tokens.weight": body.tokens_embed.weight,
            "pos.weight": body.positions_embed.weight,
        }
        for i, theirs_block in enumerate(body.h):
            weights |= conv_block(f"blocks.{i}", theirs_block)
        ours.load_state_dict(weights)
        return ours.eval(), theirs

    return gpt1_pair


@pytest.fixture(scope="session")
def llama_pair(nano) -> Callable[..., tuple[Decoder, torch.nn.Module]]:
    """As `gpt2_pair`, with Llama; `attn` and `embed` are options of ours."""

    def llama_pair(*, attn: str, embed: str):
        from transformers import LlamaConfig, LlamaForCausalLM

        ours = nano(f"attn={attn}", f"embed={embed}", "norm=rmsnorm", "pos=rope", "ffn=swiglu", "block=pre")
        theirs = randomised(
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=512,
                hidden_size=32,
                intermediate_size=88,  # 2/3 of 128 in multiples of 8
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads={"mha": 4, "gqa": 2, "mqa": 1}[attn],
                max_position_embeddings=64,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                tie_word_embeddings=embed == "tied",
                bos_token_id=0,
                eos_token_id=0,
            ),
        )
        weights = {"embed.tokens.weight": theirs.model.embed_tokens.weight}
        if embed == "untied":
            weights["embed.head.weight"] = theirs.lm_head.weight
        for i, layer in enumerate(theirs.model.layers):
            a, f = layer.self_attn, layer.mlp
            qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
            weights |= {
                f"blocks.{i}.attn.qkv.weight": qkv,
                f"blocks.{i}.attn.out.weight": a.o_proj.weight,
                f"blocks.{i}.ffn.gate.weight": f.gate_proj.weight,
                f"blocks.{i}.ffn.up.weight": f.up_proj.weight,
                f"blocks.{i}.ffn.out.weight": f.down_proj.weight,
                f"blocks.{i}.attn_norm.weight": layer.input_layernorm.weight,
                f"blocks.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
            }
        weights["norm.weight"] = theirs.model.norm.weight
        ours.load_state_dict(weights)
        return ours.eval(), theirs

    return llama_pair


@pytest.fixture
def checkpointed(nano, composed, book, tmp_path) -> Callable[..., tuple[RunDirectory, list[Decoder]]]:
    """`checkpointed(directory, "attn=gqa", steps=(5, 10))` leaves in it configuration, tokenizer and
    checkpoints of the nano model, each of other weights -> the run, its decoder after each step.
    """

    def checkpointed(directory, *overrides, steps=(5, 10), kind=None):
        codec = (kind or Byte()).train(iter([book.read_text()]))
        sized = (f"model.vocab_size={codec.vocab_size}", *overrides)
        paths = (f"data.files={book}", f"paths.cache={tmp_path / 'cache'}")
        config = composed("model=nano", "data=text", *paths, *sized)
        run = RunDirectory(directory)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        record = OmegaConf.to_yaml(resolved_config(config) | {"choices": {"attn": "mha"}})
        run.config.write_text(record)
        codec.save(run.tokenizer)
        decoders = [nano(*sized, gain=8, seed=seed).eval() for seed in range(len(steps))]
        for step, decoder in zip(steps, decoders, strict=True):
            weights = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
            torch.save({"state_dict": weights, "global_step": step}, run.checkpoint(step))
        run.last.hardlink_to(run.checkpoint(steps[-1]))
        return run, decoders

    return checkpointed


GPT = ("norm=layernorm", "pos=learned", "attn=mha", "ffn=gelu_tanh", "embed=tied", "model.bias=true")
"""What GPT-1 and GPT-2 share."""


def randomised(kind, config) -> Any:
    """A model of `transformers` with eager attention whose every parameter is random, biases and norms
    too."""
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():  # its own initialisation draws from the global generator
        torch.manual_seed(0)
        model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0, 0.15, generator=generator))
    return model


def named(prefix: str, module: Any, transpose: bool = False) -> dict[str, torch.Tensor]:
    """Weight and bias under our names; GPT's Conv1D keeps the transpose of a Linear's weight."""
    weight = module.weight.T if transpose else module.weight
    return {f"{prefix}.weight": weight, f"{prefix}.bias": module.bias}


def conv_block(prefix: str, theirs: Any) -> dict[str, torch.Tensor]:
    """One block of GPT-1 or GPT-2 under our names."""
    biases = theirs.attn.c_attn.bias.chunk(3)
    return {
        f"{prefix}.attn.qkv.weight": theirs.attn.c_attn.weight.T,
        **{f"{prefix}.attn.{part}_bias": bias for part, bias in zip("qkv", biases, strict=True)},
        **named(f"{prefix}.attn.out", theirs.attn.c_proj, transpose=True),
        **named(f"{prefix}.ffn.up", theirs.mlp.c_fc, transpose=True),
        **named(f"{prefix}.ffn.out", theirs.mlp.c_proj, transpose=True),
        **named(f"{prefix}.attn_norm", theirs.ln_1),
        **named(f"{prefix}.ffn_norm", theirs.ln_2),
    }
