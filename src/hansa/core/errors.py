"""Errors that hansa raises on purpose.

    HansaError                 everything below; the command line prints its sentence, not a traceback
    ├── InputError             an option, a file or data that cannot be used (exit status 2)
    │   └── CheckError         a federation whose parts do not fit together; lists all problems at once
    ├── RunError               the run could not go on (exit status 1)
    │   └── Abandoned          too few clients are left in an attempt; nothing was released
    └── ProtocolError          a peer said something that the protocol does not allow

Every message says what was expected, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class HansaError(Exception):
    """Any error that hansa raises on purpose: expected, found, what to do."""

    exit_status = 1


class InputError(HansaError):
    """An option, a file or data that cannot be used as given."""

    exit_status = 2


class CheckError(InputError):
    """A federation whose parts do not fit together; ``problems`` holds every sentence."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([heading, *(f"{i} {p}" for i, p in enumerate(self.problems, 1))]))


class RunError(HansaError):
    """The run could not go on."""


class Abandoned(RunError):
    """Too few clients are left in this attempt; nothing was released and nothing is remembered.

    ``may_heal``: somebody did not answer, or it was abandoned before a restart, so that another attempt may do better.
    ``blamed`` are clients without whose mail this attempt might have gone on.
    """

    def __init__(self, message: str, *, may_heal: bool = False, blamed: Sequence[str] = ()) -> None:
        self.may_heal, self.blamed = may_heal, tuple(blamed)
        super().__init__(message)


class ProtocolError(HansaError):
    """A peer said something that the protocol does not allow."""
