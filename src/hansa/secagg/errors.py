"""What peers of secure aggregation may send that cannot be used.

ProtocolError
└── SecAggError
    ├── BadKey       a public key that is not one, or that nothing secret can be agreed with
    ├── BadSeal      a sealed message that was changed, cut, or sealed under another key
    └── BadShares    shares that do not join to a secret
"""

from __future__ import annotations

from hansa.core.errors import ProtocolError


class SecAggError(ProtocolError):
    """Something of secure aggregation that cannot be used or trusted; nothing was released because of it."""


class BadKey(SecAggError):
    """A public key that is not one, or that nothing secret can be agreed with."""


class BadSeal(SecAggError):
    """A sealed message that was changed, cut, or sealed under another key or for another purpose."""


class BadShares(SecAggError):
    """Shares that do not join to a secret."""


__all__ = ["BadKey", "BadSeal", "BadShares", "SecAggError"]
