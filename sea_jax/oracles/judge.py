"""A language model as a judge: a chat endpoint is shown a prompt and two responses, and names the better one."""

import asyncio
import hashlib
import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from sea_jax.oracles.concurrent_calls import at_once, pause
from sea_jax.oracles.paid_answers import OverBudgetError, PaidAnswers
from sea_jax.oracles.user_preference import NoAnswerError
from sea_jax.runtime import backoff, cache
from sea_jax.settings import AT_LEAST_1, JSON_OBJECT, NOT_NEGATIVE, Check, is_http_path, setting
from sea_jax.types import Preference

if TYPE_CHECKING:
    from sea_jax.oracles.chat_client import ChatClient, Completion

TEMPLATE = Path(__file__).with_name("judge_template.txt")  # SEA paper, Fig. 10, https://arxiv.org/abs/2411.01493
PLACEHOLDERS = ("prompt", "first", "second")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
FIRST, SECOND = "0", "1"  # what the judge calls the responses
AROUND = " \n\t▁Ġ\"'`*"  # what may stand around an answer, blanks as tokenizers write them among it
TOP_LOGPROBS = 20  # as many as OpenAI's endpoint gives
OVERHEAD_TOKENS = 256  # of a chat template around a question, at most
PER_PRICE = 1e6  # tokens that a price is for
SHOWN_EVERY_S = 5.0  # between two warnings of one kind
VARIABLE = re.compile("[A-Z][A-Z0-9_]*")
OWN_FIELDS = ("messages", "stream")  # of a request, which nobody else sets
BASE_URL: Check = (lambda v: not v or is_http_path(v), "an http:// or https:// URL, such as https://api.openai.com/v1")


@dataclass(frozen=True)
class ChatJudgeSettings:
    """Which model judges, what it is asked, and what that may cost."""

    url: str = setting(
        "", "an OpenAI-compatible endpoint, with its version's path: https://api.openai.com/v1", BASE_URL
    )
    model: str = setting("", "as the endpoint calls it")
    key_environment: str = setting("", 'environment variable that holds the endpoint\'s key; "": it wants none')
    template: str = setting(
        "",
        "file with the question, to be answered 0 or 1, in which {prompt}, {first} (0) and {second} (1) stand for the texts; "
        '"": that of the paper',
        source="paper, Fig. 10",
    )
    both_orders: bool = setting(False, "asked twice, each response being the first once, and the mean is taken")
    samples: int = setting(
        0,
        "sampled answers of which the share is P; 0: P from the log-probs of the answer tokens 0 and 1",
        NOT_NEGATIVE,
    )
    temperature: float = setting(1.0, "of sampled answers", (lambda v: 0 <= v <= 2, "a number from 0 to 2"))
    answer_tokens: int = setting(1, "of an answer, at most", AT_LEAST_1, unit="tokens")
    arguments: str = setting(
        "", 'further fields of a request, a JSON object such as {"top_logprobs": 5}; null leaves one out', JSON_OBJECT
    )
    max_cost: float = setting(0.0, "of this judge in this run, never passed; 0: no limit", NOT_NEGATIVE, unit="money")
    input_price: float = setting(0.0, "of what is asked", NOT_NEGATIVE, unit="money per million tokens")
    output_price: float = setting(0.0, "of what is answered", NOT_NEGATIVE, unit="money per million tokens")
    cache: str = setting(
        "",
        'file in which runs share answers, or cache:NAME; "": judge.sqlite in the work directory. What was answered there to '
        "the same question by a model of the same name is not asked again",
    )

    def faults_of(self, field: str) -> Iterator[str]:
        """Yields a line for everything that does not go together.

        Args:
          field: where these settings stand, such as oracle.judge.
        """
        if not self.url:
            yield f"config.{field}.url='': a judge needs an OpenAI-compatible endpoint, such as https://api.openai.com/v1"
        if not self.model:
            yield f"config.{field}.model='': a judge needs the name that its endpoint has for the model"
        if self.key_environment and not VARIABLE.fullmatch(self.key_environment):  # not shown: it may be the key
            yield (
                f"config.{field}.key_environment: must be the name of an environment variable, in capitals, such as "
                "OPENAI_API_KEY, and not the key itself; what was given is not shown"
            )
        if self.max_cost and not (self.input_price or self.output_price):
            yield (
                f"config.{field}.max_cost={self.max_cost:g}: a limit needs prices, {field}.input_price and "
                f"{field}.output_price"
            )
        if taken := [name for name in OWN_FIELDS if name in json.loads(self.arguments or "{}")]:
            yield f"config.{field}.arguments={self.arguments}: must not set {', '.join(taken)}"
        elif self.max_cost and self.output_price and _most_output_tokens(self.body("")) is None:
            yield f"config.{field}.arguments: with max_cost, an answer must be limited by max_tokens"

    def body(self, question: str) -> dict[str, Any]:
        """Returns what the endpoint is sent."""
        how: dict[str, Any] = (
            {"temperature": self.temperature, "n": self.samples}
            if self.samples
            else {"temperature": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        )
        message = {"role": "user", "content": question}
        body = {"model": self.model, "messages": [message], "max_tokens": self.answer_tokens, **how}
        body |= json.loads(self.arguments or "{}")
        return {name: value for name, value in body.items() if value is not None}


def _most_output_tokens(body: Mapping[str, Any]) -> int | None:
    """Tokens that the answers to one request can have together; None: nothing limits them."""
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if isinstance(body.get(name), int)]
    return max(limits) * int(body.get("n", 1)) if limits else None


def read_template(settings: ChatJudgeSettings, field: str) -> str:
    """Returns the text of a judge's question.

    Args:
      settings: ChatJudgeSettings.
      field: where they stand, such as oracle.judge.

    Raises:
      ValueError: the file cannot be read, or not every text has its place in it.
    """
    path = Path(settings.template).expanduser() if settings.template else TEMPLATE
    place = f"config.{field}.template={settings.template}"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: {getattr(error, 'strerror', '') or error}; name a text file in UTF-8") from error
    found = set(PLACEHOLDER.findall(text))
    faults = [f"{{{name}}} is missing" for name in PLACEHOLDERS if name not in found]
    faults += [f"{{{name}}} is unknown" for name in sorted(found.difference(PLACEHOLDERS))]
    if faults:
        wanted = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"{place}: {', '.join(faults)}; the texts stand where it says {wanted}, and nothing else may")
    return text


def template_fingerprint(settings: ChatJudgeSettings, field: str) -> str:
    """Returns what tells the question of a judge from others; raises as `read_template` does."""
    return hashlib.sha256(read_template(settings, field).encode()).hexdigest()


def read_key(settings: ChatJudgeSettings, field: str) -> str:
    """Returns the key that an endpoint is shown; "": none.

    Args:
      settings: ChatJudgeSettings.
      field: where they stand, such as oracle.judge.

    Raises:
      ValueError: the environment holds none, or what cannot be one.
    """
    name = settings.key_environment
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise ValueError(
            f"config.{field}.key_environment={name}: the environment variable {name} "
            f"{'holds no key' if key else 'is empty or not set'}; export {name}=... before the command"
        )
    return key


def fill(template: str, prompt: str, first: str, second: str) -> str:
    """Returns the question about two responses; what the texts themselves have in braces stays as it is."""
    texts = {"prompt": prompt, "first": first, "second": second}
    return PLACEHOLDER.sub(lambda found: str(texts[found[1]]), template)


# --------------------------------------------------------------------------------------------------------------- Answers


def by_logprobs(completion: "Completion") -> float | None:
    """P(first wins) from the log-probs of the answer tokens, renormalised over the two; None: neither is among the top.

    The logit of the one over the other is what Bradley-Terry's sigmoid takes (SEA paper, Fig. 10); one that is not among the
    top has no mass.
    """
    logprobs = completion.choices[0].logprobs
    positions = logprobs.content if logprobs is not None else None
    mass = dict.fromkeys((FIRST, SECOND), 0.0)
    for alternative in positions[0].top_logprobs if positions else ():
        token = alternative.token.strip(AROUND)
        if token in mass:
            mass[token] += math.exp(min(alternative.logprob, 0.0))
    whole = sum(mass.values())
    return mass[FIRST] / whole if whole > 0 else None


def by_answers(completion: "Completion") -> tuple[int, int]:
    """Returns how many of the answers to a question begin with the name of the first response, and of the second."""
    texts = [(choice.message.content or "").lstrip(AROUND) for choice in completion.choices]
    return sum(text.startswith(FIRST) for text in texts), sum(text.startswith(SECOND) for text in texts)


# --------------------------------------------------------------------------------------------------------------- Asking


@dataclass
class ChatJudge:
    """A judge and how it is asked.

    Attributes:
      settings: ChatJudgeSettings.
      field: where these stand, such as oracle.judge, for errors.
      template: of the question.
      client: asks the endpoint.
      answers: what was paid for.
      retries: of a request that failed.
    """

    settings: ChatJudgeSettings
    field: str
    template: str
    client: "ChatClient"
    answers: PaidAnswers
    retries: int

    def __post_init__(self) -> None:
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # question -> held by who asks it
        self._under_way = self._ended = 0  # calls
        self._end = asyncio.Condition()  # told of when a call ends

    async def probability(self, prompt: str, first: str, second: str, gone: asyncio.Event) -> float | None:
        """P(first wins); None: the judge named neither.

        Args:
          gone: is set where it makes no sense any more to try again.

        Raises:
          NoAnswerError: the endpoint has failed too often or takes nothing, or the money is spent.
        """
        said = await self._in_order(prompt, first, second, gone)
        if not self.settings.both_orders or said is None:
            return said
        turned = await self._in_order(prompt, second, first, gone)
        return None if turned is None else (said + 1 - turned) / 2

    async def _in_order(self, prompt: str, first: str, second: str, gone: asyncio.Event) -> float | None:
        """P(first wins), as the judge says when it is shown the first one first."""
        body = self.settings.body(fill(self.template, prompt, first, second))
        if not self.settings.samples:
            completion = await self._answered(body, 0, gone)
            return None if completion is None else by_logprobs(completion)
        drawn, wins = 0, [0, 0]
        while drawn < self.settings.samples:  # endpoints may write fewer answers to a request than they are asked for
            rest = {"n": self.settings.samples - drawn} if "n" in body else {}
            completion = await self._answered(body | rest, drawn, gone)
            if completion is None:
                break
            drawn += len(completion.choices)
            wins = [before + now for before, now in zip(wins, by_answers(completion), strict=True)]
        return wins[0] / sum(wins) if any(wins) else None

    async def _answered(self, body: Mapping[str, Any], drawn: int, gone: asyncio.Event) -> "Completion | None":
        """The answer to a request, from the disk where it was paid for; None: the endpoint refuses the question."""
        from sea_jax.oracles.chat_client import Completion

        content = json.dumps([body, drawn], sort_keys=True, ensure_ascii=False)
        question = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
        async with self._turns[question]:
            known = self.answers.find(question)
            if known is not None:
                return Completion.model_validate_json(known)
            return await self._paid(body, question, gone)

    async def _paid(self, body: Mapping[str, Any], question: str, gone: asyncio.Event) -> "Completion | None":
        """The answer to a request that was not answered before."""
        from sea_jax.oracles.chat_client import PassingError, RefusedError, RefusedQuestionError

        failures, most = 0, self._most(body)
        while True:
            call = await self._begin(question, most, gone)
            try:
                completion = await self.client.complete(body)
            except PassingError as error:
                self.answers.fail(call, most if error.billed else 0.0)
                failures += 1
                if failures > self.retries:
                    raise NoAnswerError(f"config.{self.field}.url: {error}, {failures} times in a row") from None
                # Not all at the same time that failed at the same time, and none before the endpoint wants it.
                wait_s = max(backoff.wait_s(failures) * random.uniform(0.5, 1.0), error.retry_after_s)
                logging.log_every_n_seconds(
                    logging.WARNING,
                    "config.%s.url: %s; asked again in %.1f s, %d of %d",
                    SHOWN_EVERY_S,
                    *(self.field, error, wait_s, failures, self.retries),
                )
                if await pause(wait_s, gone):
                    raise NoAnswerError(f"config.{self.field}.url: {error}") from None
            except RefusedQuestionError as error:
                self.answers.fail(call, 0.0)
                spent = self.answers.spent()
                if spent.calls == spent.failed_calls:  # it may take none at all
                    raise NoAnswerError(
                        f"config.{self.field}: {error}: see its url, model, samples, answer_tokens and arguments"
                    ) from None
                logging.log_every_n_seconds(
                    logging.WARNING, "config.%s.url: %s: no answer to a pair", SHOWN_EVERY_S, self.field, error
                )
                return None
            except RefusedError as error:
                self.answers.fail(call, 0.0)
                raise NoAnswerError(f"config.{self.field}: {error}: see its url, model and key_environment") from None
            else:
                self._record(call, question, completion, most)
                return completion
            finally:
                await self._tell_end()

    async def _begin(self, question: str, most: float, gone: asyncio.Event) -> int:
        """The name of a call that the limit lets through, if need be when others have cost less than they might have."""
        while True:
            try:
                call = self.answers.begin(question, most, self.settings.max_cost)
            except OverBudgetError as error:
                if not self._under_way or gone.is_set():
                    raise NoAnswerError(
                        f"config.{self.field}.max_cost={self.settings.max_cost:g}: {error}; nothing more is asked. Set a "
                        "larger one, and the same command goes on"
                    ) from None
                ended = self._ended
                async with self._end:
                    while self._ended == ended:
                        await self._end.wait()
            else:
                self._under_way += 1
                return call

    async def _tell_end(self) -> None:
        """Tells those who wait for money that a call has ended."""
        self._under_way, self._ended = self._under_way - 1, self._ended + 1
        async with self._end:
            self._end.notify_all()

    def _most(self, body: Mapping[str, Any]) -> float:
        """What a request costs at most; no token has less than a byte of the text."""
        asked = sum(len(message["content"].encode(errors="surrogatepass")) for message in body["messages"])
        answered = _most_output_tokens(body) or 0
        return self._cost(asked + OVERHEAD_TOKENS, answered)

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        prices = self.settings.input_price, self.settings.output_price
        return (input_tokens * prices[0] + output_tokens * prices[1]) / PER_PRICE

    def _record(self, call: int, question: str, completion: "Completion", most: float) -> None:
        """Keeps an answer, and says if it is not of the kind that was asked for."""
        usage = completion.usage
        without = not self.settings.samples and completion.choices[0].logprobs is None
        usable = by_logprobs(completion) is not None if not self.settings.samples else any(by_answers(completion))
        self.answers.record(
            call,
            question,
            completion.model_dump_json(exclude_none=True),
            usable=usable,
            cost=most if usage is None else self._cost(usage.prompt_tokens, usage.completion_tokens),
            input_tokens=0 if usage is None else usage.prompt_tokens,
            output_tokens=0 if usage is None else usage.completion_tokens,
        )
        if without:
            raise NoAnswerError(
                f"config.{self.field}.samples=0: {self.client.url} answers without log-probs of its tokens; take the share of "
                "sampled answers instead, of 5, say"
            )


def check(settings: ChatJudgeSettings, field: str) -> None:
    """Refuses a judge that cannot be asked: its template or its key is not there.

    Raises:
      ValueError: which of them.
    """
    read_template(settings, field)
    read_key(settings, field)


def judge(
    settings: ChatJudgeSettings,
    field: str,
    directory: Path | None,
    *,
    retries: int,
    timeout_s: float,
    concurrency: int,
) -> Preference:
    """Returns the taste of a chat model, whose answers come one by one.

    Args:
      settings: ChatJudgeSettings.
      field: where they stand, such as oracle.judge.
      directory: where what is paid for is kept; None: in memory.
      retries: of a request that failed.
      timeout_s: seconds until a request must have been answered.
      concurrency: pairs that are asked about at once.

    Returns:
      A preference with an attribute `spent`, a function that returns `Spent`.

    Raises:
      ValueError: its template or key is not there.
    """
    from sea_jax.oracles.chat_client import ChatClient  # takes a while, and settings need it not

    url = settings.url.rstrip("/")
    chat_judge = ChatJudge(
        settings,
        field,
        read_template(settings, field),
        ChatClient(url, read_key(settings, field), timeout_s, concurrency),
        PaidAnswers(directory, field, cache.resolve(settings.cache) if settings.cache else None),
        retries,
    )

    def ask(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[int, float | None]]:
        def about(row: int, gone: asyncio.Event) -> Any:
            return chat_judge.probability(prompts[row], first[row], second[row], gone)

        return at_once(about, len(prompts), concurrency)

    ask.spent = chat_judge.answers.spent  # type: ignore[attr-defined]
    ask.pointwise = settings.both_orders  # type: ignore[attr-defined]
    return ask
