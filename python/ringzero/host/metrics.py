"""Metrics of a host in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ringzero.host.wire import Message
from ringzero.policy import PAGE

__all__ = ["exposition"]


class _Rows(Collector):
    def __init__(self, host: Message, vms: Sequence[Message]) -> None:
        self._host = host
        self._vms = vms

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        amounts = GaugeMetricFamily(
            "ringzero_host_memory_bytes", "Memory of the host for VMs.", labels=["kind"]
        )
        for kind in ("total", "free", "shared", "compressed"):
            amounts.add_metric([kind], self._host[kind] * PAGE)
        yield amounts
        swap = GaugeMetricFamily(
            "ringzero_host_swap_bytes", "Swap file space of the host for VMs.", labels=["kind"]
        )
        swap.add_metric(["size"], self._host["swap_size"] * PAGE)
        swap.add_metric(["free"], self._host["swap_free"] * PAGE)
        yield swap
        level = GaugeMetricFamily(
            "ringzero_host_memory_level", "1 for the level of free memory.", labels=["level"]
        )
        for name in ("high", "soft", "hard", "low"):
            level.add_metric([name], float(name == self._host["level"]))
        yield level
        phases = GaugeMetricFamily("ringzero_vms", "VMs by phase.", labels=["phase"])
        for phase in ("waiting", "booting", "running", "ended"):
            phases.add_metric([phase], sum(vm["phase"] == phase for vm in self._vms))
        yield phases
        living = [vm for vm in self._vms if vm["pid"] is not None]
        pages = GaugeMetricFamily(
            "ringzero_vm_memory_bytes", "Guest memory by state.", labels=["vm", "state"]
        )
        bounds = GaugeMetricFamily(
            "ringzero_vm_bound_bytes",
            "What was promised: size, min, max; and the target.",
            labels=["vm", "bound"],
        )
        own = GaugeMetricFamily("ringzero_vm_monitor_bytes", "The monitor's own memory.", labels=["vm"])
        active = GaugeMetricFamily(
            "ringzero_vm_active_ratio", "Part of its memory that a VM uses.", labels=["vm"]
        )
        shares = GaugeMetricFamily("ringzero_vm_shares", "Weight of a VM.", labels=["vm"])
        cpu = CounterMetricFamily("ringzero_vm_cpu_seconds", "Processor time.", labels=["vm"])
        done = CounterMetricFamily(
            "ringzero_vm_pages", "Pages scanned, shared, dropped as zero, evicted.", labels=["vm", "action"]
        )
        for vm in living:
            name, spec = vm["name"], vm["spec"]
            for state, count in vm["pages"].items():
                pages.add_metric([name, state], count * PAGE)
            for bound, field in (("size", "memory"), ("min", "min"), ("max", "max")):
                bounds.add_metric([name, bound], spec[field])
            if vm["target"] is not None:
                bounds.add_metric([name, "target"], vm["target"] * PAGE)
            if vm["own"] is not None:
                own.add_metric([name], vm["own"])
            active.add_metric([name], vm["active"])
            shares.add_metric([name], spec["shares"])
            cpu.add_metric([name], vm.get("cpu", 0.0))
            for action, count in vm["done"].items():
                done.add_metric([name, action], count)
        yield from (pages, bounds, own, active, shares, cpu, done)


def exposition(host: Message, vms: Sequence[Message]) -> str:
    """Return the metrics of a host and its VMs, from the daemon's rows."""
    registry = CollectorRegistry()
    registry.register(_Rows(host, vms))
    return generate_latest(registry).decode()
