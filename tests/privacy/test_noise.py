import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hansa.core.key import Key
from hansa.privacy import noise
from hansa.privacy.noise import in_pieces, noised, secure_normal

LONG = 9 * 2**17 + 3  # nine pieces and a bit


def test_numbers_are_those_of_one_stream_read_from_its_start():
    """Box and Muller's pairs of 2**17 numbers at a time, from one pass over the cipher's stream."""
    secret, count = Key.of("stream"), 3 * 2**17 + 6
    stream = Cipher(algorithms.AES(secret.material), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
    unit = (np.frombuffer(stream, "<u8") >> np.uint64(11)) * 2.0**-53
    expected = []
    for piece in np.split(unit, [2**17, 2 * 2**17, 3 * 2**17]):
        radius, angle = np.split(piece, 2)
        radius, angle = np.sqrt(-2 * np.log1p(-radius)), 2 * np.pi * angle
        expected += [radius * np.cos(angle), radius * np.sin(angle)]
    np.testing.assert_allclose(secure_normal(secret, count), np.concatenate(expected), rtol=1e-12, atol=1e-15)


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
