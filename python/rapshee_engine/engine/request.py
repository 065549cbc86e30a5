"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

from enum import Enum

from rapshee_engine.sampling_params import SamplingParams

__all__ = ["Request", "RequestStatus"]


class RequestStatus(Enum):
    """Where a request stands. The value of a finished one is its finish reason."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPED = "stop"
    LENGTH = "length"
    ABORTED = "abort"
    FAILED = "error"

    @property
    def is_finished(self) -> bool:
        return self not in (RequestStatus.WAITING, RequestStatus.RUNNING)


class Request:
    """A prompt and what was generated from it. ``n`` completions are ``n`` requests.

    The scheduler owns every field below ``leader``; others read them.

    Attributes:
        token_ids: prompt, then generated tokens whose step was collected.
        max_tokens: most tokens to generate, resolved; 0: only the prompt is computed.
        seed: 0 <= seed < 2**64.
        stop_token_ids: tokens that end it, end-of-sequence included unless ignored.
        use_prefix_cache: whether cached blocks may stand for its prompt; prompt log-probabilities
            need every prompt row computed.
        leader: a request with the same prompt that arrived before; while it computes the prompt
            this one waits, to find the blocks in the prefix cache.
        arrival: position in the order of arrival.
        stop_reason: stop string or stop token that ended it; None for end-of-sequence.
        block_tables: for each group of layers, the physical block of each logical block; -1 where
            it was given back, as no window reaches it any more. Empty while not running.
        num_dropped_blocks: for each group, how many of them, all at the start.
        block_digests: chained digest of each full block of ``token_ids``, as far as computed.
        num_hashed_blocks: leading blocks that were offered to the prefix cache.
        num_computed_tokens: tokens whose keys and values are written by a collected step or one
            in flight.
        num_collected_tokens: the part of them whose step was collected.
        num_cached_tokens: prompt tokens taken from the prefix cache at first admission.
        num_scored_tokens: prompt tokens whose log-probability was collected.
        num_pending_samples: drawn by steps in flight (at most one when a step is built).
        num_steps_in_flight: outstanding steps that hold it.
        slot: row of per-sequence state (batch columns, penalty counts) while running, else -1.
        admission: unique number of its current admission, -1 while not running.
    """

    __slots__ = (
        "adapter",
        "admission",
        "arrival",
        "block_digests",
        "block_tables",
        "cache_salt",
        "leader",
        "max_tokens",
        "num_cached_tokens",
        "num_collected_tokens",
        "num_computed_tokens",
        "num_dropped_blocks",
        "num_hashed_blocks",
        "num_pending_samples",
        "num_preemptions",
        "num_prompt_tokens",
        "num_scored_tokens",
        "num_steps_in_flight",
        "request_id",
        "sampling_params",
        "seed",
        "slot",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
        "use_prefix_cache",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        max_tokens: int,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        cache_salt: str = "",
        adapter: int = -1,
        leader: Request | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling_params = sampling_params
        self.max_tokens = max_tokens
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.cache_salt = cache_salt
        self.adapter = adapter
        self.use_prefix_cache = sampling_params.prompt_logprobs is None
        self.leader = leader
        self.arrival = -1
        self.status = RequestStatus.WAITING
        self.stop_reason: str | int | None = None
        self.block_tables: list[list[int]] = []
        self.num_dropped_blocks: list[int] = []
        self.block_digests: list[bytes] = []
        self.num_hashed_blocks = 0
        self.num_computed_tokens = 0
        self.num_collected_tokens = 0
        self.num_cached_tokens = 0
        self.num_scored_tokens = 0
        self.num_pending_samples = 0
        self.num_steps_in_flight = 0
        self.num_preemptions = 0
        self.slot = -1
        self.admission = -1

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those that steps in flight will have drawn included."""
        return len(self.token_ids) + self.num_pending_samples

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens that wait to be computed. Nothing follows the last one that may be drawn, so it is
        none of them."""
        most = self.num_prompt_tokens + max(self.max_tokens - 1, 0)
        return min(self.num_tokens, most) - self.num_computed_tokens
