"""Groups of processes over a stand-in for the coordination service; threads are the processes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from colbert_jax import processes
from colbert_jax.processes import Group, PeerError


class Service:
    """Keys and values as `jax.distributed`'s client keeps them."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nothing came")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, "_POLL", 0.02)


def together(work, count: int = 3) -> list:
    """What `work(group)` returns or raises in each process."""
    service = Service()

    def one(index: int):
        group = Group(index, count, service, "job")
        try:
            return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_values_by_process():
    def work(group):
        return [group.exchange("a", group.index), group.exchange("b", {"x": [group.index]})]

    assert together(work) == [[[0, 1, 2], [{"x": [0]}, {"x": [1]}, {"x": [2]}]]] * 3


def test_nobody_goes_on_before_all_have_come():
    came = []

    def work(group):
        time.sleep(0.05 * group.index)
        came.append(group.index)
        group.exchange("all here")
        return len(came)

    assert together(work) == [3, 3, 3]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_reaches_those_who_wait(failing):
    def work(group):
        group.check()
        if group.index == failing:
            error = OSError("disk full")
            group.fail(error)
            raise error
        group.exchange("the end")

    for index, result in enumerate(together(work)):
        if index == failing:
            assert isinstance(result, OSError)
        else:
            assert isinstance(result, PeerError)
            assert str(result) == f"process {failing} failed: OSError: disk full"


def test_check_tells_without_waiting():
    service = Service()
    first, second = (Group(i, 2, service, "job") for i in range(2))
    first.check()
    second.fail(ValueError("bad"))
    second.check()  # its own failure is no news
    with pytest.raises(PeerError, match="process 1 failed: ValueError: bad"):
        first.check()


def test_different_calls_are_an_error_in_all():
    results = together(lambda group: group.exchange(f"call {group.index // 2}"))
    assert all(isinstance(result, PeerError) for result in results)
    assert "process 0 is at 'call 0', process 2 at 'call 1'" in str(results[1])


def test_one_that_never_comes():
    def work(group):
        return "elsewhere" if group.index == 1 else group.exchange("the start", seconds=0.1)

    first, _, third = together(work)
    assert isinstance(first, TimeoutError) and "process 1 did not come to 'the start'" in str(first)
    assert isinstance(third, TimeoutError)


def test_alone():
    with processes.group("anything") as group:
        assert group.count == 1 and group.is_first
        assert group.exchange("x", 5) == [5]
        group.check()
        group.fail(OSError())
