"""Metrics of the server in the Prometheus text format."""

from bisect import bisect_left
from collections import Counter

BUCKETS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)  # upper bounds, in seconds


class Metrics:
    """Counters of requests, tokens and latencies."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0
        self._statuses: Counter[int] = Counter()
        self._seconds = [0] * (len(BUCKETS) + 1)
        self._total = 0.0

    def finished(self, status: int, seconds: float) -> None:
        """Record a finished request. Status 499: the client disconnected."""
        self._statuses[status] += 1
        self._seconds[bisect_left(BUCKETS, seconds)] += 1
        self._total += seconds

    def text(self, in_flight: int) -> str:
        """All metrics as text."""
        lines = ["# HELP avocado_requests_total Chat requests by HTTP status; 499: the client disconnected."]
        lines += ["# TYPE avocado_requests_total counter"]
        lines += [f'avocado_requests_total{{status="{status}"}} {n}' for status, n in sorted(self._statuses.items())]
        for name, kind, value, meaning in (
            ("requests_in_flight", "gauge", in_flight, "Chat requests that are being answered."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Tokens of prompts with their media."),
            ("completion_tokens_total", "counter", self.completion_tokens, "Tokens of answers."),
        ):
            lines += [f"# HELP avocado_{name} {meaning}", f"# TYPE avocado_{name} {kind}", f"avocado_{name} {value}"]
        lines += ["# HELP avocado_request_seconds Time from a request to the end of its answer."]
        lines += ["# TYPE avocado_request_seconds histogram"]
        count = 0
        for bound, many in zip((*BUCKETS, "+Inf"), self._seconds):
            count += many
            lines.append(f'avocado_request_seconds_bucket{{le="{bound}"}} {count}')
        lines += [f"avocado_request_seconds_sum {self._total:.3f}", f"avocado_request_seconds_count {count}"]
        return "\n".join(lines) + "\n"
