import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hansa.core.key import Key, Streams, normal, philox, uniform, words
from hansa.data.permutations import permutations

# Known answers of Philox-4x32-10 from Random123 (Salmon et al. 2011): key, counter, words.
KNOWN = [
    ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0xA4093822, 0x299F31D0],
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KEYS = [Key.of(0).child("client", i) for i in range(7)]
names = st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3)), max_size=3)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_the_generator_gives_philoxs_known_answers(key, counter, expected):
    """The material is key 0, key 1 and the upper half of the counter; the lower half counts blocks of four words."""
    material = np.array([[*key, *counter[2:]]], dtype=np.uint64)
    low = np.array([counter[0] | counter[1] << 32], dtype=np.uint64)
    assert philox(material, low).reshape(-1).tolist() == expected


def test_words_are_the_generators_blocks_in_order():
    material = np.frombuffer(KEYS[0].material[:16], dtype=">u4").astype(np.uint64)[None]
    expected = philox(material, np.arange(3, dtype=np.uint64)).reshape(-1)
    assert words(KEYS[:1], 12)[0].tolist() == expected.tolist()


@given(start=st.integers(0, 50), count=st.integers(0, 30))
def test_a_word_depends_on_its_key_and_place_alone(start, count):
    whole = words(KEYS, 100)
    assert (words(KEYS, count, start) == whole[:, start : start + count]).all()
    assert (words(KEYS[3:4], count, start)[0] == whole[3, start : start + count]).all()


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_of_draws_does_not_depend_on_the_block(draw):
    whole = draw(KEYS, 33)
    assert whole.shape == (7, 33)
    for i, key in enumerate(KEYS):
        assert (draw([key], 9)[0] == whole[i, :9]).all()


def test_uniform_draws_pass_a_chi_square_test_and_stay_in_range():
    draws = uniform(KEYS, 20_000)
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=64, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_bits_of_words_are_balanced():
    bits = np.unpackbits(words(KEYS, 4000).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(bits))


def test_normal_draws_are_standard_normal():
    draws = normal(KEYS, 9_001)
    assert draws.dtype == np.float64
    assert stats.kstest(draws.reshape(-1), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:, 0:9000:2].reshape(-1), draws[:, 1:9000:2].reshape(-1))[0, 1]) < 0.02


def test_rows_are_independent():
    draws = normal(KEYS[:2], 20_000)
    assert abs(np.corrcoef(draws)[0, 1]) < 0.03


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=7))
def test_a_permutation_holds_each_number_once_whatever_the_block(sizes):
    drawn = permutations(KEYS[: len(sizes)], np.array(sizes))
    for i, size in enumerate(sizes):
        assert sorted(drawn[i, :size].tolist()) == list(range(size))
        assert (permutations([KEYS[i]], np.array([size]))[0] == drawn[i, :size]).all()


def test_every_order_of_three_is_equally_likely():
    keys = [Key.of(i) for i in range(6000)]
    drawn = permutations(keys, np.full(6000, 3))
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


@given(one=names, two=names)
def test_children_of_other_names_are_others(one, two):
    assert (Key.of(0).child(*one) == Key.of(0).child(*two)) == (one == two)


def test_names_do_not_run_together():
    root = Key.of(0)
    assert len({root.child("ab"), root.child("a", "b"), root.child("a").child("b"), root.child("b", "a")}) == 4
    assert root.child(1) != root.child("1")


def test_a_child_holds_nothing_of_its_parent():
    """One-way: no bytes in common, and a sibling cannot be had from it by naming."""
    root = Key.of(0)
    child = root.child("round", 3)
    assert len(child.material) == 32
    assert not {root.material[i : i + 4] for i in range(29)} & {child.material[i : i + 4] for i in range(29)}
    assert child.child("round", 4) != root.child("round", 4)


def test_seeds_and_texts_are_roots_of_their_own():
    assert len({Key.of(seed) for seed in (0, 1, -1, 2**80, "holdout")}) == 5
    assert Key.of(5) == Key.of("5")


def test_a_generator_repeats_its_stream():
    assert Key.of(1).generator().normal(size=3).tolist() == Key.of(1).generator().normal(size=3).tolist()
    assert Key.of(1).generator().normal(size=3).tolist() != Key.of(2).generator().normal(size=3).tolist()


def test_streams_make_a_key_when_it_is_asked_for_and_no_other():
    made = []
    streams = Streams("abcd", lambda name: made.append(name) or Key.of(0).child(name))
    assert len(streams) == 4
    some = streams[1:3]
    assert len(some) == 2
    assert made == []
    assert some[1] == streams[2] == Key.of(0).child("c")
    assert streams[-1] == Key.of(0).child("d")
    assert made == ["c", "c", "d"]
    assert list(some) == [Key.of(0).child("b"), Key.of(0).child("c")]
    with pytest.raises(IndexError):
        some[2]


def test_streams_of_streams_are_children_of_children():
    """A closure over a loop's variable must not make every stream the last one's."""
    own = Streams("ab", Key.of(0).child)
    layers = [Streams(own, lambda key, i=i: key.child("transform", i)) for i in range(2)]
    assert [keys[1] for keys in layers] == [Key.of(0).child("b").child("transform", i) for i in range(2)]
    assert words(layers[0], 3).tolist() == words([key.child("transform", 0) for key in own], 3).tolist()
