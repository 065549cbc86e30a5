"""How many KV blocks each group of layers gets."""

from __future__ import annotations

from collections.abc import Sequence

from rapshee_engine.config import EngineConfig

__all__ = ["share_memory", "wanted_blocks"]


def wanted_blocks(config: EngineConfig, window: int, *, max_model_len: int, block_size: int) -> int:
    """Blocks with which a group of that window (0: everything is seen) never runs short.

    Without a window that is ``max_num_seqs`` full contexts. With one, a sequence holds the
    ``window - 1`` tokens before its oldest token in flight, and the tokens in flight; cut at any
    place, these runs lie in at most ``blocks(window - 1) + 2`` blocks, and one for each whole block
    of tokens in flight, of which all sequences together have two steps' at most. Admission wants
    another one to spare for each. The prefix cache gets as much again for the windows of sequences
    that have ended.
    """

    def blocks(num_tokens: int) -> int:
        return -(-num_tokens // block_size)

    contexts = config.max_num_seqs * blocks(max_model_len)
    if not window:
        return contexts
    wanted = config.max_num_seqs * (blocks(window - 1) + 3)
    wanted += blocks(2 * config.max_num_batched_tokens)
    return min(contexts, wanted * (2 if config.enable_prefix_caching else 1))


def share_memory(memory: int, block_bytes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Blocks of each group that fit ``memory`` bytes together: equally many, as each token takes
    its place in every group, but of none more than it wants."""
    num_blocks = [0] * len(wanted)
    groups = sorted(range(len(wanted)), key=lambda group: wanted[group])
    for index, group in enumerate(groups):
        equal = memory // sum(block_bytes[g] for g in groups[index:])
        num_blocks[group] = min(wanted[group], equal)
        memory -= num_blocks[group] * block_bytes[group]
    return num_blocks
