"""Makes ``smollm2.npz``: greedy continuations and their log-probabilities, by transformers in
float32 on the dequantised weights of a llama GGUF file.

Run from the root of the repository, after ``pip install '.[oracle]'``:

    PYTHONPATH=tests python -m golden.make_smollm2 SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rapshee_engine.weights.gguf import GGUFFile, read_gguf
from reference.golden import GOLDEN_FOLDER
from reference.quant import decode

NUM_GENERATED = 64
NUM_TOP = 8
CONTROL = 3  # tokenizer.ggml.token_type

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build_model(gguf: GGUFFile) -> LlamaForCausalLM:
    m = gguf.metadata
    config = LlamaConfig(
        vocab_size=gguf.tensors["token_embd.weight"].shape[0],
        hidden_size=m["llama.embedding_length"],
        intermediate_size=m["llama.feed_forward_length"],
        num_hidden_layers=m["llama.block_count"],
        num_attention_heads=m["llama.attention.head_count"],
        num_key_value_heads=m["llama.attention.head_count_kv"],
        max_position_embeddings=m["llama.context_length"],
        rms_norm_eps=m["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=m["llama.rope.freq_base"],
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attn_implementation="eager",
        # Continuations go on past the end of a text.
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(read_weights(gguf, config), strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert (missing, unexpected) == (tied, [])
    return model.float().eval()


def read_weights(gguf: GGUFFile, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Dequantised weights under transformers' names, Q and K rows in its order."""
    data = np.memmap(gguf.path, mode="r")
    weights = {}
    for info in gguf.tensors.values():
        raw = data[info.offset : info.offset + info.nbytes].tobytes()
        values = decode(raw, info.dtype, info.shape)
        if ".attn_q." in info.name:
            values = rotate_halves(values, config.num_attention_heads)
        elif ".attn_k." in info.name:
            values = rotate_halves(values, config.num_key_value_heads)
        weights[hf_name(info.name)] = torch.from_numpy(np.ascontiguousarray(values))
    return weights


def rotate_halves(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """From neighbouring rows that rotate together to rows half a head apart."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def hf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("blk."):
        _, index, layer_module = module.split(".")
        return f"model.layers.{index}.{LAYER_NAMES[layer_module]}.{kind}"
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    return f"{names[module]}.{kind}"


def build_tokenizer(metadata: Any) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE; ``smollm`` splits digits one by one."""
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(control)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = metadata["tokenizer.chat_template"]
    return wrapped


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: dict[str, Any]) -> list[int]:
    text = prompt["text"]
    if prompt["chat"]:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate(model: LlamaForCausalLM, prompt_ids: list[int]) -> list[int]:
    """Greedy continuation, past end-of-sequence tokens."""
    options = GenerationConfig(do_sample=False, max_new_tokens=NUM_GENERATED, eos_token_id=None)
    prompt = torch.tensor([prompt_ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
    return list(out[0, len(prompt_ids) :].tolist())


def score(model: LlamaForCausalLM, prompt_ids: list[int], token_ids: list[int]) -> dict[str, Any]:
    """Teacher-forced log-probabilities, from one pass over everything."""
    everything = torch.tensor(prompt_ids + token_ids)
    logits = model(everything[None, :-1], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, everything[1:, None])[:, 0]
    first = len(prompt_ids) - 1
    top_logits = logits[first:].topk(2).values
    top_logprobs, top_ids = logprobs[first:].topk(NUM_TOP)
    return {
        "prompt_logprobs": chosen[:first].numpy(),
        "logprobs": chosen[first:].numpy(),
        "argmax_ids": logits[first:].argmax(dim=-1).numpy().astype(np.int32),
        "margins": (top_logits[:, 0] - top_logits[:, 1]).numpy(),
        "top_ids": top_ids.numpy().astype(np.int32),
        "top_logprobs": top_logprobs.numpy(),
    }


@torch.inference_mode()
def main(path: Path) -> None:
    torch.set_num_threads(2)
    gguf = read_gguf(path)
    model, tokenizer = build_model(gguf), build_tokenizer(gguf.metadata)
    prompts = json.loads((GOLDEN_FOLDER / "smollm2_prompts.json").read_text())
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    token_ids = [generate(model, ids) for ids in prompt_ids]
    scores = [score(model, *pair) for pair in zip(prompt_ids, token_ids, strict=True)]
    for prompt, ids in zip(prompts, token_ids, strict=True):
        print(f"{prompt['text'][:40]!r} -> {tokenizer.decode(ids)!r}")
    arrays = {key: np.stack([s[key] for s in scores]) for key in scores[0] if key[:6] != "prompt"}
    np.savez_compressed(
        GOLDEN_FOLDER / "smollm2.npz",
        prompt_ids=np.concatenate(prompt_ids).astype(np.int32),
        prompt_lengths=np.array([len(ids) for ids in prompt_ids], dtype=np.int32),
        prompt_logprobs=np.concatenate([s["prompt_logprobs"] for s in scores]),
        token_ids=np.array(token_ids, dtype=np.int32),
        **arrays,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
