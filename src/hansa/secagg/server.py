"""The server's side: what it relays, and how it takes the masks off a sum. Pure functions of what clients have said.

Of a group it learns the sum of those that are alive, if enough of their neighbours answer, and nothing else. It keeps
no secret: after a crash the same reports give the same sum.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from hansa.core.errors import Abandoned
from hansa.core.protocols import Client
from hansa.secagg.client import STREAM, pair_key, self_key
from hansa.secagg.errors import SecAggError
from hansa.secagg.grid import signed
from hansa.secagg.mail import SEALED
from hansa.secagg.masks import add_masks, num_cores
from hansa.secagg.packing import add_unpacked
from hansa.secagg.primitives import KeyPair
from hansa.secagg.shamir import join
from hansa.secagg.terms import SIGNATURE_SIZE, Advert, Terms, Witness, bitmap_of, circle_of, survivors_text

Said = Mapping[Client, Any]  # what each client said in one step, those that said nothing left out
_OTHER_CHOICES = 64  # of shares, where the first ones do not fit


class Lost(SecAggError):
    """A group whose masks cannot be taken off: too few of its clients answered, or their shares do not fit."""


class Sums(NamedTuple):
    """What is left of a group when its masks are gone."""

    clients: tuple[Client, ...]
    values: np.ndarray  # (num_values,) int64
    exact: np.ndarray  # (num_numbers,) int64
    names: tuple[str, ...]


class Table:
    """Everyone of an attempt, by place: the adverts in the order of their names."""

    def __init__(self, adverts: Sequence[Advert], terms: Terms) -> None:
        self.adverts, self.terms = adverts, terms
        self.digests = np.frombuffer(b"".join(a.digest for a in adverts), np.uint8).reshape(-1, 32)
        self.circle = circle_of(self.digests.tobytes(), terms)

    @staticmethod
    def of(keys: Said, terms: Terms) -> Table:
        """The table of those that sent keys; ``Abandoned`` where they are too few for one group."""
        adverts = [Advert.of(name, keys[name]) for name in sorted(keys)]
        if len(adverts) < 2 * terms.num_groups:
            reason = f"secure sum: expected keys of {2 * terms.num_groups} clients, found {len(adverts)}"
            raise Abandoned(reason, may_heal=True)
        return _table(tuple(adverts), terms)

    @cached_property
    def places(self) -> dict[Client, int]:
        """Where each client stands."""
        return {advert.name: place for place, advert in enumerate(self.adverts)}

    def lists(self) -> dict[Client, Any]:
        """The mail of the second step: everyone's digests, and the neighbours' adverts."""
        trees = [{"place": place, **a.tree, "name": a.name} for place, a in enumerate(self.adverts)]
        return {
            advert.name: {
                "digests": self.digests,
                "place": place,
                "peers": [trees[there] for there in self.circle.neighbours(place)],
            }
            for place, advert in enumerate(self.adverts)
        }

    def shares(self, sealed: Said) -> dict[Client, Any]:
        """The mail of the third step: what each client's neighbours sealed for it."""
        mail: dict[Client, Any] = {}
        for group in range(len(self.circle.rings)):
            members = self.members(group, sealed)
            if len(members) < self.circle.graph(group).threshold:
                continue
            for name in members:
                place = self.places[name]
                sharing = [p for p in self.circle.neighbours(place) if self.adverts[p].name in sealed]
                rows = [sealed[self.adverts[p].name]["sealed"][self.circle.neighbours(p).index(place)] for p in sharing]
                mail[name] = {
                    "places": np.array(sharing, np.int64),
                    "sealed": np.array(rows) if rows else np.empty((0, SEALED), np.uint8),
                }
        return mail

    def survivors(self, masked: Said) -> dict[Client, Any]:
        """The mail of the fourth step: who of the group is alive."""
        mail: dict[Client, Any] = {}
        for group in range(len(self.circle.rings)):
            living = self.members(group, masked)
            if len(living) >= self.terms.fewest(self.circle.graph(group)):
                alive = bitmap_of((self.places[name] for name in living), len(self.adverts))
                mail |= {name: {"alive": alive} for name in living}
        return mail

    def lists_signed(self, masked: Said, agreed: Said) -> dict[Client, Any]:
        """The mail of the fifth step: the same survivors, and the neighbours' signatures on them."""
        mail: dict[Client, Any] = {}
        for name, listed in self.survivors(masked).items():
            if name not in agreed:
                continue
            signing = [p for p in self.circle.neighbours(self.places[name]) if self.adverts[p].name in agreed]
            signatures = [agreed[self.adverts[p].name]["signature"].ljust(SIGNATURE_SIZE, b"\0") for p in signing]
            rows = np.frombuffer(b"".join(signatures), np.uint8).reshape(-1, SIGNATURE_SIZE)
            mail[name] = {**listed, "places": np.array(signing, np.int64), "signatures": rows}
        return mail

    def usual(self, masked: Said) -> dict[Client, Any]:
        """The rows that can be added: in each group those of the form, and for the model, of most.

        Whoever says that it has another model counts as lost, so that it cannot keep the others from their sum.
        """
        found: dict[Client, Any] = {}
        for group in range(len(self.circle.rings)):
            forms = {name: _form(masked[name]) for name in self.members(group, masked)}
            most = Counter(forms.values()).most_common(1)
            found |= {name: masked[name] for name, form in forms.items() if form == most[0][0]}
        return found

    def believed(self, masked: Said, agreed: Said, witness: Witness | None) -> dict[Client, Any]:
        """Whose signatures on the survivors hold: peers would refuse to go on for one that does not."""
        if witness is None:
            return dict(agreed)
        listed = self.survivors(masked)
        return {
            name: said
            for name, said in agreed.items()
            if name in listed and not self._fault(name, masked[name]["context"], listed[name]["alive"], said, witness)
        }

    def _fault(self, name: Client, context: bytes, alive: Any, said: Any, witness: Witness) -> str:
        advert = self.adverts[self.places[name]]
        return witness.fault(name, advert.certificate, said["signature"], survivors_text(context, alive))

    def lists_unsigned(self, masked: Said) -> dict[Client, Any]:
        """The mail of the last step where the server is trusted to say the same to everyone."""
        nobody = {"places": np.empty(0, np.int64), "signatures": np.empty((0, SIGNATURE_SIZE), np.uint8)}
        return {name: {**listed, **nobody} for name, listed in self.survivors(masked).items()}

    def members(self, group: int, said: Iterable[Client]) -> list[Client]:
        """Those of a group who said something, by place."""
        here = set(said)
        names = (self.adverts[place].name for place in sorted(int(p) for p in self.circle.rings[group]))
        return [name for name in names if name in here]


@lru_cache(maxsize=4)
def _table(adverts: tuple[Advert, ...], terms: Terms) -> Table:
    return Table(adverts, terms)


def opened(table: Table, group: int, sealed: Said, masked: Said, answers: Said, widths: tuple[int, int]) -> Sums:
    """The sum of a group's survivors, with their masks taken off.

    ``widths`` are those of values and exact words. Raises ``Lost`` where too few answered or what they said does not
    fit.
    """
    living, shared = table.members(group, masked), table.members(group, sealed)
    if len(living) < table.terms.fewest(table.circle.graph(group)):
        raise Lost(f"expected {table.terms.fewest(table.circle.graph(group))} survivors, found {len(living)}")
    rows = _alike([masked[name] for name in living])
    lost = [name for name in shared if name not in set(living)]
    seeds = _rebuilt(table, living, "seed", answers)
    with_masks = [name for name in lost if any(_is_near(table, name, other) for other in living)]
    secrets = _rebuilt(table, with_masks, "key", answers)
    plus, minus = _masks(table, living, seeds, secrets, rows[0]["context"])
    values = np.zeros(rows[0]["count"], np.uint32)
    exact = np.zeros(rows[0]["numbers"], np.uint64)
    for row in rows:
        add_unpacked(values, row["values"], widths[0], len(values))
        add_unpacked(exact, row["exact"], widths[1], len(exact))
    for words, part in ((values, slice(0, STREAM)), (exact, slice(STREAM, 2 * STREAM))):
        if len(words):
            add_masks(words, [k[part] for k in plus], [k[part] for k in minus], num_threads=num_cores())
    sums = signed(values, widths[0]), signed(exact, widths[1])
    return Sums(tuple(living), *sums, tuple(str(name) for name in rows[0]["names"]))


def _masks(
    table: Table,
    living: Sequence[Client],
    seeds: Mapping[Client, bytes],
    secrets: Mapping[Client, bytes],
    context: bytes,
) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks to add to the sum, and of those to take away, for none to be left."""
    plus: list[bytes] = []
    minus = [self_key(seeds[name], context, table.places[name]) for name in living]
    here = set(living)
    for name, secret in secrets.items():
        place, pair = table.places[name], KeyPair(secret)
        for other in table.circle.neighbours(place):
            if table.adverts[other].name in here:
                key = pair_key(pair, table.adverts[other].mask_key, context, place, other)
                (minus if other < place else plus).append(key)
    return plus, minus


def _alike(rows: Sequence[Any]) -> Sequence[Any]:
    """Rows of one form and context; ``Lost`` where some differ, which neighbours would have noticed."""
    if len({_form(row) for row in rows}) > 1:
        raise Lost("expected masked rows of one length, for one model; found several")
    return rows


def _form(row: Any) -> tuple[Any, ...]:
    """What rows must have alike to be added."""
    return row["count"], row["numbers"], tuple(row["names"]), row["context"]


def _is_near(table: Table, name: Client, other: Client) -> bool:
    return table.places[other] in table.circle.neighbours(table.places[name])


def _rebuilt(table: Table, names: Sequence[Client], kind: str, answers: Said) -> dict[Client, bytes]:
    """The secrets of clients, joined from what their neighbours said, and checked against their adverts."""
    held: dict[Client, list[tuple[int, np.ndarray]]] = {name: [] for name in names}
    for helper in sorted(answers, key=table.places.__getitem__):
        told = answers[helper]
        for there, row in zip(told[f"{kind}_places"].tolist(), told[f"{kind}s"], strict=True):
            name = table.adverts[there].name if 0 <= there < len(table.adverts) else ""
            if name in held and table.places[helper] in table.circle.holders(there):
                held[name].append((table.places[helper] + 1, row))
    threshold = {name: table.circle.graph(table.circle.group(table.places[name])).threshold for name in names}
    for name, shares in held.items():
        if len(shares) < threshold[name]:
            raise Lost(f"expected {threshold[name]} shares of {name!r}, found {len(shares)}")
    found: dict[Client, bytes] = {}
    for name, secret in _joined({name: shares[: threshold[name]] for name, shares in held.items()}).items():
        fits = _fits(table, name, kind, secret)
        found[name] = secret if fits else _searched(table, name, kind, held[name], threshold[name])
    return found


def _joined(shares: Mapping[Client, Sequence[tuple[int, np.ndarray]]]) -> dict[Client, bytes]:
    """Secrets joined all at once; empty bytes where a share is false."""
    if not shares:
        return {}
    places = np.array([[x for x, _ in own] for own in shares.values()])
    rows = np.array([[row for _, row in own] for own in shares.values()], np.uint32)
    try:
        return {name: secret.tobytes() for name, secret in zip(shares, join(places, rows), strict=True)}
    except SecAggError:
        if len(shares) == 1:
            return dict.fromkeys(shares, b"")
        return {name: secret for one in shares for name, secret in _joined({one: shares[one]}).items()}


def _searched(table: Table, name: Client, kind: str, shares: Sequence[tuple[int, Any]], threshold: int) -> bytes:
    """The secret from other choices of shares, where one of the first was false: leave out some, in turn."""
    for start in islice(range(1, len(shares)), _OTHER_CHOICES):
        chosen = [*shares[start:], *shares[:start]][:threshold]
        secret = _joined({name: chosen})[name]
        if _fits(table, name, kind, secret):
            return secret
    raise Lost(f"expected shares of {name!r} that fit its keys, found false ones among them")


def _fits(table: Table, name: Client, kind: str, secret: bytes) -> bool:
    """Whether a secret is the one that a client's advert is of."""
    advert = table.adverts[table.places[name]]
    if kind == "seed":
        return hashlib.sha256(secret).digest() == advert.commitment
    return len(secret) == 32 and KeyPair(secret).public == advert.mask_key


__all__ = ["Lost", "Said", "Sums", "Table", "opened"]
