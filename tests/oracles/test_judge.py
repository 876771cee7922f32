"""A chat model as a judge: what it is asked, how it is read, what goes wrong on the way, and that nothing is paid for twice."""

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sea_jax.oracles import judge, labelling, paid_answers, preferences
from sea_jax.oracles.chat_client import Completion, retry_after_s
from sea_jax.oracles.judge import ChatJudgeSettings
from sea_jax.oracles.labelling import Question
from sea_jax.oracles.ledger import Ledger
from sea_jax.oracles.paid_answers import Spent, read_spent
from sea_jax.oracles.user_preference import NoAnswerError
from sea_jax.runtime import backoff
from tests.support.chat_server import INPUT_TOKENS, KEY, OUTPUT_TOKENS, ChatServer, saying, settings, with_logprobs

ROOT = Path(__file__).parents[2]
FIELD = "oracle.judge"
WITH_PRICES = {"input_price": 1e6, "output_price": 2e6}  # 1 and 2 for a token
PRICE = INPUT_TOKENS + 2 * OUTPUT_TOKENS  # of one answer at these


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    monkeypatch.setattr(judge, "SHOWN_EVERY_S", 0.0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of back-off before jitter, which nobody waits here."""
    real, seen = backoff.wait_s, list[float]()

    def not_at_all(failures: int) -> float:
        seen.append(real(failures))
        return 0.0

    monkeypatch.setattr(backoff, "wait_s", not_at_all)
    return seen


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    """Starts servers, and ends them."""
    started: list[ChatServer] = []

    def start(*arguments: Any) -> ChatServer:
        started.append(ChatServer(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.close()


def taste(how: ChatJudgeSettings, directory: Path | None = None, **patience: Any) -> Any:
    return judge.judge(how, FIELD, directory, **{"retries": 2, "timeout_s": 20.0, "concurrency": 4} | patience)


def ask(preference: Any, *pairs: tuple[str, str], prompt: str = "Who?") -> list[float | None]:
    """P(first wins) of some pairs; None where there is no answer."""
    said = dict(preference([prompt] * len(pairs), [a for a, _ in pairs], [b for _, b in pairs]))
    return [None if said[row] is None else round(said[row], 6) for row in range(len(pairs))]


def sigmoid(x: float) -> float:
    return round(1 / (1 + math.exp(-x)), 6)


# ---------------------------------------------------------------------------------------------------- Questions and answers


def test_the_question_is_the_papers_and_the_answer_is_read_from_both_tokens(serve: Any) -> None:
    server = serve()
    assert ask(taste(settings(server)), ("eee", "e"), ("a", "be")) == [sigmoid(2), sigmoid(-1)]
    body = next(body for body in server.asked if "eee" in body["messages"][0]["content"])
    question = body["messages"][0]["content"]
    assert question.startswith("I require a leaderboard")
    assert question.endswith("(no quotation marks, no spaces, no new lines, ...).")
    assert '"model_identifier": "0",\n    "output": eee\n' in question
    assert '"model_identifier": "1",\n    "output": e\n' in question
    assert "## Instruction\n\nWho?\n" in question
    del body["messages"]
    assert body == {"model": "any", "max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}


def test_texts_are_data_even_where_they_look_like_places() -> None:
    template = judge.read_template(ChatJudgeSettings(), FIELD)
    filled = judge.fill(template, "{second} {x}", "{prompt}", '}\n{ "0" {first}')
    assert "## Instruction\n\n{second} {x}\n" in filled
    assert '"output": {prompt}\n' in filled
    assert '"output": }\n{ "0" {first}\n' in filled


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ({"0": 0.6, "1": 0.2}, 0.75),
        ({"0": 0.3, " 0": 0.3, "1": 0.1, "▁1": 0.1, "01": 0.05}, 0.75),
        ({"1": 1e-6, "Both": 0.9}, 0.0),
        ({'"0': 0.5, "1": 0.5}, 0.5),
        ({"Both": 0.9, "10": 0.1}, None),
        ({}, None),
    ],
)
def test_log_probs_are_summed_over_spellings_and_renormalised(tokens: dict[str, float], wanted: float | None) -> None:
    top = [{"token": token, "logprob": math.log(mass)} for token, mass in tokens.items()]
    choice = {"message": {"content": None}, "logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}
    found = judge.by_logprobs(Completion.model_validate({"choices": [choice]}))
    assert found == (wanted if wanted is None else pytest.approx(wanted))


def test_without_log_probs_the_share_of_sampled_answers_counts(serve: Any) -> None:
    drawn = iter(["0", "1", "neither", '"0"', " 0.", "1"])  # two at a time, whatever n is
    server = serve(lambda question, n: [saying(next(drawn)) for _ in range(min(n, 2))])
    assert ask(taste(settings(server, samples=6, temperature=0.5)), ("a", "b")) == [0.6]
    assert [body["n"] for body in server.asked] == [6, 4, 2]
    assert {body["temperature"] for body in server.asked} == {0.5}
    assert "logprobs" not in server.asked[0]


def test_an_answer_that_names_neither_is_an_abstention_paid_for_once(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda question, n: [with_logprobs(0.9) if "good" in question else saying("I like both")])
    sampled = settings(server, samples=1, **WITH_PRICES)
    server.answer = lambda question, n: [saying("0" if "good" in question else "I like both")]
    for _ in range(2):
        assert ask(taste(sampled, tmp_path), ("good", "b"), ("bad", "c")) == [1.0, None]
    assert read_spent(tmp_path) == {FIELD: Spent(2, 0, 1, 2 * INPUT_TOKENS, 2, 2 * PRICE)}


def test_both_orders_are_averaged_and_a_bias_for_the_first_goes(serve: Any) -> None:
    server = serve(lambda question, n: [with_logprobs(0.8 if '"output": good' in question.split('"1"')[0] else 0.6)])
    assert ask(taste(settings(server)), ("good", "b"), ("b", "good")) == [0.8, 0.6]
    both = taste(settings(server, both_orders=True))
    assert ask(both, ("good", "b"), ("b", "good"), ("c", "d")) == [0.6, 0.4, 0.5]
    assert both.pointwise  # a random order tells nothing more
    assert not taste(settings(server)).pointwise


def test_an_own_template_and_further_fields(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text("{first} or {second}? It was asked: {prompt}\n{}\n", encoding="utf-8")
    server = serve(lambda question, n: [with_logprobs(0.75)])
    own = settings(server, template=str(path), arguments='{"top_logprobs": 5, "temperature": null, "seed": 3}')
    assert ask(taste(own), ("a", "b")) == [0.75]
    assert server.questions() == ["a or b? It was asked: Who?\n{}"]
    assert (server.asked[0]["top_logprobs"], server.asked[0]["seed"]) == (5, 3)
    assert "temperature" not in server.asked[0]


# ------------------------------------------------------------------------------------------------------- What is not there


def faults(**fields: Any) -> list[str]:
    return list(ChatJudgeSettings(**{"url": "http://a/v1", "model": "m"} | fields).faults_of(FIELD))


def test_what_is_missing_is_said_and_a_key_in_the_wrong_place_is_not_shown() -> None:
    assert faults() == []
    assert [line.split(":")[0] for line in faults(url="", model="")] == [
        "config.oracle.judge.url=''",
        "config.oracle.judge.model=''",
    ]
    (told,) = faults(key_environment="sk-abc")
    assert "must be the name of an environment variable" in told
    assert "sk-abc" not in told
    assert "a limit needs prices" in faults(max_cost=1.0)[0]
    assert "must not set stream" in faults(arguments='{"stream": true}')[0]
    unlimited = {"max_cost": 1.0, "output_price": 1.0, "arguments": '{"max_tokens": null}'}
    assert "an answer must be limited by max_tokens" in faults(**unlimited)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{first} {second}", r"\{prompt\} is missing; the texts stand where it says \{prompt\}, \{first\}, \{second\}"),
        ("{prompt} {first} {second} {instruction}", r"\{instruction\} is unknown"),
    ],
)
def test_a_template_is_looked_at_before_anything_is_asked(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"^config\.oracle\.judge\.template=.*t\.txt: .*{message}"):
        judge.check(ChatJudgeSettings(template=str(tmp_path / "t.txt")), FIELD)


def test_the_key_must_be_in_the_environment() -> None:
    with pytest.raises(
        ValueError, match=r"key_environment=NO_SUCH_KEY: the environment variable NO_SUCH_KEY is empty or not set"
    ):
        judge.check(ChatJudgeSettings(key_environment="NO_SUCH_KEY"), FIELD)
    judge.check(ChatJudgeSettings(), FIELD)


# ------------------------------------------------------------------------------------------------------- What goes wrong

TWICE = 2 * PRICE
# Per request: at most 1 for a byte of the question and for OVERHEAD_TOKENS more, 2 for the answer.
PASSING = {  # fault -> whether the call may be billed
    "429 0": False,
    "500 out of memory": False,
    "503 ": False,
    "reset": True,
    "cut": True,
    "says nonsense": True,
    'says {"choices": []}': True,
    'says {"choices": [{"message": {"content": 3}}]}': True,
    'says {"error": "no model"}': True,
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(fault: str, serve: Any, tmp_path: Path, waits: list[float]) -> None:
    server = serve()
    server.faults = [fault, fault]
    assert ask(taste(settings(server, **WITH_PRICES), tmp_path), ("e", "a")) == [sigmoid(1)]
    assert server.statuses == [fault, fault, "ok"]
    assert waits == [1.0, 2.0]
    spent = read_spent(tmp_path)[FIELD]
    assert (spent.calls, spent.failed_calls, spent.input_tokens) == (3, 2, INPUT_TOKENS)
    most = len(server.questions()[0].encode()) + judge.OVERHEAD_TOKENS + 2
    assert spent.cost == PRICE + (2 * most if PASSING[fault] else 0)


@pytest.mark.parametrize(
    ("fault", "told"), [("500 out of memory", r"answers 500 \(out of memory\)"), ("cut", "broke off")]
)
def test_what_does_not_pass_ends_it_in_one_line(fault: str, told: str, serve: Any, waits: list[float]) -> None:
    server = serve()
    server.faults = [fault] * 3
    with pytest.raises(NoAnswerError, match=rf"^config\.oracle\.judge\.url: http://127\S* {told}.*, 3 times in a row$"):
        ask(taste(settings(server)), ("e", "a"))
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_deadline_is_for_the_whole_answer(fault: str, serve: Any, waits: list[float]) -> None:
    server = serve()
    server.faults = [fault]
    start = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"has not answered within 0\.3 s, 1 times in a row$"):
        ask(taste(settings(server), timeout_s=0.3, retries=0), ("e", "a"))
    assert time.monotonic() - start < 10


def test_retry_after_is_waited_for_and_dates_are_read(serve: Any, waits: list[float]) -> None:
    server = serve()
    server.faults = ["429 1"]
    assert ask(taste(settings(server)), ("e", "a")) == [sigmoid(1)]
    assert server.at_times[1] - server.at_times[0] >= 1
    assert retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    assert [retry_after_s(text) for text in ("", "7", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-3")] == [0, 7, 0, 0, 0]


def test_nobody_there_and_nobody_who_lets_in(serve: Any, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    server = serve()
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-other")
    with pytest.raises(
        NoAnswerError,
        match=r"answers 401 \(Incorrect API key provided: Bearer \[key\]\): see its url, model and key_env",
    ):
        ask(taste(settings(server)), ("e", "a"))
    with pytest.raises(NoAnswerError, match="answers 404"):
        ask(taste(ChatJudgeSettings(url=server.url + "/v2", model="any")), ("e", "a"))
    server.close()
    with pytest.raises(NoAnswerError, match=r"cannot be reached .*, 3 times in a row"):
        ask(taste(settings(server)), ("e", "a"))
    assert waits == [1.0, 2.0]  # of the last alone


def test_a_question_that_is_refused_is_an_abstention_unless_all_are(serve: Any, tmp_path: Path) -> None:
    server = serve()
    server.faults = ["400 too long"]
    with pytest.raises(
        NoAnswerError, match=r"answers 400 \(too long\): see its url, model, samples, answer_tokens and arg"
    ):
        ask(taste(settings(server), tmp_path), ("e", "a"))
    assert ask(taste(settings(server), tmp_path), ("e", "a")) == [sigmoid(1)]
    server.faults = ["400 too long"]
    assert ask(taste(settings(server), tmp_path, concurrency=1), ("ee", "a"), ("a", "e")) == [None, sigmoid(-1)]


def test_an_endpoint_without_log_probs_is_told_from_a_judge_that_says_nothing(serve: Any) -> None:
    server = serve(lambda question, n: [saying("0")])
    with pytest.raises(
        NoAnswerError, match=r"config\.oracle\.judge\.samples=0: .* answers without log-probs of its tokens"
    ):
        ask(taste(settings(server)), ("e", "a"))


def test_no_more_is_asked_at_once_than_is_set_and_answers_come_as_they_are_there(serve: Any) -> None:
    server = serve()
    server.faults = ["slow 0.6", *["slow 0.05"] * 8]
    said = taste(settings(server), concurrency=3)(["p"] * 9, [f"e{n}" for n in range(9)], ["a"] * 9)
    rows = [row for row, _ in said]
    assert sorted(rows) == list(range(9))
    assert rows != sorted(rows)
    assert server.most_at_once == 3


def test_the_key_is_in_no_log_and_no_file(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, waits: Any
) -> None:
    server = serve()
    server.faults = [f"500 who is {KEY}?", f"says {KEY}"]
    with caplog.at_level(logging.DEBUG):
        assert ask(taste(settings(server), tmp_path), ("e", "a")) == [sigmoid(1)]
    assert "who is [key]?" in caplog.text
    assert KEY not in caplog.text
    assert KEY.encode() not in (tmp_path / paid_answers.CALLS_FILE).read_bytes()


# ---------------------------------------------------------------------------------------------------------- What is paid


def test_what_was_answered_is_not_paid_for_again_in_this_run_or_another(serve: Any, tmp_path: Path) -> None:
    server = serve()
    shared = settings(server, cache=str(tmp_path / "new" / "answers.sqlite"), **WITH_PRICES)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert ask(taste(shared, tmp_path / name), ("e", "a"), ("a", "e"), ("e", "a")) == [
            sigmoid(1),
            sigmoid(-1),
            sigmoid(1),
        ]
    assert len(server.asked) == 2  # the third was asked at the same time as the first
    assert read_spent(tmp_path / "a")[FIELD].cost == 2 * PRICE
    assert read_spent(tmp_path / "b") == {}
    assert ask(taste(settings(server, **WITH_PRICES), tmp_path / "b"), ("e", "a")) == [sigmoid(1)]  # one of its own
    assert len(server.asked) == 3


def test_the_limit_is_never_passed_and_a_larger_one_goes_on(serve: Any, tmp_path: Path) -> None:
    server = serve()
    pairs = [("e" * n, "a") for n in range(1, 10)]
    one = (
        len(judge.fill(judge.read_template(ChatJudgeSettings(), FIELD), "Who?", "e" * 9, "a"))
        + judge.OVERHEAD_TOKENS
        + 2
    )
    limited = settings(server, max_cost=one + 2.5 * PRICE, **WITH_PRICES)
    message = r"^config\.oracle\.judge\.max_cost=\S+: \S+ is spent in \d calls, and the next may cost \S+; nothing more"
    with pytest.raises(NoAnswerError, match=message):
        ask(taste(limited, tmp_path), *pairs)
    spent = read_spent(tmp_path)[FIELD]
    assert spent.calls == len(server.asked) == 3  # as far as the limit goes, though four may be asked at once
    assert spent.cost == PRICE * spent.calls <= limited.max_cost
    with pytest.raises(NoAnswerError, match=message):
        ask(taste(limited, tmp_path, concurrency=1), *pairs)
    assert len(server.asked) == 3
    larger = settings(server, max_cost=one + 20 * PRICE, **WITH_PRICES)
    assert ask(taste(larger, tmp_path), *pairs) == [sigmoid(n) for n in range(1, 10)]
    assert len(server.asked) == 9
    assert read_spent(tmp_path)[FIELD].cost == 9 * PRICE


def test_an_answer_is_on_disk_before_its_label_is(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    oracle = preferences.labelled(taste(settings(server), tmp_path, concurrency=1), preferences.soft)
    questions = [Question(str(n), 0, "p", "Who?", "e" * n, "a", None) for n in range(3)]
    keys = jax.random.split(jax.random.key(0), 3)
    with Ledger(tmp_path / "queries.jsonl") as ledger, monkeypatch.context() as patched:

        def die(entries: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(ledger, "record", die)
        with pytest.raises(KeyboardInterrupt):
            labelling.label(questions, oracle, ledger, keys)
    asked = server.questions()
    assert asked
    with Ledger(tmp_path / "queries.jsonl") as ledger:
        assert np.allclose(labelling.label(questions, oracle, ledger, keys), [sigmoid(n) for n in range(3)])
    assert len(server.asked) == 3
    assert server.questions()[: len(asked)] == asked


KILLED = """
import sys
from pathlib import Path
from sea_jax.oracles import judge
from sea_jax.oracles.judge import ChatJudgeSettings
how = ChatJudgeSettings(url=sys.argv[1], model="any", key_environment="TEST_JUDGE_KEY", input_price=1e6, max_cost=1e9)
taste = judge.judge(how, "oracle.judge", Path(sys.argv[2]), retries=0, timeout_s=60.0, concurrency=2)
print(sorted(taste(["p"] * 6, ["e" * n for n in range(6)], ["a"] * 6)))
"""


def test_killed_at_any_instant_it_pays_for_no_answer_twice(serve: Any, tmp_path: Path) -> None:
    server = serve()
    started: list[subprocess.Popen[str]] = []

    def kill(number: int) -> None:
        if number in (2, 4, 7):
            os.kill(started[-1].pid, signal.SIGKILL)

    server.before = kill
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        said = started[-1].communicate(timeout=300)[0]
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 3 + [0]
    assert [round(p, 6) for _, p in json.loads(said.replace("(", "[").replace(")", "]"))] == [
        sigmoid(n) for n in range(6)
    ]
    with sqlite3.connect(tmp_path / paid_answers.CALLS_FILE) as opened:
        outcomes = opened.execute("SELECT question, outcome FROM calls").fetchall()
    answered = [question for question, outcome in outcomes if outcome == paid_answers.ANSWERED]
    assert len(answered) == len(set(answered)) == 6
    assert (
        3 <= sum(outcome == paid_answers.OPEN for _, outcome in outcomes) <= 6
    )  # what was on its way, and may be billed
    spent = read_spent(tmp_path)[FIELD]
    assert spent.cost > 6 * INPUT_TOKENS
    assert spent.calls == len(outcomes)


def test_a_file_that_is_none_is_named(serve: Any, tmp_path: Path) -> None:
    (tmp_path / paid_answers.CALLS_FILE).write_text("no database, and longer than a header of SQLite is" * 10)
    with pytest.raises(OSError, match=r"judge\.sqlite: file is not a database"):
        ask(taste(settings(serve()), tmp_path), ("e", "a"))
    with pytest.raises(OSError, match=r"judge\.sqlite: file is not a database"):
        read_spent(tmp_path)
