"""Many clients of one coordinator: enrolled in one go, and calling as ``hansa join`` does, without a participant."""

import asyncio
import hashlib
import time
from collections import Counter

import numpy as np
from calls import LOST, Caller, Refused

from hansa.core.chain import Raw
from hansa.core.protocols import Report, Updates
from hansa.network import identity
from hansa.network import messages as m
from hansa.network.pace import LONGEST_WAIT_S, Patient
from hansa.network.registry import open_authority
from hansa.network.store import Store, clients
from hansa.version import __version__
from hansa.wire import pack_report


def enrol(folder, names):
    """Certificates for ``names``, by the coordinator's own authority: their rows, and a file each (key, certificate).

    They share one key, which spares time and shows nowhere else.
    """
    store = Store(folder / "fed")
    authority = open_authority(store)
    key, request = identity.make_request("fleet")
    files = folder / "fleet"
    files.mkdir()
    rows = []
    for name in names:
        certificate = authority.sign_client(request, name)
        (files / f"{name}.pem").write_bytes(key + certificate)
        rows.append(
            {
                "name": name,
                "certificate_sha256": identity.fingerprint(certificate),
                "certificate": certificate,
                "key_hash": identity.request_key_hash(request),
                "enrolled_at": store.clock(),
            }
        )
    with store.write() as db:
        db.execute(clients.insert(), rows)
    store.close()
    return authority.certificate


class Client:
    """One client's loop: hello, then questions for work for ever, at the pace that the server tells."""

    def __init__(self, fleet, name):
        self.fleet, self.patient = fleet, Patient()
        self.caller = Caller(fleet.port, fleet.authority, name, fleet.folder / f"{name}.pem")
        self.acknowledged, self.released, self.run, self.answered_at = 0, "", "", None
        self.was_lost = False

    async def hello(self):
        """Enter the run that is on."""
        body = m.write(m.Hello(protocol=m.PROTOCOL, version=__version__, fingerprints=(self.fleet.fingerprint,)))
        self.run = m.read_welcome(await self.caller.ask("POST", "/v1/hello", body)).run

    async def live(self, start_in_s):
        """Call for ever."""
        await asyncio.sleep(start_in_s)
        while True:
            try:
                if not self.run:
                    await self.hello()
                began = time.monotonic()
                if self.was_lost:  # once without waiting, so that it can be told when this client is back
                    await self.work(wait_s=0)
                    self.was_lost, self.answered_at = False, time.monotonic()
                work = await self.work()
                self.answered_at = time.monotonic()
                self.patient.reached()
                if work.plan is not None:
                    await self.answer(work)
                elif not work.says_something:
                    await asyncio.sleep(self.patient.until_next(time.monotonic() - began))
            except Refused as error:
                if error.status < 500 and error.status != 429:
                    self.fleet.refused[error.code] += 1
                    if error.code not in ("not-found", "not-asked", "hello-first"):
                        raise
                    self.run = "" if error.code == "hello-first" else self.run
                else:
                    self.fleet.told_later += 1
                    await asyncio.sleep(self.patient.until_retry(error.after_s))
            except LOST as error:
                self.fleet.lost[type(error).__name__] += 1
                self.was_lost = True
                self.caller.close()
                await asyncio.sleep(self.patient.until_retry())

    async def work(self, wait_s=LONGEST_WAIT_S):
        """What to do next."""
        query = {"acknowledged": self.acknowledged, "released": self.released, "wait": wait_s}
        work = m.read_work(await self.caller.ask("GET", "/v1/work", query=query))
        self.patient.hear(work.retry_after_s)
        if work.settlements:
            self.acknowledged = work.settlements[-1].number
        if work.released is not None:
            self.released = m.release_mark(work.released)
        return work

    async def answer(self, work):
        """Fetch the vectors of a plan, and report an update of the right length."""
        plan = m.read_plan(work.plan)
        for sha256 in plan.vectors.values():
            body = await self.caller.ask("GET", f"/v1/blobs/{sha256}")
            assert hashlib.sha256(body).hexdigest() == sha256
            self.fleet.bytes_down += len(body)
        body, sha256 = self.fleet.report(plan.slot)
        path = f"/v1/reports/{work.run}/{plan.slot}/{sha256}"
        receipt = m.read_receipt(await self.caller.ask("PUT", path, body))
        self.fleet.bytes_up += len(body)
        self.fleet.receipts.append((plan.slot.round, receipt.status, time.monotonic()))


class Fleet:
    """All clients of this process, and what they counted."""

    def __init__(self, folder, authority, port, fingerprint, num_params=4):
        self.folder, self.authority, self.port, self.fingerprint = folder / "fleet", authority, port, fingerprint
        self.num_params, self.clients, self.tasks = num_params, [], []
        self.refused, self.lost, self.told_later = Counter(), Counter(), 0
        self.receipts, self.bytes_up, self.bytes_down = [], 0, 0
        self._body = b"", ""

    def report(self, slot):
        """The body of a report, the same for all clients, and its SHA-256."""
        if not self._body[0]:
            values = np.full((1, self.num_params), 0.001, np.float32)
            updates = Updates(("x",), values, np.array([1.0]), {"train_loss": np.array([0.5])})
            body = bytes(pack_report(Report(slot, ("x",), updates), Raw()))
            self._body = body, hashlib.sha256(body).hexdigest()
        return self._body

    def begin(self, names, per_s):
        """Let clients begin, ``per_s`` of them each second."""
        for number, name in enumerate(names):
            client = Client(self, name)
            self.clients.append(client)
            self.tasks.append(asyncio.create_task(client.live(number / per_s)))

    def num_answered_since(self, moment):
        """How many clients have had an answer for work since."""
        return sum(1 for client in self.clients if client.answered_at is not None and client.answered_at >= moment)

    def check(self):
        """Raise what ended a client, if any has ended."""
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def end(self):
        """Stop every client."""
        self.check()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for client in self.clients:
            client.caller.close()
