"""What is measured of each engine where there are several. Everything else is their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from polyadapt.api.meters import FLEET_METERS
from polyadapt.engine.fleet import EngineFleet, MemberState

_GAUGES: dict[str, Callable[[MemberState], float]] = {
    "polyadapt_fleet_engine_ready": lambda member: member.is_ready,
    "polyadapt_fleet_engine_load_tokens": lambda member: member.load_tokens,
    "polyadapt_fleet_engine_running": lambda member: member.num_running,
    "polyadapt_fleet_engine_waiting": lambda member: member.num_waiting,
    "polyadapt_fleet_engine_resident_adapters": lambda member: member.num_resident,
}


class FleetCollector(Collector):
    """Reads the fleet at each scrape; the label `engine` has one value for each."""

    def __init__(self, fleet: EngineFleet) -> None:
        self._fleet = fleet

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are known to be free."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield every family of FLEET_METERS."""
        members = self._fleet.members()
        for name, value in _GAUGES.items():
            gauge = FLEET_METERS[name].gauge()
            for member in members:
                gauge.add_metric([member.name], float(value(member)))
            yield gauge
        restarts = FLEET_METERS["polyadapt_fleet_engine_restarts"].counter()
        for member in members:
            restarts.add_metric([member.name], float(member.num_restarts))
        yield restarts
        failovers = FLEET_METERS["polyadapt_fleet_failovers"].counter()
        failovers.add_metric([], float(self._fleet.num_failovers))
        yield failovers
