#!/usr/bin/env python3
"""Writes small models with random weights that vLLM can serve, also on a CPU.

    python tiny_model.py KIND DIR

KIND is one of
  gqa    Llama: 4 layers, 8 heads over 4 KV heads of 64; one KV group
  mla    DeepSeek-V2, all layers dense: one latent KV vector of 512 + 64 per token
  swa    Gemma 3: sliding-window and full attention mixed, which makes several KV groups
  demo   gqa, with a word-level tokenizer and a chat template, for the HTTP server
  bytes  gqa, with a tokenizer that takes any text, a token a byte: for load generators, which
         bring texts of their own
  gpu    Llama as gqa, but 4 heads over 2 KV heads of 128, as attention kernels of GPUs like it

The weights come from fixed seeds: the same KIND gives the same bytes everywhere. They are large
enough for greedy output (in float32) to be varied and to depend on every part of the prompt, so
that a wrong KV block shows as other tokens. Needs numpy and nothing else.
"""
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 2048
FIRST_WORD = 8          # token ids below are special ones; prompts use [FIRST_WORD, VOCAB)
KINDS = ("gqa", "mla", "swa", "demo", "bytes", "gpu")

# Standard deviations. Queries are larger, so that attention picks single tokens instead of an
# average in which one wrong block of a long prompt would drown.
MATRIX, QUERY, EMBEDDING, HEAD = 0.06, 0.09, 0.5, 0.05

# (name, shape, standard deviation); a deviation of 0 means a norm: every weight is `fill`.
Tensor = tuple[str, tuple[int, ...], float]


def config(kind: str) -> dict[str, Any]:
    """The content of config.json."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }
    if kind in ("gqa", "demo", "bytes", "gpu"):
        heads, kv_heads, dim = (4, 2, 128) if kind == "gpu" else (8, 4, 64)
        return common | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
            "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        }
    if kind == "mla":
        return common | {
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
            "hidden_act": "silu", "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 8,
            "kv_lora_rank": 512, "q_lora_rank": None,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
            "attention_bias": False,
            # As real models of this family have it. Without scaling vLLM's CPU operator rotates
            # the strided queries and keys wrongly, by amounts that depend on the batch.
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                "original_max_position_embeddings": 4096,
                                "beta_fast": 32, "beta_slow": 1,
                                "mscale": 1.0, "mscale_all_dim": 1.0},
            # Every layer is before the first one with experts.
            "first_k_dense_replace": 3, "n_routed_experts": 2, "n_shared_experts": 1,
            "num_experts_per_tok": 1, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
        }
    if kind == "swa":
        return common | {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "query_pre_attn_scalar": 8, "attention_bias": False, "sliding_window": 128,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        }
    raise ValueError(f"no model kind {kind!r}; there are: {', '.join(KINDS)}")


def tensors(kind: str) -> Iterator[Tensor]:
    """Every weight of the model."""
    c = config(kind)
    hidden, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    # Gemma multiplies embeddings by sqrt(hidden) and normalises what attention adds to them; it
    # also normalises queries, so there query_pre_attn_scalar does what QUERY does.
    embedding = EMBEDDING / hidden**0.5 if kind == "swa" else EMBEDDING
    yield "model.embed_tokens.weight", (VOCAB, hidden), embedding
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        if kind == "mla":
            rope, nope, v = c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]
            rank = c["kv_lora_rank"]
            yield p + "self_attn.q_proj.weight", (heads * (nope + rope), hidden), QUERY
            yield p + "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden), MATRIX
            yield p + "self_attn.kv_a_layernorm.weight", (rank,), 0
            yield p + "self_attn.kv_b_proj.weight", (heads * (nope + v), rank), MATRIX
            yield p + "self_attn.o_proj.weight", (hidden, heads * v), MATRIX
        else:
            dim, kv = c["head_dim"], c["num_key_value_heads"]
            yield p + "self_attn.q_proj.weight", (heads * dim, hidden), QUERY
            yield p + "self_attn.k_proj.weight", (kv * dim, hidden), MATRIX
            yield p + "self_attn.v_proj.weight", (kv * dim, hidden), MATRIX
            yield p + "self_attn.o_proj.weight", (hidden, heads * dim), MATRIX
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind == "swa":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            yield p + "self_attn.q_norm.weight", (c["head_dim"],), 0
            yield p + "self_attn.k_norm.weight", (c["head_dim"],), 0
        for norm in norms:
            yield p + norm + ".weight", (hidden,), 0
        yield p + "mlp.gate_proj.weight", (inner, hidden), MATRIX
        yield p + "mlp.up_proj.weight", (inner, hidden), MATRIX
        yield p + "mlp.down_proj.weight", (hidden, inner), MATRIX
    yield "model.norm.weight", (hidden,), 0
    yield "lm_head.weight", (VOCAB, hidden), HEAD


def values(kind: str, tensor: Tensor) -> np.ndarray:
    """The weights of one tensor. RandomState, as its numbers are the same in every numpy."""
    name, shape, deviation = tensor
    if not deviation:
        return np.full(shape, 0.0 if kind == "swa" else 1.0, np.float32)    # Gemma adds the 1
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return (random.standard_normal(shape) * deviation).astype("<f4")


def write_weights(kind: str, path: Path) -> None:
    """One safetensors file: length of the header, header in JSON, raw bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, _ in tensors(kind):
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors(kind):
            f.write(values(kind, tensor).tobytes())


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>", "<end>")
CHAT_TEMPLATE = (
    "<s> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words() -> list[str]:
    """The vocabulary: special tokens, then made-up words of two syllables."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    made = [a + b for a in syllables for b in syllables]
    step = 1009             # a prime: neighbouring ids get words that look different
    picked = [made[i * step % len(made)] for i in range(VOCAB - len(SPECIAL))]
    return [*SPECIAL, *picked]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level tokenizers: the byte's own
    where it has one in Latin-1, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in printable)
    moved = {b: 256 + n for n, b in enumerate(others)}
    return [chr(moved.get(b, b)) for b in range(256)]


def byte_tokenizer() -> dict[str, Any]:
    """Special tokens, the 256 bytes, and words, which only the model's answers hold."""
    letters = byte_letters()
    made = [letters[ord(" ")] + word for word in words()[len(SPECIAL):]]
    tokens = [*SPECIAL, *letters, *made][:VOCAB]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}}


def word_tokenizer() -> dict[str, Any]:
    vocabulary = {word: i for i, word in enumerate(words())}
    return {"pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}


def write_tokenizer(kind: str, folder: Path) -> None:
    """In the files that transformers reads. The demo's splits at white space."""
    parts = byte_tokenizer() if kind == "bytes" else word_tokenizer()
    special = [{"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, word in enumerate(SPECIAL)]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None, **parts,
    })
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16384,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    })


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def write(kind: str, folder: str | Path) -> Path:
    """Writes the model into folder (made if need be) and returns it."""
    folder = Path(folder)
    settings = config(kind)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings)
    write_weights(kind, folder / "model.safetensors")
    if kind in ("demo", "bytes"):
        write_tokenizer(kind, folder)
    return folder


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        print(f"usage: tiny_model.py {'|'.join(KINDS)} DIR", file=sys.stderr)
        return 2
    write(sys.argv[1], sys.argv[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
