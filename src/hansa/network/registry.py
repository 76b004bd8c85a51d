"""Who may take part: join tokens, the clients that enrolled with them, and who said hello in a run."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.errors import InputError
from hansa.network import lasting
from hansa.network.failpoints import fail_point
from hansa.network.identity import Authority, fingerprint, request_key_hash
from hansa.network.journal import append, append_of_strangers, append_seldom
from hansa.network.messages import NAME, Enrol, Enrolled, Hello, Refusal, Renew, check_name
from hansa.network.signing import UNKNOWN
from hansa.network.store import Store, clients, presence, renewals, token_uses, tokens
from hansa.network.token import JoinToken

Prove = Callable[[str, bytes], None]
Later = Callable[[Callable[[], None]], None]  # takes a write that the caller need not wait for itself
_HOLDER = "SELECT name, certificate, revoked_at FROM clients WHERE certificate_sha256 = ?"
_NEXT_HOLDER = """SELECT clients.name, renewals.certificate, revoked_at FROM renewals
    JOIN clients ON clients.name = renewals.name WHERE renewals.certificate_sha256 = ?"""


def at_once(write: Callable[[], None]) -> None:
    """Write now."""
    write()


class Caller(str):
    """A client's name as a request proved it, with the certificate that proved it.

    It travels as the name does, so that whatever a request changes can look whether the certificate is still good.
    """

    certificate: str  # SHA-256, in hex

    def __new__(cls, name: str, certificate: str) -> Caller:
        """The name, and by which certificate."""
        made = super().__new__(cls, name)
        made.certificate = certificate
        return made


@dataclass(frozen=True)
class Registry:
    """Tokens and clients in a store. Each method is one transaction, and what it did is in the audit log."""

    store: Store

    def invite(
        self,
        name: str,
        *,
        url: str,
        authority: str,
        uses: int = 1,
        expires_s: float | None = None,
        again: bool = False,
    ) -> JoinToken:
        """A new join token for ``name``, or for any name that matches it (``gw-*``); only a hash of its secret is kept.

        ``again`` lets it replace the certificate of a client that exists already (a lost machine). Raises
        ``InputError`` for a name that cannot be, and for one that is taken unless ``again``.
        """
        pattern = "*" in name or "?" in name
        check_name(name.replace("*", "x").replace("?", "x"))
        if uses < 1 or (uses > 1 and not pattern):
            raise InputError(
                f"invite {name}: expected one use for one name, found {uses}; use a pattern such as 'gw-*' for several"
            )
        token = JoinToken(
            url=url, authority=authority, id=secrets.token_hex(8), secret=secrets.token_bytes(32), name=name
        )
        now = self.store.clock()
        with self.store.write() as db:
            taken = db.scalar(sa.select(clients.c.name).where(clients.c.name == name, clients.c.revoked_at.is_(None)))
            if taken and not again:
                raise InputError(
                    f"invite {name}: expected a name that is free, found a client of that name; "
                    "choose another, or replace its certificate with --again"
                )
            db.execute(
                tokens.insert().values(
                    id=token.id,
                    secret_hash=hashlib.sha256(token.secret).hexdigest(),
                    pattern=name,
                    uses_left=uses,
                    again=again,
                    created_at=now,
                    expires_at=None if expires_s is None else now + expires_s,
                )
            )
            append(db, now, "invited", name, {"uses": uses, "expires_s": expires_s, "again": again})
        return token

    def enrol(self, message: Enrol, authority: Authority, *, address: str = "") -> Enrolled:
        """A certificate for a client that shows a good token; the same key and name again get the same one.

        Raises ``Refusal`` for a wrong, used or expired token, a name it is not for, or a name that is taken.
        """
        try:
            return self._enrol(message, authority)
        except Refusal as refusal:
            with self.store.write() as db:
                what = {"reason": str(refusal), "address": address}
                append_of_strangers(db, self.store.clock(), "enrolment refused", message.name, what)
            raise

    def _enrol(self, message: Enrol, authority: Authority) -> Enrolled:
        """One transaction: the token is used, and the name has its certificate."""
        name = message.name
        if not NAME.fullmatch(name):
            raise Refusal("token", "enrol: expected a name of 1 to 64 letters, digits, dots, dashes or underscores")
        key_hash, now = request_key_hash(message.request), self.store.clock()
        with self.store.write() as db:
            token = db.execute(sa.select(tokens).where(tokens.c.id == message.token)).one_or_none()
            stored = token.secret_hash if token else hashlib.sha256(b"").hexdigest()
            if not hmac.compare_digest(hashlib.sha256(message.secret).hexdigest(), stored) or token is None:
                raise Refusal(
                    "token",
                    "join token: expected one that this coordinator made, found another; "
                    f"ask for a new one: hansa invite {name}",
                )
            client = db.execute(sa.select(clients).where(clients.c.name == name)).one_or_none()
            used = db.scalar(
                sa.select(token_uses.c.used_at).where(token_uses.c.token == token.id, token_uses.c.client == name)
            )
            if used and client and client.key_hash == key_hash and client.revoked_at is None:
                return Enrolled(name=name, certificate=client.certificate)
            _check_token(db, token, name, now)
            _check_free(client, token)
            certificate = authority.sign_client(message.request, name)
            row = {
                "certificate_sha256": fingerprint(certificate),
                "certificate": certificate,
                "key_hash": key_hash,
                "enrolled_at": now,
                "revoked_at": None,
                "last_seen": now,
            }
            db.execute(
                upsert(clients).values(name=name, **row).on_conflict_do_update(index_elements=["name"], set_=row)
            )
            db.execute(tokens.update().where(tokens.c.id == token.id).values(uses_left=tokens.c.uses_left - 1))
            use = upsert(token_uses).values(token=token.id, client=name, used_at=now)
            db.execute(use.on_conflict_do_update(index_elements=["token", "client"], set_={"used_at": now}))
            db.execute(renewals.delete().where(renewals.c.name == name))
            what = {"certificate": row["certificate_sha256"], "again": client is not None}
            append(db, now, "enrolled", name, what)
            fail_point("coordinator.client.enrolling")
        fail_point("coordinator.client.enrolled")
        return Enrolled(name=name, certificate=certificate)

    def renew(self, caller: Caller, message: Renew, authority: Authority) -> Enrolled:
        """The next certificate of a client, for the same key or a new one; asked again, the same one for the same key.

        Both are good until the client has used the new one: a crash on either side leaves it one that works.
        """
        key_hash = request_key_hash(message.request)
        with self.store.write() as db:
            refuse_revoked(db, caller)
            waiting = db.execute(sa.select(renewals).where(renewals.c.name == caller)).one_or_none()
            if waiting is not None and waiting.key_hash == key_hash:
                return Enrolled(name=str(caller), certificate=waiting.certificate)
            certificate = authority.sign_client(message.request, caller)
            row = {
                "certificate_sha256": fingerprint(certificate),
                "certificate": certificate,
                "key_hash": key_hash,
            }
            made = upsert(renewals).values(name=caller, **row)
            db.execute(made.on_conflict_do_update(index_elements=["name"], set_=row))
            append(db, self.store.clock(), "renewed", caller, {"certificate": row["certificate_sha256"]})
        return Enrolled(name=str(caller), certificate=certificate)

    def authenticate(
        self, certificate_sha256: str | None, prove: Prove | None = None, later: Later = at_once
    ) -> Caller:
        """The client whose certificate this is; ``prove(name, certificate)`` raises unless the caller holds its key.

        A certificate that is not known, was replaced, or whose key the caller does not hold is one and the same
        ``Refusal``; only whoever holds the key hears that the client was revoked. The first use of a renewed
        certificate ends the one before, by a write that is given to ``later``.
        """
        if certificate_sha256 is None:
            raise Refusal("unauthenticated", UNKNOWN)
        client = self.store.row(_HOLDER, certificate_sha256)
        is_next = client is None
        client = client or self.store.row(_NEXT_HOLDER, certificate_sha256)
        if client is None:
            raise Refusal("unauthenticated", UNKNOWN)
        name, certificate, revoked_at = client
        if prove is not None:
            prove(name, certificate)
        _refuse_revoked(name, revoked_at)
        caller = Caller(name, certificate_sha256)
        if is_next:
            later(partial(self._replace, caller))
        return caller

    def _replace(self, caller: Caller) -> None:
        """A client has used its renewed certificate: from now on it is the only one."""
        with self.store.write() as db:
            same = (renewals.c.name == caller, renewals.c.certificate_sha256 == caller.certificate)
            renewed = db.execute(sa.select(renewals).where(*same)).one_or_none()
            if renewed is not None:
                row = {name: getattr(renewed, name) for name in ("certificate_sha256", "certificate", "key_hash")}
                db.execute(renewals.delete().where(*same))
                db.execute(clients.update().where(clients.c.name == caller).values(**row))
                what = {"certificate": renewed.certificate_sha256}
                append(db, self.store.clock(), "replaced", caller, what)

    def saw(self, names: Mapping[str, float]) -> None:
        """Note when clients were seen last; many at once, as it is but for ``hansa status``."""
        if names:
            rows = [{"who": name, "at": at} for name, at in names.items()]
            seen = clients.update().where(clients.c.name == sa.bindparam("who")).values(last_seen=sa.bindparam("at"))
            with self.store.write() as db:
                db.execute(seen, rows)

    def check_revoked(self, name: str) -> None:
        """Refuse a client that was revoked, or whose certificate was replaced, while its request waited."""
        client = self.store.row("SELECT certificate_sha256, revoked_at FROM clients WHERE name = ?", str(name))
        if client != (getattr(name, "certificate", client and client[0]), None):
            with self.store.read() as db:
                refuse_revoked(db, name)

    def revoke(self, name: str) -> None:
        """Refuse a client from now on, and the tokens for its name; ``InputError`` when there is none of that name."""
        with self.store.write() as db:
            chosen = clients.update().where(clients.c.name == name, clients.c.revoked_at.is_(None))
            now = self.store.clock()
            if db.execute(chosen.values(revoked_at=now)).rowcount:
                db.execute(tokens.update().where(tokens.c.pattern == name).values(uses_left=0))
                db.execute(renewals.delete().where(renewals.c.name == name))
                append(db, now, "revoked", name, {})
                return
            known = [row.name for row in db.execute(sa.select(clients.c.name).order_by(clients.c.name).limit(20))]
        raise InputError(
            f"revoke {name}: expected a client that is enrolled, found none of that name; there are {known}"
        )

    def hello(self, name: str, run: str, message: Hello) -> None:
        """Note that a client takes part in a run."""
        row = {"hello_at": (now := self.store.clock()), "version": message.version[:40], "said_goodbye": False}
        with self.store.write() as db:
            refuse_revoked(db, name)
            lasting.forget(db, run, name)
            here = upsert(presence).values(run=run, client=name, **row)
            db.execute(here.on_conflict_do_update(index_elements=["run", "client"], set_=row))
            append_seldom(db, now, "hello", name, {"run": run, "version": row["version"]})
        fail_point("coordinator.hello.noted")

    def goodbye(self, name: str, run: str) -> None:
        """Note that a client knows that the run is over."""
        with self.store.write() as db:
            chosen = presence.update().where(presence.c.run == run, presence.c.client == name)
            db.execute(chosen.values(said_goodbye=True))
        fail_point("coordinator.goodbye.noted")

    def present(self, run: str, *, without_goodbye: bool = False) -> list[str]:
        """Names, sorted, of the clients that said hello in a run and were not revoked."""
        chosen = (
            sa.select(presence.c.client)
            .join(clients, clients.c.name == presence.c.client)
            .where(presence.c.run == run, clients.c.revoked_at.is_(None))
        )
        if without_goodbye:
            chosen = chosen.where(presence.c.said_goodbye.is_(False))
        with self.store.read() as db:
            return sorted(row.client for row in db.execute(chosen))

    def here(self, run: str, name: str) -> bool | None:
        """Whether a client that said hello in a run has not said goodbye; None before its hello."""
        chosen = "SELECT said_goodbye FROM presence WHERE run = ? AND client = ?"
        row = self.store.row(chosen, run, str(name))
        return None if row is None else not row[0]


def invite(
    folder: Path,
    name: str,
    *,
    url: str | None = None,
    uses: int = 1,
    expires_s: float | None = None,
    again: bool = False,
) -> JoinToken:
    """``hansa invite``: a join token from a coordinator's state folder, whether it is being served or not.

    ``url`` is needed only before the first ``hansa serve``, which notes its own. Raises ``InputError``.
    """
    store = Store.existing(folder) if url is None else Store(folder)
    try:
        address = url or (store.get("url") or b"").decode()
        if not address:
            raise InputError(
                f"invite {name}: expected to know the coordinator's address, found none in {folder}; "
                "start hansa serve first, or give --url https://HOST:PORT"
            )
        authority = open_authority(store).fingerprint
        return Registry(store).invite(
            name, url=address, authority=authority, uses=uses, expires_s=expires_s, again=again
        )
    finally:
        store.close()


def revoke(folder: Path, name: str) -> None:
    """``hansa revoke``: refuse a client from now on, whether its coordinator is being served or not."""
    store = Store.existing(folder)
    try:
        Registry(store).revoke(name)
    finally:
        store.close()


def open_authority(store: Store) -> Authority:
    """The authority in a state folder; created once, even if two processes ask at the same time."""
    with store.write():
        return Authority.open(store.folder / "authority")


def refuse_revoked(db: sa.Connection, name: str) -> None:
    """Refuse, within a transaction, a client that was revoked, and a ``Caller`` whose certificate was replaced."""
    client = db.execute(sa.select(clients).where(clients.c.name == name)).one_or_none()
    if client is None:
        return
    _refuse_revoked(client.name, client.revoked_at)
    shown = getattr(name, "certificate", client.certificate_sha256)
    if shown != client.certificate_sha256:
        waiting = sa.select(renewals.c.name).where(renewals.c.certificate_sha256 == shown)
        if db.scalar(waiting) is None:
            raise Refusal("unauthenticated", UNKNOWN)


def _refuse_revoked(name: str, revoked_at: float | None) -> None:
    """Refuse a client that was revoked."""
    if revoked_at is not None:
        raise Refusal(
            "revoked",
            f"client {name} was revoked by the coordinator on {_when(revoked_at)}; "
            f"if that is a mistake, ask for a new token: hansa invite {name}",
        )


def _check_token(db: sa.Connection, token: Any, name: str, now: float) -> None:
    """Refuse a token that is used up, expired, or for another name."""
    ask = f"ask the coordinator for a new one: hansa invite {name}"
    if token.uses_left < 1:
        latest = sa.select(token_uses).where(token_uses.c.token == token.id).order_by(token_uses.c.used_at.desc())
        use = db.execute(latest.limit(1)).one_or_none()
        if use is None:
            raise Refusal(
                "token", f"join token: expected one that is good, found one that a revocation cancelled; {ask}"
            )
        again = " --again" if use.client == name else ""
        raise Refusal(
            "token",
            f"join token: expected one that is unused, found one that {use.client} used on {_when(use.used_at)}; "
            f"{ask}{again}",
        )
    if token.expires_at is not None and now > token.expires_at:
        raise Refusal(
            "token", f"join token: expected one in date, found one that expired on {_when(token.expires_at)}; {ask}"
        )
    if not fnmatch.fnmatchcase(name, token.pattern):
        raise Refusal("token", f"join token: expected a name like {token.pattern}, found {name}; give --name, or {ask}")


def _check_free(client: Any, token: Any) -> None:
    """Refuse a name that is taken, unless the token says again, and one revoked since the token was made."""
    if client is None:
        return
    if client.revoked_at is not None:
        if token.created_at < client.revoked_at:
            _refuse_revoked(client.name, client.revoked_at)
    elif not token.again:
        raise Refusal(
            "token",
            f"enrol: expected a name that is free, found {client.name} enrolled since {_when(client.enrolled_at)}; "
            f"choose another with --name, or ask for: hansa invite {client.name} --again",
        )


def _when(seconds: float) -> str:
    """A time as a person reads it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
