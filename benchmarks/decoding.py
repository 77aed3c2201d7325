"""How fast a model writes: `python benchmarks/decoding.py`, about a minute on two CPU cores.

A Llama of 12 M parameters (6 layers, d_model 384, 6 heads, vocabulary 4096) goes on from 16 tokens by 128,
greedily, in float32. The contestants hold the same weights and take turns in one process, so that whatever
else the machine does falls on all alike:

    ours            scantling.inference.generation.generate
    ours, by rows   the same, weights left in memory as they were trained
    ours, bf16      weights and cache in bfloat16
    HF              transformers' generate on LlamaForCausalLM, its default attention

Ratios are medians over rounds. The floor is what it takes to read every weight that a token needs once, from
memory. Beside them stands how many of each contestant's tokens are those of transformers. Then the bytes of
each kind of cache against `cached_numbers`, and with `--run DIR` the loss of a trained run through each kind.

On a busy machine `--cpu-time` counts the CPU time of a single thread: threads that wait for each other would
make wall time meaningless.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from scantling.config.decoder import build_decoder
from scantling.data.loading import validation_batches
from scantling.inference.decoding_layout import lay_out_for_decoding
from scantling.inference.generation import generate
from scantling.inference.sampling import GenerationSettings
from scantling.inference.stored_run import StoredRun
from scantling.model import hardware
from scantling.model.cache import BUFFERS
from scantling.model.decoder import Decoder

CONF = Path(__file__).resolve().parents[1] / "conf"
LAYERS, D_MODEL, HEADS, HIDDEN, VOCABULARY = 6, 384, 6, 1024, 4096
PROMPT, NEW = 16, 128


def our_model() -> Decoder:
    overrides = [
        *("model=llama_tiny", "embed=tied", f"model.n_layers={LAYERS}", f"model.d_model={D_MODEL}"),
        *(f"model.n_heads={HEADS}", f"model.d_ff={HIDDEN * 3 // 2}", f"model.vocab_size={VOCABULARY}"),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=overrides)
    decoder = build_decoder(config, VOCABULARY, "cpu")
    decoder.initialise(0)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(
                4 if p.ndim > 1 else 1
            )  # far from uniform, so that rounding does not decide which token is next
    return decoder.eval()


def hugging_face(ours: Decoder) -> transformers.LlamaForCausalLM:
    """The same weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": ours.embed.tokens.weight, "model.norm.weight": ours.norm.weight}
    for i, block in enumerate(cast(Any, ours.layers)):
        at = f"model.layers.{i}"
        for name, weight in zip("qkv", block.attn.qkv.weight.chunk(3), strict=True):
            weights[f"{at}.self_attn.{name}_proj.weight"] = weight
        weights |= {
            f"{at}.self_attn.o_proj.weight": block.attn.out.weight,
            f"{at}.mlp.gate_proj.weight": block.ffn.gate.weight,
            f"{at}.mlp.up_proj.weight": block.ffn.up.weight,
            f"{at}.mlp.down_proj.weight": block.ffn.out.weight,
            f"{at}.input_layernorm.weight": block.attn_norm.weight,
            f"{at}.post_attention_layernorm.weight": block.ffn_norm.weight,
        }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    return theirs


def written_by(decoder: Decoder, prompts_BT: Tensor) -> list[list[int]]:
    settings = GenerationSettings(n_tokens=NEW, temperature=0.0, top_k=None, top_p=None)
    prompts, texts = prompts_BT.tolist(), [[] for _ in prompts_BT]
    for step in generate(decoder, prompts, settings=settings, generator=torch.Generator()):
        for row, token in step:
            texts[row].append(token)
    return texts


def written_by_transformers(model: transformers.LlamaForCausalLM, prompts_BT: Tensor) -> list[list[int]]:
    mask = torch.ones_like(prompts_BT)
    texts = cast(Any, model).generate(
        prompts_BT, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
    )
    return texts[:, PROMPT:].tolist()


def seconds_by_round(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Each round gives every contestant one turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, turn in contestants.items():
            start = clock()
            turn()
            seconds[name].append(clock() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def memory_bandwidth() -> float:
    """Bytes per second, of a sum over far more than the caches hold; the best of ten."""
    numbers = torch.ones(2**26)
    taken = []
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - start)
    return numbers.nbytes / min(taken)


def cache_table(ours: Decoder) -> Table:
    """Measured bytes against those of the numbers that each layer says it keeps, and of the scales of
    quantised ones."""
    table = Table(title=f"\ncache of {PROMPT + NEW} tokens, bytes a sequence", box=None)
    for heading in ("precision", "measured", "said", "measured/said", "of full precision"):
        table.add_column(heading, justify="right")
    numbers = sum(block.attn.cached_numbers(PROMPT + NEW) for block in ours.layers)
    for precision in BUFFERS:
        cache = ours.new_cache(PROMPT + NEW, precision)
        with torch.inference_mode():
            ours(torch.zeros(1, PROMPT + NEW, dtype=torch.long), cache)
        # A byte a number, and a scale in float32 for each key and each value of a head.
        said = numbers * 4 if precision == "full" else numbers + 4 * numbers // (D_MODEL // HEADS)
        ratios = (f"{cache.nbytes / said:.4f}", f"{cache.nbytes / (4 * numbers):.3f}")
        table.add_row(precision, f"{cache.nbytes:,}", f"{said:,}", *ratios)
    return table


@torch.inference_mode()
def loss_table(path: str, cached: Path, n_windows: int) -> Table:
    """Of a trained run, every key and value read back from the cache."""
    run = StoredRun.load(path, "best")
    windows = validation_batches(
        run.corpus(None, cached).val.tokens, run.decoder.seq_len, n_windows=n_windows, batch_size=8
    )
    table = Table(title=f"\nloss of {run.directory.name} through the cache", box=None)
    for heading in ("precision", "nats/token", "more than full"):
        table.add_column(heading, justify="right")
    full = 0.0
    for precision in BUFFERS:
        nats, n_tokens = 0.0, 0
        for batch in windows:
            logits_BTV = run.decoder(batch["inputs"], run.decoder.new_cache(run.decoder.seq_len, precision))
            nats += float(
                cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
            )
            n_tokens += batch["targets"].numel()
        loss = nats / n_tokens
        full = full or loss
        table.add_row(precision, f"{loss:.5f}", f"{loss / full - 1:+.4%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: CPU time of a single thread"
    )
    parser.add_argument("--run", help="directory of a trained run, for its loss through each kind of cache")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/scantling"), help="of tokens, with --run"
    )
    arguments = parser.parse_args()
    if arguments.cpu_time:
        arguments.threads = 1
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    hardware.keep_freed_memory()
    transformers.logging.set_verbosity_error()
    console = Console(highlight=False, width=120)
    plain = our_model()
    theirs = hugging_face(plain)
    read = sum(p.nbytes for p in plain.parameters())  # a tied table is read whole by the head
    bandwidth = memory_bandwidth()
    console.print(f"device         {hardware.describe(torch.device('cpu'))}, {arguments.threads} threads")
    clocked = "CPU time" if arguments.cpu_time else "wall time"
    console.print(f"torch          {torch.__version__}, transformers {transformers.__version__}, {clocked}")
    console.print(
        f"floor          {read / 1e6:.1f} MB of weights at {bandwidth / 1e9:.1f} GB/s: "
        f"{1e3 * read / bandwidth:.2f} ms a token"
    )
    table = Table(title=f"{PROMPT} tokens in, {NEW} out", box=None)
    for heading in (
        "batch",
        "contestant",
        "tokens/s",
        "ms a step",
        "times HF",
        "rounds' range",
        "same tokens",
    ):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for batch in arguments.batches:
        prompts = torch.randint(VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        ours = lay_out_for_decoding(our_model(), batch)
        low = lay_out_for_decoding(our_model().bfloat16(), batch)
        contestants = {
            "ours": lambda m=ours, p=prompts: written_by(m, p),
            "ours, by rows": lambda p=prompts: written_by(plain, p),
            "ours, bf16": lambda m=low, p=prompts: written_by(m, p),
            "HF": lambda p=prompts: written_by_transformers(theirs, p),
        }
        expected = written_by_transformers(theirs, prompts)
        seconds = seconds_by_round(contestants, arguments.rounds, clock)
        for name, turn in contestants.items():
            ratios = [hf / own for hf, own in zip(seconds["HF"], seconds[name], strict=True)]
            equal = sum(
                a == b for x, y in zip(turn(), expected, strict=True) for a, b in zip(x, y, strict=True)
            )
            median = statistics.median(seconds[name])
            table.add_row(
                str(batch),
                name,
                f"{batch * NEW / median:,.0f}",
                f"{1e3 * median / NEW:.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{equal / (batch * NEW):.1%}",
            )
    if arguments.batches:
        console.print(table)
    console.print(cache_table(plain))
    if arguments.run:
        console.print(loss_table(arguments.run, arguments.cache, n_windows=64))


if __name__ == "__main__":
    main()
