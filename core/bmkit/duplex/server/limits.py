"""How much one client may send."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

FRAME_BYTES = 64 * 1024
"""The longest frame that is read."""


@dataclass
class Rate:
    """A bucket of `burst` frames that fills with `a_second`; times are in seconds.

    Who goes on when it is empty is sent away after `patience` frames that were dropped.
    """

    a_second: float = 50.0
    burst: float = 100.0
    patience: int = 200
    dropped: int = 0
    """Frames that came too soon since the bucket was half full."""
    _left: float = field(init=False)
    _last: float | None = None

    def __post_init__(self) -> None:
        """Begin with a full bucket."""
        self._left = self.burst

    def admits(self, now: float) -> bool:
        """Tell whether a frame may come at a time; a clock that goes back adds nothing."""
        if self._last is not None and now > self._last:
            self._left = min(self.burst, self._left + (now - self._last) * self.a_second)
        self._last = now
        if self._left < 1:
            self.dropped += 1
            return False
        self._left -= 1
        if self._left >= self.burst / 2:
            self.dropped = 0
        return True

    @property
    def exhausted(self) -> bool:
        """Tell whether it has been too much."""
        return self.dropped >= self.patience


def is_local(host: str) -> bool:
    """Tell whether only this machine can reach what listens on a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def origin_is_known(origin: str | None, host: str | None, allowed: Iterable[str] = ()) -> bool:
    """Tell whether a browser's page may open a session: one from here, or one that is allowed.

    A program other than a browser sends no origin. `host` is what the request was sent to.
    """
    if origin is None:
        return True
    if origin in allowed:
        return True
    return host is not None and _parts(origin).netloc == host


def host_is_expected(said: str | None, listening: str) -> bool:
    """Tell whether a request means this server: one that listens to this machine only is called so.

    A page whose own name was made to lead here says that name, and is kept out.
    """
    if not is_local(listening):
        return True
    name = _parts(f"//{said}").hostname if said else None
    return name is not None and is_local(name)


def _parts(url: str) -> SplitResult:
    """Return the parts of an address; of one that can't be read, none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
