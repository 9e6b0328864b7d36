"""Processes and devices: how ranks train and communicate, how they are started, and how they end."""

from sparring.parallel.protocol import Parallel
from sparring.parallel.single import SingleProcess, local_device, num_local_devices, num_usable_cpus

__all__ = ["Parallel", "SingleProcess", "local_device", "num_local_devices", "num_usable_cpus"]
