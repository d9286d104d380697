"""What a bug report should contain: versions, devices, kernels, precision, and a model's order.

`environment` reads versions and devices, `rounding` measures operators against float64, `exactness`
measures whether hypergradients and checkpointing are exact for one model.
"""

from __future__ import annotations

from metafocus.doctor.environment import kernels, machine, versions
from metafocus.doctor.exactness import examined
from metafocus.doctor.findings import Finding
from metafocus.doctor.rounding import precision

__all__ = ["Finding", "examined", "kernels", "machine", "precision", "versions"]
