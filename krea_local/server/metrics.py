"""What Prometheus reads at /metrics. One registry an application; knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from krea_local.server.jobs import Job
from krea_local.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
WORKER_STATES = ("loading", "idle", "busy", "failed", "stopped")


class Metrics:
    """Counts what is finished, and asks the service for the rest when it is read."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._jobs = Counter(
            "krea_local_jobs", "Finished jobs.", ["state", "endpoint"], registry=self.registry
        )
        self._images = Counter(
            "krea_local_images", "Finished images.", ["flagged"], registry=self.registry
        )
        self._stages = Histogram(
            "krea_local_stage_seconds",
            "Seconds of a job in a stage.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._waits = Histogram(
            "krea_local_wait_seconds",
            "Seconds that a job waited before it began.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Now(service))

    def finished(self, job: Job) -> None:
        """Count a job that is done, failed or cancelled."""
        self._jobs.labels(job.state, job.endpoint).inc()
        if job.started is not None:
            self._waits.observe(max(0.0, job.started - job.created))
        if job.outcome is None:
            return
        for flagged in job.outcome.has_nsfw_concepts:
            self._images.labels(str(flagged).lower()).inc()
        for stage, seconds in job.outcome.timings.items():
            self._stages.labels(stage).observe(seconds)

    def read(self) -> bytes:
        """All of it, as Prometheus wants it."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is true at this moment."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks nothing of a service that has not started

    def collect(self) -> Iterable[Metric]:
        service = self._service
        length, ready = float(service.queue_length), float(service.ready)
        yield GaugeMetricFamily("krea_local_queue_length", "Jobs that wait.", length)
        yield GaugeMetricFamily("krea_local_ready", "Whether a worker has its model.", ready)
        used = GaugeMetricFamily(
            "krea_local_gpu_memory_used_bytes", "GPU memory in use.", labels=["device"]
        )
        total = GaugeMetricFamily(
            "krea_local_gpu_memory_total_bytes", "GPU memory there is.", labels=["device"]
        )
        states = GaugeMetricFamily(
            "krea_local_worker", "1 for the state a worker is in.", labels=["device", "state"]
        )
        for place, worker in enumerate(service.workers()):
            device = f"{place}:{worker.device}"
            used.add_metric([device], float(worker.memory_used))
            total.add_metric([device], float(worker.memory_total))
            for state in WORKER_STATES:
                states.add_metric([device, state], float(worker.state == state))
        yield used
        yield total
        yield states
