import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myelin.errors import DataRefused
from myelin.weights import Parameter, flat_size, pack, place, unpack

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.permutations(range(len(shape))).map(tuple))
)


@given(st.lists(SHAPES, min_size=1, max_size=5))
def test_pack_and_unpack_are_inverse_and_lay_out_as_documented(shapes):
    places = place({f"p{i}": pair for i, pair in enumerate(shapes)})
    generator = np.random.default_rng(0)
    values = {p.name: generator.standard_normal(p.shape).astype(np.float32) for p in places}
    flat = pack(places, values)
    assert flat.size == flat_size(places)
    covered = np.zeros(flat.size, bool)
    for p in places:
        assert p.offset % 64 == 0
        span = slice(p.offset // 4, p.offset // 4 + values[p.name].size)
        assert not covered[span].any()
        covered[span] = True
        expected = np.transpose(values[p.name], p.layout).ravel()
        assert np.array_equal(flat[span], expected)
    assert not flat[~covered].any()
    for name, value in unpack(places, flat).items():
        assert np.array_equal(value, values[name])
    described = [p.document() for p in places]
    assert np.array_equal(pack(described, values), flat)


def test_refusals_name_the_parameter_and_what_is_needed():
    places = place({"w": ((2, 3), (1, 0)), "b": ((2,), (0,))})
    good = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    with pytest.raises(DataRefused, match="differ in the parameters b"):
        pack(places, {"w": good["w"]})
    with pytest.raises(DataRefused, match="differ in the parameters c"):
        pack(places, {**good, "c": good["b"]})
    with pytest.raises(DataRefused, match=r"w is float32\[3, 2\], the image needs float32\[2, 3\]"):
        pack(places, {**good, "w": good["w"].T})
    with pytest.raises(DataRefused, match="w is float64"):
        pack(places, {**good, "w": good["w"].astype(float)})
    with pytest.raises(DataRefused, match=r"flat weights are float32\[31\]"):
        unpack(places, np.zeros(31, np.float32))
    with pytest.raises(DataRefused, match=r"layout \(0, 0\) permutes no axes"):
        Parameter(name="w", shape=(2, 3), layout=(0, 0), offset=0)
    with pytest.raises(DataRefused, match="offset 4 is no multiple of 64"):
        Parameter(name="w", shape=(2, 3), layout=(0, 1), offset=4)
