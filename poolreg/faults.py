"""Faults on purpose, for the tests of what a crash or a failing disk leaves behind.

Code that changes a pool passes named steps. With POOLREG_FAULT unset, as it always is but in
tests, passing one does nothing. `POOLREG_FAULT=STEP@N=ACTION` acts when a step whose name matches
the pattern STEP (as in a shell: `journal.*`) is passed for the Nth time: `kill` ends the process
as kill -9 does, `stop` halts it until SIGCONT, and the name of an error, such as EIO or ENOSPC,
raises that `OSError`. `POOLREG_FAULT=trace` writes the steps that are passed to stderr.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import signal
import sys
from dataclasses import dataclass

_VARIABLE = "POOLREG_FAULT"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class _Fault:
    pattern: str
    countdown: int
    action: str

    @classmethod
    def parse(cls, text: str) -> _Fault:
        if text == "trace":
            return cls("*", 0, "trace")
        place, _, action = text.rpartition("=")
        pattern, _, number = place.partition("@")
        if not pattern or (action not in _SIGNALS and not hasattr(errno, action)):
            raise ValueError(f"{_VARIABLE}={text!r} is not STEP@N=ACTION")
        return cls(pattern, int(number or 1), action)

    def passed(self, step: str) -> None:
        if not fnmatch.fnmatchcase(step, self.pattern):
            return
        if self.action == "trace":
            print(step, file=sys.stderr)
            return
        self.countdown -= 1
        if self.countdown:
            return
        if self.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.action])
            return
        code = getattr(errno, self.action)
        raise OSError(code, os.strerror(code))


_fault = _Fault.parse(os.environ[_VARIABLE]) if os.environ.get(_VARIABLE) else None


def step(name: str) -> None:
    """Pass a step; something happens only where a test has asked for it."""
    if _fault is not None:
        _fault.passed(name)
