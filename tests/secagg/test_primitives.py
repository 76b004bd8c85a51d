"""The cryptography is the standards': known answers, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.secagg.errors import BadKey, BadSeal
from hansa.secagg.primitives import KeyPair, derive, hkdf, joined, seal, stream, unseal

H = bytes.fromhex


@pytest.mark.parametrize(
    ("scalar", "point", "found"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_agreement_is_that_of_rfc_7748_section_5_2(scalar, point, found):
    assert KeyPair(H(scalar)).agree(H(point)) == H(found)


def test_key_pairs_are_those_of_rfc_7748_section_6_1():
    alice = KeyPair(H("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = KeyPair(H("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public == H("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public == H("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = H("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert alice.agree(bob.public) == bob.agree(alice.public) == shared


@pytest.mark.parametrize(
    "public", [bytes(32), bytes([1]) + bytes(31), H("ec" + "ff" * 30 + "7f"), b"", bytes([9]) + bytes(30), bytes(33)]
)
def test_keys_that_agree_on_zeros_with_everybody_or_are_none_are_refused(public):
    with pytest.raises(BadKey, match="public key"):
        KeyPair(bytes([7] * 32)).agree(public)


def test_a_secret_of_another_length_is_refused_and_none_is_printed():
    with pytest.raises(InputError, match="32 bytes, found 31"):
        KeyPair(bytes(31))
    assert "secret" not in repr(KeyPair(b"secret" * 5 + b"!!"))


@pytest.mark.parametrize(
    ("material", "salt", "info", "found"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_derivation_is_that_of_rfc_5869_appendix_a_1_to_3(material, salt, info, found):
    assert hkdf(material, salt, info, len(H(found))) == H(found)


def test_streams_are_those_of_sp_800_38a_section_f_5_1():
    start = int.from_bytes(H("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    plain = H(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = H(
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee"
    )
    assert stream(H("2b7e151628aed2a6abf7158809cf4f3c"), start).update(plain) == cipher


def test_other_purposes_contexts_and_secrets_give_other_keys():
    keys = [
        derive(bytes(32), "mask", b"", 16),
        derive(bytes(32), "share", b"", 16),
        derive(bytes(32), "mask", b"1", 16),
        derive(bytes([1] * 32), "mask", b"", 16),
    ]
    assert len(set(keys)) == 4


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
def test_joined_parts_can_be_told_apart(one, other):
    assert (joined(*one) == joined(*other)) == (one == other)


@given(st.binary(max_size=50), st.binary(max_size=9), st.data())
def test_what_is_sealed_comes_back_and_nothing_else_does(message, associated, data):
    key = bytes(range(32))
    sealed = seal(key, message, associated)
    assert len(sealed) == len(message) + 16
    assert unseal(key, sealed, associated) == message
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = sealed[:at] + bytes([sealed[at] ^ 1 << data.draw(st.integers(0, 7))]) + sealed[at + 1 :]
    for other in [(key, flipped, associated), (key, sealed, associated + b"."), (bytes(32), sealed, associated)]:
        with pytest.raises(BadSeal, match="sealed"):
            unseal(*other)
    with pytest.raises(BadSeal, match="sealed"):
        unseal(key, sealed[:at], associated)
