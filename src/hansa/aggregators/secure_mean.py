"""The mean of the clients' updates, of which the server sees the sum alone.

    mean = sum_i w_i * u_i / sum_i w_i,      sums under masks that only leave together

The protocol is that of ``hansa.secagg``: five exchanges, in the third of which clients learn. Whoever is lost on the
way is left out, as long as enough are left; else the attempt is abandoned, nothing is released, and the next one begins
with fresh keys. In buffered rounds clients learn in an exchange of its own, and once a buffer is full the five follow
among its clients, late rows scaled before they are masked (``secure_waiting.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from hansa.aggregators.ideal_sum import ideal
from hansa.aggregators.mean import Mean
from hansa.aggregators.secure_rows import exact_words, heaviest, row_of, sums_of, words_of
from hansa.aggregators.secure_waiting import LEAST_SCALE, Waiting, by_scale, keep_rows, scale_of
from hansa.core.chain import Limits
from hansa.core.errors import Abandoned, CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Ask, Client, Plan, Report, Updates
from hansa.long_vectors import columnwise
from hansa.secagg import client, mail
from hansa.secagg.errors import SecAggError
from hansa.secagg.graph import FULL, Server, refuse_rates
from hansa.secagg.grid import LIMBS, UNBOUNDED, WORD_BITS, TooLarge, exact_width, width_of
from hansa.secagg.primitives import joined
from hansa.secagg.refusals import OutOfOrder
from hansa.secagg.server import Lost, Said, Sums, Table, opened
from hansa.secagg.steps import buffer_of, step_in
from hansa.secagg.terms import Advert, Credentials, Terms, Witness

History = Mapping[str, tuple[Report, ...]]
_MOST_BITS = 24  # whole numbers that float32 holds
_LONG, _LONG_GROUP = 30_000_000, 100
_NAMES = 2000  # bytes: a certificate, two signatures, and what surrounds all of it
_REFUSED = "secure aggregation: "
_TOLD = f"{_REFUSED}it does not go on; its own log says why"
_PROTECTION = {
    "update": "none needed: it says that an update waits to be summed, and no more",
    "keys": "none needed: fresh public keys of this client's, and its signature",
    "shares": "sealed for each peer: the server cannot open them",
    "agree": "none needed: a signature on who is alive",
    "unmask": "shares of masks: enough of them open the sum, and no update",
}


@dataclass(frozen=True, kw_only=True)
class SecureMean:
    """Mean under secure aggregation: ``bits`` a coordinate, on a grid that the chain's norm bound gives.

    ``corrupt`` is the share of clients that may work with the server, ``dropout`` the share that may be lost in a
    round; degree and threshold of the graph follow. A ``server="malicious"`` may lie to clients in any way, and then
    they refuse; ``"honest"`` trusts it to keep to the protocol and saves an exchange. Nobody opens a sum of fewer than
    ``min_survivors`` clients. ``weighting="examples"`` needs ``max_weight``, and weights travel under the masks.

    ``num_groups`` above 1 sums random groups apart, and ``across`` (``Median()``, say) merges their means, so that a
    few liars spoil their own groups only; the server then sees a mean a group. No group has more than ``group_size``
    clients: 100 above 3e7 parameters, where the masks of one large group would take minutes. ``simulate="protocol"``
    runs all of the cryptography in a simulation, too, where by default the same sums are made without it.

    | input | result |
    |---|---|
    | no bound on coordinates | refused: put ``Clip`` before it |
    | sums that could overflow | refused, on both sides |
    | fewer left than the threshold | ``Abandoned``: nothing is released |

    >>> SecureMean(bits=16, corrupt=0.05).bits
    16
    """

    weighting: Literal["clients", "examples"] = "clients"
    max_weight: float | None = None
    denominator: float | None = None
    bits: int = 16
    corrupt: float = 0.1
    dropout: float = 0.1
    server: Server = "malicious"
    min_survivors: int = 0
    num_groups: int = 1
    group_size: int | None = None
    across: Any = None
    simulate: Literal["ideal", "protocol"] = "ideal"
    limits: Limits = field(default=Limits(), repr=False)
    hashed: dict[str, Any] | None = field(default=None, repr=False, compare=False)  # in a simulation, of the last plan
    credentials: Credentials | None = field(default=None, repr=False, compare=False)

    witness: Witness | None = field(default=None, repr=False, compare=False)

    linear: ClassVar[bool] = True
    reveals_rows: ClassVar[bool] = False
    buffer_exchange: ClassVar[str] = "update"  # in which clients learn for a buffer; the others follow for each buffer
    least_scale: ClassVar[float] = LEAST_SCALE

    def __post_init__(self) -> None:
        kind = type(self).__name__
        Mean(weighting=self.weighting, max_weight=self.max_weight, denominator=self.denominator)
        refuse_rates(self.corrupt, self.dropout, self.server)
        if self.weighting == "examples" and self.max_weight is None:
            raise InputError(
                f'{kind}(weighting="examples"): expected max_weight=, the most examples that count of one client; '
                "found None; without it no sum is safe from overflow"
            )
        if not 2 <= self.bits <= _MOST_BITS:
            raise InputError(f"{kind}(bits=): expected 2 to {_MOST_BITS}, found {self.bits}")
        if self.min_survivors < 0 or self.num_groups < 1 or (self.group_size or 2) < 2:
            raise InputError(f"{kind}: expected min_survivors from 0, num_groups from 1 and group_size from 2")
        if self.simulate not in ("ideal", "protocol"):
            raise InputError(f'{kind}(simulate=): expected "ideal" or "protocol", found {self.simulate!r}')
        if self.across is not None and (self.num_groups < 3 or not hasattr(self.across, "merge")):
            raise InputError(
                f"{kind}(across=): expected a rule such as hansa.Median() over 3 groups or more, found {self.across!r} "
                f"over {self.num_groups}; SecureMean(num_groups=10, across=hansa.Median())"
            )

    @property
    def terms(self) -> Terms:
        """What all clients must have alike."""
        groups = self.num_groups, self.group_size
        return Terms(self.corrupt, self.dropout, self.server, self.min_survivors, *groups, self.bits)

    @property
    def exchanges(self) -> tuple[str, ...]:
        """The exchanges in their order."""
        agree = ("agree",) if self.server == "malicious" else ()
        return ("keys", "shares", "masked", *agree, "unmask")

    def fitted(self, limits: Limits) -> SecureMean:
        """The same for one round: what the chain proves of rows says how they lie on the grid."""
        return replace(self, limits=limits)

    def enrolled(self, credentials: Credentials) -> SecureMean:
        """The same at an enrolled client: it signs, and refuses peers whose signatures do not hold."""
        return replace(self, credentials=credentials)

    def witnessed(self, witness: Witness) -> SecureMean:
        """The same at a server that knows enrolled clients: one whose signatures do not hold is left out by itself."""
        return replace(self, witness=witness)

    def sized(self, num_params: int) -> SecureMean:
        """The same for updates of this length: very long ones are summed in groups."""
        is_long = num_params >= _LONG and self.group_size is None
        return replace(self, group_size=_LONG_GROUP) if is_long else self

    def of_sums(self) -> SecureMean:
        """The same for sums of metrics and statistics: every client weighs the same, and all are in one group."""
        return replace(self, weighting="clients", max_weight=None, denominator=None, num_groups=1, across=None)

    def simulated(self, *, buffered: bool = False) -> Any:
        """What takes its place in a simulation: itself, or the same sums without the cryptography."""
        return replace(self, hashed={}) if self.simulate == "protocol" else ideal(self, buffered=buffered)

    # ------------------------------------------------------------------------------------------- the server's half

    def ask(self, cohort: tuple[Client, ...], history: History) -> Ask | None:
        """Keys from everyone, then step after step from those that are left."""
        if "keys" not in history:
            return Ask("keys", cohort, False)
        table = Table.of(_said(history, "keys"), self.terms)
        steps: dict[str, Callable[[], dict[Client, Any]]] = {
            "shares": table.lists,
            "masked": lambda: table.shares(_said(history, "shares")),
            "agree": lambda: table.survivors(table.usual(_said(history, "masked"))),
            "unmask": lambda: self._lists(table, table.usual(_said(history, "masked")), _said(history, "agree")),
        }
        for exchange in self.exchanges[1:]:
            if exchange in history:
                continue
            told = steps[exchange]()
            if not told:
                raise Abandoned(f"secure sum: too few clients are left before {exchange}", may_heal=True)
            return Ask(exchange, tuple(c for c in cohort if c in told), exchange == "masked", told)
        return None

    def _lists(self, table: Table, masked: Said, agreed: Said) -> dict[Client, Any]:
        """The mail of the last exchange."""
        if self.server == "honest":
            return table.lists_unsigned(masked)
        return table.lists_signed(masked, table.believed(masked, agreed, self.witness))

    def check_signed(self, plan: Plan, name: Client, said: Any) -> str:
        """What is wrong with the signature of a client's keys, where a witness knows clients."""
        if self.witness is None or step_in(plan.slot.exchange) != "keys":
            return ""
        advert = Advert.of(name, said)
        message = advert.signed(self._aim(plan))
        fault = self.witness.fault(name, advert.certificate, advert.signature, message)
        return f"keys: {fault}" if fault else ""

    def _aim(self, plan: Plan) -> bytes:
        """What keys are for: this attempt at a round, or at a buffer."""
        return self.terms.aim(buffer_of(plan.slot.exchange) or plan.slot, plan.key.material)

    def check_mail(self, exchange: str, said: Any) -> str:
        """What is wrong with one client's word by itself."""
        if exchange == self.buffer_exchange:
            return "" if said == {} else "mail of an update that waits should be empty"
        return mail.fault(step_in(exchange), said)

    def open(self, cohort: tuple[Client, ...], history: History) -> Updates:
        """The sum over the survivors of all groups, or with ``across`` the groups' means."""
        table = Table.of(_said(history, "keys"), self.terms)
        shared, masked, answers = (_said(history, exchange) for exchange in ("shares", "masked", "unmask"))
        masked = table.usual(masked)
        found: list[Sums] = []
        reasons: list[str] = []
        for group in range(len(table.circle.rings)):
            try:
                widths = self._widths(table.circle.graph(group).num_clients)
                found.append(opened(table, group, shared, masked, answers, widths))
            except Lost as error:
                reasons.append(str(error))
        if not found or (self.across is not None and len(found) < 3):
            raise Abandoned(f"secure sum: {reasons[0] if reasons else 'nobody is left'}", may_heal=True)
        divides, most = self.denominator is None, heaviest(self)
        rows = [by_scale(row_of(sums, self.limits, self.bits, most), divides=divides) for sums in found]
        return sums_of(rows, apart=self.across is not None)

    @columnwise(lambda owner: owner.across is None)
    def reduce(self, blocks: Sequence[Updates], scales: Sequence[float]) -> Aggregate:
        """As the plain mean of folded blocks; with ``across`` that rule over the groups' means."""
        if self.across is not None:
            found: Aggregate = self.across.reduce(blocks, scales)
            return found
        return Mean(denominator=self.denominator).reduce(blocks, scales)

    def sensitivity(self, bound: float) -> float:
        """As of the plain mean: rows stay within the bound on the grid."""
        if self.across is not None:
            return math.inf
        own = Mean(weighting=self.weighting, max_weight=self.max_weight, denominator=self.denominator)
        return own.sensitivity(bound)

    def _widths(self, num_clients: int) -> tuple[int, int]:
        """Bits of the words of values and of exact numbers that hold a group's sums."""
        has_grid = math.isfinite(self.limits.value)
        width = width_of(self.limits, self.bits, num_clients) if has_grid else 1
        return width, exact_width(num_clients)

    def report_bytes(self, exchange: str, num_params: int, num_clients: int) -> int:
        """The most bytes that one of so many clients says in an exchange, beside a few names."""
        degree = max(min(num_clients, FULL), self.terms.graph(max(2, num_clients)).degree)
        exchange = step_in(exchange)
        if exchange != "masked":
            sizes = {"keys": mail.LARGEST_ADVERT, "shares": mail.SEALED * degree, "agree": mail.LARGEST_ADVERT}
            return sizes.get(exchange, mail.SHARE * (degree + 1))
        if not math.isfinite(self.limits.value):
            return LIMBS * -(-num_params * exact_width(num_clients) // 8)
        try:
            width = width_of(self.limits, self.bits, num_clients)
        except TooLarge:  # in one group they would be too many
            width = WORD_BITS
        return -(-num_params * width // 8)

    def round_bytes(self, num_params: int, num_columns: int, num_clients: int) -> int:
        """About the bytes that one of so many clients says in all exchanges of a round."""
        group = -(-num_clients // self.terms.groups(num_clients))
        numbers = LIMBS * -(-(1 + num_columns) * exact_width(group) // 8)
        shares = (mail.SEALED + mail.SHARE) * self.terms.graph(max(2, group)).degree
        return self.report_bytes("masked", num_params, group) + numbers + shares + _NAMES

    # ------------------------------------------------------------------------------------------- the client's half

    def protection(self, exchange: str) -> str:
        """What a client's word in an exchange is, and who can read it."""
        return _PROTECTION.get(step_in(exchange), f"{type(self).__name__}: the server sees the sum only")

    def told(self, reason: str) -> str:
        """As much of a refusal's ``reason`` as the server may know: that a client does not trust it, and no more."""
        return _TOLD if reason.startswith(_REFUSED) else reason

    def answer(
        self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any], secret: Sequence[Key]
    ) -> tuple[Any, Mapping[Client, Any], Mapping[Client, str]]:
        """Each client's word in this exchange, and what it keeps; one that is lied to refuses with a reason."""
        if plan.slot.exchange == self.buffer_exchange:
            payload, kept, refused = keep_rows(updates, scratch)
            return payload, kept, {name: f"{_REFUSED}{reason}" for name, reason in refused.items()}
        payload, kept, refused = {}, {}, {}
        clients = self._clients(plan, updates, scratch)
        model = self._model_of(plan) if step_in(plan.slot.exchange) == "masked" else b""
        for i, name in enumerate(clients):
            row = None if updates is None else updates.take([i])
            try:
                payload[name], kept[name] = self._say(plan, name, row, scratch.get(name), secret[i], model)
            except (SecAggError, TooLarge) as error:
                refused[name] = f"{_REFUSED}{error}"
        return payload, kept, refused

    def _clients(self, plan: Plan, updates: Updates | None, scratch: Mapping[Client, Any]) -> Sequence[Client]:
        return updates.clients if updates is not None else tuple(scratch)

    def _say(
        self, plan: Plan, name: Client, row: Updates | None, held: Any, secret: Key, model: bytes
    ) -> tuple[Any, Any]:
        """One client's step."""
        step, told, terms = step_in(plan.slot.exchange), plan.mail.get(name) or {}, self.terms
        signer, buffered = self.credentials, buffer_of(plan.slot.exchange) is not None
        held, waiting = Waiting.of(held, buffered=buffered, first=step == "keys")
        if step == "keys":
            said, after = client.advertise(name, self._aim(plan), secret, signer)
        elif step == "shares":
            said, after = client.share(client.Kept.of(held, "keys"), told, terms, secret, signer)
        elif step == "masked":
            before, scale = client.Kept.of(held, "shares"), 1.0
            if waiting is not None:
                row = waiting.block(name)
                scale, told = scale_of(told)
            if row is None:
                raise OutOfOrder("expected to learn in this exchange")
            words = self._words(plan, row, len(before.ring), secret, scale)
            said, after = client.mask(before, told, words, model)
        elif step == "agree" and self.server == "malicious":
            said, after = client.agree(client.Kept.of(held, "masked"), told, signer)
        elif step == "unmask":
            before = client.Kept.of(held, "agreed" if self.server == "malicious" else "masked")
            return client.unmask(before, told, terms, signer), client.Kept("done").tree
        else:
            raise SecAggError(f"expected one of {', '.join(self.exchanges)}; was asked for {step!r}")
        return said, after.tree if step == "masked" or waiting is None else {**after.tree, "row": waiting.row}

    def _model_of(self, plan: Plan) -> bytes:
        """The hash of what clients were sent; a simulation, where all have the same plan, makes it once."""
        if self.hashed is None:
            return _model_of(plan)
        if self.hashed.get("plan") is not plan:
            self.hashed.update(plan=plan, model=_model_of(plan))
        found: bytes = self.hashed["model"]
        return found

    def _words(self, plan: Plan, row: Updates, num_clients: int, secret: Key, scale: float) -> client.Words:
        """A client's weighted row, weight and columns as whole numbers; a late row counts ``scale`` times as much."""
        width, wide = self._widths(num_clients)
        if not math.isfinite(self.limits.value) and plan.slot.task == "train":
            raise CheckError([UNBOUNDED])
        values, numbers = words_of(row, self.limits, self.bits, heaviest(self), secret, scale)
        return client.Words(values, width, exact_words(numbers), wide, tuple(sorted(row.tail)))


@dataclass(frozen=True, kw_only=True)
class SecureSum(SecureMean):
    """The sum of the clients' updates, each with weight 1, under secure aggregation.

    >>> SecureSum().denominator
    1.0
    """

    denominator: float | None = 1.0


def _said(history: History, exchange: str) -> Said:
    """Each client's word in an exchange."""
    return {name: report.payload[name] for report in history.get(exchange, ()) for name in report.clients}


def _model_of(plan: Plan) -> bytes:
    """What a client was sent to learn from: vectors, settings and key, as one hash."""
    digest = hashlib.sha256(joined(plan.key.material, repr(plan.settings).encode()))
    for name in sorted(plan.broadcast):
        vector = np.ascontiguousarray(plan.broadcast[name])
        digest.update(joined(name.encode(), repr((vector.shape, str(vector.dtype))).encode()))
        digest.update(vector.reshape(-1).view(np.uint8).data)
    return digest.digest()


__all__ = ["SecureMean", "SecureSum"]
