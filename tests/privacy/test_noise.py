"""Noise that protects: where it comes from, how it is distributed, and that sums keep their last bits to themselves."""

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from hansa.core.key import Key
from hansa.privacy import noise
from hansa.privacy.noise import deviation_of, grid, in_pieces, noised, secure_normal

LONG = 9 * 2**16 + 3  # nine pieces and a bit


def test_numbers_are_the_polar_methods_of_a_stream_of_aes():
    key = Key.of("secret")
    num_points = math.ceil(4 / math.pi + 4) + 8
    stream = Cipher(algorithms.AES256(key.material), modes.CTR(bytes(16))).encryptor().update(bytes(16 * num_points))
    unit = [int.from_bytes(stream[i : i + 8], "little", signed=True) / 2**63 for i in range(0, 16 * num_points, 8)]
    points = zip(unit[:num_points], unit[num_points:], strict=True)
    x, y = next((x, y) for x, y in points if 0 < x * x + y * y < 1)
    factor = math.sqrt(-2 * math.log(x * x + y * y) / (x * x + y * y))
    assert secure_normal(key, 2) == pytest.approx([x * factor, y * factor], rel=1e-9)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 131_071, 131_073, 300_000])
def test_any_number_of_them_is_normal_and_each_its_own(count):
    found = secure_normal(Key.of(count), count)
    assert found.shape == (count,)
    assert len(np.unique(found)) == count
    assert np.isfinite(found).all()
    if count > 1000:
        assert stats.kstest(found, "norm").pvalue > 1e-3
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(count)


def test_secrets_are_streams():
    assert (secure_normal(Key.of(1), 9) == secure_normal(Key.of(1), 9)).all()
    assert (secure_normal(Key.of(1), 9) != secure_normal(Key.of(2), 9)).all()


@pytest.mark.parametrize("deviation", [1.0, 0.37, 1e-12, 3e9])
def test_a_sum_is_a_whole_number_of_steps_whatever_the_value(deviation):
    rng = np.random.default_rng(0)
    step = grid(deviation)
    assert 2.0**-31 < step / deviation <= 2.0**-30
    assert math.frexp(step)[0] == 0.5  # a power of two
    for values in (np.zeros(1000), rng.normal(size=1000) * deviation, np.full(1000, deviation / 3)):
        steps = noised(values, secure_normal(Key.of(3), 1000), deviation) / step
        assert (steps == np.rint(steps)).all()


def test_two_values_in_one_step_of_the_grid_have_the_same_sums():
    step = grid(1.0)
    one, two = np.array([5 * step]), np.array([5.4 * step])
    for seed in range(100):
        sums = [noised(values, secure_normal(Key.of(seed), 1), 1.0)[0] for values in (one, two)]
        assert sums[0] == sums[1]


def test_values_and_secret_stay_as_they_were_and_the_noise_is_added():
    values = np.array([1.0, -2.0, 1e6])
    noise = secure_normal(Key.of(0), 3)
    expected = values + 0.5 * noise
    found = noised(values, noise, 0.5)
    assert found == pytest.approx(expected, abs=2 * grid(0.5))
    assert values.tolist() == [1.0, -2.0, 1e6]


def test_the_deviation_covers_what_the_grid_adds_to_the_sensitivity():
    for size in (1, 10**6, 10**9):
        deviation = deviation_of(3.0, 0.25, size)
        apart = 0.25 + grid(deviation) * math.sqrt(size)
        assert 3.0 * apart <= deviation <= 3.0 * 0.25 * (1 + 1e-3)


@pytest.mark.parametrize("num_cores", [1, 2, 5])
def test_the_number_of_cores_changes_no_bit(num_cores, monkeypatch):
    monkeypatch.setattr(noise, "_num_cores", lambda: 3)
    secret, values = Key.of(1), np.linspace(-1, 1, LONG)
    numbers = secure_normal(secret, LONG)
    whole = noised(values, numbers.copy(), 0.3)
    monkeypatch.setattr(noise, "_num_cores", lambda: num_cores)
    assert secure_normal(secret, LONG).tobytes() == numbers.tobytes()
    assert noised(values, numbers, 0.3).tobytes() == whole.tobytes()


def test_what_fails_in_a_piece_is_not_lost(monkeypatch):
    monkeypatch.setattr(noise, "_num_cores", lambda: 2)

    def fail(first, stop):
        if first:
            raise OverflowError

    with pytest.raises(OverflowError):
        in_pieces(LONG, fail)
