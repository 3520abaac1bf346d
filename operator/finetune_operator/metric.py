"""What Prometheus is told. One registry for each operator, so that tests may run several."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_api.status import Phase

SECONDS = (1, 5, 15, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600)
"""Buckets of a stage's duration: from a check of seconds to a training of days."""
QUICK_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Buckets of a reconcile."""


class Metrics:
    """All metrics; names begin with ``finetune_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.reconcile_seconds = Histogram(
            "finetune_reconcile_duration_seconds",
            "Time of one look at a job.",
            ["outcome"],
            buckets=QUICK_SECONDS,
            registry=self.registry,
        )
        self.retries = Counter(
            "finetune_reconcile_retries_total", "Looks at a job that failed and were put off.", registry=self.registry
        )
        self.actions = Counter(
            "finetune_actions_total", "What was done to the cluster.", ["action"], registry=self.registry
        )
        self.stage_seconds = Histogram(
            "finetune_stage_duration_seconds",
            "Running time of attempts that have ended.",
            ["stage", "reason"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.job_seconds = Histogram(
            "finetune_job_duration_seconds",
            "Time from creation to the end of jobs that have ended.",
            ["phase"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.events_lost = Counter(
            "finetune_events_lost_total", "Kubernetes events that could not be written.", registry=self.registry
        )
        self.ghosts = Counter(
            "finetune_ghosts_total", "Objects that were gone and still in the cache.", ["kind"], registry=self.registry
        )
        self.sessions = Counter(
            "finetune_watch_sessions_total", "Times that all watches were started.", registry=self.registry
        )

    def watch(
        self,
        jobs: Callable[[], Iterable[tuple[str, Phase | None]]],
        depth: Callable[[], int],
        untold: Callable[[], int],
        leads: Callable[[], bool],
    ) -> Collector:
        """Ask for the figures of the moment whenever Prometheus does; see `forget`.

        Args:
            jobs: namespace and phase of every job.
            depth: keys that wait for a worker.
            untold: events that wait to be written.
            leads: whether this replica acts.
        """
        collector = _Moment(jobs, depth, untold, leads)
        self.registry.register(collector)
        return collector

    def forget(self, collector: Collector) -> None:
        """Ask no more."""
        self.registry.unregister(collector)

    def text(self) -> bytes:
        """Return all of it in Prometheus' format."""
        return generate_latest(self.registry)


class _Moment(Collector):
    def __init__(
        self,
        jobs: Callable[[], Iterable[tuple[str, Phase | None]]],
        depth: Callable[[], int],
        untold: Callable[[], int],
        leads: Callable[[], bool],
    ) -> None:
        self._jobs = jobs
        self._depth = depth
        self._untold = untold
        self._leads = leads

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges."""
        jobs = GaugeMetricFamily("finetune_jobs", "FineTuneJobs.", labels=["namespace", "phase"])
        for (namespace, phase), count in sorted(Tally(self._jobs()).items(), key=str):
            jobs.add_metric([namespace, phase or Phase.PENDING], count)
        yield jobs
        yield GaugeMetricFamily("finetune_queue_depth", "Jobs that wait to be looked at.", value=self._depth())
        yield GaugeMetricFamily(
            "finetune_events_waiting", "Kubernetes events that wait to be written.", value=self._untold()
        )
        yield GaugeMetricFamily("finetune_leader", "1 where this replica acts.", value=int(self._leads()))

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Say nothing before there is something to count."""
        return ()
