"""Many episodes at once: in chunks, and shared by ranks."""

from __future__ import annotations

from metafocus.tasks.mean import over_tasks

__all__ = ["over_tasks"]
