"""What one client may ask for in a minute, and that it is no other client's loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.network import routes as routes_module
from hansa.network.messages import Enrol, Refusal, write
from hansa.network.quotas import Bucket, Limits, Quotas
from support_signing import Routes, SigningDesk, scope_of


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@given(steps=st.lists(st.floats(0, 10), max_size=60), a_minute=st.floats(1, 600), burst=st.integers(1, 20))
def test_a_bucket_gives_its_burst_and_its_rate_and_no_more(steps, a_minute, burst):
    clock = Clock()
    bucket, taken = Bucket(a_minute, burst, clock), 0
    for step in steps:
        clock.now += step
        taken += bucket.take("berlin") == 0
        assert taken <= burst + clock.now * a_minute / 60 + 1e-6


@given(a_minute=st.floats(1, 600), burst=st.integers(1, 20))
def test_whoever_waits_as_long_as_told_is_served(a_minute, burst):
    clock = Clock()
    bucket = Bucket(a_minute, burst, clock)
    while (wait := bucket.take("berlin")) == 0:
        pass
    assert bucket.wait_s("berlin") == wait
    clock.now += wait + 1e-6
    assert bucket.take("berlin") == 0


def test_a_clients_flood_takes_nothing_from_another(clock):
    quotas = Quotas(Limits(requests_burst=3), clock)
    for _ in range(3):
        quotas.request("berlin")
    with pytest.raises(Refusal) as caught:
        quotas.request("berlin")
    assert (caught.value.code, caught.value.more["retry_after_s"] >= 1) == ("too-many", True)
    quotas.request("paris")


def test_a_network_of_ipv6_addresses_is_one_address(clock):
    quotas = Quotas(Limits(strangers_burst=1), clock)
    quotas.stranger("2001:db8::1")
    with pytest.raises(Refusal):
        quotas.stranger("2001:db8::2")
    for other in ("2001:db8:0:1::1", "192.0.2.1", "192.0.2.2", "::ffff:192.0.2.3", "::ffff:192.0.2.4", "unix"):
        quotas.stranger(other)


def test_requests_and_bytes_under_way_are_counted_until_they_end(clock):
    quotas = Quotas(Limits(requests_at_once=2, upload_bytes=100), clock)
    with quotas.under_way("berlin", 60):
        with pytest.raises(Refusal, match="bytes at once"), quotas.under_way("berlin", 41):
            pass
        with (
            quotas.under_way("berlin", 40),
            pytest.raises(Refusal, match="requests at once"),
            quotas.under_way("berlin", 0),
        ):
            pass
        with quotas.under_way("paris", 100):
            pass
    with quotas.under_way("berlin", 100):
        pass


def test_a_hundred_thousand_addresses_do_not_fill_the_memory(clock):
    bucket = Bucket(60, 2, clock)
    for number in range(120_000):
        bucket.take(str(number))
    assert len(bucket._levels) <= 50_000


def test_a_quota_is_429_with_the_time_to_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(routes_module, "Quotas", lambda: Quotas(Limits(requests_burst=3, requests_a_minute=60)))
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    statuses = [routes.ask("POST", b"/v1/hello", routes.hello()) for _ in range(4)]
    assert [answer.status for answer in statuses] == [200, 200, 200, 429]
    refused = statuses[-1]
    assert (refused.json["code"], int(refused.headers[b"retry-after"])) == ("too-many", refused.json["retry_after_s"])
    desk.close()


def test_tokens_cannot_be_guessed_for_long_and_others_still_enrol(tmp_path, monkeypatch):
    monkeypatch.setattr(routes_module, "Quotas", lambda: Quotas(Limits(guesses_a_minute=5)))
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    guess = write(Enrol(token="t", secret=b"guess", name="berlin", request=b"csr"))
    head = [(b"content-length", str(len(guess)).encode())]

    def enrol(address):
        return routes.send(scope_of("POST", b"/v1/enrol", head, address=address), guess).status

    assert [enrol("192.0.2.1") for _ in range(7)] == [400] * 5 + [429] * 2
    assert enrol("192.0.2.2") == 400
    desk.close()
