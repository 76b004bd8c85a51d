"""What secure aggregation costs beyond the training: masks, agreements, shares; beside the machine's own AES.

    python benchmarks/secagg/run.py [--parts aes,client,server,server-long] [--quick] [--check]

Every part states the rate of AES-128 in counter mode (the library's own call, nothing added), measured before and after
it: the machine's two cores may be threads of one, and others may use them. ``client`` is one client's work of a round,
but for its training and the checks of its peers' signatures. ``server`` and ``server-long`` are what is left to do once
the last share has come: join the secrets, agree with the neighbours of the dropped, take all masks away. Their first
words are compared with a sum that is computed key by key. With ``--check`` the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setting import need, setting  # benchmarks are scripts

from hansa.core.key import Key
from hansa.secagg.masks import add_masks, num_cores
from hansa.secagg.packing import add_unpacked, pack
from hansa.secagg.primitives import KeyPair, derive, seal, stream, unseal
from hansa.secagg.shamir import join, split

GB = 1e9


class Size(NamedTuple):
    """A round: clients, parameters, how many dropped, neighbours of each, shares that join."""

    clients: int
    params: int
    dropped: int
    degree: int
    threshold: int


class Figure(NamedTuple):
    """One line of the table; ``bar`` is met where ``value`` is at most (``at_least``: at least) that."""

    name: str
    value: float
    unit: str
    note: str
    bar: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def raw_rate(num_threads: int = 1, seconds: float = 0.2) -> float:
    """Bytes a second of AES-128 in counter mode, of all threads together."""

    def one(_: int) -> int:
        encryptor, zeros, out, made = stream(os.urandom(16)), bytes(2**18), bytearray(2**18 + 16), 0
        while time.perf_counter() < until:
            for _ in range(50):
                encryptor.update_into(zeros, out)
            made += 50 * 2**18
        return made

    began = time.perf_counter()
    until = began + seconds
    with ThreadPoolExecutor(num_threads) as pool:
        made = sum(pool.map(one, range(num_threads)))
    return made / (time.perf_counter() - began)


def aes(size: Size) -> Iterator[Figure]:
    """How close adding a mask comes to making it; what packing costs beside it."""
    words, keys = np.zeros(size.params, np.uint32), [os.urandom(16) for _ in range(97)]
    for num_threads, said in ((1, "one core"), (num_cores(), f"{num_cores()} threads")):
        before = raw_rate(num_threads)
        taken = timed(lambda threads=num_threads: add_masks(words, keys, num_threads=threads))
        raw = (before + raw_rate(num_threads)) / 2
        rate = len(keys) * words.nbytes / taken
        note = f"{rate / GB:.1f} GB/s where AES alone makes {raw / GB:.1f}"
        yield Figure(f"mask and add, {said}", rate / raw, "of AES", note, 0.6 if num_threads == 1 else None, True)
    packed = pack(words, 26)
    yield Figure("pack words of 26 bits", timed(lambda: pack(words, 26)) * 1e9 / size.params, "ns a word", "")
    added = timed(lambda: add_unpacked(words, packed, 26, size.params))
    yield Figure("add a packed row of 26 bits", added * 1e9 / size.params, "ns a word", "")


def client(size: Size) -> Iterator[Figure]:
    """One client: two key pairs, agreements, shares out and in, masks, packing."""
    row, peers = np.zeros(size.params, np.uint32), [KeyPair(os.urandom(32)).public for _ in range(size.degree)]

    def work() -> None:
        masking, sharing = KeyPair(os.urandom(32)), KeyPair(os.urandom(32))
        seed = os.urandom(32)
        secrets = np.frombuffer(seed + masking.secret, np.uint8).reshape(2, 32)
        shares = split(secrets, size.threshold, range(1, size.degree + 2), Key(os.urandom(32)))
        seals = [derive(sharing.agree(peer), "share", b"context" * 8, 32) for peer in peers]
        sealed = [seal(key, shares[:, i].tobytes(), b"") for i, key in enumerate(seals)]
        for key, message in zip(seals, sealed, strict=True):
            unseal(key, message, b"")
        keys = [derive(masking.agree(peer), "mask", b"context" * 8, 16) for peer in peers]
        half = len(keys) // 2
        add_masks(row, [derive(seed, "mask", b"", 16), *keys[:half]], keys[half:])
        pack(row, 26)

    taken = timed(work)
    alone = (size.degree + 1) * row.nbytes / raw_rate()
    note = f"{size.degree + 1} masks of {size.params:,} words, one core; AES alone {alone:.3f} s"
    yield Figure("a client's round", taken, "s", note, 0.12)


def server(size: Size) -> Iterator[Figure]:
    """All that is left to do when the last share has come."""
    yield from _unmasking(size, 4.0)


def server_long(size: Size) -> Iterator[Figure]:
    """The same for few clients and a long row."""
    yield from _unmasking(size, 20.0)


def _unmasking(size: Size, bar: float) -> Iterator[Figure]:
    pairs, seeds = [KeyPair(os.urandom(32)) for _ in range(size.clients)], os.urandom(32 * size.clients)
    secrets = np.frombuffer(seeds, np.uint8).reshape(-1, 32).copy()
    secrets[: size.dropped] = np.frombuffer(b"".join(p.secret for p in pairs[: size.dropped]), np.uint8).reshape(-1, 32)
    shares = split(secrets, size.threshold, range(1, size.degree + 2), Key(os.urandom(32)))
    drawn = np.random.default_rng(0)
    places = np.stack([drawn.permutation(size.degree + 1)[: size.threshold] for _ in secrets])
    shares = np.take_along_axis(shares, places[:, :, None], axis=1)
    public = [pair.public for pair in pairs]
    # the neighbours of the dropped that live: nine tenths of them
    alive = [
        drawn.permutation(np.arange(size.dropped, size.clients))[: _living(size)].tolist() for _ in range(size.dropped)
    ]
    total = np.full(size.params, 0, np.uint32)  # touched, so that it counts as held
    held = peak_mb()
    parts: dict[str, float] = {}

    def part(name: str, began: float) -> float:
        now = time.perf_counter()
        parts[name] = now - began
        return now

    before, began = raw_rate(num_cores()), time.perf_counter()
    joined = join(places + 1, shares)
    now = part("join", began)
    own = [derive(secret.tobytes(), "self", b"", 16) for secret in joined[size.dropped :]]
    plus, minus = [], list(own)
    for number, secret in enumerate(joined[: size.dropped]):
        pair = KeyPair(secret.tobytes())
        for peer in alive[number]:
            (plus if peer % 2 else minus).append(derive(pair.agree(public[peer]), "mask", b"context" * 8, 16))
    now = part("agree", now)
    add_masks(total, plus, minus, num_threads=num_cores())
    now = part("masks", now)
    taken, raw = now - began, (before + raw_rate(num_cores())) / 2
    need((joined == secrets).all() and _is_right(total, plus, minus), "the masks that were taken away are not those")
    made = len(plus) + len(minus)
    note = (
        f"{made:,} masks of {size.params:,} words, {num_cores()} threads: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
        + f"; AES alone {made * total.nbytes / raw:.2f} s; memory {peak_mb() - held:,.0f} MB beyond the row"
    )
    yield Figure(f"unmasking, {size.clients:,} clients", taken, "s", note, bar)


def _living(size: Size) -> int:
    return -(-size.degree * (size.clients - size.dropped) // size.clients)


def _is_right(total: npt.NDArray[np.uint32], plus: list[bytes], minus: list[bytes]) -> bool:
    count = min(1000, len(total))
    expected = np.zeros(count, np.uint32)
    for keys, sign in ((plus, 1), (minus, -1)):
        for key in keys:
            expected += np.uint32(sign % 2**32) * np.frombuffer(stream(key).update(bytes(4 * count)), "<u4")
    return bool((total[:count] == expected).all())


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """The least seconds of a few times: what others use of the machine only adds."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def peak_mb() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


PARTS: dict[str, tuple[Callable[[Size], Iterator[Figure]], Size]] = {
    "aes": (aes, Size(1000, 1_000_000, 100, 96, 67)),
    "client": (client, Size(1000, 1_000_000, 100, 96, 67)),
    "server": (server, Size(1000, 1_000_000, 100, 96, 67)),
    "server-long": (server_long, Size(100, 100_000_000, 10, 32, 22)),
}
QUICK = Size(20, 10_000, 2, 8, 6)


def main(words: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    options.add_argument("--quick", action="store_true", help="20 clients, 10,000 parameters, no bars")
    options.add_argument("--check", action="store_true", help="exit status 1 where a bar is missed")
    given = options.parse_args(words)
    chosen = given.parts.split(",")
    need(set(chosen) <= set(PARTS), f"--parts: expected some of {','.join(PARTS)}, found {given.parts}")
    print(setting("cryptography"))
    missed = False
    for name in chosen:
        measure, size = PARTS[name]
        for figure in measure(QUICK if given.quick else size):
            figure = figure._replace(bar=None) if given.quick else figure
            verdict = "" if figure.bar is None else "met" if figure.met else "MISSED"
            bar = "" if figure.bar is None else f"bar {figure.bar:g}: {verdict}"
            print(f"{figure.name:>30}  {figure.value:8.3f} {figure.unit:9} {bar:16} {figure.note}", flush=True)
            missed = missed or not figure.met
    return int(given.check and missed)


if __name__ == "__main__":
    raise SystemExit(main())
