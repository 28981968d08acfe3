"""Calls in threads: their order, and the bounds on their number and memory."""

import threading
import time

import pytest

from avocado_jax.data.ordered import map_ordered


class Gauge:
    """Counts calls in progress, and the bytes of results that are not consumed yet."""

    def __init__(self) -> None:
        self.calls = self.most_calls = self.bytes = self.most_bytes = 0
        self.lock = threading.Lock()

    def call(self, item: int) -> int:
        with self.lock:
            self.calls += 1
            self.bytes += item
            self.most_calls, self.most_bytes = max(self.most_calls, self.calls), max(self.most_bytes, self.bytes)
        time.sleep(0.002 * (item % 3))
        with self.lock:
            self.calls -= 1
        return item

    def use(self, item: int) -> int:
        with self.lock:
            self.bytes -= item
        return item


def test_results_are_ordered_and_calls_concurrent():
    gauge = Gauge()
    results = map_ordered(gauge.call, range(200), at_once=8)
    assert [gauge.use(item) for item in results] == list(range(200))
    assert 4 <= gauge.most_calls <= 8


@pytest.mark.parametrize("memory", [0, 10, 40])
def test_memory_in_flight_is_bounded(memory):
    """The largest call exceeds the bound, so it runs alone."""
    gauge = Gauge()
    sizes = [1 + number % 7 for number in range(100)] + [50, 1, 2]
    results = map_ordered(gauge.call, sizes, lambda item: item, memory, at_once=8)
    assert [gauge.use(item) for item in results] == sizes
    assert gauge.most_bytes == 50
    gauge = Gauge()
    for item in map_ordered(gauge.call, sizes[:100], lambda item: item, memory, at_once=8):
        gauge.use(item)
    assert gauge.most_bytes <= max(memory, 7)


def test_error_is_raised_in_order_and_cancels_the_calls():
    begun = []

    def call(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    results = map_ordered(call, range(1000), at_once=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(begun) < 50


def test_closing_early_cancels_the_calls():
    begun = []
    results = map_ordered(begun.append, range(1000), at_once=4)
    next(results)
    results.close()
    assert len(begun) < 50
