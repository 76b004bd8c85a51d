"""Who signed a request: its key, its time, its nonce, and whether the certificate is still in date."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from hansa.network.journal import append_seldom
from hansa.network.messages import Refusal
from hansa.network.quotas import Bucket
from hansa.network.registry import Caller, Later, Registry, at_once
from hansa.network.signing import TOLERANCE_S, UNKNOWN, Claim, is_signed, read_claim

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

RENEW = "/v1/renew"
RENEWAL_GRACE_S = 30 * 86_400.0
_SEEN_EVERY_S = 10.0


class Checker:
    """Says who signed a request. ``epoch`` is new at each start, so that nothing signed before it is good after it.

    Its time is the wall clock's of the start and goes on by a monotonic clock: a clock that is stepped changes nothing.
    The last nonce of each certificate is in memory. A certificate that has ended may be renewed for 30 days more, since
    revocation, not expiry, is what keeps a client out; it is good for nothing else.
    """

    def __init__(self, registry: Registry, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.registry, self.epoch, self._monotonic = registry, secrets.token_hex(8), monotonic
        self._ahead = registry.store.clock() - monotonic()
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        self._seen: dict[str, float] = {}
        self._written_at = monotonic()
        self._noted = Bucket(1.0, 1.0, monotonic)

    @property
    def now(self) -> float:
        """The server's time."""
        return self._monotonic() + self._ahead

    def check(self, scope: Any, shown: str | None, later: Later = at_once) -> tuple[Caller, Claim]:
        """Who signed a request (an ASGI scope), and what was claimed; ``Refusal`` where it does not hold.

        ``shown`` is the SHA-256 of the certificate that the connection shows, if it shows one. What has to be written
        is given to ``later``, also where the request is refused; all else takes a fraction of a millisecond.
        """
        path = scope.get("raw_path") or scope["path"].encode("utf-8")
        claim = read_claim(scope["method"], path, scope["query_string"], scope["headers"])
        if shown is not None and shown != claim.keyid:
            raise Refusal("unauthenticated", UNKNOWN)
        if shown is not None:  # TLS has proved the key: whoever comes back after a restart is told before all else
            self._refuse_old(claim)
        ends = 0.0

        def prove(name: str, certificate: bytes) -> None:
            nonlocal ends
            holds, ends = _holds(certificate, claim)
            if not holds:
                later(partial(self.note, name, "a signature that is not its key's", scope))
                raise Refusal("unauthenticated", UNKNOWN)

        caller = self.registry.authenticate(claim.keyid, prove, later)
        self._refuse_ended(caller, ends, scope)
        self._refuse_old(claim)
        self._refuse_again(caller, claim, scope, later)
        self._saw(caller, later)
        return caller, claim

    def note(self, name: str, what: str, scope: Any) -> None:
        """Put a refused request into the audit log, once a minute and client."""
        if self._noted.take(str(name)) > 0:
            return
        store, address = self.registry.store, (scope.get("client") or ("", 0))[0]
        told = {"reason": what, "method": scope["method"], "path": scope["path"], "address": address}
        with store.write() as db:
            append_seldom(db, store.clock(), "request refused", name, told)

    def _refuse_ended(self, caller: Caller, ends: float, scope: Any) -> None:
        """Refuse a certificate that has ended, but for its renewal in the days of grace."""
        late_s = self.registry.store.clock() - ends
        if late_s <= 0 or (late_s <= RENEWAL_GRACE_S and (scope["method"], scope["path"]) == ("POST", RENEW)):
            return
        what = "renew it" if late_s <= RENEWAL_GRACE_S else f"ask for a new token: hansa invite {caller} --again"
        raise Refusal("expired", f"certificate of {caller}: expected one in date, found that it has ended; {what}")

    def _refuse_old(self, claim: Claim) -> None:
        """Refuse what was signed for another time or another start of the server."""
        now = self.now
        if claim.epoch == self.epoch and abs(now - claim.created) <= TOLERANCE_S:
            return
        text = "signature: expected one of this server's time and epoch; sign again"
        raise Refusal("clock", text, now=now, epoch=self.epoch, last=self._last.get(claim.keyid, 0))

    def _refuse_again(self, caller: Caller, claim: Claim, scope: Any, later: Later) -> None:
        """Refuse what was sent before."""
        with self._lock:
            last = self._last.get(claim.keyid, 0)
            if claim.nonce > last:
                self._last[claim.keyid] = claim.nonce
                return
        later(partial(self.note, caller, "a nonce that was used before", scope))
        text = f"signature: expected a nonce above {last}, found {claim.nonce}; sign again"
        raise Refusal("replay", text, now=self.now, epoch=self.epoch, last=last)

    def _saw(self, caller: Caller, later: Later) -> None:
        """Remember when a client was here; all of them are written down together now and then."""
        with self._lock:
            self._seen[str(caller)] = self.registry.store.clock()
            if self._monotonic() - self._written_at < _SEEN_EVERY_S:
                return
            seen, self._seen, self._written_at = self._seen, {}, self._monotonic()
        later(partial(self.registry.saw, seen))


def _holds(certificate: bytes, claim: Claim) -> tuple[bool, float]:
    """Whether the key of a certificate (PEM) signed what is claimed, and when the certificate ends."""
    key, ends = _read(certificate)
    return key is not None and is_signed(key, claim.signature, claim.base), ends


@lru_cache(maxsize=4096)
def _read(certificate: bytes) -> tuple[EllipticCurvePublicKey | None, float]:
    """The key of a certificate (PEM), where it is one of ours, and when it ends."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    found = x509.load_pem_x509_certificate(certificate)
    key = found.public_key()
    return key if isinstance(key, EllipticCurvePublicKey) else None, found.not_valid_after_utc.timestamp()
