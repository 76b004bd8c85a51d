"""The records that cross the seams, and the protocols of the parts: what is learned, how it travels, where it runs.

A federation is an ``Algorithm`` (what), a chain of ``UpdateTransform``s that ends in an ``Aggregator`` (how) and a
``Runtime`` (where). Everything between the learner and the aggregator is a block: rows are clients, columns are
parameters. Most parts need two or three of the methods; the records in ``core/chain.py`` and the helpers in
``core/round.py`` hold the defaults of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from hansa.core.key import Key
from hansa.core.layout import Layout

Array = Any  # a NumPy array or a PyTorch tensor: the two namespaces of array-api-compat that hansa is tested with
State = Any
Settings = Any
Client = str


class Slot(NamedTuple):
    """The name of one exchange; reports, scratch and pending memory are filed under it."""

    round: int
    attempt: int
    exchange: str
    task: str = "train"

    def __str__(self) -> str:
        return f"{self.task}-{self.round}-{self.attempt}-{self.exchange}"


class Updates(NamedTuple):
    """A block: rows of clients, or one folded row (a weighted sum), or the one row that an aggregator opened."""

    clients: tuple[Client, ...]
    values: Array  # (num_clients, num_params): the only part that transforms may turn, round or sparsify
    weights: Array  # (num_clients,)
    tail: Mapping[str, Array] = {}  # (num_clients,) by name: counts and metrics; weighted and noised, never rounded
    side: Mapping[str, Array] = {}  # (num_clients,) by name: a row's grid scale, for the codec; never summed
    folded: bool = False

    def take(self, rows: Sequence[int]) -> Updates:
        """The block of some of its rows."""
        index = list(rows)
        return Updates(
            tuple(self.clients[i] for i in index),
            self.values[index],
            self.weights[index],
            {name: column[index] for name, column in self.tail.items()},
            {name: column[index] for name, column in self.side.items()},
        )


class Plan(NamedTuple):
    """What the server tells a client for one exchange: vectors, numbers and names only."""

    slot: Slot
    learn: bool  # the update is made in this exchange
    broadcast: Mapping[str, Array]
    settings: tuple[Settings, ...]  # one a transform
    key: Key
    variants: Mapping[Client, Any] = {}  # from the algorithm; each client is given its own entry only
    mail: Mapping[Client, Any] = {}  # from the aggregator; likewise


class Report(NamedTuple):
    """What comes back from a block of clients; ``payload`` is ``Updates`` or a mapping by client."""

    slot: Slot
    clients: tuple[Client, ...]
    payload: Any
    refused: Mapping[Client, str] = {}


class Ask(NamedTuple):
    """The next exchange that an aggregator asks for."""

    exchange: str
    clients: tuple[Client, ...]
    learn: bool
    mail: Mapping[Client, Any] = {}


class Draws(NamedTuple):
    """The random streams of one transform in one plan."""

    shared: Key  # the same for every client and for the server
    rows: Sequence[Key]  # a client's own
    secret: Sequence[Key]  # a client's own, unknown to the server
    norm_bound: float = math.inf  # what the stages before prove of a row's L2 norm
    value_bound: float = math.inf  # and of its largest value


class Aggregate(NamedTuple):
    """The mean (or another merger) of a cohort's updates, as ``server_update`` receives it."""

    values: Array  # (num_params,) float64
    tail: Mapping[str, float]
    clients: tuple[Client, ...] = ()
    variants: Mapping[Client, Any] = {}
    num_population: int = 0  # clients that could have taken part
    layout: Layout | None = None  # of the model


class Memory:
    """What clients keep between rounds, as a block: a client without an entry gets the default row.

    >>> import numpy as np
    >>> Memory([{"bias": np.ones(2)}, {}]).get("bias", np.zeros(2)).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, rows: Sequence[Mapping[str, Array]], prefix: str = "") -> None:
        self._rows, self._prefix = rows, prefix

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, name: str, default: Array) -> Array:
        """The rows called ``name``: (num_clients, length); ``default`` is one row (length,)."""
        import numpy as np

        return np.stack([np.asarray(row.get(self._prefix + name, default)) for row in self._rows])

    def part(self, name: str) -> Memory:
        """What the clients keep for one part: the algorithm (``a``) or the transform at a position (``0``)."""
        return Memory(self._rows, f"{self._prefix}{name}.")


class Remembered(NamedTuple):
    """What clients will keep once their report has counted: arrays (num_clients, ...) by part and name."""

    clients: tuple[Client, ...]
    arrays: Mapping[str, Array]


class Fit(Protocol):
    """A learner bound to a block of clients, their data and their local training settings (``work.py``)."""

    clients: tuple[Client, ...]
    variant: Any
    datasets: Sequence[Any]

    @property
    def local(self) -> Any: ...  # the LocalTraining of this round
    @property
    def num_examples(self) -> Array: ...
    @property
    def num_steps(self) -> Array: ...
    @property
    def train_loss(self) -> Array | None: ...
    def __call__(
        self,
        params: Array,
        *,
        linear: Array | None = None,
        strength: float = 0.0,
        anchor: Array | None = None,
        trainable: Array | None = None,
        models: Mapping[str, Array] | None = None,
        steps: int | None = None,
    ) -> Array: ...
    @property
    def change(self) -> Callable[..., Array]: ...  # change(params, ...) = fit(params, ...) - params
    def updates(
        self, values: Array, weights: Array | None = None, tail: Mapping[str, Array] | None = None
    ) -> Updates: ...
    def loss(self, params: Array) -> Array: ...
    def gradient(self, params: Array) -> Array: ...
    def evaluate(self, params: Array) -> Array: ...


class Algorithm(Protocol):
    """What is learned: pure functions of state and updates. ``model`` and ``variants`` are optional."""

    def init(self, params: Array) -> State: ...
    def broadcast(self, state: State) -> Mapping[str, Array]: ...
    def client_update(
        self, received: Mapping[str, Array], fit: Any, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]: ...
    def server_update(self, state: State, mean: Aggregate) -> State: ...


class UpdateTransform(Protocol):
    """How an update changes on the way: ``encode`` on clients, ``decode`` and ``release`` on the server."""

    def init(self, num_params: int) -> State: ...
    def settings(self, state: State) -> Settings: ...
    def norm_bound(self, incoming: float, settings: Settings) -> float: ...
    def tail_bound(self, settings: Settings) -> float: ...
    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]: ...
    def decode(self, values: Array, settings: Settings, shared: Key) -> Array: ...
    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]: ...
    def codec(self, inner: Codec) -> Codec: ...


class Codec(Protocol):
    """Packs rows into arrays and back, bit for bit. Optional ``row_bytes(num_params)``: the most bytes of one row."""

    def pack(self, updates: Updates) -> Mapping[str, Array]: ...
    def unpack(self, arrays: Mapping[str, Array], num_params: Any) -> tuple[Array, Mapping[str, Array]]: ...


class Aggregator(Protocol):
    """Merges updates, in one exchange or in several; the server's half is pure functions of frozen reports.

    ``fitted(limits) -> Aggregator`` is optional: what the chain proves of rows (``chain.Limits``), told once a round.
    ``check_mail(exchange, mail) -> str`` is optional: what is wrong with one client's mail, or an empty text. Mail may
    be any tree of arrays, numbers and texts. A coordinator asks before it accepts a report: what is let through,
    ``ask`` and ``open`` should be able to read (where they fail all the same, see ``aggregators/careful.py``).
    """

    linear: bool  # True: the sum is decoded. False: rows are decoded, then meet

    def ask(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Ask | None: ...
    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]: ...
    def open(self, cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Updates: ...
    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate: ...
    def sensitivity(self, bound: float) -> float: ...


class Runtime(Protocol):
    """Where clients run."""

    def start(self, plan: Plan, clients: Sequence[Client]) -> None: ...  # idempotent by slot
    def reports(self, slot: Slot) -> Iterator[Report]: ...  # a slot's frozen set
    def arrivals(self, count: int, refill: Callable[[int], None]) -> Iterator[Report]: ...  # the next so many clients
    def settle(self, slot: Slot, counted: Sequence[Client]) -> None: ...  # commit or drop memory, forget scratch
    def once(self, name: str, make: Callable[[], bytes]) -> Key: ...  # durable before it is used
