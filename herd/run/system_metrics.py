"""Load of this machine as MLflow's UI expects it: `system/cpu_utilization_percentage` and its siblings.

sample = Sampler().sample()        # {"system/...": float}; needs mlflow and psutil, and nvidia-ml-py for GPUs
"""

from contextlib import suppress

import psutil


class Sampler:
    """MLflow's own monitors, read on demand instead of by a thread each."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._process = psutil.Process()
        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # how it says that there is no NVML or no GPU
            self._monitors.append(GPUMonitor())

    def sample(self) -> dict[str, float]:
        """Percentages and megabytes of the machine now, and the resident memory of this process."""
        values = {"system/process_memory_megabytes": self._process.memory_info().rss / 1e6}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values
