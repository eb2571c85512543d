"""Which layers keep their activations: never more than memory holds, and always the last ones."""

from hypothesis import given
from hypothesis import strategies as st

from lockstep.models.activations import layers_that_fit


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), available=st.integers(-1000, 50_000))
def test_what_is_kept_fits_beside_one_recomputed_layer(sizes, available):
    kept = layers_that_fit(sizes, available)
    if kept:
        assert sum(sizes[-kept:]) + max(sizes) <= available
    if kept < len(sizes):
        assert sum(sizes[-kept - 1 :]) + max(sizes) > available
