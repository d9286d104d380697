"""What a bug report should contain: versions, devices, kernels, precision, and a model's order.

`machine` reads versions and devices, `precision` measures operators against float64, and `model`
measures whether hypergradients and checkpointing are exact for one model.
"""

from __future__ import annotations

from metafocus.doctor.findings import Finding
from metafocus.doctor.machine import kernels, machine, versions
from metafocus.doctor.model import examined
from metafocus.doctor.precision import precision

__all__ = ["Finding", "examined", "kernels", "machine", "precision", "versions"]
