"""Every family against its class in `transformers`: logits, one step of training, and the way there
and back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra.utils import instantiate
from torch.testing import assert_close

from scantling.hub.family import Family, all_families
from scantling.hub.files import TensorFiles, export_tensors, import_tensors, read_json, write_tensors
from scantling.hub.runs import compose_run, express_decoder, train_overrides
from scantling.hub.weights import rules_of
from scantling.model.decoder import Decoder

FAMILIES = all_families()
TOKENS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))

SMALL = {"vocab_size": 257, "pad_token_id": None, "bos_token_id": 256, "eos_token_id": 256}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS_16 = {**LLAMA, "head_dim": 16}  # four of them: wider than the model
GPT2 = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MHA = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DEEPSEEK = {
    **LLAMA,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}

CASES = {
    "llama": {**HEADS_16, "tie_word_embeddings": False},
    "llama tied, biases, odd width": {
        **LLAMA,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "intermediate_size": 57,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "gpt2": GPT2,
    "gpt2 n_inner": {**GPT2, "n_inner": 48, "activation_function": "relu"},
    "llama 3": {**LLAMA, "rope_parameters": LLAMA3},
    "llama linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama yarn": {**LLAMA, "rope_parameters": YARN},
    "llama yarn, two terms": {**LLAMA, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "mistral": {**HEADS_16, "sliding_window": 9},
    "mistral full": {**LLAMA, "head_dim": 8, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": HEADS_16,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "phi3": {**LLAMA, "sliding_window": 9, "rope_parameters": PARTIAL},
    "qwen3_moe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmo3": {**LLAMA, "num_hidden_layers": 5, "sliding_window": 9},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gemma": HEADS_16,
    "gemma2": {**HEADS_16, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "gemma2 uncapped": {**HEADS_16, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": {**HEADS_16, "num_hidden_layers": 7, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "olmo": {**LLAMA, "clip_qkv": 0.5},
    "olmo2": LLAMA,
    "phi": LLAMA,
    "stablelm": {**LLAMA, "rope_parameters": PARTIAL, "use_qkv_bias": True},
    "stablelm parallel, normed": {
        **LLAMA,
        "rope_parameters": PARTIAL,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "cohere": {**LLAMA, "logit_scale": 0.8},
    "cohere normed": {**LLAMA, "use_qk_norm": True, "logit_scale": 0.25},
    "nemotron": HEADS_16,
    "starcoder2": {**LLAMA, "sliding_window": 9},
    "granite": {
        **LLAMA,
        "embedding_multiplier": 3.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "smollm3": {**LLAMA, "num_hidden_layers": 5},
    "gpt_neox": {**MHA, "rope_parameters": PARTIAL},
    "gpt_neox one after the other": {
        **MHA,
        "rope_parameters": PARTIAL,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "gptj": {**GPT2, "rotary_dim": 4},
    "opt": {
        **{key: value for key, value in MHA.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "opt post": {
        **{key: value for key, value in MHA.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "bloom": {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bloom 6 heads": {**SMALL, "hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": {
        **SMALL,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 0.0},  # which is none
    },
    "mpt clipped": {
        **SMALL,
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3},
    },
    "falcon": {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon 40B": {
        **SMALL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "falcon all heads": {
        **SMALL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": False,
        "bias": True,
    },
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 yarn": {
        **DEEPSEEK,
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "deepseek_v3 yarn, one term": {**DEEPSEEK, "rope_parameters": {**YARN, "mscale_all_dim": 0.7}},
    "deepseek_v3 yarn, explicit": {
        **DEEPSEEK,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": 1.2},
    },
}
"""What each takes: the model's type is the first word, the rest says what is special."""


@dataclass
class Pair:
    """A decoder of ours that holds the weights of theirs, and the directory that theirs was saved in."""

    family: Family
    theirs: torch.nn.Module
    source: Path
    config: dict
    ours: Decoder
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    family = FAMILIES[request.param.split()[0]]
    theirs = model_of(family, CASES[request.param])
    source = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(source)
    config = compose_run(tuple(train_overrides(family, read_json(source / "config.json"))))["decoder"]
    ours = instantiate(config)
    state = import_tensors(family, ours, TensorFiles(source))
    ours.load_state_dict(state)
    return Pair(family, theirs, source, config, ours.eval(), state)


def model_of(family: Family, settings: dict) -> Any:
    """Every parameter random, biases and norms too, and what no gradient moves."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, family.architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.15))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.3)
        if family.model_type == "opt":  # two rows for padding, which no text reaches
            model.model.decoder.embed_positions.weight[:2] = 0
    return model


@torch.no_grad()
def test_logits_are_theirs(pair):
    theirs = pair.theirs(TOKENS).logits
    assert theirs.std() > 0.1  # else the next line would say little
    assert_close(pair.ours(TOKENS), theirs, rtol=0, atol=1e-4)


def test_the_way_there_and_back_changes_no_bit(pair, tmp_path):
    written = export_tensors(rules_of(pair.family.tensors, pair.ours), pair.state)
    stored = TensorFiles(pair.source)
    assert written.keys() == stored.files.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, stored.read(name)), name
    write_tensors(written, tmp_path / "model.safetensors")
    for name, tensor in import_tensors(pair.family, pair.ours, TensorFiles(tmp_path)).items():
        assert torch.equal(tensor, pair.state[name]), name


@torch.no_grad()
def test_transformers_opens_what_is_written(pair, tmp_path):
    opened = opened_by_transformers(pair, express_decoder(pair.family, pair.config), tmp_path)
    assert type(opened) is type(pair.theirs)
    assert_close(opened(TOKENS).logits, pair.theirs(TOKENS).logits, rtol=0, atol=1e-6)


def opened_by_transformers(pair: Pair, settings: dict, path: Path) -> Any:
    (path / "config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    write_tensors(
        export_tensors(rules_of(pair.family.tensors, pair.ours), pair.state), path / "model.safetensors"
    )
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


YARN_256 = {
    "_target_": "scantling.model.rope_scaling.yarn",
    "_partial_": True,
    "factor": 4.0,
    "original_seq_len": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "attention_factor": 1.2,
}
CHANGES = {
    "a part of each head turned": ("fraction", 0.5),
    "yarn": ("scaling", YARN_256),
    "capped": ("softcap", 0.5),
}
"""A setting of a decoder that few families have, and what it is wherever it stands."""


def changed(node: dict, key: str, value: Any) -> dict:
    inner = {k: changed(v, key, value) if isinstance(v, dict) else v for k, v in node.items()}
    return inner | {key: value} if key in node else inner


@torch.no_grad()
def test_what_is_not_refused_is_computed_alike(pair, tmp_path):
    """A field may stand in `config.json` that the family's code does not read."""
    for change, (key, value) in CHANGES.items():
        config = changed(pair.config, key, value)
        if config == pair.config:  # the family's parts have no such setting
            continue
        try:
            settings = express_decoder(pair.family, config)
        except ValueError:
            continue
        ours = instantiate(config)
        ours.load_state_dict(pair.state)
        place = tmp_path / key
        place.mkdir()
        theirs = opened_by_transformers(pair, settings, place)
        logits = theirs(TOKENS).logits
        assert_close(ours.eval()(TOKENS), logits, rtol=0, atol=1e-4, msg=lambda m, c=change: f"{c}: {m}")


def test_one_step_of_training_gives_their_weights(pair, tmp_path):
    """The last test of a pair, for it moves both: gradients too go through the same function."""
    for model, logits in ((pair.ours, pair.ours(TOKENS)), (pair.theirs, pair.theirs(TOKENS).logits)):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    pair.theirs.save_pretrained(tmp_path)
    theirs, before = TensorFiles(tmp_path), TensorFiles(pair.source)
    ours = export_tensors(rules_of(pair.family.tensors, pair.ours), pair.ours.state_dict())
    for name, tensor in ours.items():
        assert_close(
            tensor, theirs.read(name), rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = [name for name in ours if not torch.equal(theirs.read(name), before.read(name))]
    assert len(moved) > 0.7 * len(ours)


# --- config.json ---

NO_MATTER = {
    *("use_cache", "initializer_range", "init_std", "pretraining_tp", "output_router_logits"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "layerdrop", "residual_dropout"),
    *("embedding_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "router_jitter_noise"),
    *("router_aux_loss_coef", "bos_token_id", "eos_token_id", "pad_token_id", "is_decoder"),
    *(
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    *("reorder_and_upcast_attn", "slow_but_exact", "init_device"),  # rounding, and where weights are made
    *("learned_pos_emb", "norm_type"),  # MPT: not read by its code
    *("original_max_position_embeddings",),  # of longrope, which is refused
    *("max_window_layers",),  # read where use_sliding_window is true, which is refused
    *("num_nextn_predict_layers", "qk_head_dim"),  # a module left out; a sum of others
}
"""Fields that change nothing of what a trained model computes."""


def default(model_type: str) -> dict:
    """The fields of the family's own, as its class of `transformers` has them."""
    kept = transformers.AutoConfig.for_model(model_type).to_dict()
    general = transformers.PretrainedConfig().to_dict().keys() - FAMILIES[model_type].names
    return {key: value for key, value in kept.items() if key not in general}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_field_is_overlooked(model_type):
    """A field that we never heard of could change the model and we would not notice."""
    fields = default(model_type).keys()
    derived = {
        *({"layer_types", "sliding_window"} if "use_sliding_window" in fields else ()),
        *({"head_dim"} if model_type == "deepseek_v3" else ()),
        *({"intermediate_size"} if model_type == "qwen3_moe" else ()),  # of layers without experts
    }
    assert fields - FAMILIES[model_type].names - NO_MATTER - derived == set()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_left_out_is_taken_as_transformers_does(model_type):
    """Files on the Hub leave out what their version of `transformers` had as a default."""
    family, whole = FAMILIES[model_type], default(model_type)
    left_out = 0
    for name in family.names & whole.keys():
        less = {key: value for key, value in whole.items() if key != name}
        try:
            words = family.overrides(less)
        except ValueError as error:
            complaint = str(error)
        else:
            complaint, left_out = "", left_out + 1
            assert words == family.overrides(whole), name
        assert complaint in ("", f"config.json lacks {name}")
    assert left_out >= 3


OLD = {
    "llama": (
        {"rope_parameters": LLAMA3},
        {
            "rope_theta": 5e5,
            "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        },
    ),
    "gpt_neox": ({"rope_parameters": PARTIAL}, {"rotary_pct": 0.5, "rotary_emb_base": 10000}),
    "phi": ({"rope_parameters": PARTIAL}, {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
    "gemma3_text": (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
            }
        },
        {
            "rope_theta": 3e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}
"""Rotary settings as transformers 5 writes them, and as those before did."""


@pytest.mark.parametrize("model_type", OLD)
def test_older_files_mean_the_same(model_type):
    family, whole = FAMILIES[model_type], default(model_type)
    new, old = ({**whole, **settings} for settings in OLD[model_type])
    assert family.overrides(
        {key: value for key, value in old.items() if key != "rope_parameters"}
    ) == family.overrides(new)


@pytest.mark.parametrize(
    ("model_type", "parameters", "complaint"),
    [
        ("llama", PARTIAL, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        (
            "gemma3_text",
            {"full_attention": YARN | {"truncate": False}},
            "truncate=False is not supported, only True",
        ),
        ("phi3", YARN, "rope_type=yarn is not supported, only default"),
    ],
)  # fmt: skip
def test_what_the_code_of_a_family_does_not_read_is_refused(model_type, parameters, complaint):
    with pytest.raises(ValueError, match=complaint):
        FAMILIES[model_type].overrides({**default(model_type), "rope_parameters": parameters})


def test_text_in_a_number_never_reaches_hydra():
    """`hidden_size` could name a class to build, were it not refused."""
    settings = {**default("llama"), "hidden_size": "{_target_:os.system,command:ls}"}
    with pytest.raises(ValueError, match=r"_target_.*is not a number, and model.d_model takes nothing else"):
        FAMILIES["llama"].overrides(settings)


# --- docs/hub.md ---

PARTS = ("norm", "pos", "attn", "ffn", "block", "embed", "head")
USUAL = ("attn/pattern=full", "attn/qk_norm=none", "pos/scaling=none", "block=pre")


def table() -> str:
    """What the families' classes say of themselves, and the options of their defaults."""
    rows = ["| `model_type` | what it is | options, beside `block=pre` |", "|---|---|---|"]
    for model_type, family in FAMILIES.items():
        words = [word for word in family.overrides(default(model_type)) if "." not in word.partition("=")[0]]
        # by part, a part before what stands inside it
        shown = sorted(
            set(words) - set(USUAL), key=lambda w: (PARTS.index(re.split("[/=]", w)[0]), "/" in w, w)
        )
        about = " ".join((type(family).__doc__ or "").split()).removesuffix(".")
        rows.append(f"| `{model_type}` | {about} | `{' '.join(shown)}` |")
    return "\n".join(rows)


def test_the_table_of_families_is_up_to_date():
    assert table() in (Path(__file__).parents[2] / "docs" / "hub.md").read_text()


def test_every_family_is_tried():
    assert {case.split()[0] for case in CASES} == FAMILIES.keys()
