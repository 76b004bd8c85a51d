"""Who masks with whom: the degree and threshold that a threat asks for, and a random regular graph of clients.

Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure single-server aggregation with (poly)logarithmic overhead", CCS
2020, section 4: the clients stand on a ring in random order, and each has the nearest ``degree / 2`` on either side for
neighbours (a Harary graph). Up to ``FULL`` clients everyone is everyone's neighbour, as in Bonawitz et al., "Practical
secure aggregation for privacy-preserving machine learning", CCS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from hansa.core.errors import InputError
from hansa.core.key import Key, words

FULL = 60  # clients among whom everyone is a neighbour
Server = Literal["honest", "malicious"]
_SECURITY, _CORRECTNESS = 40, 20  # bits: of what goes wrong for privacy, and of an attempt that fails for bad luck
_MOST = 0.9  # of all clients that may be corrupt or lost


class Graph(NamedTuple):
    """How many neighbours each client has, and how many of those that hold its shares can rebuild its secrets.

    In a full graph (``degree == num_clients - 1``) a client holds a share of its own secrets, too.
    """

    num_clients: int
    degree: int
    threshold: int

    @property
    def is_full(self) -> bool:
        """Whether everyone is everyone's neighbour."""
        return self.degree >= self.num_clients - 1


def refuse_rates(corrupt: float, dropout: float, server: Server) -> None:
    """Raise ``InputError`` for rates with which no protocol can do its work."""
    if server not in ("honest", "malicious"):
        raise InputError(f'secure aggregation: expected server="honest" or "malicious", found {server!r}')
    for name, rate in (("corrupt", corrupt), ("dropout", dropout)):
        if not (math.isfinite(rate) and 0 <= rate < 1):
            raise InputError(f"secure aggregation: expected {name} from 0 to below 1, found {rate}")
    lost = 2 * dropout if server == "malicious" else dropout
    if corrupt + lost > _MOST:
        formula = "corrupt + 2 * dropout" if server == "malicious" else "corrupt + dropout"
        raise InputError(f"secure aggregation: expected {formula} of at most {_MOST}, found {corrupt + lost:g}")


@lru_cache(maxsize=256)
def graph_of(num_clients: int, *, corrupt: float = 0.1, dropout: float = 0.1, server: Server = "malicious") -> Graph:
    """The smallest degree, and its threshold, that hold against the share ``corrupt`` of clients beside the server.

    With chance ``1 - 2**-40`` no client's secrets can be rebuilt by its corrupt neighbours and the honest clients that
    are left hang together; with chance ``1 - 2**-20`` enough neighbours of everyone answer when the share ``dropout``
    of clients is lost. A ``"malicious"`` server may tell some clients that another is alive and others that it was
    lost: then twice the threshold exceeds what it could gather. ``"honest"``: it keeps to the protocol, and listens.

    >>> graph_of(1000), graph_of(100, server="honest")
    (Graph(num_clients=1000, degree=96, threshold=67), Graph(num_clients=100, degree=22, threshold=11))
    """
    refuse_rates(corrupt, dropout, server)
    if num_clients > FULL:
        for degree in range(2, num_clients - 1, 2):
            threshold = _threshold(num_clients, degree, corrupt, dropout, server)
            if threshold is not None:
                return Graph(num_clients, degree, threshold)
    corrupted = math.ceil(corrupt * num_clients - 1e-9)
    most = (num_clients + corrupted) // 2 if server == "malicious" else corrupted
    return Graph(num_clients, max(0, num_clients - 1), max(2, most + 1))


def groups_of(session: bytes, num_clients: int, num_groups: int = 1) -> list[np.ndarray]:
    """The places 0 .. ``num_clients - 1`` in groups of equal size (within one), each in the order of its ring.

    A function of the session, which holds every client's fresh keys: nobody can choose whom it will stand beside.

    >>> [len(group) for group in groups_of(bytes(32), 10, 3)]
    [4, 3, 3]
    """
    drawn = words([Key(session)], 2 * num_clients)[0].astype(np.uint64)
    order = np.argsort((drawn[::2] << np.uint64(32)) | drawn[1::2], kind="stable")
    return np.array_split(order, num_groups)


def neighbours_of(ring: Sequence[int] | np.ndarray, position: int, degree: int) -> list[int]:
    """The places beside a position of a ring, ``degree`` of them (an even number, or all), in rising order.

    >>> neighbours_of([5, 3, 8, 1, 2], 0, 2), neighbours_of([5, 3, 8], 1, 2)
    ([2, 3], [5, 8])
    """
    size = len(ring)
    if degree >= size - 1:
        return sorted(int(place) for i, place in enumerate(ring) if i != position)
    half = degree // 2
    return sorted(int(ring[(position + step) % size]) for step in range(-half, half + 1) if step)


def _threshold(num_clients: int, degree: int, corrupt: float, dropout: float, server: Server) -> int | None:
    """A threshold for which this degree is safe and likely to work, or None."""
    num_corrupt = math.floor((corrupt + 1e-14) * num_clients)
    num_left = math.ceil((1 - dropout - 1e-14) * num_clients)
    num_bad = num_corrupt + math.floor((dropout + 1e-14) * num_clients)
    rare = -(_SECURITY + 1) * math.log(2)
    if _log_chance_cut(num_clients, degree, num_bad) >= rare:
        return None
    most_corrupt = _quantile(num_clients, num_corrupt, degree, rare - math.log(num_clients), upper=True)
    least_left = _quantile(num_clients, num_left, degree, -_CORRECTNESS * math.log(2) - math.log(num_clients))
    if server == "malicious":
        most_corrupt = math.ceil((most_corrupt + degree - 1.25) / 2)
    return None if least_left <= most_corrupt else max(2, most_corrupt + 1)


def _log_chance_cut(num_clients: int, degree: int, num_bad: int) -> float:
    """At least the log of the chance that bad clients cut a ring in two: two runs of half a degree, at any places."""
    if degree > num_bad:
        return -math.inf
    pairs = math.log(num_clients) + math.log(num_clients - degree - 1) - math.log(2)
    here = math.lgamma(num_bad + 1) - math.lgamma(num_bad - degree + 1)
    return pairs + here + math.lgamma(num_clients - degree + 1) - math.lgamma(num_clients + 1)


def _quantile(total: int, marked: int, drawn: int, log_chance: float, *, upper: bool = False) -> int:
    """Of ``drawn`` clients out of ``total``, how many of the ``marked`` are among them.

    ``upper``: the least number that is exceeded with at most that chance. Otherwise the largest that is reached with at
    least the rest of the chance.
    """
    least, most = max(0, drawn - (total - marked)), min(drawn, marked)
    log_total = _log_choose(total, drawn)
    chance = [
        math.exp(_log_choose(marked, i) + _log_choose(total - marked, drawn - i) - log_total)
        for i in range(least, most + 1)
    ]
    bound, tail = math.exp(log_chance), 0.0
    if upper:
        for i in range(most, least - 1, -1):
            tail += chance[i - least]
            if tail > bound:
                return i
        return least
    for i in range(least, most + 1):
        tail += chance[i - least]
        if tail > bound:
            return i
    return most


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
