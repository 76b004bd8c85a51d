"""Who may take part: join tokens, the clients that enrolled with them, and who said hello in a run."""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from hansa.core.errors import InputError
from hansa.network.failpoints import fail_point
from hansa.network.identity import Authority, fingerprint, request_key_hash
from hansa.network.messages import NAME, Enrol, Enrolled, Hello, Refusal, check_name
from hansa.network.store import Store, clients, presence, token_uses, tokens
from hansa.network.token import JoinToken

_SEEN_EVERY_S = 10.0


@dataclass(frozen=True)
class Registry:
    """Tokens and clients in a store. Each method is one transaction."""

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
        return token

    def enrol(self, message: Enrol, authority: Authority) -> Enrolled:
        """A certificate for a client that shows a good token; the same key and name again get the same one.

        Raises ``Refusal`` for a wrong, used or expired token, a name it is not for, or a name that is taken.
        """
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
            if client is not None and client.revoked_at is None and not token.again:
                raise Refusal(
                    "token",
                    f"enrol: expected a name that is free, found {name} enrolled since {_when(client.enrolled_at)}; "
                    f"choose another with --name, or ask for: hansa invite {name} --again",
                )
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
            fail_point("coordinator.client.enrolling")
        fail_point("coordinator.client.enrolled")
        return Enrolled(name=name, certificate=certificate)

    def authenticate(self, certificate_sha256: str | None) -> str:
        """The name of the client that shows this certificate; ``Refusal`` when there is none, or it was revoked."""
        if certificate_sha256 is None:
            raise Refusal("unauthenticated", "expected a client's certificate, found none; join with a token first")
        with self.store.read() as db:
            chosen = sa.select(clients).where(clients.c.certificate_sha256 == certificate_sha256)
            client = db.execute(chosen).one_or_none()
        if client is None:
            raise Refusal(
                "unauthenticated",
                "expected the certificate of an enrolled client, found one that was replaced or is not known here; "
                "ask the coordinator for a new token and join again",
            )
        _refuse_revoked(client)
        now = self.store.clock()
        if client.last_seen is None or abs(now - client.last_seen) > _SEEN_EVERY_S:
            with self.store.write() as db:
                db.execute(clients.update().where(clients.c.name == client.name).values(last_seen=now))
        return str(client.name)

    def check_revoked(self, name: str) -> None:
        """Refuse a client that was revoked while its request waited."""
        with self.store.read() as db:
            _refuse_revoked(db.execute(sa.select(clients).where(clients.c.name == name)).one())

    def revoke(self, name: str) -> None:
        """Refuse a client from now on; ``InputError`` when there is none of that name."""
        with self.store.write() as db:
            chosen = clients.update().where(clients.c.name == name, clients.c.revoked_at.is_(None))
            if db.execute(chosen.values(revoked_at=self.store.clock())).rowcount:
                return
            known = [row.name for row in db.execute(sa.select(clients.c.name).order_by(clients.c.name).limit(20))]
        raise InputError(
            f"revoke {name}: expected a client that is enrolled, found none of that name; there are {known}"
        )

    def hello(self, name: str, run: str, message: Hello) -> None:
        """Note that a client takes part in a run."""
        row = {"hello_at": self.store.clock(), "version": message.version[:40], "said_goodbye": False}
        with self.store.write() as db:
            here = upsert(presence).values(run=run, client=name, **row)
            db.execute(here.on_conflict_do_update(index_elements=["run", "client"], set_=row))
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

    def here(self, run: str, name: str) -> Any:
        """A client's row of presence in a run, or None before its hello."""
        with self.store.read() as db:
            chosen = sa.select(presence).where(presence.c.run == run, presence.c.client == name)
            return db.execute(chosen).one_or_none()


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


def _refuse_revoked(client: Any) -> None:
    """Refuse a client that was revoked."""
    if client.revoked_at is not None:
        raise Refusal(
            "revoked",
            f"client {client.name} was revoked by the coordinator on {_when(client.revoked_at)}; "
            f"if that is a mistake, ask for a new token: hansa invite {client.name}",
        )


def _check_token(db: sa.Connection, token: Any, name: str, now: float) -> None:
    """Refuse a token that is used up, expired, or for another name."""
    ask = f"ask the coordinator for a new one: hansa invite {name}"
    if token.uses_left < 1:
        latest = sa.select(token_uses).where(token_uses.c.token == token.id).order_by(token_uses.c.used_at.desc())
        use = db.execute(latest.limit(1)).one()
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


def _when(seconds: float) -> str:
    """A time as a person reads it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
