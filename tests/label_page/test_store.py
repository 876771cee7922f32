"""Who is shown what, what counts, and what the learner is given."""

import random
from collections import Counter

import pytest

from label_page import store as store_file
from label_page.store import Ask, Refused


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(store_file, "time", clock)
    return clock


def asks(count: int, **more) -> list[Ask]:
    return [Ask(f"run/{i}", f"prompt {i}", f"left {i}", f"right {i}", i % 2 == 1, **more) for i in range(count)]


def join(store, *names: str) -> None:
    for name in names:
        store.join(store.invitations([name])[name], "", f"session of {name}")


def say(store, person: str, verdict: str) -> int | None:
    pair = store.next_pair(person)
    if pair is None:
        return None
    store.answer(person, pair.number, pair.ticket, verdict)
    return pair.number


@pytest.mark.parametrize(
    ("verdict", "label"),
    [
        ("left", 1.0),
        ("right", 0.0),
        ("tie", 0.5),
        ("both_bad", 0.5),
        ("skip", None),
        ("slightly_left", 0.75),
        ("slightly_right", 0.25),
    ],
)
def test_what_is_said_becomes_a_label(make_store, verdict, label):
    store = make_store(slightly=0.75)
    join(store, "anna")
    store.post(asks(2))
    say(store, "anna", verdict)
    (taken,) = store.take(["run/0", "run/1"])
    assert (taken.name, taken.label, taken.swapped, taken.verdicts) == ("run/0", label, False, {"anna": verdict})


def test_slight_differences_are_refused_where_nobody_asks_for_them(make_store):
    store = make_store()
    join(store, "anna")
    store.post(asks(1))
    with pytest.raises(Refused, match="'slightly_left' is none of left, right, tie, both_bad, skip"):
        say(store, "anna", "slightly_left")


def test_a_pair_goes_to_one_person_and_to_the_next_when_the_lease_is_over(make_store, clock):
    store = make_store(lease_s=60.0)
    join(store, "anna", "ben")
    store.post(asks(1))
    pair = store.next_pair("anna")
    assert store.next_pair("anna") == pair  # who looks again sees the same
    assert store.next_pair("ben") is None
    clock.now += 61
    other = store.next_pair("ben")
    assert other is not None
    assert other.number == pair.number
    store.answer("anna", pair.number, pair.ticket, "left")  # still needed, and welcome
    with pytest.raises(Refused, match="not needed any more"):
        store.answer("ben", other.number, other.ticket, "right")
    assert store.next_pair("ben") is None
    assert store.take(["run/0"])[0].verdicts == {"anna": "left"}


def test_with_redundancy_the_label_is_the_mean_and_nobody_is_asked_twice(make_store):
    store = make_store(redundancy=2)
    join(store, "anna", "ben", "carla")
    store.post(asks(1))
    number = say(store, "anna", "left")
    assert store.next_pair("anna") is None
    assert store.take(["run/0"]) == []
    assert say(store, "ben", "tie") == number
    assert store.next_pair("carla") is None
    assert store.take(["run/0"])[0].label == 0.75


def test_a_pair_that_everybody_skips_is_closed_and_one_that_some_skip_is_not(make_store):
    store = make_store()
    join(store, "anna", "ben")
    store.post(asks(1))
    number = say(store, "anna", "skip")
    assert store.next_pair("anna") is None
    assert store.take(["run/0"]) == []
    assert say(store, "ben", "skip") == number
    (taken,) = store.take(["run/0"])
    assert taken.label is None
    assert store.take(["never posted"])[0].label is None


def test_an_answer_can_be_taken_back_until_the_learner_has_it(make_store, clock):
    store = make_store(undo_s=8.0)
    join(store, "anna")
    store.post(asks(2))
    first, second = say(store, "anna", "left"), say(store, "anna", "left")
    clock.now += 7
    assert store.take(["run/0", "run/1"]) == []
    store.undo("anna")
    pair = store.next_pair("anna")
    assert pair.number == second
    store.answer("anna", pair.number, pair.ticket, "right")
    store.undo("anna")
    store.undo("anna")
    assert store.next_pair("anna").number == first
    for verdict in ("tie", "both_bad"):
        say(store, "anna", verdict)
    clock.now += 9
    assert [one.label for one in store.take(["run/0", "run/1"])] == [0.5, 0.5]
    assert not store.can_undo("anna")
    with pytest.raises(Refused, match="the model has learnt from it"):
        store.undo("anna")


def test_the_same_click_twice_counts_once_and_another_one_is_refused(make_store):
    store = make_store()
    join(store, "anna")
    store.post(asks(1, foreseen=0.3))
    pair = store.next_pair("anna")
    for _ in range(2):
        assert store.answer("anna", pair.number, pair.ticket, "left") == 0.3
    with pytest.raises(Refused):
        store.answer("anna", pair.number, pair.ticket, "right")
    store.undo("anna")
    with pytest.raises(Refused):  # a click from before
        store.answer("anna", pair.number, pair.ticket, "left")
    with pytest.raises(Refused):
        store.answer("ben", pair.number, pair.ticket, "left")


def test_what_is_posted_again_is_the_same_and_another_pair_under_its_name_is_refused(make_store):
    store = make_store()
    join(store, "anna")
    store.post(asks(2))
    say(store, "anna", "right")
    before = store.take(["run/0"])
    store.post(asks(2))
    assert store.take(["run/0"]) == before
    with pytest.raises(Refused, match="another pair was asked under the name run/1"):
        store.post([Ask("run/1", "prompt 1", "left 1", "other", True)])


def test_what_is_withdrawn_is_shown_to_nobody_and_an_answer_that_was_there_is_kept(make_store, clock):
    store = make_store(undo_s=8.0)
    join(store, "anna")
    store.post(asks(2))
    say(store, "anna", "left")
    store.withdraw(["run/0", "run/1"])
    assert store.next_pair("anna") is None
    assert [one.label for one in store.take(["run/0", "run/1"])] == [1.0, None]


def test_checks_are_mixed_in_and_are_no_labels(make_store):
    store = make_store(check_every=3)
    join(store, "anna")
    store.post(asks(5))
    store.post_checks([(Ask("check/a", "prompt", "good", "bad", False), 1.0)])
    while say(store, "anna", "left"):
        pass
    assert store.counts("anna") == {"labelled": 5, "waiting": 0, "mine": 6}
    order = [
        row[0]
        for row in store._db.execute("SELECT a.name FROM answers n JOIN asks a ON a.number = n.ask ORDER BY n.number")
    ]
    assert order == ["run/0", "run/1", "check/a", "run/2", "run/3", "run/4"]


def test_a_link_is_used_up_by_the_first_who_comes(make_store):
    store = make_store()
    (token,) = store.invitations(["anna"]).values()
    assert store.invitations(["anna"]) == {"anna": token}  # until then it stays
    assert store.invited(token) == "anna"
    assert store.join(token, "mallory", "her session") == "anna"
    assert store.person("her session") == "anna"
    with pytest.raises(Refused, match="used already"):
        store.join(token, "mallory", "another session")
    assert store.person("another session") is None
    assert store.invitations(["anna"]) != {"anna": token}


def test_a_store_has_one_writer(make_store, tmp_path, clock, monkeypatch):
    store = make_store()
    monkeypatch.setattr(store_file, "LOCK_WAIT_S", -1.0)
    with pytest.raises(BlockingIOError, match="another page has it"):
        store_file.Store(tmp_path / "0", store.rules)
    assert (tmp_path / "0" / store_file.FILE).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("seed", range(3))
def test_whatever_people_do_nobody_is_asked_twice_and_every_label_is_the_mean_of_what_was_said(make_store, clock, seed):
    draw = random.Random(seed)
    redundancy, people = draw.choice([(1, 2), (2, 3), (3, 3)])
    store = make_store(redundancy=redundancy, undo_s=5.0, lease_s=20.0)
    names = [f"person {i}" for i in range(people)]
    join(store, *names)
    posted = asks(12)
    open_names = {ask.name for ask in posted[:6]}
    number_of: dict[int, str] = {}
    told: dict[str, dict[str, str]] = {ask.name: {} for ask in posted}
    order: dict[str, list[str]] = {name: [] for name in names}
    taken: dict[str, float | None] = {}
    store.post(posted[:6])
    for turn in range(400):
        clock.now += draw.uniform(0, 3)
        if turn == 30:
            store.post(posted)
            open_names |= {ask.name for ask in posted[6:]}
        person = draw.choice(names)
        pair = store.next_pair(person) if draw.random() < 0.8 else None
        if pair is not None:
            name = number_of.setdefault(pair.number, f"run/{pair.prompt.split()[1]}")
            assert person not in told[name], "asked again"
            assert name not in taken
            verdict = draw.choice(["left", "right", "tie", "skip"])
            if draw.random() < 0.7:
                store.answer(person, pair.number, pair.ticket, verdict)
                told[name][person] = verdict
                order[person].append(name)
        elif draw.random() < 0.2 and store.can_undo(person):
            store.undo(person)
            del told[order[person].pop()][person]
        for one in store.take(sorted(open_names)):
            open_names.discard(one.name)
            taken[one.name] = one.label
            assert one.verdicts == told[one.name]
    assert len(taken) == 12
    labels = {"left": 1.0, "right": 0.0, "tie": 0.5}
    for name, label in taken.items():
        said = [labels[verdict] for verdict in told[name].values() if verdict in labels]
        assert len(said) <= redundancy
        assert label == (pytest.approx(sum(said) / len(said)) if said else None)
    assert {one.name: one.label for one in store.take(sorted(taken))} == taken
    assert max(Counter(ask for asked in order.values() for ask in asked).values()) <= people
