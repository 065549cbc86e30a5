"""A scheduled step as the flat arrays that the runner takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from rapshee_engine.engine.request import Request
from rapshee_engine.engine.scheduler import ScheduledSequence, ScheduledStep

__all__ = ["Batch", "BatchBuilder", "StepInput"]

_TABLE_ALIGNMENT = 8
"""Block tables are this many blocks wide, or a multiple: their shape rarely changes then."""

_FIRST_TABLE_WIDTH = 1024
"""Blocks that tables have room for at first."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """The arguments of ``ModelRunner.launch``; shapes and meaning are documented there. Valid until
    the next step is built."""

    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int64]
    query_start_loc: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    sample_rows: npt.NDArray[np.int32]
    target_ids: npt.NDArray[np.int32]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    repetition_penalty: npt.NDArray[np.float32]
    presence_penalty: npt.NDArray[np.float32]
    frequency_penalty: npt.NDArray[np.float32]
    seed: npt.NDArray[np.uint64]
    draw_index: npt.NDArray[np.uint32]
    num_logprobs: npt.NDArray[np.int32]
    state_slot: npt.NDArray[np.int32]
    bias_indptr: npt.NDArray[np.int32]
    bias_ids: npt.NDArray[np.int32]
    bias_values: npt.NDArray[np.float32]
    needs_mask: npt.NDArray[np.uint8]

    def as_arguments(self) -> dict[str, npt.NDArray[Any]]:
        """Field name -> array."""
        return {name: getattr(self, name) for name in _FIELD_NAMES}


_FIELD_NAMES = tuple(field.name for field in fields(StepInput))


@dataclass(frozen=True, slots=True)
class Batch:
    """A step to launch.

    Attributes:
        step_input: the arrays.
        masks: u32 [n, ceil(V / 32)], for the rows with ``needs_mask``; None where there are none.
    """

    step_input: StepInput
    masks: npt.NDArray[np.uint32] | None


class BatchBuilder:
    """Builds steps from columns that persist.

    What belongs to a request (its sampling options, its block table) is written into the row of
    its slot when it is admitted; later only its new blocks are. A step gathers the rows of its
    slots, so the Python work a step is one short loop over its sequences. One more row, the last,
    holds the options of rows that score a prompt token and draw nothing.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int,
        num_kv_groups: int = 1,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._end_token_ids = end_token_ids
        self._columns = _Columns(max_num_seqs + 1)
        self._neutral_slot = max_num_seqs
        # Most sequences are far shorter than the context that a model claims to have.
        width = _aligned(min(max_blocks_per_seq, _FIRST_TABLE_WIDTH))
        self._max_blocks_per_seq = max_blocks_per_seq
        self._tables = np.full((num_kv_groups, max_num_seqs, width), -1, np.int32)
        self._table_lens = [0] * max_num_seqs
        self._num_dropped = [[0] * num_kv_groups for _ in range(max_num_seqs)]
        self._admissions = [-1] * max_num_seqs
        self._sample_rows = [-1] * max_num_seqs  # output row in the last step that sampled it
        self._biases: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = {}
        self._masks: dict[int, _Masks] = {}

    def build(self, step: ScheduledStep) -> Batch:
        """Arrays of ``step``, which was just scheduled."""
        for sequence in step.sequences:
            self._update_slot(sequence)
        rows = _Rows()
        for sequence in step.sequences:
            self._add_rows(rows, sequence)
        tokens = self._token_arrays(step, rows)
        slots = np.array(rows.slots, np.intp)
        needs_mask = self._needs_mask(rows)
        step_input = StepInput(
            **tokens,
            sample_rows=np.array(rows.sample_rows, np.int32),
            target_ids=np.array(rows.target_ids, np.int32),
            draw_index=np.array(rows.draw_index, np.uint32),
            needs_mask=needs_mask,
            **self._columns.gather(slots),
            **self._bias_arrays(slots),
        )
        if rows.num_logprobs:  # rows that score prompt tokens
            for row, num_logprobs in rows.num_logprobs.items():
                step_input.num_logprobs[row] = num_logprobs
        return Batch(step_input, self._mask_rows(rows, needs_mask))

    # Slots

    def _update_slot(self, sequence: ScheduledSequence) -> None:
        slot, request = sequence.slot, sequence.request
        if self._admissions[slot] != sequence.admission:
            self._admissions[slot] = sequence.admission
            self._fill_slot(slot, request)
        known, num_blocks = self._table_lens[slot], len(request.block_tables[0])
        if known != num_blocks:
            self._widen_tables(num_blocks)
            for group, table in enumerate(request.block_tables):
                self._tables[group, slot, known:num_blocks] = table[known:]
            self._table_lens[slot] = num_blocks
        if self._num_dropped[slot] != request.num_dropped_blocks:
            self._num_dropped[slot] = list(request.num_dropped_blocks)
            for group, num_dropped in enumerate(request.num_dropped_blocks):
                self._tables[group, slot, :num_dropped] = -1

    def _widen_tables(self, num_blocks: int) -> None:
        """Make room for a sequence of so many blocks, and then some."""
        old = self._tables
        if num_blocks > old.shape[-1]:
            width = _aligned(max(num_blocks, min(2 * old.shape[-1], self._max_blocks_per_seq)))
            self._tables = np.full((*old.shape[:-1], width), -1, np.int32)
            self._tables[..., : old.shape[-1]] = old

    def _fill_slot(self, slot: int, request: Request) -> None:
        params = request.sampling_params
        self._columns.fill(slot, request)
        self._tables[:, slot] = -1
        self._table_lens[slot] = 0
        self._biases.pop(slot, None)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int32)
            self._biases[slot] = (ids, np.fromiter(params.logit_bias.values(), np.float32))
        self._masks.pop(slot, None)
        if params.min_tokens or params.allowed_token_ids is not None:
            self._masks[slot] = _Masks.of(request, self._end_token_ids, self._vocab_size)

    # Rows of T and R

    def _add_rows(self, rows: _Rows, sequence: ScheduledSequence) -> None:
        request, start, offset = sequence.request, sequence.start, len(rows.token_ids)
        end = start + sequence.num_tokens
        if sequence.has_pending_input:
            rows.token_ids += request.token_ids[start : end - 1]
            rows.token_ids.append(~self._sample_rows[sequence.slot])
        else:
            rows.token_ids += request.token_ids[start:end]
        if sequence.num_scored:
            first = sequence.first_scored
            targets = request.token_ids[first + 1 : first + 1 + sequence.num_scored]
            num_logprobs = request.sampling_params.prompt_logprobs or 0
            for index, target in enumerate(targets, offset + first - start):
                rows.num_logprobs[len(rows.sample_rows)] = num_logprobs
                rows.add(index, target, 0, self._neutral_slot)
        if sequence.samples:
            self._sample_rows[sequence.slot] = len(rows.sample_rows)
            rows.add(len(rows.token_ids) - 1, -1, sequence.draw_index, sequence.slot)

    def _token_arrays(self, step: ScheduledStep, rows: _Rows) -> dict[str, npt.NDArray[Any]]:
        count = len(step.sequences)
        slots = np.fromiter((s.slot for s in step.sequences), np.intp, count)
        starts = np.fromiter((s.start for s in step.sequences), np.int32, count)
        lens = np.fromiter((s.num_tokens for s in step.sequences), np.int32, count)
        query_start_loc = np.zeros(count + 1, np.int32)
        np.cumsum(lens, out=query_start_loc[1:])
        token_ids = np.array(rows.token_ids, np.int32)
        positions = np.arange(len(token_ids), dtype=np.int32)
        positions += np.repeat(starts - query_start_loc[:-1], lens)
        blocks = self._tables[:, np.repeat(slots, lens), positions // self._block_size]
        slot_mapping = blocks.astype(np.int64) * self._block_size + positions % self._block_size
        longest = max(self._table_lens[s.slot] for s in step.sequences)
        width = _aligned(longest)
        return {
            "token_ids": token_ids,
            "positions": positions,
            "slot_mapping": np.ascontiguousarray(slot_mapping),
            "query_start_loc": query_start_loc,
            "seq_lens": starts + lens,
            "block_tables": np.ascontiguousarray(self._tables[:, slots, :width]),
        }

    # Bias and masks

    def _bias_arrays(self, slots: npt.NDArray[np.intp]) -> dict[str, npt.NDArray[Any]]:
        indptr = np.zeros(len(slots) + 1, np.int32)
        if not self._biases:
            return {
                "bias_indptr": indptr,
                "bias_ids": np.empty(0, np.int32),
                "bias_values": np.empty(0, np.float32),
            }
        biases = [self._biases.get(slot, _NO_BIAS) for slot in slots.tolist()]
        np.cumsum([len(ids) for ids, _ in biases], out=indptr[1:])
        return {
            "bias_indptr": indptr,
            "bias_ids": np.concatenate([_NO_BIAS[0], *(ids for ids, _ in biases)]),
            "bias_values": np.concatenate([_NO_BIAS[1], *(values for _, values in biases)]),
        }

    def _needs_mask(self, rows: _Rows) -> npt.NDArray[np.uint8]:
        needs_mask = np.zeros(len(rows.slots), np.uint8)
        if self._masks:
            for row, slot in enumerate(rows.slots):
                masks = self._masks.get(slot)
                needs_mask[row] = masks is not None and masks.at(rows.draw_index[row]) is not None
        return needs_mask

    def _mask_rows(
        self, rows: _Rows, needs_mask: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint32] | None:
        wanted = needs_mask.nonzero()[0].tolist()
        if not wanted:
            return None
        return np.stack([self._masks[rows.slots[r]].require(rows.draw_index[r]) for r in wanted])


_NO_BIAS = (np.empty(0, np.int32), np.empty(0, np.float32))


class _Rows:
    """Rows of T and R, collected sequence by sequence."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.sample_rows: list[int] = []
        self.target_ids: list[int] = []
        self.draw_index: list[int] = []
        self.slots: list[int] = []
        self.num_logprobs: dict[int, int] = {}  # of rows that score a prompt token

    def add(self, row: int, target_id: int, draw_index: int, slot: int) -> None:
        self.sample_rows.append(row)
        self.target_ids.append(target_id)
        self.draw_index.append(draw_index)
        self.slots.append(slot)


class _Columns:
    """Sampling options by slot, one array an option."""

    def __init__(self, count: int) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "temperature": np.zeros(count, np.float32),
            "top_k": np.zeros(count, np.int32),
            "top_p": np.ones(count, np.float32),
            "min_p": np.zeros(count, np.float32),
            "repetition_penalty": np.ones(count, np.float32),
            "presence_penalty": np.zeros(count, np.float32),
            "frequency_penalty": np.zeros(count, np.float32),
            "seed": np.zeros(count, np.uint64),
            "num_logprobs": np.zeros(count, np.int32),
            "state_slot": np.full(count, -1, np.int32),
        }

    def fill(self, slot: int, request: Request) -> None:
        params, arrays = request.sampling_params, self._arrays
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            arrays[name][slot] = getattr(params, name)
        arrays["top_k"][slot] = max(params.top_k, 0)
        arrays["seed"][slot] = request.seed
        # The chosen token's rank comes only with at least one alternative.
        arrays["num_logprobs"][slot] = 0 if params.logprobs is None else max(params.logprobs, 1)
        arrays["state_slot"][slot] = slot if params.uses_penalties else -1

    def gather(self, slots: npt.NDArray[np.intp]) -> dict[str, npt.NDArray[Any]]:
        return {name: column[slots] for name, column in self._arrays.items()}


@dataclass(frozen=True, slots=True)
class _Masks:
    """Allowed tokens of a request as bit words: before ``min_tokens``, and from then on."""

    min_tokens: int
    before: npt.NDArray[np.uint32]
    after: npt.NDArray[np.uint32] | None

    @classmethod
    def of(cls, request: Request, end_token_ids: frozenset[int], vocab_size: int) -> _Masks:
        params = request.sampling_params
        allowed = np.ones(vocab_size, np.bool_)
        if params.allowed_token_ids is not None:
            allowed[:] = False
            allowed[list(params.allowed_token_ids)] = True
        after = None if params.allowed_token_ids is None else _pack(allowed)
        allowed[list(end_token_ids | request.stop_token_ids)] = False
        return cls(params.min_tokens, _pack(allowed), after)

    def at(self, draw_index: int) -> npt.NDArray[np.uint32] | None:
        """The mask for drawing that generated token, None where all are allowed."""
        return self.before if draw_index < self.min_tokens else self.after

    def require(self, draw_index: int) -> npt.NDArray[np.uint32]:
        mask = self.at(draw_index)
        if mask is None:
            raise ValueError(f"token {draw_index} needs no mask")
        return mask


def _pack(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Bit ``t % 32`` of word ``t // 32`` is ``allowed[t]``."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
    padded[: len(allowed)] = allowed
    words: npt.NDArray[np.uint32] = np.packbits(padded, bitorder="little").view("<u4")
    return words


def _aligned(num_blocks: int) -> int:
    return -(-num_blocks // _TABLE_ALIGNMENT) * _TABLE_ALIGNMENT
