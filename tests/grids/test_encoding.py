import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pop3d_jax.grids.encoding import CODEBOOK_ENTRIES, EncodedFeatures, decode, encode, train_codebook
from pop3d_jax.grids.search import phrase_tables

_FEATURES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 5), st.just(16)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


@pytest.fixture(scope="module")
def clustered():
    """Vectors around forty directions, of all lengths."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, 16))
    vectors = centres[generator.integers(0, 40, 2000)] + 0.1 * generator.normal(size=(2000, 16))
    return (vectors * generator.uniform(0.1, 10, (2000, 1))).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(_FEATURES)
def test_int8_is_off_by_half_a_step_at_most(features):
    encoded = encode(features, "int8")
    assert encoded.codes.dtype == np.int8
    step = encoded.scale.astype(np.float32)[:, None]
    # The scale itself is rounded to float16: an entry of 127 steps may miss by 127 times that.
    assert np.all(np.abs(decode(encoded) - features) <= 0.57 * step)


@settings(max_examples=30, deadline=None)
@given(_FEATURES)
def test_float16_is_the_nearest_float16(features):
    np.testing.assert_array_equal(decode(encode(features, "float16")), features.astype(np.float16).astype(np.float32))


def test_product_quantisation_finds_the_nearest_entries(clustered):
    codebook = train_codebook(clustered, 4)
    encoded = encode(clustered[:100], "pq", codebook)
    unit = clustered[:100] / np.linalg.norm(clustered[:100], axis=-1, keepdims=True)
    rotated = (unit @ codebook.rotation).reshape(100, 4, 1, 4)
    distances = ((rotated - codebook.entries) ** 2).sum(-1)
    chosen = np.take_along_axis(distances, encoded.codes[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-6)
    np.testing.assert_allclose(codebook.rotation @ codebook.rotation.T, np.eye(16), atol=1e-5)
    error = np.linalg.norm(decode(encoded, codebook) - clustered[:100], axis=-1)
    assert np.all(error < 0.5 * np.linalg.norm(clustered[:100], axis=-1))


def test_more_bytes_are_nearer(clustered):
    errors = []
    for parts in (2, 4, 8):
        codebook = train_codebook(clustered, parts)
        errors.append(np.linalg.norm(decode(encode(clustered, "pq", codebook), codebook) - clustered))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_tables_give_the_products_of_the_decoded_vectors(clustered):
    codebook = train_codebook(clustered, 4)
    encoded = encode(clustered[:50], "pq", codebook)
    phrases = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    tables = phrase_tables(phrases, codebook)
    sums = tables[np.arange(4), encoded.codes].sum(1)
    directions = decode(EncodedFeatures(encoded.codes, np.ones(50, np.float16)), codebook)
    np.testing.assert_allclose(sums, directions @ phrases.T, atol=1e-5)


def test_what_cannot_be_written_down_is_refused(clustered):
    with pytest.raises(ValueError, match="finite and no longer than 65504"):
        encode(np.full((1, 16), 1e5, np.float32), "float16")
    with pytest.raises(ValueError, match="finite"):
        encode(np.full((1, 16), np.nan, np.float32), "int8")
    with pytest.raises(ValueError, match="needs a codebook"):
        encode(clustered, "pq")
    with pytest.raises(ValueError, match="must divide the 16 dimensions"):
        train_codebook(clustered, 5)
    with pytest.raises(ValueError, match=f"at least {CODEBOOK_ENTRIES} voxels"):
        train_codebook(clustered[:10], 4)
