"""Renewal: a client asks for its next certificate while a third of the life of the present one is left.

Each time it makes a new key, which stays with it. The server takes either certificate until the client has used the new
one; the client goes over to the new one by one rename. So a crash at any moment leaves it one that works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hansa.core.errors import ProtocolError
from hansa.network import identity
from hansa.network.blobs import write_file
from hansa.network.enrolment import Identity
from hansa.network.messages import Renew, read_enrolled, write

PATH = "/v1/renew"
_LEFT = 1 / 3


def is_due(who: Identity, now: float | None) -> bool:
    """Whether less than a third of the certificate's life is left; ``now`` is the server's time, None if not known yet.

    >>> from pathlib import Path
    >>> who = Identity(Path("."), "berlin", "https://localhost", "ab" * 32, begins=0.0, ends=90.0)
    >>> is_due(who, 59.0), is_due(who, 61.0)
    (False, True)
    """
    return now is not None and who.ends - now < _LEFT * (who.ends - who.begins)


def renew(who: Identity, ask: Callable[[bytes], bytes]) -> Identity:
    """The identity with a new key and certificate, durable; ``ask`` sends the request, signed with the old key.

    Raises ``ProtocolError`` for a certificate that is not the authority's, or not for this key: then nothing changes.
    """
    key, request = identity.make_request(who.name)
    certificate = read_enrolled(ask(write(Renew(request=request)))).certificate
    if not identity.certifies(certificate, key, who.authority_pem):
        raise ProtocolError(
            "renewal: expected a certificate of the federation's authority for the key just made, found another; "
            "do not trust this server"
        )
    new = replace(who, stem=who.other_stem)
    write_file(new.key, key, private=True)
    write_file(new.certificate, certificate)
    new = new.dated()
    new.save()
    return new
