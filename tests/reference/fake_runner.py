"""A runner without a model: its next token depends on everything that a real one would read.

Keys and values are stand-ins, (token, position) a slot. Each step writes them by ``slot_mapping``
and reads histories, or what a group's window shows of them, back through ``block_tables`` and
``seq_lens``, so a wrong table, slot, position or length, a block that is reused too early or a
prefix that never was computed is an `AssertionError` or another text. Steps are executed when they
are collected, in order: nothing can be read early. What depends on a failed step is `_POISONED`, a
token that nobody may accept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.batch_builder import StepInput
from rapshee_engine.engine.engine import Engine
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.errors import EngineDeadError
from rapshee_engine.tokenizer.chat_template import ChatTemplate
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary

__all__ = [
    "CHAT_TEMPLATE",
    "EOS",
    "FakeRunner",
    "FakeStepOutput",
    "greedy_continuation",
    "make_engine",
    "make_library_tokenizer",
    "make_tokenizer",
]

EOS = 256
VOCAB_SIZE = 258
_UNWRITTEN = -1
_POISONED = -2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """One token a byte, then ``<|end|>`` (end of sequence) and ``<|start|>``."""
    vocabulary = LibraryVocabulary(make_library_tokenizer(), "test")
    return Tokenizer(vocabulary, eos_token="<|end|>", eos_token_ids=[EOS])


def make_library_tokenizer() -> tokenizers.Tokenizer:
    """What `make_tokenizer` consists of; a checkpoint's folder holds it as ``tokenizer.json``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens(
        [AddedToken("<|end|>", special=True), AddedToken("<|start|>", special=True)]
    )
    return hf


def make_engine(
    *,
    num_blocks: int | Sequence[int] = 64,
    windows: Sequence[int] = (0,),
    block_size: int = 4,
    max_position: int = 64,
    has_chat_template: bool = True,
    is_asynchronous: bool = False,
    **options: Any,
) -> Engine:
    """An engine on a `FakeRunner`; ``options`` are those of `EngineConfig`."""
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 32, **options}
    config = EngineConfig(model="fake", **options)
    runner = FakeRunner(
        num_blocks=num_blocks,
        windows=windows,
        block_size=block_size,
        max_num_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        is_asynchronous=is_asynchronous,
    )
    return Engine(
        config,
        runner,
        make_tokenizer(),
        max_position=max_position,
        chat_template=ChatTemplate(CHAT_TEMPLATE) if has_chat_template else None,
    )


@dataclass(frozen=True, slots=True)
class FakeStepOutput:
    """As ``_core.StepOutput``."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


@dataclass(slots=True)
class _Step:
    """A launched step. ``previous``: the one in flight at its launch."""

    ticket: int
    arrays: dict[str, npt.NDArray[Any]]
    previous: _Step | None
    masks: npt.NDArray[np.uint32] | None = None
    token_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(slots=True)
class _SetState:
    slot: int
    token_ids: list[int]
    num_prompt_tokens: int


class FakeRunner:
    """See the module.

    Attributes:
        launch_errors, collect_errors: ticket -> what launching or collecting it raises. An
            `EngineDeadError` kills the runner.
        unsamplable_seeds: rows of these seeds draw -1, as rows do whose logits are not finite.
        num_launches: tickets given out or refused.
        batch_sizes: sequences of each launched step.
    """

    def __init__(
        self,
        *,
        num_blocks: int | Sequence[int],
        block_size: int,
        windows: Sequence[int] = (0,),
        max_num_tokens: int = 32,
        max_num_seqs: int = 8,
        vocab_size: int = VOCAB_SIZE,
        is_asynchronous: bool = False,
    ) -> None:
        counts = [num_blocks] * len(windows) if isinstance(num_blocks, int) else num_blocks
        self.kv_groups = tuple(KVGroup(n, w) for n, w in zip(counts, windows, strict=True))
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.is_asynchronous = is_asynchronous
        self.identity = "fake"
        self.is_closed = False
        self.launch_errors: dict[int, Exception] = {}
        self.collect_errors: dict[int, Exception] = {}
        self.unsamplable_seeds: set[int] = set()
        self.num_launches = 0
        self.batch_sizes: list[int] = []
        self._max_num_tokens = max_num_tokens
        self._max_num_seqs = max_num_seqs
        self._is_dead = False
        slots = (len(windows), max(counts) * block_size)
        self._tokens = np.full(slots, _UNWRITTEN, np.int32)
        self._positions = np.full(slots, _UNWRITTEN, np.int32)
        self._states: dict[int, _SetState] = {}
        self._queue: deque[_Step | _SetState] = deque()

    # The seam

    def launch(self, step_input: StepInput) -> int:
        ticket = self.num_launches
        self.num_launches += 1
        self._require_alive()
        if ticket in self.launch_errors:
            raise self._failure(self.launch_errors[ticket])
        in_flight = self._in_flight()
        assert len(in_flight) < 2, "more than two tickets are outstanding"
        arrays = {name: array.copy() for name, array in step_input.as_arguments().items()}
        _check_arrays(step_input.as_arguments(), self)
        for other in in_flight:
            self._check_no_reuse(arrays, other.arrays)
        self._queue.append(_Step(ticket, arrays, in_flight[-1] if in_flight else None))
        self.batch_sizes.append(len(arrays["seq_lens"]))
        return ticket

    def set_masks(self, ticket: int, masks: npt.NDArray[np.uint32]) -> None:
        step = next(step for step in self._in_flight() if step.ticket == ticket)
        assert masks.dtype == np.uint32
        assert masks.shape == (step.arrays["needs_mask"].sum(), -(-self.vocab_size // 32))
        step.masks = masks.copy()

    def set_state(
        self, slot: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int
    ) -> None:
        self._require_alive()
        assert 0 <= slot < self._max_num_seqs
        assert token_ids.dtype == np.int32
        self._queue.append(_SetState(slot, token_ids.tolist(), num_prompt_tokens))

    def collect(self, ticket: int) -> FakeStepOutput:
        self._require_alive()
        while isinstance(self._queue[0], _SetState):
            state = self._queue.popleft()
            self._states[state.slot] = state
        step = self._queue.popleft()
        assert step.ticket == ticket, "collected out of order"
        if ticket in self.collect_errors:
            self._poison(step)
            raise self._failure(self.collect_errors[ticket])
        return self._execute(step)

    def close(self) -> None:
        self.is_closed = True

    # Execution

    def _execute(self, step: _Step) -> FakeStepOutput:
        a = step.arrays
        token_ids = a["token_ids"].copy()
        pending = token_ids < 0
        if pending.any():
            assert step.previous is not None, "refers to a step that is not in flight"
            token_ids[pending] = step.previous.token_ids[~token_ids[pending]]
        for group, slots in enumerate(a["slot_mapping"]):
            written = slots >= 0
            self._tokens[group, slots[written]] = token_ids[written]
            self._positions[group, slots[written]] = a["positions"][written]
        histories = [
            [self._history(a, group, s) for group in range(len(self.kv_groups))]
            for s in range(len(a["seq_lens"]))
        ]
        output = self._sample(step, histories)
        step.token_ids = output.token_ids
        step.previous = None
        return output

    def _first_seen(self, a: Mapping[str, npt.NDArray[Any]], group: int, s: int) -> int:
        """The first position that the group's window shows to a query of the step."""
        window, first_query = self.kv_groups[group].window, a["query_start_loc"][s]
        return max(0, int(a["positions"][first_query]) + 1 - window) if window else 0

    def _history(
        self, a: Mapping[str, npt.NDArray[Any]], group: int, s: int
    ) -> npt.NDArray[np.int32]:
        """Tokens by position; those that nobody sees are not read."""
        positions = np.arange(self._first_seen(a, group, s), a["seq_lens"][s])
        blocks = a["block_tables"][group, s][positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        stored = self._positions[group, slots]
        history = np.full(a["seq_lens"][s], _UNWRITTEN, np.int32)
        history[positions] = self._tokens[group, slots]
        assert (blocks >= 0).all(), "the table lacks blocks"
        if (stored == _POISONED).any() or (history == _POISONED).any():
            return np.full_like(history, _POISONED)
        assert np.array_equal(stored, positions), f"sequence {s} reads positions {stored.tolist()}"
        return history

    def _sample(self, step: _Step, histories: list[list[npt.NDArray[np.int32]]]) -> FakeStepOutput:
        a = step.arrays
        masks = iter(()) if step.masks is None else iter(step.masks)
        num_rows, width = len(a["sample_rows"]), int(a["num_logprobs"].max(initial=0))
        output = FakeStepOutput(
            token_ids=np.empty(num_rows, np.int32),
            logprobs=np.empty(num_rows, np.float32),
            ranks=np.zeros(num_rows, np.int32),
            top_ids=np.full((num_rows, width), -1, np.int32),
            top_logprobs=np.full((num_rows, width), -np.inf, np.float32),
        )
        for r, row in enumerate(a["sample_rows"].tolist()):
            s = int(np.searchsorted(a["query_start_loc"], row, side="right")) - 1
            end = int(a["positions"][row]) + 1
            if any(history[-1] == _POISONED for history in histories[s]):
                output.token_ids[r] = _POISONED
                continue
            if int(a["seed"][r]) in self.unsamplable_seeds:
                output.token_ids[r], output.logprobs[r] = -1, np.nan
                continue
            windows = [group.window for group in self.kv_groups]
            seen = [
                h[max(0, end - (w or end)) : end]
                for w, h in zip(windows, histories[s], strict=True)
            ]
            logits = _logits(seen, self.vocab_size)
            token_id = int(a["target_ids"][r])
            if token_id < 0:
                mask = next(masks) if a["needs_mask"][r] else None
                token_id = self._draw(
                    a, r, logits, max(map(np.ndarray.tolist, seen), key=len), mask
                )
            logprobs = logits - np.log(np.exp(logits).sum())
            top = np.argsort(-logprobs, kind="stable")
            count = int(a["num_logprobs"][r])
            output.token_ids[r] = token_id
            output.logprobs[r] = logprobs[token_id]
            if count or a["target_ids"][r] >= 0:
                output.ranks[r] = 1 + int((logprobs > logprobs[token_id]).sum())
            output.top_ids[r, :count] = top[:count]
            output.top_logprobs[r, :count] = logprobs[top[:count]]
        return output

    def _draw(
        self,
        a: Mapping[str, npt.NDArray[Any]],
        r: int,
        logits: npt.NDArray[np.float64],
        history: list[int],
        mask: npt.NDArray[np.uint32] | None,
    ) -> int:
        logits = logits.copy()
        bias = slice(a["bias_indptr"][r], a["bias_indptr"][r + 1])
        np.add.at(logits, a["bias_ids"][bias], a["bias_values"][bias])
        slot = int(a["state_slot"][r])
        if slot >= 0:
            state = self._states[slot]
            counted = state.token_ids[-len(history) :]
            assert counted == history, f"slot {slot} counts other tokens than were read"
            for token in set(state.token_ids[state.num_prompt_tokens :]):
                logits[token] -= a["presence_penalty"][r]
        if a["temperature"][r] > 0:
            key = blake2b(f"{a['seed'][r]} {a['draw_index'][r]}".encode(), digest_size=8)
            noise = np.random.Generator(np.random.Philox(int.from_bytes(key.digest(), "little")))
            logits = logits / a["temperature"][r] + noise.gumbel(size=len(logits))
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size]
            logits[bits == 0] = -np.inf
        token_id = int(np.argmax(logits))
        if slot >= 0:
            self._states[slot].token_ids.append(token_id)
        return token_id

    # Checks and failures

    def _in_flight(self) -> list[_Step]:
        return [item for item in self._queue if isinstance(item, _Step)]

    def _check_no_reuse(
        self, new: Mapping[str, npt.NDArray[Any]], old: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """A block that a step in flight reads may only be written behind what that step sees."""
        for group, tables in enumerate(old["block_tables"].tolist()):
            seen: dict[int, int] = {}
            for s, (table, seq_len) in enumerate(zip(tables, old["seq_lens"], strict=True)):
                first = self._first_seen(old, group, s) // self.block_size
                for block in table[first : -(-int(seq_len) // self.block_size)]:
                    seen[block] = max(seen.get(block, 0), int(seq_len))
            blocks = (new["slot_mapping"][group] // self.block_size).tolist()
            for block, position in zip(blocks, new["positions"].tolist(), strict=True):
                assert position >= seen.get(block, 0), f"block {block} is reused while in flight"

    def _poison(self, step: _Step) -> None:
        """What a failed step has written is worth nothing, nor is what follows from it."""
        for group, slots in enumerate(step.arrays["slot_mapping"]):
            self._positions[group, slots] = _POISONED
        step.token_ids = np.full(len(step.arrays["sample_rows"]), _POISONED, np.int32)

    def _failure(self, error: Exception) -> Exception:
        self._is_dead = isinstance(error, EngineDeadError)
        return error

    def _require_alive(self) -> None:
        if self._is_dead or self.is_closed:
            raise EngineDeadError("the fake device is gone")


def greedy_continuation(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    vocab_size: int,
    stop: int,
    presence_penalty: float = 0.0,
    windows: Sequence[int] = (0,),
) -> list[int]:
    """What greedy sampling gives for a prompt that is alone, up to and with ``stop``."""
    history = list(prompt)
    for _ in range(max_tokens):
        seen = [np.array(history[-window:], np.int32) for window in windows]
        logits = _logits(seen, vocab_size)
        for token in set(history[len(prompt) :]):
            logits[token] -= np.float32(presence_penalty)
        history.append(int(np.argmax(logits)))
        if history[-1] == stop:
            break
    return history[len(prompt) :]


def _logits(seen: Sequence[npt.NDArray[np.int32]], vocab_size: int) -> npt.NDArray[np.float64]:
    """``seen``: what each group of layers sees of the tokens so far."""
    key = blake2b(b"".join(tokens.tobytes() for tokens in seen), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
    return 2.0 * generator.standard_normal(vocab_size)


_DTYPES = {
    "slot_mapping": np.int64,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "bias_values": np.float32,
    "seed": np.uint64,
    "draw_index": np.uint32,
    "needs_mask": np.uint8,
}
_BY_TOKEN = ("token_ids", "positions")
_NOT_BY_ROW = (
    *_BY_TOKEN,
    "slot_mapping",
    "query_start_loc",
    "seq_lens",
    "block_tables",
    "bias_indptr",
    "bias_ids",
    "bias_values",
)


def _check_arrays(a: Mapping[str, npt.NDArray[Any]], runner: FakeRunner) -> None:
    """What the native runner checks."""
    for name, array in a.items():
        assert array.dtype == _DTYPES.get(name, np.int32), f"{name} is {array.dtype}"
        assert array.flags.c_contiguous, f"{name} is not contiguous"
    num_tokens, num_seqs, num_rows = (
        len(a[name]) for name in ("token_ids", "seq_lens", "sample_rows")
    )
    assert 0 < num_tokens <= runner._max_num_tokens
    assert 0 < num_seqs <= runner._max_num_seqs
    assert all(len(a[name]) == num_tokens for name in _BY_TOKEN)
    assert all(len(a[name]) == num_rows for name in a if name not in _NOT_BY_ROW)
    assert len(a["query_start_loc"]) == num_seqs + 1
    assert len(a["bias_indptr"]) == num_rows + 1
    assert a["bias_indptr"][-1] == len(a["bias_ids"]) == len(a["bias_values"])
    assert a["slot_mapping"].shape == (len(runner.kv_groups), num_tokens)
    assert a["block_tables"].shape[:2] == (len(runner.kv_groups), num_seqs)
    for group, tables in zip(runner.kv_groups, a["block_tables"], strict=True):
        assert tables.max() < group.num_blocks
    lens = np.diff(a["query_start_loc"])
    assert (lens > 0).all()
    assert (np.diff((lens > 1).astype(int)) >= 0).all(), "one-token sequences come first"
    last = a["query_start_loc"][1:] - 1
    assert np.array_equal(a["positions"][last] + 1, a["seq_lens"])
    assert a["token_ids"].max(initial=0) < runner.vocab_size
