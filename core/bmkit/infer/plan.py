"""What `infer` will do and need, from headers alone."""

from __future__ import annotations

from bmkit.runtime.estimate import estimate

__all__ = ["estimate"]
