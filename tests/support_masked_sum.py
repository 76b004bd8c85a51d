"""A toy masked sum with drop-outs: an aggregator of four exchanges, after the real one's message flow.

    masked_i = row_i + PRG(own seed) + sum over peers p of +-PRG(key agreed with p),  modulo 2^48

Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, figure 4, in groups.
The group is 127 bits wide and shares travel in the clear: the cryptography is a toy. The flow is not: who says what in
which exchange, what a client keeps, what survives each drop-out, and what a client refuses to answer.

Everything said or kept is a tree of arrays, small numbers and text (big numbers too are text), so that it can travel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hansa.aggregators.mean import Mean
from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Ask, Client, Plan, Report, Updates

PRIME, GENERATOR, MODULUS = 2**127 - 1, 3, 2**48
EXCHANGES = ("keys", "shares", "masked", "unmask")
History = Mapping[str, tuple[Report, ...]]


class Refusal(ValueError):
    """Why a client does not answer."""


@dataclass(frozen=True, kw_only=True)
class MaskedSum:
    """Weighted mean of which the server sees only sums over groups; at least ``threshold`` of a group must stay.

    Values are rounded to ``1 / scale``; sums of weighted values stay below ``2^47 / scale``.
    """

    group: int = 4
    threshold: int = 2
    scale: float = 2.0**20

    linear = True
    reveals_rows = False

    # ------------------------------------------------------------------------------------------- the server's half

    def ask(self, cohort: tuple[Client, ...], history: History) -> Ask | None:
        """Keys from everyone; then, in each group that is still large enough: shares, masked rows, unmasking."""
        if "keys" not in history:
            return Ask("keys", cohort, False)
        for before, exchange in itertools.pairwise(EXCHANGES):
            mail: dict[Client, Any] = {}
            for group in self._groups(cohort, history):
                live = [client for client in group if client in _said(history, before)]
                if len(live) >= self.threshold:
                    mail |= self._mail(exchange, group, live, history)
            if not mail:
                raise Abandoned(f"masked sum: expected {self.threshold} of a group after {before}, found fewer")
            if exchange not in history:
                return Ask(exchange, tuple(mail), exchange == "masked", mail)
        return None

    def check_mail(self, exchange: str, mail: Any) -> str:
        """What is wrong with one client's word by itself; rows of another length only show beside others."""
        fits = {
            "keys": lambda: _is_number(mail),
            "shares": lambda: all(_is_share(share[name]) for share in mail.values() for name in ("seed", "key")),
            "masked": lambda: (
                mail["row"].dtype == np.uint64
                and mail["row"].ndim == 1
                and all(isinstance(n, str) for n in mail["tail"])
            ),
            "unmask": lambda: all(_is_share(share) for part in ("seeds", "keys") for share in mail[part].values()),
        }
        try:
            return "" if fits[exchange]() else f"mail of {exchange} holds something else"
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            return f"mail of {exchange} is of another form"

    def open(self, cohort: tuple[Client, ...], history: History) -> Updates:
        """The sum over the clients whose masked rows came, in the groups that enough helpers unmasked."""
        sent, tail, counted, total = _said(history, "masked"), [], [], np.zeros(0, np.uint64)
        for group in self._groups(cohort, history):
            alive = [client for client in group if client in sent]
            helpers = [client for client in group if client in _said(history, "unmask")][: self.threshold]
            if len(helpers) < self.threshold:
                continue
            masks = self._masks(group, alive, helpers, history)
            part = (sum((sent[client]["row"] for client in alive), np.uint64(0)) + masks) % MODULUS
            total = part if not counted else (total + part) % MODULUS
            tail, counted = sent[alive[0]]["tail"], counted + alive
        if not counted:
            raise Abandoned(f"masked sum: expected {self.threshold} helpers in a group, found fewer")
        signed = total.astype(np.int64)
        signed[signed >= MODULUS // 2] -= MODULUS
        row, end = signed / self.scale, len(signed) - 1 - len(tail)
        columns = {name: row[[end + i]] for i, name in enumerate(tail)}
        return Updates(tuple(counted), row[None, :end], row[-1:], columns, {}, folded=True)

    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate:
        """As the plain mean of one folded block a plan."""
        return Mean().reduce(blocks, scales)

    def sensitivity(self, bound: float) -> float:
        """Nothing is claimed."""
        return math.inf

    def _groups(self, cohort: Sequence[Client], history: History) -> list[list[Client]]:
        live = [client for client in cohort if client in _said(history, "keys")]
        return [live[start : start + self.group] for start in range(0, len(live), self.group)]

    def _mail(self, exchange: str, group: Sequence[Client], live: list[Client], history: History) -> dict[Client, Any]:
        """What each client of a group is told."""
        if exchange == "shares":
            keys = _said(history, "keys")
            return {client: {peer: keys[peer] for peer in live} for client in live}
        shares = _said(history, "shares")
        if exchange == "masked":
            return {client: {peer: shares[peer][client] for peer in live} for client in live}
        gone = [client for client in group if client in shares and client not in live]
        return {client: {"alive": live, "gone": gone} for client in live}

    def _masks(self, group: Sequence[Client], alive: list[Client], helpers: list[Client], history: History) -> Any:
        """What must be added to the sum of masked rows to leave the sum of rows."""
        keys, told = _said(history, "keys"), [_said(history, "unmask")[helper] for helper in helpers]
        length = len(_said(history, "masked")[alive[0]]["row"])
        total = np.zeros(length, np.uint64)
        for client in alive:
            total -= _prg(_rebuild([answer["seeds"][client] for answer in told]), length)
        for client in told[0]["keys"]:
            private = _rebuild([answer["keys"][client] for answer in told])
            for peer in alive:
                total -= _pair_mask(peer, client, keys[peer], private, length)
        return total

    # ------------------------------------------------------------------------------------------- the client's half

    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]:
        """Each client's word in this exchange, and what it keeps; a client that is lied to refuses with a reason."""
        payload: dict[Client, Any] = {}
        kept: dict[Client, Any] = {}
        refused: dict[Client, str] = {}
        for i, (client, held) in enumerate(scratch.items()):
            own = None if updates is None else updates.take([i])
            mine = {**held, **({} if own is None else {"row": self._row(own), "tail": sorted(own.tail)})}
            try:
                say = getattr(self, f"_say_{plan.slot.exchange}")
                payload[client], kept[client] = say(client, plan.mail.get(client), mine, secret[i])
            except Refusal as reason:
                refused[client] = str(reason)
        return payload, kept, refused

    def _row(self, own: Updates) -> Any:
        """Weighted values, tail and weight, on the grid."""
        columns = [own.tail[name] for name in sorted(own.tail)]
        weighted = np.concatenate([np.asarray(own.values[0], np.float64), *columns]) * own.weights[0]
        grid = np.rint(np.append(weighted, own.weights) * self.scale).astype(np.int64)
        return (grid % MODULUS).astype(np.uint64)

    def _say_keys(self, client: Client, mail: Any, mine: dict[str, Any], secret: Key) -> tuple[Any, dict[str, Any]]:
        private = _number(secret)
        return str(pow(GENERATOR, private, PRIME)), {"private": str(private)}

    def _say_shares(self, client: Client, mail: Any, mine: dict[str, Any], secret: Key) -> tuple[Any, dict[str, Any]]:
        private = int(mine["private"])
        if len(mail) < self.threshold or mail.get(client) != str(pow(GENERATOR, private, PRIME)):
            raise Refusal("the group is too small, or my own key was changed")
        seed, peers = _number(secret), sorted(mail)
        seeds, keys = (
            _shares(value, self.threshold, peers, secret.child(name)) for value, name in ((seed, "s"), (private, "k"))
        )
        return {p: {"seed": seeds[p], "key": keys[p]} for p in peers}, {**mine, "seed": str(seed), "peers": dict(mail)}

    def _say_masked(self, client: Client, mail: Any, mine: dict[str, Any], secret: Key) -> tuple[Any, dict[str, Any]]:
        row = mine["row"] + _prg(int(mine["seed"]), len(mine["row"]))
        for peer in mail:
            if peer != client:
                row += _pair_mask(client, peer, mine["peers"][peer], int(mine["private"]), len(row))
        kept = {name: mine[name] for name in ("private", "seed", "peers")}
        return {"row": row % np.uint64(MODULUS), "tail": mine["tail"]}, {**kept, "held": dict(mail)}

    def _say_unmask(self, client: Client, mail: Any, mine: dict[str, Any], secret: Key) -> tuple[Any, dict[str, Any]]:
        alive, gone = set(mail["alive"]), set(mail["gone"])
        if client not in alive or alive & gone or len(alive) < self.threshold:
            raise Refusal("the survivors' list is not honest")
        if mine.get("answered", mail) != mail:
            raise Refusal("a second, different request to unmask")
        told = {
            "seeds": {peer: mine["held"][peer]["seed"] for peer in sorted(alive)},
            "keys": {peer: mine["held"][peer]["key"] for peer in sorted(gone)},
        }
        return told, {**mine, "answered": mail}


def _said(history: History, exchange: str) -> dict[Client, Any]:
    """Each client's word in an exchange."""
    return {client: report.payload[client] for report in history.get(exchange, ()) for client in report.clients}


def _is_number(text: Any) -> bool:
    """Whether a text is a number below the prime."""
    return isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 40 and int(text) < PRIME


def _is_share(share: Any) -> bool:
    """Whether this is a point of a polynomial."""
    return len(share) == 2 and type(share[0]) is int and 0 < share[0] < PRIME and _is_number(share[1])


def _number(key: Key) -> int:
    return int.from_bytes(key.material[:15], "big")


def _prg(seed: int, length: int) -> Any:
    """The mask that a number stands for: (length,) uint64 below the modulus."""
    return Key.of(f"mask {seed}").generator().integers(0, MODULUS, length, dtype=np.uint64)


def _pair_mask(client: Client, peer: Client, public: str, private: int, length: int) -> Any:
    """What ``client`` adds for ``peer``, who adds its negative (modulo 2^64, hence modulo 2^48)."""
    mask = _prg(pow(int(public), private, PRIME), length)
    return mask if client < peer else -mask


def _shares(value: int, threshold: int, peers: Sequence[Client], key: Key) -> dict[Client, list[Any]]:
    """Shamir's shares of ``value``: a point [place, text of a number] for each peer; ``threshold`` of them suffice."""
    slopes = [value] + [_number(key.child(i)) for i in range(1, threshold)]
    return {
        peer: [x, str(sum(a * pow(x, i, PRIME) for i, a in enumerate(slopes)) % PRIME)]
        for x, peer in enumerate(peers, 1)
    }


def _rebuild(points: Sequence[Sequence[Any]]) -> int:
    """The value at 0 of the polynomial through the points."""
    places = [x for x, _ in points]
    return (
        sum(int(y) * math.prod(other * pow(other - x, -1, PRIME) for other in places if other != x) for x, y in points)
        % PRIME
    )
