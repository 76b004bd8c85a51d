"""Why a client does not go on: a server, or a peer, that does not keep to the protocol, or too few clients.

SecAggError
└── Refused
    ├── OutOfOrder    asked for a step that does not follow the last one, or for one again in another way
    ├── TooFew        a sum of fewer clients than it takes to hide one
    ├── Forged        an advert, a list or a signature that nobody enrolled has made
    ├── Contradiction a client that is both alive and lost, or that I know to be the other
    ├── ChangedList   survivors other than those that this client, or enough of its neighbours, signed
    └── OtherModel    a neighbour was sent another model, or other terms, than this client
"""

from __future__ import annotations

from hansa.secagg.errors import SecAggError


class Refused(SecAggError):
    """A client does not take part in an attempt any further; nothing that it holds leaves it."""


class OutOfOrder(Refused):
    """A step that does not follow the last one."""


class TooFew(Refused):
    """A sum of so few clients would not hide this one."""


class Forged(Refused):
    """Something that nobody enrolled has made, or that is not about this attempt."""


class Contradiction(Refused):
    """Claims about who is alive that cannot all be true."""


class ChangedList(Refused):
    """Survivors other than those that were agreed on."""


class OtherModel(Refused):
    """Neighbours work on another model or under other terms."""


__all__ = ["ChangedList", "Contradiction", "Forged", "OtherModel", "OutOfOrder", "Refused", "TooFew"]
