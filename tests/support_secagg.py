"""A table of clients that speak through a server, in whose hands every message is: it may lose and change any."""

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hansa.aggregators.secure_mean import SecureMean
from hansa.core.chain import Limits
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot, Updates

LIMITS = Limits(norm=4.0, value=4.0)


class Signed:
    """Credentials of one client of a roster that the server has no part in."""

    def __init__(self, name, roster):
        self.key, self.roster = Ed25519PrivateKey.from_private_bytes(Key.of(name).material), roster
        self.certificate = self.key.public_key().public_bytes_raw()
        roster[name] = self.certificate

    def sign(self, message):
        return self.key.sign(message)

    def fault(self, name, certificate, signature, message):
        if self.roster.get(name) != certificate:
            return "not enrolled"
        try:
            Ed25519PublicKey.from_public_bytes(certificate).verify(signature, message)
        except InvalidSignature:
            return "another signature"
        return ""


class Table:
    """Clients with rows, and a server that keeps to the protocol unless told otherwise."""

    def __init__(self, aggregator, rows, *, weights=None, tail=None, is_signed=False, limits=LIMITS):
        self.names = tuple(f"c{i:02d}" for i in range(len(rows)))
        self.rows = dict(zip(self.names, np.asarray(rows, np.float32), strict=True))
        self.weights = np.ones(len(rows)) if weights is None else np.asarray(weights, float)
        self.tail = tail or {}
        self.server, roster = aggregator.fitted(limits), {}
        creds = {name: Signed(name, roster) for name in self.names}
        self.clients = {n: self.server.enrolled(creds[n]) if is_signed else self.server for n in self.names}
        self.scratch = {name: {} for name in self.names}
        self.broadcasts = {name: {"params": np.zeros(3, np.float32)} for name in self.names}
        self.refused, self.history, self.attempt = {}, {}, 0
        self.change = {}  # by exchange: function(mail of everyone) -> mail
        self.dropped = {}  # by exchange: names that do not answer

    def updates(self, name):
        i = self.names.index(name)
        tail = {key: np.asarray([column[i]], float) for key, column in self.tail.items()}
        return Updates((name,), self.rows[name][None].copy(), self.weights[[i]], tail)

    def answer(self, name, ask, mail):
        """One client's answer, or None."""
        slot = Slot(0, self.attempt, ask.exchange)
        plan = Plan(slot, ask.learn, self.broadcasts[name], (), Key.of(7).child(self.attempt), {}, {name: mail})
        secret = Key.of(1).child(name, self.attempt, "aggregator", ask.exchange)
        updates = self.updates(name) if ask.learn else None
        said, kept, refused = self.clients[name].answer(plan, updates, {name: self.scratch[name]}, [secret])
        self.refused |= {n: (ask.exchange, why) for n, why in refused.items()}
        if name not in said:
            return None
        self.scratch[name] = kept[name]
        return said[name]

    def step(self):
        """One exchange; False when the server has what it needs."""
        ask = self.server.ask(self.names, self.history)
        if ask is None:
            return False
        slot = Slot(0, self.attempt, ask.exchange)
        mail = self.change.get(ask.exchange, lambda told: told)(dict(ask.mail))
        reports = []
        for name in ask.clients:
            if name in self.dropped.get(ask.exchange, ()):
                continue
            said = self.answer(name, ask, mail.get(name))
            if said is None:
                continue
            assert self.server.check_mail(ask.exchange, said) == ""
            reports.append(Report(slot, (name,), {name: said}))
        self.history[ask.exchange] = tuple(reports)
        return True

    def play(self):
        """The opened sum."""
        while self.step():
            pass
        return self.server.open(self.names, self.history)


def grid_rows(count, size=5, seed=0, step=2.0**-13):
    """Rows on the grid of 16 bits and ``LIMITS``, which rounding leaves as they are."""
    rng = np.random.default_rng(seed)
    return rng.integers(-4000, 4000, (count, size)) * step


__all__ = ["LIMITS", "SecureMean", "Signed", "Table", "grid_rows"]
