"""What the clients of an attempt agree on before they mask anything, and who they are."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.protocols import Slot
from hansa.secagg.errors import SecAggError
from hansa.secagg.graph import Graph, Server, graph_of, groups_of, neighbours_of
from hansa.secagg.primitives import joined

KEY_SIZE = 32
SIGNATURE_SIZE = 64
_LONGEST_CERTIFICATE = 4096
Places = npt.NDArray[np.int64]


class Witness(Protocol):
    """Knows the signatures of enrolled clients."""

    def fault(self, name: str, certificate: bytes, signature: bytes, message: bytes) -> str:
        """What is wrong with the signature of the client ``name`` over ``message``, or an empty text."""
        ...


class Credentials(Witness, Protocol):
    """How an enrolled client signs, and how it knows another's signature; the server of a round has no part in it."""

    @property
    def certificate(self) -> bytes:
        """Says whose key signs."""
        ...

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes."""
        ...


class Terms(NamedTuple):
    """The threat that everyone guards against, and how sums are made; each client has its own copy of the app."""

    corrupt: float = 0.1
    dropout: float = 0.1
    server: Server = "malicious"
    min_survivors: int = 0
    num_groups: int = 1
    group_size: int | None = None
    bits: int = 16

    def groups(self, num_clients: int) -> int:
        """How many groups so many clients make: as many as are asked for, and none larger than may be."""
        found = self.num_groups if self.group_size is None else max(self.num_groups, -(-num_clients // self.group_size))
        return max(1, min(found, num_clients))

    def graph(self, num_clients: int) -> Graph:
        """The graph of a group of so many clients."""
        return graph_of(num_clients, corrupt=self.corrupt, dropout=self.dropout, server=self.server)

    def fewest(self, graph: Graph) -> int:
        """The fewest clients of a group whose sum may be opened: half of a large group, the threshold of a full one."""
        natural = graph.threshold if graph.is_full else -(-graph.num_clients // 2)
        return max(2, natural, self.min_survivors)

    def aim(self, slot: Slot, key: bytes) -> bytes:
        """What fresh keys are for: this attempt of this run, under these terms."""
        words = tuple(self)
        where = f"{slot.task} {slot.round} {slot.attempt}"
        return hashlib.sha256(joined(b"aim", where.encode(), key, repr(words).encode())).digest()


class Advert(NamedTuple):
    """A client's fresh public keys for one attempt, and a commitment to the seed of its own mask, signed.

    ``certificate`` and ``signature`` are empty where identities are not checked (a simulation).
    """

    name: str
    mask_key: bytes
    share_key: bytes
    commitment: bytes  # SHA-256 of the seed
    certificate: bytes = b""
    signature: bytes = b""

    def signed(self, aim: bytes) -> bytes:
        """What the signature is over."""
        return joined(b"advert", aim, self.name.encode(), self.mask_key, self.share_key, self.commitment)

    @property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        fields = (self.mask_key, self.share_key, self.commitment, self.certificate, self.signature)
        return hashlib.sha256(joined(self.name.encode(), *fields)).digest()

    @property
    def tree(self) -> dict[str, Any]:
        """As it travels; a client's own name is not in what it says."""
        return {field: value for field, value in self._asdict().items() if field != "name"}

    @staticmethod
    def of(name: str, tree: Any) -> Advert:
        """The advert that travelled; ``SecAggError`` for anything else."""
        sizes = {"mask_key": KEY_SIZE, "share_key": KEY_SIZE, "commitment": 32}
        if not isinstance(tree, dict) or set(tree) != {*sizes, "certificate", "signature"}:
            raise SecAggError("keys: expected two public keys, a commitment, a certificate and a signature")
        if not all(isinstance(value, bytes) for value in tree.values()):
            raise SecAggError("keys: expected bytes, found something else")
        if any(len(tree[field]) != size for field, size in sizes.items()):
            raise SecAggError("keys: expected keys and a commitment of 32 bytes, found others")
        if len(tree["certificate"]) > _LONGEST_CERTIFICATE or len(tree["signature"]) not in (0, SIGNATURE_SIZE):
            raise SecAggError(f"keys: expected a certificate, and a signature of {SIGNATURE_SIZE} bytes; found others")
        return Advert(name, **tree)


class Circle:
    """Who takes part in an attempt, by place, and who is whose neighbour: a function of everyone's adverts."""

    def __init__(self, digests: npt.NDArray[np.uint8], terms: Terms) -> None:
        self.session = hashlib.sha256(joined(b"session", digests.tobytes())).digest()
        self.terms, self.num_clients = terms, len(digests)
        self.rings = groups_of(self.session, len(digests), terms.groups(len(digests)))
        self._where = {int(place): (g, i) for g, ring in enumerate(self.rings) for i, place in enumerate(ring)}

        self._near: dict[int, list[int]] = {}

    def group(self, place: int) -> int:
        """The number of the group that a place is in."""
        return self._where[place][0]

    def graph(self, group: int) -> Graph:
        """Degree and threshold of a group."""
        return self.terms.graph(len(self.rings[group]))

    def neighbours(self, place: int) -> list[int]:
        """The neighbours of a place, in rising order."""
        if place not in self._near:
            group, position = self._where[place]
            self._near[place] = neighbours_of(self.rings[group], position, self.graph(group).degree)
        return self._near[place]

    def holders(self, place: int) -> list[int]:
        """Who holds shares of a place's secrets: its neighbours, and in a full graph it, too; in rising order."""
        found = self.neighbours(place)
        return sorted([*found, place]) if self.graph(self.group(place)).is_full else found


@lru_cache(maxsize=4)
def circle_of(digests: bytes, terms: Terms) -> Circle:
    """The circle of adverts with these digests, made once for all clients of one process."""
    return Circle(np.frombuffer(digests, np.uint8).reshape(-1, 32), terms)


def survivors_text(context: bytes, alive: npt.NDArray[np.uint8]) -> bytes:
    """What a signature on the survivors is over."""
    return joined(b"survivors", context, alive.tobytes())


def bitmap_of(places: Any, num_clients: int) -> npt.NDArray[np.uint8]:
    """One bit a place.

    >>> bitmap_of([0, 9], 10).tolist(), places_of(bitmap_of([0, 9], 10), 10)
    ([1, 2], [0, 9])
    """
    bits = np.zeros(num_clients, np.uint8)
    bits[list(places)] = 1
    return np.packbits(bits, bitorder="little")


def places_of(bitmap: Any, num_clients: int) -> list[int]:
    """The places whose bit is set; ``SecAggError`` for a bitmap of another size."""
    if not isinstance(bitmap, np.ndarray) or bitmap.dtype != np.uint8 or bitmap.shape != (-(-num_clients // 8),):
        raise SecAggError(f"survivors: expected one bit for each of {num_clients} clients, found something else")
    bits = np.unpackbits(bitmap, bitorder="little")
    if bits[num_clients:].any():
        raise SecAggError(f"survivors: expected one bit for each of {num_clients} clients, found more")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


__all__ = [
    "Advert",
    "Circle",
    "Credentials",
    "Places",
    "Terms",
    "Witness",
    "bitmap_of",
    "circle_of",
    "places_of",
    "survivors_text",
]
