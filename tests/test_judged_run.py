"""A run whose oracle and judge are chat models: its budget of money, its numbers, its report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from configs import tiny_random
from sea_jax import evaluate, train
from sea_jax.oracles import judge
from sea_jax.oracles.paid_answers import CALLS_FILE, read_spent
from tests.support.chat_server import INPUT_TOKENS, KEY, OUTPUT_TOKENS, ChatServer, settings

PRICES = {"input_price": 1e6, "output_price": 2e6}  # 1 and 2 for a token
PRICE = INPUT_TOKENS + 2 * OUTPUT_TOKENS


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    one = ChatServer()
    yield one
    one.close()


def configured(server: ChatServer, **fields: Any) -> ml_collections.ConfigDict:
    """The tiny configuration, labelled and judged by the server."""
    config = tiny_random.get_config()
    config.max_queries, config.oracle.concurrency = 8, 4
    config.oracle.label = "soft"
    config.eval.oracle = False
    for taste in (config.oracle, config.eval.judge):
        taste.kind = "judge"
        asked = settings(server, **PRICES)
        taste.judge.url, taste.judge.model, taste.judge.key_environment = asked.url, asked.model, asked.key_environment
        taste.judge.input_price, taste.judge.output_price = asked.input_price, asked.output_price
    config.eval.judge.judge.both_orders = True
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_money_that_is_spent_stops_a_run_and_more_of_it_goes_on(server: ChatServer, tmp_path: Path) -> None:
    one = len(judge.read_template(judge.ChatJudgeSettings(), "")) + judge.OVERHEAD_TOKENS  # and the texts
    limits = [float(one + calls * PRICE) for calls in (6, 20)]
    message = (
        r"^the oracle did not answer: config\.oracle\.judge\.max_cost=\d+: .* Set a larger one, and the same command"
    )
    with pytest.raises(OSError, match=message):
        train.train(configured(server, oracle__judge__max_cost=limits[0]), tmp_path)
    paid = read_spent(tmp_path)["oracle.judge"]
    assert 0 < paid.calls < 8
    assert paid.cost == PRICE * paid.calls <= limits[0]
    train.train(configured(server, oracle__judge__max_cost=limits[1]), tmp_path)
    assert len(server.questions()) == len(set(server.questions()))

    ledger = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    counted = [line for line in ledger if line.get("counted")]
    asks = {line["key"]: line for line in ledger if line["event"] == "ask"}
    assert len(counted) == 8
    for line in counted:  # turned back, whichever was shown first
        first, second = asks[line["key"]]["first"], asks[line["key"]]["second"]
        (wanted,) = tiny_random.prefers_many_es([""], [first], [second])
        assert line["probability"] == pytest.approx(wanted)

    spent = read_spent(tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for who, field in (("oracle", "oracle.judge"), ("judge", "eval.judge.judge")):
        assert last[f"{who}/cost"] == spent[field].cost == PRICE * spent[field].calls
        assert last[f"{who}/calls"] == spent[field].calls
        assert last[f"{who}/input_tokens"] == INPUT_TOKENS * spent[field].calls
        assert last[f"{who}/unusable_answers"] == 0
    report = (tmp_path / "report.md").read_text()
    assert f"| `oracle.judge` | 8 | 0 | 0 | {8 * INPUT_TOKENS:,} | 8 | {8 * PRICE} |" in report
    for path in (
        tmp_path / name for name in ("config.json", "metrics.jsonl", "queries.jsonl", "report.md", CALLS_FILE)
    ):
        assert KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"oracle__judge__model": ""}, r"^config\.oracle\.judge\.model='': a judge needs the name"),
        ({"eval__judge__judge__url": ""}, r"^config\.eval\.judge\.judge\.url='': a judge needs an OpenAI-compatible"),
        ({"oracle__judge__template": "no/such.txt"}, r"^config\.oracle\.judge\.template=.*no/such\.txt: No such file"),
        (
            {"eval__judge__judge__key_environment": "NO_SUCH_KEY"},
            r"^config\.eval\.judge\.judge\.key_environment=NO_SUCH_KEY:",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    fields: dict[str, Any], message: str, server: ChatServer, tmp_path: Path
) -> None:
    config = configured(server, policy__source="no/such/model", **fields)
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_question_under_the_same_name_is_not_gone_on_with(server: ChatServer, tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text('{prompt} "output": {first}\n} "output": {second}\n}')
    config = configured(server, oracle__judge__template=str(path), max_queries=4)
    train.train(config, tmp_path / "run")
    path.write_text('{prompt}? "output": {first}\n} "output": {second}\n}')
    with pytest.raises(ValueError, match=r"oracle\.judge\.template"):
        train.train(config, tmp_path / "run")


def test_judges_are_shown_the_pairs_of_a_run_and_agree_or_not(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(configured(server), tmp_path)
    specs = [
        "recorded",
        "oracle",
        f"turned:kind=judge,judge.url={server.url},judge.model=any,judge.key_environment=TEST_JUDGE_KEY,judge.both_orders=True,"
        'judge.arguments={"seed": 3, "top_logprobs": 5},retries=1',
        "letters:kind=configs.tiny_random:prefers_many_letters",
    ]
    asked = len(server.asked)
    told = evaluate.judged(tmp_path, specs, None)
    assert len(server.asked) == asked + 16  # what the oracle was asked is not paid for again
    assert {body.get("seed") for body in server.asked[asked:]} == {3}
    assert "| recorded, oracle | 8 | 1.000 [0.676, 1.000] | 1.000 |" in told
    assert "| recorded, turned | 8 | 1.000 [0.676, 1.000] | 1.000 |" in told
    assert "| turned | 8 of 8 | " in told
    assert read_spent(tmp_path)["judges.turned.judge"].calls == 16
    assert "| letters, " not in told
    assert len(evaluate.judged(tmp_path, ["recorded"], 3).splitlines()) == 3
    assert "| recorded | 3 of 3 |" in evaluate.judged(tmp_path, ["recorded"], 3)
    for spec, message in {
        "nobody": r"^--judges=nobody: must be recorded, oracle, judge, or NAME:FIELD=VALUE",
        "a:kind=judge": r"^config\.judges\.a\.judge\.url='': a judge needs",
        "a:judge.model=x": r"^--judges=a:judge\.model=x: kind is missing",
        "a:sort=judge": r"^--judges=a:sort=judge: 'sort' is no field of eval\.judge",
        "a:kind=judge,judge.samples=many": r"judge\.samples='many': invalid literal",
        "a:kind=judge,judge.both_orders=yes": r"judge\.both_orders='yes': must be True or False",
        "a:kind=somebody": r"kind='somebody': must be empty, one of embedding",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate.judged(tmp_path, [spec], None)
    with pytest.raises(ValueError, match="there is another judge oracle"):
        evaluate.judged(tmp_path, ["oracle", "oracle"], None)
