"""What counts as the same reply: against recorded replies that stand in for an endpoint."""

from math import inf
from typing import Any

import pytest

from loraport.serve.proof.together import Question, as_reply, ask_together, list_questions
from loraport.serve.proof.tolerance import TOLERANCES, tolerance_for
from loraport.serve.proof.verify import Recorded, Served, read_reply, replay, tells_apart
from loraport.train.manifest import Golden, Reply
from tests.test_serve_plan import manifest

PROMPT = [1, 2, 3]
EXACT, LOOSE = TOLERANCES["float32"], TOLERANCES["bfloat16"]


def reply(*tokens: int, logprob: float = -0.5, margin: float = 2.0, stopped: bool = True) -> Reply:
    count = len(tokens)
    return Reply(tokens=list(tokens), logprobs=[logprob] * count, margins=[margin] * count, text="x", stopped=stopped)


def outcome_of(served: Reply, expected: Reply, tolerance: Any = EXACT) -> Any:
    return replay(Recorded(served, len(PROMPT)), "demo", PROMPT, expected, tolerance)


def test_the_same_reply_agrees() -> None:
    found = outcome_of(reply(5, 6, 7), reply(5, 6, 7))
    assert found.agrees and (found.most, found.mean) == (0, 0)


@pytest.mark.parametrize("size", [0.005, 0.1])
def test_rounding_is_allowed_within_the_tolerance(size: float) -> None:
    served = reply(5, 6, 7).model_copy(update={"logprobs": [-0.5, -0.5 - size, -0.5]})
    assert outcome_of(served, reply(5, 6, 7), LOOSE).agrees
    assert outcome_of(served, reply(5, 6, 7), EXACT).agrees == (size < EXACT.most)


def test_a_small_difference_everywhere_is_another_adapter() -> None:
    found = outcome_of(reply(5, 6, 7, logprob=-0.6), reply(5, 6, 7), LOOSE)
    assert not found.agrees and found.most < LOOSE.most < found.mean * 4


def test_another_token_is_a_difference_unless_training_was_undecided() -> None:
    assert outcome_of(reply(5, 9, 7), reply(5, 6, 7)).at == 1
    assert outcome_of(reply(5, 9, 7, margin=0.005), reply(5, 6, 7, margin=0.005)).agrees
    undecided = {"margins": [2, 0.005, 2]}
    served, expected = (reply(*tokens).model_copy(update=undecided) for tokens in ((5, 9, 8), (5, 6, 7)))
    assert outcome_of(served, expected).at == 2


def test_a_reply_must_stop_where_it_stopped() -> None:
    assert outcome_of(reply(5, 6, 7, 8), reply(5, 6, 7)).at == 3
    assert outcome_of(reply(5, 6, 7, stopped=False), reply(5, 6, 7)).at == 3
    assert outcome_of(reply(5, 6), reply(5, 6, 7)).at == 2
    assert outcome_of(reply(5, 6, 7, 8), reply(5, 6, 7, stopped=False)).agrees


def test_replies_that_tell_apart() -> None:
    golden = Golden(messages=[], prompt_tokens=PROMPT, adapter=reply(5, 6), base=reply(5, 9))
    assert tells_apart(golden, EXACT)
    assert not tells_apart(golden.model_copy(update={"base": reply(5, 6)}), EXACT)
    assert tells_apart(golden.model_copy(update={"base": reply(5, 6, logprob=-2.0)}), LOOSE)


def test_the_coarser_type_sets_the_tolerance() -> None:
    assert tolerance_for(manifest(8), "float32") == EXACT
    assert tolerance_for(manifest(8), "bfloat16") == LOOSE
    assert tolerance_for(manifest(8, dtype="bfloat16"), "float32") == LOOSE
    assert tolerance_for(manifest(8, dtype="nf4"), "bfloat16") == TOLERANCES["nf4"]


def test_completions_are_read() -> None:
    choice = {"text": "hi", "finish_reason": "stop"}
    tops = [{"token_id:5": -0.1, "token_id:6": -3}, {"token_id:2": 0}]
    logprobs = {"tokens": ["token_id:5", "token_id:2"], "token_logprobs": [-0.1, 0], "top_logprobs": tops}
    read = read_reply(choice | {"logprobs": logprobs})
    assert read == Served((5, 2), ({5: -0.1, 6: -3.0}, {2: 0.0}), (-inf, -inf), "hi", True)
    assert (read.logprob(0, 6), read.logprob(1, 6)) == (-3.0, -inf)


def test_an_undecided_position_still_knows_the_recorded_token() -> None:
    """Where margins are small everywhere, any token could win; but not with another adapter's probabilities."""

    class Fixed:
        def ask(self, model: str, prompt: list[int], tokens: int) -> Served:
            return Served((9, 7), ({9: -0.5, 6: -0.55}, {7: -0.5}), (-inf, -inf), "y", False)

    undecided = reply(6, 7, margin=0.1, stopped=False)
    assert replay(Fixed(), "demo", PROMPT, undecided, LOOSE).at == 1
    assert replay(Fixed(), "demo", PROMPT, reply(8, 7, margin=0.1, stopped=False), LOOSE).at == 0


def test_questions_are_asked_at_the_same_moment_of_every_model() -> None:
    golden = [Golden(messages=[], prompt_tokens=[n], adapter=reply(5, n), base=reply(6, n)) for n in (1, 2)]
    manifests = [
        manifest(8, name).model_copy(update={"golden": golden[:count]}) for name, count in (("a", 2), ("b", 1))
    ]
    questions = list_questions("base", manifests, "float32")
    asked = [(question.model, question.prompt, question.expected.tokens) for question in questions]
    first = [("base", [1], [6, 1]), ("a", [1], [5, 1]), ("base", [1], [6, 1]), ("b", [1], [5, 1])]
    assert asked == [*first, ("base", [2], [6, 2]), ("a", [2], [5, 2])]
    assert ask_together(Recorded(reply(5), 1), []) == []
    outcomes = ask_together(Recorded(reply(5, 1), 1), [Question("a", [1], reply(5, 1), EXACT), questions[0]])
    assert [outcome.agrees for outcome in outcomes] == [True, False]


def test_a_served_reply_can_stand_for_a_recorded_one() -> None:
    served = Served((5, 2), ({5: -0.1, 6: -3.1}, {2: -0.2}), (-inf, -inf), "hi", True)
    recorded = as_reply(served)
    assert (recorded.tokens, recorded.logprobs, recorded.stopped) == ([5, 2], [-0.1, -0.2], True)
    assert recorded.margins == [pytest.approx(3.0), inf]
    assert outcome_of(recorded, recorded).agrees
