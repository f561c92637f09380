"""Prometheus metrics of a service, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridgen.errors import ConfigError
from hybridgen.serving.service.adapter import graph_counts, graph_values, hit_rates, read_share
from hybridgen.serving.service.generator import Done
from hybridgen.serving.service.service import Service

_TTFT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Histograms that completions are put into, and a collector that reads the rest when it is asked."""

    def __init__(self) -> None:
        """
        Raises:
            ConfigError: the Prometheus client library is not installed.
        """
        try:
            import prometheus_client
            import prometheus_client.core
            import prometheus_client.exposition
        except ImportError as error:
            raise ConfigError(
                "metrics need the package prometheus-client, which is not installed; pip install 'hybridgen[serve]'"
            ) from error
        self._library = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return prometheus_client.Histogram(f"hybridgen_{name}", text, buckets=buckets, registry=self._registry)

        self._ttft = histogram("ttft_seconds", "From submission to the first token", _TTFT_BUCKETS)
        self._tpot = histogram("tpot_seconds", "Mean time per token after a completion's first", _TPOT_BUCKETS)
        self._queue = histogram("queue_seconds", "From submission to the launch of the first prefill", _TTFT_BUCKETS)
        self._completions = prometheus_client.Counter(
            "hybridgen_completions", "Completions that ended", ["finish_reason"], registry=self._registry
        )

    def completed(self, done: Done) -> None:
        """Take in a completion."""
        completion = done.event.completion
        if completion is None:
            return
        timing, times = completion.timing, completion.timing.token_times
        self._completions.labels(str(completion.finish_reason)).inc()
        if timing.queue is not None:
            self._queue.observe(timing.queue)
        if timing.ttft is not None:
            self._ttft.observe(timing.ttft)
        if len(times) > 1:
            self._tpot.observe((times[-1] - times[0]) / (len(times) - 1))

    def watch(self, service: Service) -> None:
        """Tell of this service, once."""
        self._registry.register(_Now(self._library, service))

    def text(self, accept: str) -> tuple[bytes, str]:
        """What a scrape answers: the metrics of this moment, and their content type.

        Args:
            accept: the content types that the asker takes, as HTTP has them.
        """
        encode, kind = self._library.exposition.choose_encoder(accept)
        return encode(self._registry), kind


class _Now:
    """What the service and the engine hold at the moment of a scrape. Reads values; asks the generator for nothing."""

    def __init__(self, library: Any, service: Service) -> None:
        self._core = library.core
        self._service = service

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        service = self._service
        health, stats = service.health(), service.generator.snapshot
        counts = dict(service.counts)
        yield self._counter("requests", "Requests that were accepted", {(): counts.get("requests", 0)})
        refused = {("busy",): counts.get("busy", 0), ("error",): counts.get("errors", 0)}
        yield self._counter("requests_failed", "Requests answered with an error", refused, ("kind",))
        yield self._counter("clients_cut_off", "Clients that read too slowly", {(): counts.get("cut_off", 0)})
        tokens = {(kind,): count for kind, count in stats.get("tokens", {}).items()}
        yield self._counter("tokens", "Tokens that the engine read and made", tokens, ("kind",))
        yield self._counter("steps", "Steps that ended", {(): health["steps"]})
        drafts = stats.get("speculation", {})
        checked, right, drafter = drafts.get("drafted", 0), drafts.get("accepted", 0), drafts.get("drafter", "off")
        counted = {(drafter, "accepted"): right, (drafter, "refused"): checked - right} if checked else {}
        yield self._counter("drafts", "Drafts that were checked, by what came of them", counted, ("drafter", "result"))
        steps = graph_counts(stats)
        yield self._counter("graph_steps", "Steps by what CUDA graphs did for them", steps, ("phase", "result"))
        text = "Share of steps that a CUDA graph ran since the start, 0 to 1"
        rates = self._core.GaugeMetricFamily("hybridgen_graph_hit_rate", text, labels=("phase",))
        for phase, rate in hit_rates(stats).items():
            rates.add_metric((phase,), rate)
        yield rates
        share = read_share(stats)
        if share is not None:
            yield self._gauge("read_share", "Decode's reads as a share of the device's best, 0 to 1", share)
        graphs = graph_values(stats)
        yield self._counter("graph_capture_failures", "Captures that failed", {(): graphs["capture_failures"]})
        yield self._counter("graph_lazy_captures", "Captures while idle", {(): graphs["lazy_captures"]})
        yield self._counter("graph_evictions", "CUDA graphs that were dropped for room", {(): graphs["evictions"]})
        yield self._gauge("graphs", "CUDA graphs that are held", graphs["held"])
        yield self._gauge("graphs_failed", "Sizes without a graph, because it failed or was wrong", graphs["failed"])
        yield self._gauge("graph_bytes", "Device memory that the captures of these graphs took", graphs["bytes"])
        fallbacks = sum(stats.get("fallbacks", {}).values())
        yield self._counter("fallbacks", "Times that something ran another way than asked for", {(): fallbacks})
        yield self._gauge("clients", "Connected clients", health["clients"])
        yield self._gauge("in_flight", "Completions that run or wait", health["in_flight"])
        yield self._gauge("running", "Completions that run", stats.get("running", 0))
        yield self._gauge("waiting", "Completions that wait for a slot or pages", stats.get("waiting", 0))
        yield self._gauge("pages", "Pages of the KV cache", stats.get("pages", 0))
        yield self._gauge("pages_free", "Free pages of the KV cache", stats.get("free_pages", 0))
        prefix = stats.get("prefix", {})
        asked, found = prefix.get("prompt_tokens", 0), prefix.get("cached_tokens", 0)
        tokens = {("hit",): found, ("miss",): asked - found}
        yield self._counter("prefix_tokens", "Prompt tokens by what the prefix cache had", tokens, ("result",))
        yield self._gauge("pages_kept", "Pages that the prefix cache can find", prefix.get("pages", 0))
        yield self._gauge("work_age_seconds", "How long the present step has taken", health["work_age"])
        yield self._gauge("healthy", "1, or 0 while a step hangs", int(health["healthy"]))

    def _counter(self, name: str, text: str, values: Mapping[Any, float], labels: tuple[str, ...] = ()) -> Any:
        family = self._core.CounterMetricFamily(f"hybridgen_{name}", text, labels=labels)
        for key, value in values.items():
            family.add_metric(key, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Any:
        return self._core.GaugeMetricFamily(f"hybridgen_{name}", text, value=value)
