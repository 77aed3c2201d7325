"""What plan.py prints, against the counts it prints, and docs/parts.md against what writes it."""

import copy
import re
from functools import partial

import pytest
from hydra._internal import target_policy
from hydra.utils import instantiate
from torch.utils._python_dispatch import TorchDispatchMode

from scantling.cli import parts_table, plan
from scantling.cli.plan_tables import first_sentence
from scantling.config.composition import compose_config
from scantling.config.decoder import build_decoder
from scantling.model.accounting import CONVENTIONS, cache_bytes, parameter_counts
from scantling.report import terminal
from scantling.report.numbers import duration, short
from scantling.report.terminal import bar
from scantling.training.memory import ENGINES, DecoderSizes, training_memory


@pytest.fixture
def command(monkeypatch, entry, tmp_path):
    """`command("model=nano")` is `plan.py model=nano`."""
    monkeypatch.chdir(tmp_path)
    return partial(entry, "plan")


def row(output: str, name: str) -> list[str]:
    """The columns of the one row that begins so."""
    (found,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return re.split(r"\s{2,}", found.strip())[1:]


def test_a_plan_leaves_its_configuration_as_it_is():
    """Also where the tokenizer has other entries than the preset."""
    config = compose_config("plan", ["model=nano", "tokenizer=byte"])
    before = copy.deepcopy(config)
    plan.plan(config)
    assert config == before
    assert config.model.vocab_size == 512 != 257


def test_every_table_holds_what_accounting_counts(command, composed):
    code, out, err = command("model=llama3_8b", "attn=gqa", "context=4096", "cache.precisions=[bf16,fp8]")
    assert (code, err) == (0, "")
    config = composed("model=llama3_8b", "attn=gqa")
    decoder = build_decoder(config, config.model.vocab_size, "meta")
    counts = parameter_counts(decoder)
    assert row(out, "total")[0] == f"{sum(counts.values()):,}" == "8,030,261,248"
    assert row(out, "feed-forward")[0] == f"{counts['feed-forward']:,}"
    assert row(out, "without embeddings and head")[0] == "6,979,588,096"
    for name, convention in CONVENTIONS.items():
        assert row(out, name)[0] == short(convention(decoder, 4096)), name
    for precision in ("bf16", "fp8"):
        sizes = [
            cache_bytes(decoder, context=n, batch=1, precision=precision) for n in (1, 4096, 8192, 100_000)
        ]
        assert row(out, precision) == [short(size, "B") for size in sizes]
    sizes = DecoderSizes.of(decoder, instantiate(config.optim, _convert_="all"))
    for name, engine in ENGINES.items():
        kept, twice = (
            training_memory(
                sizes,
                sequences=64,
                seq_len=8192,
                half_precision=True,
                checkpoint_activations=checkpointed,
                engine=engine,
                devices=8,
                accumulates=False,
                averages=False,
                on_gpu=True,
            )
            for checkpointed in (False, True)
        )
        shown = re.findall(
            r"[\d.]+ [kMGT]?B", next(line for line in out.splitlines() if line.startswith(f"{name} "))
        )
        assert shown[0] == short(kept.weights, "B")
        peaks = (
            [short(kept.total, "B"), short(twice.total, "B")]
            if engine.recomputes
            else [short(kept.total, "B")]
        )
        assert shown[-len(peaks) :] == peaks


def test_the_cheapest_engine_that_fits(command):
    """Llama 3 8B takes 128 GB of float32 states a device undivided. ZeRO 2 over eight leaves 32 of weights,
    16 of all else and 16 of copies in half precision; with logits in chunks there is room for checkpointed
    activations.
    """
    _, out, _ = command("model=llama3_8b", "memory=80GB", "devices=8")
    line = out.splitlines()[-1]
    assert line.startswith("The cheapest that fits into 80.0 GB: trainer=zero2 trainer.devices=8 ")
    size = re.search(r"at ([\d.]+) GB", line)
    assert size is not None
    assert float(size[1]) <= 80
    _, out, _ = command("model=nano", "memory=1GB", "devices=2")
    assert "trainer=ddp trainer.devices=2 micro_batch_size=" in out.splitlines()[-1]
    _, out, _ = command("model=nano", "memory=1kB")
    assert out.splitlines()[-1].startswith("Nothing fits into 1.00 kB")


def test_shares_add_up(command):
    _, out, _ = command("model=mixtral_8x7b", "context=1000")
    lines = re.findall(r"([\d.]+)%   [█▏▎▍▌▋▊▉ ]", out.partition("Conventions")[0])
    assert len(lines) == 5  # two of attention, router, feed-forward, head
    assert sum(map(float, lines)) == pytest.approx(100, abs=0.3)
    assert row(out, "total")[:2] == ["46,702,792,704", "12,879,925,248"]


@pytest.mark.parametrize(
    ("overrides", "entries"),
    [
        (("tokenizer=byte",), 257),
        (("tokenizer=bpe",), 512),
        (("tokenizer.vocab_size=1000",), 1000),
        (("tokenizer=char",), None),
        (("tokenizer=pretrained",), None),
    ],
)
def test_the_vocabulary_is_the_tokenizers(command, composed, overrides, entries):
    """nano with 257 entries: 257 · 32 in the table, beside 25,248."""
    _, out, _ = command("model=nano", *overrides)
    assert row(out, "total")[0] == f"{25_248 + 32 * (entries or 512):,}"
    assert f"{entries or 512:,} entries" in out
    assert ("are taken to be model.vocab_size=512" in out) == (entries is None)


def test_time_of_a_budget(command):
    """By hand: 1e20 FLOPs at half of 4 × 1e15 FLOP/s take 50,000 s."""
    _, out, _ = command(
        "model=gpt2_small", "budget=flops", "budget.flops=1e20", "devices=4", "peak=1e15", "mfu=0.5"
    )
    assert row(out, "budget=flops")[1:3] == ["1.00e+20", "13.9 hours"]
    assert "20 tokens a parameter" in out


def test_a_budget_of_steps_counts_the_batch(command):
    _, out, _ = command("model=gpt2_small", "budget=steps", "budget.steps=100", "batch_size=10")
    assert row(out, "budget=steps")[0] == short(100 * 10 * 1024)


class Fills(TorchDispatchMode):
    """Names what fills a tensor in place while it is on, as initialisation does."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("uniform_", "normal_", "fill_", "zero_"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_giant_is_planned_unfilled_and_leaves_nothing_behind(command, monkeypatch, tmp_path):
    """No weight takes a value, and Hydra checks far fewer calls than there are experts, which are 768."""
    checks = []
    check = target_policy._authorize_target_invocation

    def counted(*args, **kwargs):
        checks.append(args)
        return check(*args, **kwargs)

    monkeypatch.setattr(target_policy, "_authorize_target_invocation", counted)
    with Fills() as fills:
        code, out, _ = command("model=deepseek_v3", "model.n_layers=6")
    assert code == 0
    assert not fills.seen
    assert len(checks) < 100
    layer = 187_107_328 + 256 * 7168 + 257 * 3 * 7168 * 2048 + 2 * 7168  # attention, router, experts, norms
    assert row(out, "total")[0] == f"{671_026_404_352 - 55 * layer:,}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [100, 120])
def test_lines_keep_to_the_terminal(command, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(terminal, "PRINTED_WIDTH", width)
    _, out, _ = command("model=deepseek_v3", "model.n_layers=4")
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=llama3_8bb"], "model=llama3_8bb is unknown: did you mean llama3_8b"),
        (["contxt=5"], "contxt is not a setting: did you mean context"),
        (["model=nano", "model.n_heads=5"], "n_heads=5 does not divide d_model=32"),
        (["model=nano", "context=0"], "context=0 must be a whole number, at least 1"),
        (["model=nano", "micro_batch_size=0"], "micro_batch_size=0 must be a whole number, at least 1"),
        (["model=nano", "cache.contexts=[8,-1]"], r"cache.contexts[1]=-1 must be a whole number, at least 1"),
        (
            ["model=nano", "cache.precisions=[int4]"],
            "a cache in int4 is unknown: use one of fp32, bf16, int8, fp8",
        ),
        (
            ["model=nano", "budget=flops", "budget.convention=7n"],
            "budget.convention=7n is unknown: use one of exact",
        ),
        (["model=nano", "memory=lots"], "memory=lots is no size: write 80GB or 500MB"),
        (["model=nano", "mfu=2"], "mfu=2 must be from 0 to 1"),
        (["model=nano", "peak=fast"], "peak=fast is not a number; its default is"),
    ],
)
def test_a_mistake_is_one_line(command, overrides, said):
    code, out, err = command(*overrides)
    assert code == 2
    assert err.count("\n") == 1
    assert said in err
    assert not out


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9999, "10.0 kB"),
        (99_960, "100 kB"),
        (2.345e9, "2.35 GB"),
    ],
)
def test_three_digits(number, said):
    assert short(number, "B") == said


def test_durations_and_bars():
    assert [duration(s) for s in (59, 61, 7200, 2 * 86400, 3.2e7)] == [
        *("59.0 seconds", "1.0 minutes", "2.0 hours", "2.0 days", "1.0 years"),
    ]
    assert [len(re.sub(r"\[/?cyan\]", "", bar(share))) for share in (0, 1 / 128, 0.5, 1)] == [0, 1, 8, 16]


def test_the_formula_of_a_docstring_ends_before_the_paper():
    def documented(text):
        return type("Part", (), {"__doc__": text})

    for text, formula in {
        "y = x². Ba et al. 2016, arXiv:1": "y = x²",
        "The last\n    one, of `n`. arXiv:1607": "The last one, of `n`",
        "a; b with c.\n\n    More. Of it.": "a; b with c",
    }.items():
        assert first_sentence(documented(text)) == formula


# --- docs/parts.md ---


@pytest.mark.slow
def test_the_page_of_parts_is_up_to_date():
    assert parts_table.PAGE.read_text() == parts_table.page(), "run: make docs"


def test_every_option_says_what_it_is():
    """In the first line of its yaml: some words, and for most a paper or a model."""
    for group in parts_table.groups():
        for path in (parts_table.CONF / group).glob("*.yaml"):
            first = path.read_text().splitlines()[0]
            assert re.match(r"# [A-Z]\w* ?\w", first), path
            assert len(first) <= 130, path


def test_costs_on_the_page(composed):
    """llama_125m by hand: grouped queries spare 2 × 12 layers × 768 × (768 - 256) weights of 134 M."""
    page = parts_table.PAGE.read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| `gqa` ")]
    spared = 2 * 12 * 768 * 512 / 134_105_856
    assert f"| −{100 * spared:.1f} % |" in line
    assert "−67 %" in line  # of the cache: 4 heads of 12


@pytest.mark.parametrize(
    ("cost", "reference", "said"),
    [(5, 5, "="), (200, 100, "×2.00"), (110, 100, "+10 %"), (99.986, 100, "−0.014 %"), (93, 100, "−7.0 %")],
)
def test_relative_costs(cost, reference, said):
    assert parts_table.relative(cost, reference) == said
