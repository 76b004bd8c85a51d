"""The audit of a run's privacy in its report, where ``hansa audit --out RUN`` has left one."""

from __future__ import annotations

import json

from hansa.core.errors import InputError
from hansa.training.report_findings import mapping
from hansa.training.report_page import Panel, Table
from hansa.training.report_read import RunRecord, number
from hansa.training.report_words import figure, power

FILE = "audit.json"


def audit_panel(run: RunRecord) -> Panel | None:
    """What is claimed beside what an attack proved; None where the run directory holds no audit.

    Raises ``InputError`` for a file that is no audit of hansa's.
    """
    path = run.path / FILE
    if not path.exists():
        return None
    try:
        found = mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected an audit, found {error}; write it again with hansa audit") from None
    claimed = mapping(found.get("claimed"))
    epsilon, delta, lowest = (
        number(v) for v in (claimed.get("epsilon"), claimed.get("delta"), found.get("lower_bound"))
    )
    if epsilon is None or delta is None or lowest is None:
        raise InputError(f"{path}: expected claimed epsilon, delta and lower_bound, found others; audit again")
    other = found.get("fingerprint") != run.info.get("fingerprint")
    note = str(found.get("verdict", ""))
    rows = [
        ("claimed", figure(epsilon), f"after {found.get('num_rounds', '?')} rounds, at delta {power(delta)}"),
        ("proved by attack", f"≥ {figure(lowest)}", f"with {number(found.get('confidence')) or 0:.0%} confidence"),
        ("estimated by attack", figure(number(found.get("estimate"))), "no bound"),
    ]
    note = f"{note[:1].upper()}{note[1:]}." + (" The audit is of another version of the app." if other else "")
    table = Table(head=("", "epsilon", ""), rows=rows, words=True, note=note)
    return Panel(title="Audit", hint=f"{found.get('num_canaries', '?')} canaries", table=table)


__all__ = ["FILE", "audit_panel"]
