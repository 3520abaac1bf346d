"""How often each of many callers may do something. Pure but for what it remembers; time is an argument."""

from collections import OrderedDict
from collections.abc import Hashable


class RateLimit:
    """A bucket of permits for each caller, filled at a steady rate; remembers the newest callers alone."""

    def __init__(self, per_second: float, burst: int, most_callers: int = 4096):
        """Allow ``burst`` at once and ``per_second`` in the long run."""
        self._per_second = per_second
        self._burst = float(burst)
        self._most_callers = most_callers
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def seconds_to_wait(self, caller: Hashable, now: float) -> float:
        """Take a permit and return 0, or return the seconds after which there will be one."""
        left, since = self._buckets.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        is_allowed = left >= 1
        self._buckets[caller] = (left - 1 if is_allowed else left, now)
        if len(self._buckets) > self._most_callers:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - left) / self._per_second
