import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.runtimes.devices import Devices, Diurnal, LogNormal, chances, standard

KEY = Key.of("devices")
MANY = [f"client-{i}" for i in range(4000)]
PHONES = Devices(
    examples_per_s=LogNormal(median=50, spread=3), download=LogNormal(median=1e6, spread=2), upload=2e5, latency_s=0.5
)


def test_a_clients_figures_do_not_depend_on_the_others():
    together = PHONES.traits(MANY[:5], KEY)
    for i, client in enumerate(MANY[:5]):
        alone = PHONES.traits([client], KEY)
        assert [column[0] for column in alone] == [column[i] for column in together]
    assert PHONES.traits(MANY[:1], Key.of("other")).examples_per_s[0] != together.examples_per_s[0]


def test_half_lie_below_the_median_and_two_thirds_within_the_spread():
    speed = PHONES.traits(MANY, KEY).examples_per_s
    assert np.median(speed) == pytest.approx(50, rel=0.06)
    assert np.mean((speed > 50 / 3) & (speed < 50 * 3)) == pytest.approx(0.683, abs=0.025)
    assert np.mean(speed < 50 / 8) == pytest.approx(0.029, abs=0.01)  # the heavy tail


def test_figures_are_independent_of_each_other():
    traits = PHONES.traits(MANY, KEY)
    assert abs(np.corrcoef(np.log(traits.examples_per_s), np.log(traits.download))[0, 1]) < 0.05
    assert set(traits.upload) == {2e5}


def test_draws_from_a_keys_own_bytes_are_uniform_and_normal():
    keys = [KEY.child(i) for i in range(4000)]
    flat, drawn = chances(keys), standard(keys)
    assert flat.min() >= 0
    assert flat.max() < 1
    np.testing.assert_allclose(flat.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(4), atol=0.08)
    assert chances([]).shape == (0, 4)


def test_devices_without_figures_cost_no_time():
    traits = Devices().traits(["a"], KEY)
    assert (10 / traits.examples_per_s, traits.latency_s, traits.dropout) == (0, 0, 0)
    assert Devices().online(["a", "b"], 1e6, KEY).tolist() == [True, True]


@pytest.mark.parametrize("hour", [0, 2, 8, 14, 20, 47])
def test_the_share_online_is_that_of_the_local_hour(hour):
    daily = Diurnal(low=0.1, high=0.6, zones_h=0)
    share = Devices(availability=daily).online(MANY, hour * 3600.0, KEY).mean()
    assert share == pytest.approx(float(daily.share(np.array(hour))), abs=0.025)


def test_a_client_is_online_in_one_stretch_a_day():
    daily = Diurnal(low=0.1, high=0.6, zones_h=0, start_hour=14)  # from the low on
    online = np.stack([daily.online(MANY[:300], minute * 900.0, KEY) for minute in range(96)])
    changes = (online[1:] != online[:-1]).sum(axis=0)
    assert set(changes.tolist()) == {0, 2}
    always = online.all(axis=0).mean()
    assert always == pytest.approx(0.1, abs=0.05)


def test_time_zones_spread_the_peak():
    far = Diurnal(low=0.0, high=0.5, zones_h=24)
    shares = [far.online(MANY, hour * 3600.0, KEY).mean() for hour in (0, 6, 12, 18)]
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Devices(examples_per_s=0), lambda: Devices(download=-1.0), lambda: Devices(upload="fast"),
        lambda: Devices(latency_s=-1), lambda: Devices(dropout=1.0), lambda: Devices(availability=0.3),
        lambda: LogNormal(median=0), lambda: LogNormal(median=1, spread=0.5), lambda: Diurnal(low=0.5, high=0.2),
        lambda: Diurnal(peak_hour=25), lambda: Diurnal(low=0, high=0),
    ],
)  # fmt: skip
def test_figures_that_cannot_be_are_refused(make):
    with pytest.raises(InputError, match=r"(Devices|LogNormal|Diurnal)(\(\w+=\))?: expected .*, found"):
        make()


# ------------------------------------------------------------------------------------------------------- trace files


def table(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return Devices.from_csv(path)


def test_a_trace_gives_each_client_its_row(tmp_path):
    devices = table(tmp_path, "client,examples_per_s,download,dropout\na,10,1000,0.5\nb,20,,\n")
    traits = devices.traits(["b", "a", "b"], KEY)
    assert traits.examples_per_s.tolist() == [20, 10, 20]
    assert traits.download.tolist() == [np.inf, 1000, np.inf]
    assert traits.dropout.tolist() == [0, 0.5, 0]
    assert traits.latency_s.tolist() == [0, 0, 0]
    assert repr(devices).endswith("trace.csv')")


def test_without_clients_each_draws_a_row_and_keeps_it(tmp_path):
    devices = table(tmp_path, "examples_per_s\n10\n20\n40\n")
    speeds = devices.traits(MANY, KEY).examples_per_s
    assert [int((speeds == s).sum()) for s in (10, 20, 40)] == pytest.approx([1333] * 3, abs=120)
    assert devices.traits(MANY[7:8], KEY).examples_per_s[0] == speeds[7]


def test_windows_may_pass_midnight_and_a_client_may_have_several(tmp_path):
    devices = table(tmp_path, "client,available_from,available_to\na,22,7\nb,1,2\nb,5,6\nc,,\n")
    online = {hour: devices.online(["a", "b", "c"], hour * 3600.0, KEY).tolist() for hour in (0, 1, 5.5, 7, 23, 25)}
    assert online == {
        0: [True, False, True], 1: [True, True, True], 5.5: [True, True, True], 7: [False, False, True],
        23: [True, False, True], 25: [True, True, True],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected columns among client.*found no columns"),
        ("speed\n1\n", "found the column 'speed'"),
        ("client,client\na,b\n", "found one twice"),
        ("client,download\n", "expected one device or more, found no rows"),
        ("client,download\na,fast\n", "line 2: expected download to be a number, found 'fast'"),
        ("client,download\na,nan\n", "line 2: expected download to be a number"),
        ("client,download\na,1\nb,0\n", "line 3: expected download to be above 0, found 0"),
        ("client,dropout\na,1\n", "line 2: expected dropout to be a chance below 1, found 1"),
        ("client,latency_s\na,-1\n", "line 2: expected latency_s to be 0 or more, found -1"),
        ("client,download\n,1\n", "line 2: expected a client's id, found none"),
        ("client,download\na,1,2\n", "line 2: expected as many cells as there are columns"),
        ("client,download\na\n", "line 2: expected as many cells as there are columns"),
        ("client,available_from\na,3\n", "from 0 to 24, found 3 and nan"),
        ("client,available_from,available_to\na,3,25\n", "from 0 to 24, found 3 and 25"),
        ("client,download\na,1\na,2\n", "line 3: expected one row for client 'a'"),
    ],
)
def test_a_trace_that_cannot_be_read_is_refused_with_its_line(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        table(tmp_path, text)


def test_a_missing_file_and_a_client_without_a_row_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.csv: expected a CSV file of devices"):
        Devices.from_csv(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="found none for 'z'"):
        table(tmp_path, "client,download\na,1\n").traits(["a", "z"], KEY)
