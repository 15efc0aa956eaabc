"""What Prometheus reads at /metrics. Steps pay nothing for it: numbers are read when asked for, and a request that ends
adds itself to the histograms."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from taskgraph.serving.http.status import READY, status_of
from taskgraph.serving.requests import CANCELLED, FAILED, LENGTH, STOP, Completion
from taskgraph.serving.service import Service

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
REASONS = (LENGTH, STOP, CANCELLED, FAILED)
KNOWN_PATHS = frozenset(
    {"/", "/health", "/metrics", "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/status"}
)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Now(Collector):
    """The engine's own counts, as they are when asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        now = status_of(self._service)
        for name, what, value in (
            ("up", "1 while requests are taken, 0 when the server stops or has failed", now.state == READY),
            ("requests_running", "requests whose sequence is in the engine", now.running),
            ("requests_waiting", "requests that wait for room in a step or in the cache", now.waiting),
            ("kv_pages", "pages of the KV cache on the device", now.pages),
            ("kv_pages_used", "pages of the KV cache that sequences hold", now.pages_held),
        ):
            yield GaugeMetricFamily(f"taskgraph_{name}", what, float(value))
        for name, what, total in (
            ("steps", "steps that were launched", now.steps),
            ("prompt_tokens", "tokens of prompts that were computed", now.prompt_tokens),
            ("generated_tokens", "tokens that were generated", now.tokens),
            ("preemptions", "sequences that gave up their pages to others", now.preemptions),
        ):
            yield CounterMetricFamily(f"taskgraph_{name}", what, float(total))


class Metrics:
    """The registry of one service."""

    def __init__(self, service: Service) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Now(service))
        self._first = _seconds(registry, "time_to_first_token", "from a request's arrival to its first token", _TTFT_S)
        self._each = _seconds(registry, "time_per_output_token", "a token after the first, mean of a request", _TPOT_S)
        self._whole = _seconds(registry, "request", "from a request's arrival to its last token", _WHOLE_S)
        self._ended = Counter("taskgraph_requests", "requests that ended, by reason", ["reason"], registry=registry)
        self._answered = Counter(
            "taskgraph_http_responses", "by path and status", ["path", "status"], registry=registry
        )
        for reason in REASONS:
            self._ended.labels(reason)
        service.watchers.append(self._watch)

    def _watch(self, done: Completion) -> None:
        self._ended.labels(done.reason).inc()
        if done.tokens:
            self._first.observe(max(done.first_s - done.arrival_s, 0.0))
        if done.reason in (LENGTH, STOP):
            self._whole.observe(max(done.end_s - done.arrival_s, 0.0))
            if len(done.tokens) > 1:
                self._each.observe(max(done.end_s - done.first_s, 0.0) / (len(done.tokens) - 1))

    def responded(self, path: str, status: int) -> None:
        """Count a response; paths that are none of ours are one."""
        self._answered.labels(path if path in KNOWN_PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """All of it, in the exposition format of CONTENT_TYPE."""
        return generate_latest(self._registry)


def _seconds(registry: CollectorRegistry, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"taskgraph_{name}_seconds", f"seconds {what}", buckets=buckets, registry=registry)
