"""When a rank decides that waiting for the next one is in vain. Real processes: end_to_end/test_resume.py."""

import json

import pytest

from finetune.failure_watch import WATCH_S, _Neighbor


class Reports:
    """A store with the latest report of rank 3."""

    def __init__(self) -> None:
        self.report: dict | None = None

    def check(self, keys: list[str]) -> bool:
        assert keys == ["running_3"]
        return self.report is not None

    def get(self, key: str) -> bytes:
        return json.dumps(self.report).encode()

    def write(self, beats: int, collectives: int = 5, has_left: bool = False) -> None:
        facts = {"progress": "after step 7", "process": "process 42 on node2", "has_left": has_left}
        self.report = {"beats": beats, "collectives": collectives, **facts}


@pytest.fixture
def store() -> Reports:
    return Reports()


def problems(store: Reports, timeout: float, looks: int, own: int, beats: bool) -> list[str | None]:
    """Return what a rank that has entered `own` collectives finds at each look; `beats`: rank 3 still reports."""
    neighbor, found = _Neighbor(3, timeout), []
    for look in range(looks):
        if beats:
            store.write(look, collectives=5)
        neighbor.look(store)
        found.append(neighbor.problem(own))
    return found


def test_a_process_that_no_longer_reports_is_named_after_the_timeout(store):
    store.write(1)
    found = problems(store, 10 * WATCH_S, 13, own=6, beats=False)
    assert found[:11] == [None] * 11
    assert found[11].startswith("Rank 3 (process 42 on node2) has not responded for 11 s, since ")
    assert ", after step 7: it is stopped, or its machine cannot be reached." in found[11]


def test_a_process_that_stopped_long_after_its_last_collective_is_not_called_running(store):
    neighbor, found = _Neighbor(3, 10 * WATCH_S), []
    for look in range(25):
        store.write(min(look, 8))  # enters no collective; reports until the eighth look
        neighbor.look(store)
        found.append(neighbor.problem(6))
    first = next(problem for problem in found if problem)
    assert "has not responded for 11 s" in first and "it is running" not in first


def test_a_process_that_does_not_run_is_given_five_minutes_at_most(store):
    store.write(1)
    found = problems(store, 1800, 303, own=6, beats=False)
    assert found[:301] == [None] * 301 and "has not responded for 301 s" in found[301]


def test_a_process_that_never_started_is_named(store):
    assert "Rank 3 (not started) has not responded" in problems(store, 5, 8, own=1, beats=False)[-1]


def test_a_running_process_is_named_only_if_others_wait_for_it(store):
    found = problems(store, 10, 13, own=6, beats=True)
    assert found[:11] == [None] * 11
    assert (
        "has kept other processes waiting for 11 s, since " in found[11] and "after step 7: it is running" in found[11]
    )
    assert problems(store, 10, 50, own=5, beats=True) == [None] * 50, "it has entered the same collective"
    assert problems(store, 10, 50, own=4, beats=True) == [None] * 50, "this rank has entered fewer"


def test_a_process_that_has_left_is_not_waited_for(store):
    """Rank 0 may be closing trackers for a while after the others have finished."""
    store.write(1, has_left=True)
    assert problems(store, 5, 500, own=6, beats=False) == [None] * 500
