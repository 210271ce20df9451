"""What a server tells Prometheus: vLLM's names where they exist, and planner's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds from one millisecond to two minutes, about three a decade.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters, gauges and histograms of one server, each with the label ``model_name``."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.running = self._gauge("vllm:num_requests_running", "Answers in the running batch.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self.kv_use = self._gauge(
            "vllm:kv_cache_usage_perc", "Cached tokens, as a share of the most there may be."
        )
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token."
        )
        self.per_token = self._histogram(
            "vllm:time_per_output_token_seconds", "Between two tokens, by answer."
        )
        self.queued = self._histogram("vllm:request_queue_time_seconds", "Arrival to prefill.")
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens read.")
        self.new_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._finished = self._counters("vllm:request_success", "Answers.", "finished_reason")
        self._refused = self._counters(
            "planner:requests_refused", "Requests refused before work was done.", "reason"
        )
        self._answers = self._counters(
            "planner:answers", "Answers by the budget of their plan.", "budget"
        )
        self._deadlines = self._counters(
            "planner:deadlines", "Answers with a deadline, by whether it was kept.", "kept"
        )
        self.slow_down = self._gauge(
            "planner:slow_down", "Expected seconds of a prompt over those on the idle machine."
        )

    def finished(self, reason: str, budget: float) -> None:
        """An answer is complete."""
        self._finished.labels(self._model, reason).inc()
        self._answers.labels(self._model, f"{budget:g}").inc()

    def aborted(self) -> None:
        """Whoever asked has gone away."""
        self._finished.labels(self._model, "abort").inc()

    def refused(self, reason: str) -> None:
        """A request was turned away."""
        self._refused.labels(self._model, reason).inc()

    def deadline(self, kept: bool) -> None:
        """An answer with a deadline is complete."""
        self._deadlines.labels(self._model, str(kept).lower()).inc()

    def deadlines(self) -> tuple[float, float]:
        """How many deadlines were missed, or refused because they could not be kept beside what
        ran; and of how many in all."""

        def count(name: str, **labels: str) -> float:
            known = {"model_name": self._model, **labels}
            return self.registry.get_sample_value(f"planner:{name}_total", known) or 0.0

        late = count("deadlines", kept="false") + count("requests_refused", reason="deadline")
        return late, late + count("deadlines", kept="true")

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(name, says, ("model_name",), registry=self.registry).labels(self._model)

    def _counter(self, name: str, says: str) -> Counter:
        return Counter(name, says, ("model_name",), registry=self.registry).labels(self._model)

    def _counters(self, name: str, says: str, by: str) -> Counter:
        return Counter(name, says, ("model_name", by), registry=self.registry)

    def _histogram(self, name: str, says: str) -> Histogram:
        histogram = Histogram(name, says, ("model_name",), registry=self.registry, buckets=_SECONDS)
        return histogram.labels(self._model)
