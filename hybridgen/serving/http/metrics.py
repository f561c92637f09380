"""What `/metrics` of the HTTP door tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridgen.serving.service.adapter import graph_counts, graph_values, hit_rates, read_share


def exposition(
    facts: Mapping[str, Any], answers: Mapping[tuple[str, int], int], ignored: Mapping[str, int], streams: int
) -> str:
    """The metrics as text.

    Args:
        facts: the server's answer to `stats`, empty where it gives none.
        answers: counted by route and status.
        ignored: fields of requests that were not known.
        streams: that are open.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Facts(facts, answers, ignored, streams))  # type: ignore[arg-type]
    return generate_latest(registry).decode()


class _Facts:
    """A collector of one moment."""

    def __init__(self, *given: Any) -> None:
        self._given = given

    def collect(self) -> Iterator[Any]:
        """The metrics."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        facts, answers, ignored, streams = self._given
        counted = CounterMetricFamily(
            "hybridgen_http_answers", "Answers by route and status", labels=["path", "status"]
        )
        for (path, status), count in answers.items():
            counted.add_metric([path, str(status)], count)
        yield counted
        names = CounterMetricFamily("hybridgen_http_ignored_fields", "Fields that are not known", labels=["field"])
        for name, count in ignored.items():
            names.add_metric([name], count)
        yield names
        yield GaugeMetricFamily("hybridgen_http_streams", "Streams that are open", value=streams)
        yield GaugeMetricFamily("hybridgen_up", "Whether the server answers", value=int(bool(facts)))
        if not facts:
            return
        server, engine = facts.get("server", {}), facts.get("engine", {})
        counts = CounterMetricFamily("hybridgen_server", "What the server counted since its start", labels=["what"])
        for name, count in server.get("counts", {}).items():
            counts.add_metric([name], count)
        yield counts
        yield GaugeMetricFamily("hybridgen_in_flight", "Completions that run or wait", value=server.get("in_flight", 0))
        for name in ("running", "waiting", "pages", "free_pages"):
            value = engine.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield GaugeMetricFamily(f"hybridgen_{name}", f"The engine's {name.replace('_', ' ')}", value=value)
        steps = CounterMetricFamily("hybridgen_graph_steps", "Steps by phase and graph", labels=["phase", "result"])
        for (phase, result), count in graph_counts(engine).items():
            steps.add_metric([phase, result], count)
        yield steps
        rates = GaugeMetricFamily("hybridgen_graph_hit_rate", "Share of steps that a graph ran", labels=["phase"])
        for phase, rate in hit_rates(engine).items():
            rates.add_metric([phase], rate)
        yield rates
        share = read_share(engine)
        if share is not None:
            yield GaugeMetricFamily("hybridgen_read_share", "Decode's reads, of the device's best", value=share)
        for name, value in graph_values(engine).items():
            yield GaugeMetricFamily(f"hybridgen_graphs_{name}", f"Graphs: {name.replace('_', ' ')}", value=value)
