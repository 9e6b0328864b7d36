"""Sixty tiny architectures of the installed transformers, on rows that reach beyond every window.

Each shares prompts, or has padded rows for the reason that its line names. In both, log-probs are those of the model's
own logits, and training computes what was scored. What transformers adds to attention is decided here first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import transformers
from shortcuts import step_metrics
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparring.errors import UserError
from sparring.model.attention import IGNORED
from sparring.model.load import context_length, load_model
from sparring.model.logprobs import Scorer, score_groups, sequence_logprobs
from sparring.model.memory import checkpoint_activations
from sparring.objectives import Spin
from sparring.parallel import SingleProcess
from sparring.types import Group, TrainingExample

CPU = torch.device("cpu")
VOCAB = 64
SIZES = MappingProxyType(
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 3,
    }
)
"""Of every architecture whose config has the setting."""
WINDOW = {"sliding_window": 16}
WINDOWS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.2, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0],
        "long_factor": [4.0, 8.0, 8.0, 8.0, 9.0, 9.0, 9.0, 9.0],
        "original_max_position_embeddings": 64,
    },
}
DBRX = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 256,
    "resid_pdrop": 0.5,
    "attn_config": {"kv_n_heads": 1, "attn_pdrop": 0.5, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    "ffn_config": {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_jitter_eps": 0.3,
    },
}
LINEAR = {
    "shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
SHARED: dict[str, tuple[str, dict[str, object]]] = {
    "afmoe": ("afmoe", WINDOWS),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", WINDOWS),
    "dbrx, nested dropout and jitter": ("dbrx", DBRX),
    "deepseek_v3": ("deepseek_v3", {**MLA, **ROUTED, "num_key_value_heads": 2, "head_dim": 8}),
    "dots1": ("dots1", {**WINDOWS, **ROUTED}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    "exaone4": ("exaone4", WINDOWS),
    "flex_olmo": ("flex_olmo", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", WINDOWS),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", ROUTED),
    "gpt2, dropout": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5, "resid_pdrop": 0.5}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("gpt_neox", {}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {}),
    "helium": ("helium", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "jetmoe": ("jetmoe", {}),
    "llama": ("llama", {}),
    "minimax_m2": ("minimax_m2", {}),
    "ministral": ("ministral", WINDOWS),
    "mistral, window": ("mistral", WINDOW),
    "mixtral, window and jitter": ("mixtral", {**WINDOW, "router_jitter_noise": 0.3}),
    "nanochat": ("nanochat", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWS),
    "olmoe": ("olmoe", {}),
    "opt, dropout": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3, longrope": ("phi3", LONGROPE),
    "phimoe, jitter and sampled routes": ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
    "qwen2": ("qwen2", {**WINDOWS, "use_sliding_window": True}),
    "qwen3": ("qwen3", {**WINDOWS, "use_sliding_window": True}),
    "qwen3_moe, window": ("qwen3_moe", {**WINDOW, "use_sliding_window": True}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {**WINDOWS, "use_sliding_window": True}),
    "starcoder2": ("starcoder2", WINDOW),
}
OWN_ATTENTION = "transformers cannot replace its attention"
HIDDEN_WINDOW = "its sliding window is in its mask and does not reach its attention"
STATES = "process a row from start to end"
PADDED: dict[str, tuple[str, dict[str, object], str]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}, OWN_ATTENTION),
    "deepseek_v4": ("deepseek_v4", {}, STATES),
    "doge": ("doge", {}, "it computes an attention mask of its own"),
    "falcon": ("falcon", {}, OWN_ATTENTION),
    "gemma2": ("gemma2", WINDOWS, "it caps attention logits"),
    "gpt_oss, sinks": ("gpt_oss", WINDOWS, "its attention takes s_aux"),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}, OWN_ATTENTION),
    "jamba": ("jamba", {}, STATES),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, STATES),
    "mamba": ("mamba", {"state_size": 4}, STATES),
    "mimo_v2_flash, sinks": ("mimo_v2_flash", {**WINDOWS, **ROUTED}, "its attention takes s_aux"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}, OWN_ATTENTION),
    "nemotron": ("nemotron", {}, "log-probs of shared rows differ"),
    "phimoe, window": ("phimoe", WINDOW, HIDDEN_WINDOW),
    "qwen2_moe, window": ("qwen2_moe", {**WINDOWS, "use_sliding_window": True}, HIDDEN_WINDOW),
    "qwen3_next": ("qwen3_next", LINEAR, STATES),
    "stablelm": ("stablelm", {}, OWN_ATTENTION),
}
ARCHITECTURES: dict[str, tuple[str, dict[str, object], str | None]] = {
    **{name: (model_type, settings, None) for name, (model_type, settings) in SHARED.items()},
    **PADDED,
}


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCAB - 4, count).astype(np.int32)


GROUPS = [
    Group(str(prompt), ids(prompt, prompt), {"real": (ids(30, 7 * prompt),), "generated": (ids(25, 9 * prompt),)})
    for prompt in (5, 20)
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str | None]:
    """Its folder, with weights so large that every position matters, and why its rows are padded."""
    model_type, settings, reason = ARCHITECTURES[request.param]
    defaults = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if name in defaults.to_dict()}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder, reason


def own_logprobs(folder: Path) -> dict[str, np.ndarray]:
    """From full logits of one row each, by the model as transformers loads it."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    found: dict[str, list[float]] = {"real": [], "generated": []}
    for group in GROUPS:
        for role in ("real", "generated"):
            row = torch.from_numpy(np.concatenate([group.prompt_ids, *group.responses[role]]).astype(np.int64))[None]
            with torch.no_grad():
                logits = model(input_ids=row, use_cache=False).logits
            is_response = torch.arange(row.shape[1])[None] >= len(group.prompt_ids)
            found[role].append(sequence_logprobs(logits, row, is_response).item())
    return {role: np.array(values) for role, values in found.items()}


def test_log_probs_are_those_of_the_own_logits_and_training_repeats_them(
    architecture: tuple[Path, str | None],
) -> None:
    folder, reason = architecture
    expected = own_logprobs(folder)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    if model.supports_gradient_checkpointing:
        checkpoint_activations(model)
    scorer = Scorer(model)
    assert scorer.packing == ("shared" if reason is None else "padded"), scorer.why_padded
    assert reason is None or reason in (scorer.why_padded or "")
    scores = score_groups(scorer, GROUPS, 1000, SingleProcess())
    np.testing.assert_allclose(scores["real"], expected["real"], atol=2e-3)
    np.testing.assert_allclose(scores["generated"][:, 0], expected["generated"], atol=2e-3)
    assert max(np.abs(expected["real"] - expected["generated"])) > 1, "nothing is degenerate"

    examples = [
        TrainingExample(group, {role: scores[role][place] for role in ("real", "generated")})
        for place, group in enumerate(GROUPS)
    ]
    metrics = step_metrics(scorer, Spin(), examples, 1000)
    assert metrics["log_ratio"] < 1e-5, "no dropout, no jitter, no sampled route"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3


def test_a_model_that_does_not_ignore_padding_is_refused() -> None:
    """CpmAnt tells padding by token 0 on the left: its padded rows were 2 nats off."""
    settings = {"hidden_size": 32, "dim_ff": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "dim_head": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model("cpmant", vocab_size=VOCAB, prompt_length=4, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UserError, match="CpmAntForCausalLM does not ignore padding"):
        Scorer(model)


SOURCES = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
CALL = re.compile(r"attention_interface\(\s*self,(.*?)\n\s*\)", re.DOTALL)
READ = {"attention_mask", "scaling", "sliding_window"}
REFUSED = {
    *{"s_aux", "softcap", "position_bias", "indices", "block_indices"},  # they change what is attended to
    *{"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"},  # of images
    *{"deterministic", "query", "key", "value"},  # of encoders
}


def test_every_argument_of_attention_is_decided() -> None:
    """A new one stands for a new mechanism: is it read, is it left out without a loss, or are rows then padded?"""
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        for call in CALL.findall(path.read_text(encoding="utf-8")):
            for name in re.findall(r"^\s*(\w+)=", call, re.MULTILINE):
                found[name].add(path.parent.name)
    assert len(found["scaling"]) > 100, "the calls are found"
    undecided = {name: models for name, models in found.items() if name not in READ | REFUSED | IGNORED}
    assert not undecided


def test_every_kind_of_layer_and_of_rope_is_decided() -> None:
    assert set(ALLOWED_ATTN_LAYER_TYPES) == {
        *{"full_attention", "sliding_attention"},  # shared
        *{"chunked_attention", "window_attention", "indexed_attention", "minimax_m3_sparse", "conv", "moe"},  # padded
        *{"compressed_sparse_attention", "heavily_compressed_attention", "hybrid", "hybrid_sliding"},
        "linear_attention",
    }
    # longrope and dynamic look at the longest position of a batch: `context_length` bounds it
    assert set(ROPE_INIT_FUNCTIONS) == {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}


def test_longrope_is_bounded_where_its_factors_change(tmp_path: Path) -> None:
    """Beyond it, the factors of every row depend on the longest one: the same response has other log-probs."""
    sizes = {name: SIZES[name] for name in AutoConfig.for_model("phi3").to_dict() if name in SIZES}
    config = AutoConfig.for_model("phi3", **{**sizes, **LONGROPE})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    assert (config.max_position_embeddings, context_length(tmp_path)) == (256, 64)
    short = Group("short", ids(5, 1), {"real": (ids(20, 2),)})
    scorer = Scorer(model)

    def beside(length: int) -> float:
        longer = Group("longer", ids(5, 3), {"real": (ids(length - 5, 4),)})
        return score_groups(scorer, [short, longer], 1000, SingleProcess())["real"][0]

    alone = score_groups(scorer, [short], 1000, SingleProcess())["real"][0]
    assert beside(64) == pytest.approx(alone, abs=1e-3)
    assert abs(beside(65) - alone) > 0.01, "what the bound is for"
