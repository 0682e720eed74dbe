"""Who is running a trial, and until when its silence is believed.

Optuna's own heartbeat does not work under ask and tell, so an abandoned trial would stay
RUNNING for ever. A lease names the process that trains the trial and a time by which it
will have spoken again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

# An evaluation or a slow step may take minutes; an owner on this machine that has died is
# noticed at once and needs no expiry.
LEASE_SECONDS = 30 * 60.0
# Process start times come from clock ticks and differ in the last digits between readings.
_SAME_START_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from a later one with the same id by its start time.

    Attributes:
        host: The machine's name.
        pid: The process id on that machine.
        started: When the process started, in seconds since the epoch.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Owner:
        """The process that asks."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, psutil.Process(pid).create_time())

    @property
    def is_alive(self) -> bool:
        """Whether the process is known to be there; False for one on another machine."""
        return self.host == socket.gethostname() and not self.is_dead

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to be gone; False for one on another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            # A zombie has ended; only its parent has not taken note.
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return abs(process.create_time() - self.started) > _SAME_START_SECONDS
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True, slots=True)
class Lease:
    """A trial's owner and the time until which it is believed to be at work.

    Attributes:
        owner: The process that trains the trial.
        expires: Seconds since the epoch.
    """

    owner: Owner
    expires: float

    @classmethod
    def until(cls, owner: Owner, now: float) -> Lease:
        """A fresh lease that begins at ``now``."""
        return cls(owner, now + LEASE_SECONDS)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> Lease:
        """Read what :meth:`to_json` wrote; a missing lease has expired long ago."""
        if not stored:
            return cls(Owner("", 0, 0.0), 0.0)
        return cls(Owner(**stored["owner"]), float(stored["expires"]))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a trial attribute."""
        return asdict(self)

    def is_worth_renewing(self, now: float) -> bool:
        """Whether a quarter of it is used up: renewing at every step would be a write per step."""
        return self.expires - now < 0.75 * LEASE_SECONDS

    def why_over(self, now: float) -> str:
        """Say why nobody works on the trial any more, or return an empty string."""
        if self.owner.is_dead:
            return f"its process ({self.owner.pid} on {self.owner.host}) ended without a word"
        if now > self.expires:
            who = f"process {self.owner.pid} on {self.owner.host}" if self.owner.host else "nobody"
            return f"its lease expired; it belonged to {who}"
        return ""
