"""What two processes do together, see two_processes.py, which does it once for all these tests."""

import json
from typing import Any

import pytest

from tests.support import pair


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    directory = tmp_path_factory.mktemp("two")
    pair.run(directory, "tests.programs.two_processes", str(directory), devices=1)
    return [json.loads((directory / f"seen-{number}.json").read_text()) for number in range(2)]


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_both_and_its_step_saved_again(both):
    for seen, first_number in zip(both, (2000, 4000), strict=True):
        expected = [1, 1, [2, first_number], ["1", "2", "2.damaged"]]
        assert seen["a_checkpoint_that_one_cannot_read"] == expected


def test_metadata_that_one_process_cannot_read_leave_both_at_the_same_step_and_able_to_save(both):
    for seen, first_number in zip(both, (3000, 5000), strict=True):
        assert seen["metadata_that_one_cannot_read"] == [1, [3, first_number], ["1", "2.damaged", "3"]]


def test_a_file_system_that_does_not_answer_is_no_damage(both):
    first, second = (seen["a_file_system_that_does_not_answer"] for seen in both)
    assert first == ["ValueError: another process failed with a checkpoint; its message says why", ["1"]]
    assert second == ["TimeoutError: timed out", ["1"]]


def test_the_responses_of_the_first_process_are_those_of_both(both):
    for number, seen in enumerate(both):
        found = [True, [7], [2, 3, 0], 5, 0.01, [False, True, True], number == 0]
        assert seen["responses_of_the_first"] == found


def test_a_ledger_that_another_run_writes_stops_both(both):
    first, second = (seen["a_ledger_that_another_run_writes"] for seen in both)
    assert first.startswith("OSError: ")
    assert "another run is writing this ledger" in first
    assert second == "ValueError: another process failed with the ledger; its message says why"


def test_a_work_directory_that_is_not_shared_stops_both(both):
    for number, seen in enumerate(both):
        message = f"holds {1 - number} labels for process {number} and another number for others"
        assert seen["a_work_directory_that_is_not_shared"].startswith("ValueError: --workdir=")
        assert seen["a_work_directory_that_is_not_shared"].endswith(message)


def test_a_full_disk_of_the_first_process_stops_both_and_the_answers_are_the_same(both):
    (errors, labels, asked), (others, other_labels, never) = (seen["a_disk_that_is_full"] for seen in both)
    assert ["File too large" in error for error in errors] == [True, True]
    assert others == ["ValueError: another process failed with the ledger; its message says why"] * 2
    assert labels == other_labels == [0.125, 0.125]
    assert (asked, never) == (3, 0)  # not where the ask could not be written


def test_ctrl_c_in_the_first_process_stops_both(both):
    first, second = (seen["ctrl_c_in_the_first"] for seen in both)
    assert first.startswith("KeyboardInterrupt")
    assert second == "ValueError: another process failed with the oracle; its message says why"
