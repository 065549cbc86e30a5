from __future__ import annotations

import numpy as np

from rapshee_engine.engine.output_processor import Completion, StepRows
from rapshee_engine.engine.request import Request, RequestStatus
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.tokenizer.detokenizer import Detokenizer
from reference.fake_runner import FakeStepOutput, make_tokenizer

TOKENIZER = make_tokenizer()
EURO = TOKENIZER.encode("\u20ac")  # three tokens, one a byte


def completion(*stop: str) -> Completion:
    request = Request("r", [1], SamplingParams(stop=stop), max_tokens=9)
    return Completion(0, request, Detokenizer(TOKENIZER, stop=stop))


def push(target: Completion, token_ids: list[int]) -> None:
    for token_id in token_ids:
        target.request.token_ids.append(token_id)
        target.append(token_id, None)


def rows() -> StepRows:
    result = FakeStepOutput(
        token_ids=np.array([65, 65], np.int32),
        logprobs=np.array([-0.5, -3.0], np.float32),
        ranks=np.array([1, 9], np.int32),
        top_ids=np.array([[65, 66], [67, 68]], np.int32),
        top_logprobs=np.array([[-0.5, -1.0], [-0.25, -2.0]], np.float32),
    )
    return StepRows(result, TOKENIZER)


def test_the_own_token_comes_first_and_only_once() -> None:
    entries = rows().logprobs(0, 2)
    assert [(t, e.logprob, e.rank) for t, e in entries.items()] == [(65, -0.5, 1), (66, -1.0, 2)]


def test_an_unlikely_token_comes_beside_the_likely_ones() -> None:
    entries = rows().logprobs(1, 2)
    assert [(t, e.rank) for t, e in entries.items()] == [(65, 9), (67, 1), (68, 2)]


def test_no_more_than_asked_for() -> None:
    assert list(rows().logprobs(1, 0)) == [65]
    assert list(rows().logprobs(1, 1)) == [65, 67]


def test_half_a_character_is_held_back() -> None:
    target = completion()
    push(target, EURO[:2])
    output = target.output(RequestOutputKind.DELTA)
    assert (output.text, output.token_ids) == ("", EURO[:2])
    push(target, EURO[2:])
    output = target.output(RequestOutputKind.DELTA)
    assert (output.text, output.token_ids, output.num_tokens) == ("\u20ac", EURO[2:], 3)


def test_what_is_held_back_comes_out_at_the_end() -> None:
    target = completion("xyz")
    push(target, TOKENIZER.encode("axy"))
    assert target.output(RequestOutputKind.DELTA).text == "a"
    target.request.status = RequestStatus.LENGTH
    last = target.output(RequestOutputKind.DELTA)
    assert (last.text, last.token_ids, last.finish_reason) == ("xy", [], "length")


def test_a_stop_string_is_the_reason_to_stop() -> None:
    target = completion("xy")
    push(target, TOKENIZER.encode("axy"))
    assert target.stop_string == "xy"
    target.request.status = RequestStatus.STOPPED
    output = target.output(RequestOutputKind.CUMULATIVE)
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "xy")


def test_cumulative_outputs_repeat_and_deltas_do_not() -> None:
    target = completion()
    push(target, TOKENIZER.encode("ab"))
    assert [target.output(RequestOutputKind.CUMULATIVE).text for _ in "12"] == ["ab", "ab"]
    assert target.output(RequestOutputKind.DELTA).text == ""
