"""`python src/hub.py`: what it writes is a run and a Hugging Face directory, and what it refuses leaves
nothing behind.
"""

from __future__ import annotations

import inspect
import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from scantling.cli.evaluate import evaluate
from scantling.cli.hub import hub
from scantling.cli.sample import sample
from scantling.config.composition import resolved_config
from scantling.config.mistakes import Mistake
from scantling.config.options import CONF
from scantling.data.tokenizers import BPE, Byte, Char, Unigram, WordPiece
from scantling.hub.files import INDEX
from scantling.hub.runs import compose_run
from scantling.inference.stored_run import StoredRun
from scantling.runs.directory import RunDirectory

TOKENS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = 'def größe(x):\n\treturn "<|endoftext|>" + x  # naïve ☃ 🙂\n'
ENTRIES = {"hub": hub, "sample": sample, "evaluate": evaluate}


@pytest.fixture
def command(tmp_path, monkeypatch, entry):
    """`command("hub", "action=import")` -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    return entry


@pytest.fixture
def directly(tmp_path, monkeypatch):
    """`directly(action="import")` is the same without Hydra's start, which takes longest: the
    mistake, or "".
    """
    monkeypatch.chdir(tmp_path)
    usual: Any = OmegaConf.load(CONF / "hub.yaml")
    usual = OmegaConf.masked_copy(usual, ["source", "run", "checkpoint", "family", "to", "paths"])

    def directly(**settings):
        config: Any = OmegaConf.merge(usual, settings)
        try:
            hub(config)
        except Mistake as mistake:
            return str(mistake)
        return ""

    return directly


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A random Llama with the tokenizer of bytes, as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
    )
    path = tmp_path_factory.mktemp("hub") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    Byte().train(iter(())).save(path / "tokenizer.json")
    return path


@pytest.fixture
def source(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture
def stored(tmp_path, nano, composed):
    """`stored("pos=alibi")` is the directory of a run with the nano model, its weights those of the start
    times 8.
    """

    def stored(*overrides, tokenizer=None):
        codec = tokenizer or Byte().train(iter(()))
        overrides = (f"model.vocab_size={codec.vocab_size}", *overrides)
        directory = RunDirectory(tmp_path / "run")
        directory.begin(OmegaConf.to_yaml(resolved_config(composed("model=nano", *overrides))), {})
        codec.save(directory.tokenizer)
        weights = nano(*overrides, gain=8).state_dict()
        torch.save({"state_dict": {f"decoder.{k}": v for k, v in weights.items()}}, directory.best)
        return str(directory.path)

    return stored


@torch.no_grad()
def logits(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)(TOKENS).logits


@torch.no_grad()
def test_an_imported_model_is_a_run(command, source, tmp_path):
    code, out, err = command("hub", "action=import", f"source={source}")
    assert (code, err) == (0, "")
    assert "llama" in out
    assert "33,504 parameters" in out  # 2·257·32 + 2·(2·32² + 2·16·32 + 3·32·56 + 2·32) + 32
    run = StoredRun.load("runs/imported/tiny", "best")
    assert_close(run.decoder(TOKENS), logits(source), rtol=0, atol=1e-4)
    again = compose_run(tuple(run.directory.environment["overrides"]))  # what train.py would make of them
    assert again["decoder"] == OmegaConf.to_container(run.config.decoder)
    assert again["tokenizer"]["source"] == str(Path("runs/imported/tiny/tokenizer.json").resolve())
    # sampling with temperature 0 gives what transformers' own generation gives
    code, out, err = command(
        "sample", "run=runs/imported/tiny", "prompt=def ", "n_tokens=12", "temperature=0", "top_k=null"
    )
    assert code == 0, err
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    prompt = torch.tensor([[256, *run.tokenizer.encode("def ")]])  # a document starts behind another's end
    ids = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, pad_token_id=256
    )[0].tolist()
    assert out.rstrip("\n") == run.tokenizer.decode(ids).rstrip("\n")
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(inspect)[:20_000])
    code, out, err = command(
        "evaluate",
        "run=runs/imported/tiny",
        "paths.cache=cache",
        "data=text",
        f"data.files={text}",
        "n_windows=2",
    )
    assert code == 0, err
    assert "tiny" in out


@torch.no_grad()
def test_import_and_export_again_give_the_same_files(command, source):
    assert command("hub", "action=import", f"source={source}")[0] == 0
    code, out, err = command("hub", "action=export", "run=runs/imported/tiny", "family=llama", "to=back/tiny")
    assert (code, err) == (0, "")
    assert "back/tiny" in out
    before, after = load_file(source / "model.safetensors"), load_file("back/tiny/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs, ours = (json.loads(Path(path, "config.json").read_text()) for path in (source, "back/tiny"))
    assert {key: theirs.get(key) for key in ours} == ours
    assert torch.equal(logits("back/tiny"), logits(source))
    assert sorted(path.name for path in Path("back").iterdir()) == ["tiny"]
    modes = {path.stat().st_mode for path in Path("back/tiny").iterdir()}
    assert len(modes) == 1  # others may read the tensors if they may read the rest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_a_file_is_kept(directly, source, dtype):
    file = source / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    assert not directly(action="import", source=str(source), run="a")
    assert not directly(action="export", run="a", family="llama", to="b")
    before, after = load_file(file), load_file("b/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert transformers.AutoModelForCausalLM.from_pretrained("b", dtype="auto").dtype == dtype


@torch.no_grad()
def test_a_model_in_several_files(directly, source):
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert not directly(action="import", source=str(source))
    assert_close(
        StoredRun.load("runs/imported/tiny", "best").decoder(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4
    )
    lost = next(source.glob("model-00002*"))
    lost.unlink()
    err = directly(action="import", source=str(source), run="other")
    assert f"{lost.name} is missing, which {INDEX} names" in err
    assert not Path("other").exists()


@torch.no_grad()
def test_a_file_of_the_body_alone(directly, source, tmp_path):
    """GPT-2's on the Hub: no `transformer.` before the names, and masks among the weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    path = tmp_path / "body"
    model.save_pretrained(path)
    shutil.copy(source / "tokenizer.json", path)
    body = {name.removeprefix("transformer."): t for name, t in load_file(path / "model.safetensors").items()}
    body["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    body["lm_head.weight"] = body["wte.weight"].clone()
    save_file(body, path / "model.safetensors")
    assert not directly(action="import", source=str(path), run="run")
    assert_close(StoredRun.load("run", "best").decoder(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4)


# --- runs of ours ---


def tokenizers():
    text = inspect.getsource(inspect)[:20_000]
    sizes = {"vocab_size": 520, "train_bytes": None}
    kinds = (Byte(), Char(), BPE(**sizes), Unigram(**sizes), WordPiece(**sizes))
    return [pytest.param(kind, text, id=type(kind).__name__) for kind in kinds]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "text"), tokenizers())
def test_transformers_reads_the_same_text(directly, stored, kind, text):
    ours = kind.train(iter([text, string.printable]))
    assert not directly(action="export", run=stored(tokenizer=ours), family="llama", to="out")
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    for words in (TEXT, text[:2000], "", " \n  a"):
        ids = ours.encode(words)
        assert theirs(words)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.decode([ours.end_of_text], skip_special_tokens=True) == ""
    tokens = TOKENS % ours.vocab_size
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert_close(model(tokens).logits, StoredRun.load("run", "best").decoder(tokens), rtol=0, atol=1e-4)
    assert model.generation_config.eos_token_id == ours.end_of_text


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", ["model.dropout=0.1", "attn=gqa", "embed=untied"]),
        ("gpt2", ["model=gpt2_tiny", "model.n_layers=2", "model.dropout=0.1"]),
        ("mistral", ["attn=sliding", "model.d_ff=100"]),
        ("qwen3", ["attn=mha_qk_norm"]),
        ("mixtral", ["ffn=moe", "embed=untied"]),
        ("bloom", ["norm=layernorm", "pos=alibi", "ffn=gelu_tanh", "embed=tied_normed", "model.bias=true"]),
        ("olmo2", ["attn=mha_qk_norm_full", "block=reordered"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_of_ours_in_their_words(directly, stored, family, overrides):
    run = stored(*overrides)
    assert not directly(action="export", run=run, family=family, to="out")
    assert_close(logits("out"), StoredRun.load(run, "best").decoder(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "overrides", "complaint"),
    [
        ("gpt2", [], "pos._target_=scantling.model.pos.RoPE"),
        ("gpt2", [], "norm._target_=scantling.model.norm.RMSNorm"),
        (
            "llama",
            ["norm=layernorm"],
            "family llama cannot express norm._target_=scantling.model.norm.LayerNorm",
        ),
        ("llama", ["norm=none"], "norm._target_=scantling.model.norm.NoNorm"),
        ("llama", ["attn=mla"], "attn._target_=scantling.model.attn.LatentAttention"),
        ("llama", ["ffn=relu2"], "ffn._target_=scantling.model.ffn.FeedForward"),
        ("llama", ["ffn=bilinear"], "ffn.activation._target_=torch.nn.Identity"),
        ("llama", ["decoder.layers_per_block=2"], "cannot express layers_per_block=2"),
        ("llama", ["attn.softcap=30.0"], "cannot express attn.softcap=30.0"),
        ("llama", ["pos=rope_partial"], "config.json: partial_rotary_factor=0.25 is not supported, only 1.0"),
        ("phi3", ["pos=rope_linear"], "config.json: rope_type=linear is not supported, only default"),
        ("qwen2", ["attn=gqa"], "cannot express attn.q_bias=False, attn.k_bias=False, attn.v_bias=False"),
        ("bloom", ["norm=layernorm", "pos=alibi", "ffn=gelu_tanh", "embed=tied_normed", "model.bias=true",
            "model.d_ff=96"],
            "blocks.0.ffn.up.weight of shape [96, 32]: with these settings it has [128, 32]"),
        ("olmo", ["norm=layernorm_plain", "model.d_head=16"], "cannot express d_head=16"),
        ("gemma2", ["norm=rmsnorm_1p", "attn=gqa_gemma2", "ffn=geglu_tanh", "block=sandwich",
            "embed=tied_scaled", "head=softcap", "attn.scale=0.3"], "cannot express attn.scale=0.3"),
        ("mistral", ["attn=sinks"], "attn.pattern._target_=scantling.model.pattern.Sinks"),
        ("llamma", [], "family=llamma is unknown: did you mean llama"),
        ("zzz", [], "family=zzz is unknown: known are bloom, cohere"),
    ],
)  # fmt: skip
def test_what_a_family_cannot_express_is_named(directly, stored, family, overrides, complaint):
    assert complaint in directly(action="export", run=stored(*overrides), family=family, to="out")
    assert not Path("out").exists()


# --- mistakes ---


def change_config(source, **changes):
    path = source / "config.json"
    kept = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v != "gone"}
    path.write_text(json.dumps(kept))


def change_tensors(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def to_pickle(source):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "unknown type": (
        lambda s: change_config(s, model_type="lama"),
        "model_type=lama is unknown: did you mean llama",
    ),
    "no type": (lambda s: change_config(s, model_type="gone"), "model_type=None is unknown"),
    "no size": (lambda s: change_config(s, hidden_size="gone"), "config.json lacks hidden_size"),
    "code": (lambda s: change_config(s, hidden_size="{_target_: os.abort}"), "is not a number"),
    "activation": (
        lambda s: change_config(s, hidden_act="mish"),
        "hidden_act=mish is not supported, only silu",
    ),
    "period": (
        lambda s: change_config(s, model_type="smollm3", no_rope_layer_interval=0),
        "config.json: no_rope_layer_interval=0 must be a whole number, at least 1",
    ),
    "heads": (lambda s: change_config(s, num_key_value_heads=3), "n_kv_heads=3 does not divide n_heads=4"),
    "scaling": (
        lambda s: change_config(s, rope_parameters={"rope_type": "longrope"}),
        "rope_type=longrope is not supported, only default, linear, llama3, yarn",
    ),
    "not JSON": (lambda s: (s / "config.json").write_text("{"), "config.json is not JSON"),
    "missing": (
        lambda s: change_tensors(s, lambda t: t.pop(Q)),
        f"lacks the tensor {Q}, asked for by config.json",
    ),
    "extra": (
        lambda s: change_tensors(s, lambda t: t.update({"model.extra": torch.ones(2)})),
        "holds the tensor model.extra, which a llama with this config.json has not",
    ),
    "misshaped": (
        lambda s: change_tensors(s, lambda t: t.update({Q: torch.ones(32, 31)})),
        f"{Q} is [32, 31], but by config.json it should be [32, 32]",
    ),
    "quantised": (
        lambda s: change_tensors(s, lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int8)})),
        f"{Q} is stored as torch.int8: quantised weights are not read",
    ),
    "pickle": (to_pickle, "holds pytorch_model.bin, a pickle, which may run code when it is opened"),
    "no tensors": (lambda s: (s / "model.safetensors").unlink(), "holds no *.safetensors"),
    "broken": (lambda s: (s / "model.safetensors").write_bytes(b"nonsense"), "is not a safetensors file"),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), "no tokenizer at"),
    "tokenizer": (
        lambda s: Char().train(iter(["abc"])).save(s / "tokenizer.json"),
        "tokenizer.json has 5 entries, but by config.json the model has 257 (vocab_size): "
        "they do not belong together",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_mistake_is_one_line_and_leaves_nothing(directly, source, damage):
    do, complaint = DAMAGE[damage]
    do(source)
    assert complaint in directly(action="import", source=str(source), run="here/run")
    assert not Path("here").exists() or not list(Path("here").iterdir())
    assert not Path("executed").exists()


def test_a_padded_table_is_as_usual(directly, source):
    """Rows beyond the tokenizer's entries: Qwen, Pythia and others round their tables up."""
    padded = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        grows = tensor.shape[0] == 257
        padded[name] = torch.cat((tensor, torch.zeros(7, tensor.shape[1]))) if grows else tensor
    save_file(padded, source / "model.safetensors")
    change_config(source, vocab_size=264)
    assert not directly(action="import", source=str(source), run="run")
    assert StoredRun.load("run", "best").decoder(TOKENS).shape[-1] == 264
    assert not directly(action="export", run="run", family="llama", to="out")
    assert logits("out").shape[-1] == 264


def test_nothing_is_overwritten(directly, source):
    kept = Path("kept")
    kept.mkdir()
    complaint = directly(action="import", source=str(source), run="kept")
    assert complaint == "kept exists already and is not overwritten: choose another place with run=DIR"
    assert not directly(action="import", source=str(source), run="run")
    complaint = directly(action="export", run="run", family="llama", to="kept")
    assert complaint == "kept exists already and is not overwritten: choose another place with to=DIR"
    assert not list(kept.iterdir())


def test_a_mistake_on_the_command_line_is_one_line(command, source):
    """What the others see as an exception."""
    to_pickle(source)
    code, out, err = command("hub", "action=import", f"source={source}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "action is not set"),
        (
            ["from=x"],
            "from is not a setting: use one of action, checkpoint, family, paths.runs, run, source, to",
        ),
        (["action=upload"], "action=upload is unknown: use import, export or weights"),
        (["action=import"], "action=import needs source=…"),
        (["action=export", "run=x", "to=y"], "action=export needs family=…"),
        (["action=import", "source=nowhere"], "nowhere/config.json is missing"),
        (["action=export", "run=nowhere", "family=llama", "to=y"], "run=nowhere holds no run"),
    ],
)
def test_a_command_that_lacks_something_says_what(command, words, complaint):
    code, _, err = command("hub", *words)
    assert code == 2
    assert complaint in err
