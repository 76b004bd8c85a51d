"""What clients wrote may break the server's half of an aggregator; it must not end a run."""

import pytest

from hansa.aggregators.careful import Careful, careful, reading
from hansa.core.errors import Abandoned
from hansa.core.protocols import Report, Slot
from support import block
from support_masked_sum import MaskedSum

SLOT = Slot(0, 0, "sum")


def said(**words):
    """One report a client, as they come over a network."""
    return {"sum": tuple(Report(SLOT, (client,), {client: word}) for client, word in words.items())}


def total(history):
    return sum(report.payload[client] for report in history["sum"] for client in report.clients)


def test_mail_that_can_be_read_is_read():
    assert reading(total, said(a=1, b=2)) == 3


@pytest.mark.parametrize("bad", ["x", None, {"a": 1}, [3]])
def test_the_client_without_whom_it_could_be_read_is_to_blame(bad):
    with pytest.raises(Abandoned, match="that of b is not") as caught:
        reading(total, said(a=1, b=bad, c=2))
    assert caught.value.blamed == ("b",)
    assert not caught.value.may_heal


def test_where_nobody_alone_is_to_blame_nobody_is_blamed():
    with pytest.raises(Abandoned) as caught:
        reading(total, said(a=1, b="x", c="y"))
    assert caught.value.blamed == ()


def test_too_few_without_somebody_is_no_fault_of_the_others():
    """Without b the sum could be read; that it would be too small is another matter."""

    def at_least_two(history):
        found = total(history)
        if sum(len(report.clients) for report in history["sum"]) < 2:
            raise Abandoned("too few")
        return found

    with pytest.raises(Abandoned) as caught:
        reading(at_least_two, said(a=1, b="x"))
    assert caught.value.blamed == ("b",)


def test_too_few_clients_are_said_as_they_are():
    def too_few(history):
        raise Abandoned("expected two, found one")

    with pytest.raises(Abandoned, match="expected two, found one"):
        reading(too_few, said(a=1))


def test_an_error_without_mail_is_the_aggregators_own():
    def broken(history):
        raise KeyError("oops")

    with pytest.raises(KeyError):
        reading(broken, {})
    with pytest.raises(KeyError):
        reading(broken, {"update": (Report(SLOT, ("c0",), block([[1.0]])),)})


def test_an_aggregator_that_clients_send_mail_to_is_wrapped_and_is_itself_for_all_else():
    wrapped = careful(MaskedSum(group=5))
    assert isinstance(wrapped, Careful)
    assert repr(wrapped) == repr(MaskedSum(group=5))
    assert (wrapped.reveals_rows, wrapped.group) == (False, 5)
    assert wrapped.ask(("a",), {}).exchange == "keys"
    assert not hasattr(wrapped, "no_such_thing")
