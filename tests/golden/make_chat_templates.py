"""Writes ``chat_tokenizers/`` and ``chat_templates.json``: small vocabularies, chats, and the token
ids that `transformers` gives for them.

Run ``python tests/golden/make_chat_templates.py`` with the ``oracle`` extra installed (torch is not
needed for this one).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "You are a helpful assistant. Answer the question of the user in a few short sentences.",
    "def main(arguments):\n    for argument in arguments:\n        print(argument)\n",
    "What is the capital of France? The capital of France is Paris, which it has been for long.",
    "system user assistant tool message content name start end of turn header instruction",
    "Grüße aus München, where the café serves naïve crêpes; it doesn't close and we'll go there.",
    "1 2 3 10 42 100 1999 2024 3.14159 and 1,000,000 are numbers, some larger than others.",
]

# SmolLM2's own, from its checkpoint.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
INSTRUCT = """\
{%- if messages[0].role == 'system' %}
    {%- set ns = namespace(system=messages[0].content ~ '\n\n') %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set ns = namespace(system='') %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + ns.system + turn.content + ' [/INST]' }}
        {%- set ns.system = '' %}
    {%- elif turn.role == 'assistant' %}
        {%- generation %}{{- ' ' + turn.content.strip() + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('only user and assistant take turns') }}
    {%- endif %}
{%- endfor %}
"""
LINES = """\
{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
{{ '<|' + message['role'] + '|>' }}
{% if message['role'] == 'assistant' and '</think>' in message['content'] %}
{{ message['content'].split('</think>')[-1].lstrip('\n') }}
{% else %}
{{ message['content'] }}{% endif %}
{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "lines": LINES}

CONTENTS = [
    "Hello, how are you?",
    "",
    "   leading and trailing   ",
    "\n\nline\n  indented\r\n\ttab\n\n\n",
    "Grüße 😀👩\u200d👩\u200d👧 日本語 e\u0301 ½Ⅷ٣ \U00012000",
    "a < b and c > d, <b>bold</b>, [x], [[y]], <|, |>, <|im_, _end|>",
    "I'LL we'll don't 12345 3.14  1,000",
    "<think>\nhidden\n</think>\n\nshown </think> twice",
    "user-defined: <tool> and <tool>s and < tool>",
    "\u00a0\u2003\u200b\ufeff zero\x00byte \ue000\U000f0000 private",
    "{{ 7 * 7 }} {% raw %} {# not a comment #}",
    "\\n \\u00e9 \"quoted\" 'single' `code`",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE vocabulary in the manner of SmolLM2 and Llama 3."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>"]
    special += ["[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True, lstrip=True, rstrip=True)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A vocabulary in the manner of Llama 2 and Mistral: ``▁`` for spaces, bytes as ``<0xNN>``."""
    words = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = words
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {name: index for index, name in enumerate(names)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def chats() -> list[list[dict[str, Any]]]:
    """Every content in every role, then conversations of several turns."""
    roles = ("user", "system", "assistant")
    single = [
        [{"role": role, "content": content}]
        if role == "user"
        else [{"role": role, "content": content}, {"role": "user", "content": "Go on."}]
        for content in CONTENTS
        for role in roles[:2]
    ]
    long = [
        [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
        for contents in (CONTENTS[:5], CONTENTS[5:10], CONTENTS[7:], CONTENTS[::-2])
    ]
    return single + long


def main() -> None:
    cases = []
    names = {
        "byte_level": ("<|endoftext|>", "<|im_end|>", byte_level()),
        "byte_fallback": ("<s>", "</s>", byte_fallback()),
    }
    for name, (bos, eos, tokenizer) in names.items():
        folder = HERE / "chat_tokenizers" / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        for template, source in TEMPLATES.items():
            for index, messages in enumerate(chats()):
                ids = reference.apply_chat_template(
                    messages,
                    chat_template=source,
                    add_generation_prompt=index % 3 != 0,
                    return_dict=False,
                )
                cases.append([name, template, index % 3 != 0, messages, ids])
    golden = {
        "transformers": transformers.__version__,
        "templates": TEMPLATES,
        "fields": ["tokenizer", "template", "add_generation_prompt", "messages", "ids"],
        "cases": cases,
    }
    lines = json.dumps(golden, separators=(",", ":")).replace('],["byte', '],\n["byte')
    (HERE / "chat_templates.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
