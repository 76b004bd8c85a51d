"""The client's side: five steps, each from what was kept, what the server relays and what is to be masked.

    advertise -> share -> mask -> agree -> unmask

    masked_u = x_u + PRG(b_u) + sum over neighbours v of +-PRG(agree(s_u, S_v))      modulo 2**width

Bonawitz et al., CCS 2017, figure 4, with its steps against a server that lies (signed keys, a signed list of
survivors), on the graph of Bell et al., CCS 2020, algorithm 2. No input and no output: a step gives what to say and
what to keep, or raises ``Refused``; then nothing leaves. What is kept holds secrets until ``unmask`` forgets them: keep
it sealed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hansa.core.key import Key
from hansa.secagg.errors import BadSeal, SecAggError
from hansa.secagg.mail import SEALED
from hansa.secagg.masks import add_masks, num_cores
from hansa.secagg.packing import pack
from hansa.secagg.primitives import KeyPair, derive, joined, seal, unseal
from hansa.secagg.refusals import ChangedList, Contradiction, Forged, OtherModel, OutOfOrder, TooFew
from hansa.secagg.shamir import NUM_LIMBS, split
from hansa.secagg.terms import (
    SIGNATURE_SIZE,
    Advert,
    Credentials,
    Terms,
    bitmap_of,
    circle_of,
    places_of,
    survivors_text,
)

STREAM = 16  # bytes of a mask's key
_SHARE = (2, NUM_LIMBS)  # of the own mask's seed, and of the key of the masks that are shared


class Words(NamedTuple):
    """What is to be masked: whole numbers modulo ``2**width`` (uint32), and modulo ``2**exact_width`` (uint64)."""

    values: np.ndarray
    width: int
    exact: np.ndarray
    exact_width: int
    names: tuple[str, ...] = ()  # of columns, for the sum's reader


class Kept(NamedTuple):
    """What a client keeps between two steps; secrets among it."""

    step: str
    name: str = ""
    aim: bytes = b""
    mask_secret: bytes = b""
    share_secret: bytes = b""
    seed: bytes = b""
    digest: bytes = b""  # of the own advert
    session: bytes = b""
    place: int = -1
    num_clients: int = 0
    threshold: int = 0
    fewest: int = 0
    holds_own: bool = False
    ring: Any = ()  # places of the own group
    peers: Any = ()  # (place, advert's tree with its name) of each neighbour, in rising order
    own_share: Any = None  # (2, 9) uint32
    sharing: Any = ()  # places of the neighbours that sent shares
    sealed: Any = None  # (len(sharing), bytes): theirs
    context: bytes = b""
    alive: Any = None  # the bitmap that was signed

    @property
    def tree(self) -> dict[str, Any]:
        """As it is stored: what holds its default is left out."""
        return {name: value for name, value in self._asdict().items() if not _is_default(name, value)}

    @staticmethod
    def of(tree: Any, step: str) -> Kept:
        """What was kept after ``step``; ``OutOfOrder`` where the last step was another."""
        found = tree.get("step", "nothing") if isinstance(tree, Mapping) else "nothing"
        if found != step:
            raise OutOfOrder(f"expected to be asked for what follows {found}, found what follows {step}")
        return Kept(**tree)

    def adverts(self) -> dict[int, Advert]:
        """The neighbours' adverts by place."""
        return {int(place): Advert.of(tree["name"], _less(tree)) for place, tree in self.peers}


def advertise(name: str, aim: bytes, secret: Key, credentials: Credentials | None) -> tuple[dict[str, Any], Kept]:
    """Fresh keys for one attempt, signed; ``secret`` is this attempt's, known to nobody else."""
    mask_secret, share_secret, seed = (secret.child(use).material for use in ("mask key", "share key", "seed"))
    keys = KeyPair(mask_secret).public, KeyPair(share_secret).public
    advert = Advert(name, *keys, hashlib.sha256(seed).digest())
    if credentials is not None:
        signature = credentials.sign(advert.signed(aim))
        advert = advert._replace(certificate=credentials.certificate, signature=signature)
    kept = Kept("keys", name, aim, mask_secret, share_secret, seed)
    return advert.tree, kept._replace(digest=advert.digest)


def share(
    kept: Kept, mail: Mapping[str, Any], terms: Terms, secret: Key, credentials: Credentials | None
) -> tuple[dict[str, Any], Kept]:
    """Look at everyone's keys; then a share of both secrets for each neighbour, sealed for its eyes alone.

    Mail: ``digests`` (n, 32) of all adverts in the order of their names, ``place`` of one's own, and ``peers``: for
    each neighbour its place and its advert with its name.
    """
    digests, place, peers = _listed(mail)
    circle = circle_of(digests.tobytes(), terms)
    if not 0 <= place < len(digests) or digests[place].tobytes() != kept.digest:
        raise Forged("expected my own keys at my place in the list, found others")
    if len(np.unique(digests, axis=0)) < len(digests):
        raise Forged("expected every client once in the list, found one twice")
    group = circle.group(place)
    graph, neighbours = circle.graph(group), circle.neighbours(place)
    fewest = terms.fewest(graph)
    if graph.num_clients < fewest:
        raise TooFew(f"expected a group of at least {fewest} clients, found {graph.num_clients}")
    if [there for there, _ in peers] != neighbours:
        raise Forged("expected the keys of my neighbours, found those of other clients")
    _check_peers(kept, peers, digests, credentials)
    holders = circle.holders(place)
    secrets = np.frombuffer(kept.seed + kept.mask_secret, np.uint8).reshape(2, -1)
    shares = split(secrets, graph.threshold, [there + 1 for there in holders], secret.child("shares"))
    pair, sealed = KeyPair(kept.share_secret), np.empty((len(peers), SEALED), np.uint8)
    for row, (there, peer) in zip(sealed, peers, strict=True):
        key = derive(pair.agree(peer.share_key), "shares", _way(circle.session, place, there), 32)
        message = np.ascontiguousarray(shares[:, holders.index(there)], "<u4").tobytes()
        row[:] = np.frombuffer(seal(key, message, _way(circle.session, place, there)), np.uint8)
    own = shares[:, holders.index(place)] if place in holders else None
    return {"sealed": sealed}, kept._replace(
        step="shares",
        session=circle.session,
        place=place,
        num_clients=len(digests),
        threshold=graph.threshold,
        fewest=fewest,
        holds_own=own is not None,
        ring=np.sort(circle.rings[group]),
        peers=[[there, {**peer.tree, "name": peer.name}] for there, peer in peers],
        own_share=None if own is None else np.ascontiguousarray(own),
    )


def mask(kept: Kept, mail: Mapping[str, Any], words: Words, model: bytes) -> tuple[dict[str, Any], Kept]:
    """``words``, masked and packed; they are used up. ``model`` names all that this client was sent to learn from.

    Mail: ``places`` of the neighbours that sent shares, and their ``sealed`` shares for this client.
    """
    sharing, sealed = _fields(mail, "places", "sealed")
    adverts = kept.adverts()
    places = _rising(sharing)
    if not set(places) <= set(adverts):
        raise Forged("expected shares of my neighbours, found those of other clients")
    if not isinstance(sealed, np.ndarray) or sealed.dtype != np.uint8 or sealed.shape != (len(places), SEALED):
        raise Forged(f"expected {len(places)} sealed shares of {SEALED} bytes, found something else")
    if len(places) + kept.holds_own < kept.threshold:
        raise TooFew(f"expected {kept.threshold} holders of my shares, found {len(places) + kept.holds_own}")
    context = hashlib.sha256(joined(b"context", kept.aim, kept.session, model, _form(words))).digest()
    pair = KeyPair(kept.mask_secret)
    keys = {p: pair_key(pair, adverts[p].mask_key, context, kept.place, p) for p in places}
    own = self_key(kept.seed, context, kept.place)
    plus = [own, *(key for there, key in keys.items() if kept.place < there)]
    minus = [key for there, key in keys.items() if kept.place > there]
    for array, part in ((words.values, slice(0, STREAM)), (words.exact, slice(STREAM, 2 * STREAM))):
        if len(array):
            add_masks(array, [k[part] for k in plus], [k[part] for k in minus], num_threads=num_cores())
    said = {
        "values": pack(words.values, words.width),
        "count": len(words.values),
        "exact": pack(words.exact, words.exact_width),
        "numbers": len(words.exact),
        "names": list(words.names),
        "context": context,
    }
    return said, kept._replace(step="masked", sharing=np.array(places, np.int64), sealed=sealed, context=context)


def agree(kept: Kept, mail: Mapping[str, Any], credentials: Credentials | None) -> tuple[dict[str, Any], Kept]:
    """A signature on the survivors. Mail: ``alive``, one bit a place, of the own group."""
    (alive,) = _fields(mail, "alive")
    _check_alive(kept, alive)
    signature = b"" if credentials is None else credentials.sign(survivors_text(kept.context, alive))
    return {"signature": signature}, kept._replace(step="agreed", alive=alive)


def unmask(kept: Kept, mail: Mapping[str, Any], terms: Terms, credentials: Credentials | None) -> dict[str, Any]:
    """Shares of the own masks of those alive and of the keys of those that were lost; never both of one client.

    Mail: ``alive`` again, and ``signatures`` (m, 64) of the neighbours at ``places`` on it, its own not among them.
    Against a malicious server as many as the threshold must have signed the same list, for the same model.
    """
    alive, places, signatures = _fields(mail, "alive", "places", "signatures")
    if terms.server == "malicious":
        if not isinstance(alive, np.ndarray) or not np.array_equal(alive, kept.alive):
            raise ChangedList("expected the survivors that I signed, found others")
        _check_signatures(kept, alive, _rising(places), signatures, credentials)
    living = set(_check_alive(kept, alive))
    sharing = [int(there) for there in kept.sharing]
    adverts, pair = kept.adverts(), KeyPair(kept.share_secret)
    shares: dict[int, np.ndarray] = {}
    for there, sealed in zip(sharing, kept.sealed, strict=True):
        way = _way(kept.session, there, kept.place)
        try:
            opened = unseal(derive(pair.agree(adverts[there].share_key), "shares", way, 32), sealed.tobytes(), way)
        except BadSeal:
            continue  # a neighbour that sealed nonsense; others hold shares of it, too
        if len(opened) == 4 * 2 * NUM_LIMBS:
            shares[there] = np.frombuffer(opened, "<u4").reshape(_SHARE)
    if kept.holds_own:
        shares[kept.place] = np.asarray(kept.own_share)
    seeds = sorted(there for there in shares if there in living)
    keys = sorted(there for there in shares if there not in living)
    return {
        "seed_places": np.array(seeds, np.int64),
        "seeds": _stack([shares[there][0] for there in seeds]),
        "key_places": np.array(keys, np.int64),
        "keys": _stack([shares[there][1] for there in keys]),
    }


def pair_key(pair: KeyPair, public: bytes, context: bytes, place: int, other: int) -> bytes:
    """The key of the mask that two clients share, the same from either side."""
    low, high = sorted((place, other))
    return derive(pair.agree(public), "pair mask", joined(context, _place(low), _place(high)), 2 * STREAM)


def self_key(seed: bytes, context: bytes, place: int) -> bytes:
    """The key of a client's own mask."""
    return derive(seed, "own mask", joined(context, _place(place)), 2 * STREAM)


def _check_peers(
    kept: Kept, peers: Sequence[tuple[int, Advert]], digests: np.ndarray, credentials: Credentials | None
) -> None:
    """Every neighbour's keys are those in everyone's list, signed by who they are said to be."""
    names = {kept.name}
    for there, peer in peers:
        if peer.digest != digests[there].tobytes():
            raise Forged(f"expected the keys of {peer.name!r} that everyone is told of, found others")
        if peer.name in names:
            raise Forged(f"expected {peer.name!r} once, found it twice")
        names.add(peer.name)
        if credentials is not None:
            fault = credentials.fault(peer.name, peer.certificate, peer.signature, peer.signed(kept.aim))
            if fault:
                raise Forged(f"keys of {peer.name!r}: {fault}")


def _check_alive(kept: Kept, alive: Any) -> list[int]:
    """The survivors in a bitmap, if the list can be true and is long enough."""
    living = places_of(alive, kept.num_clients)
    if kept.place not in living:
        raise Contradiction("expected to be among the survivors, found myself listed as lost")
    if not set(living) <= set(np.asarray(kept.ring).tolist()):
        raise Forged("expected survivors of my group, found others")
    neighbours, sharing = {int(there) for there, _ in kept.peers}, {int(there) for there in kept.sharing}
    if set(living) & neighbours - sharing:
        raise Contradiction("expected survivors that sent me shares, found a neighbour that had been lost before")
    if len(living) < kept.fewest:
        raise TooFew(f"expected at least {kept.fewest} survivors, found {len(living)}")
    if len(set(living) & sharing) + kept.holds_own < kept.threshold:
        raise TooFew(f"expected {kept.threshold} holders of my shares among the survivors, found fewer")
    return living


def _check_signatures(
    kept: Kept, alive: np.ndarray, places: Sequence[int], signatures: Any, credentials: Credentials | None
) -> None:
    """Enough living neighbours signed this list, for the same model and terms."""
    living, adverts = set(places_of(alive, kept.num_clients)), kept.adverts()
    if not isinstance(signatures, np.ndarray) or signatures.shape != (len(places), SIGNATURE_SIZE):
        raise Forged(f"expected {len(places)} signatures of {SIGNATURE_SIZE} bytes, found something else")
    if not set(places) <= living & set(adverts):
        raise Forged("expected signatures of living neighbours, found those of other clients")
    if len(places) + kept.holds_own < kept.threshold:
        raise TooFew(f"expected {kept.threshold} signatures on the survivors, found {len(places) + kept.holds_own}")
    if credentials is None:
        return
    message = survivors_text(kept.context, alive)
    for there, signature in zip(places, signatures, strict=True):
        peer = adverts[there]
        fault = credentials.fault(peer.name, peer.certificate, signature.tobytes(), message)
        if fault:
            raise OtherModel(
                f"{peer.name!r} did not sign these survivors for the model and terms that I have ({fault}): the server "
                "sent us different lists or different models"
            )


def _listed(mail: Any) -> tuple[np.ndarray, int, list[tuple[int, Advert]]]:
    """The list of adverts in a mail, as the types that it should have."""
    digests, place, peers = _fields(mail, "digests", "place", "peers")
    if not isinstance(digests, np.ndarray) or digests.dtype != np.uint8 or digests.shape[1:] != (32,):
        raise Forged("expected a digest of 32 bytes for each client, found something else")
    if type(place) is not int or not isinstance(peers, Sequence):
        raise Forged("expected my place and my neighbours' keys, found something else")
    try:
        return digests, place, [(int(p["place"]), Advert.of(str(p["name"]), _less(p, "place"))) for p in peers]
    except (TypeError, KeyError, ValueError) as error:
        raise Forged("expected my neighbours' keys, found something else") from error


def _fields(mail: Any, *names: str) -> list[Any]:
    if not isinstance(mail, Mapping) or set(mail) != set(names):
        raise SecAggError(f"mail: expected {', '.join(names)}; found something else")
    return [mail[name] for name in names]


def _rising(places: Any) -> list[int]:
    """Places as whole numbers, each above the one before."""
    found = np.asarray(places)
    if found.dtype != np.int64 or found.ndim != 1 or (np.diff(found) <= 0).any():
        raise SecAggError("places: expected rising whole numbers, found something else")
    return [int(place) for place in found]


def _form(words: Words) -> bytes:
    """How many words of which width: sums of others would be nonsense."""
    form = (len(words.values), words.width, len(words.exact), words.exact_width, words.names)
    return repr(form).encode()


def _way(session: bytes, place: int, other: int) -> bytes:
    """From whom to whom, in which session."""
    return joined(session, _place(place), _place(other))


def _place(place: int) -> bytes:
    return int(place).to_bytes(4, "big")


def _stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(rows, np.uint32) if rows else np.empty((0, NUM_LIMBS), np.uint32)


def _less(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A tree without its name, and without others."""
    return {field: value for field, value in tree.items() if field not in ("name", *names)}


def _is_default(name: str, value: Any) -> bool:
    default = Kept._field_defaults.get(name)
    return not isinstance(value, np.ndarray) and value == default


__all__ = ["Kept", "Words", "advertise", "agree", "bitmap_of", "mask", "pair_key", "self_key", "share", "unmask"]
