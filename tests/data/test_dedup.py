import random

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_jax.config import DedupConfig
from dsv2_jax.data.dedup import Deduplicator, Index, MinHash, choose_bands, ngram_hashes

K, NGRAM = 128, 5


def shingles(tokens, ngram=NGRAM):
    length = min(ngram, len(tokens))
    return {" ".join(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def variants(count, seed=0):
    """A corpus of random documents followed by edits of some: (tokens of each, in order)."""
    generator = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(2000)]
    corpus = [generator.choices(vocabulary, k=generator.randint(80, 400)) for _ in range(count)]
    for tokens in corpus[: count // 2]:
        for edits in (1, 3, 6, 12):
            copy = list(tokens)
            for _ in range(edits):
                copy[generator.randrange(len(copy))] = generator.choice(vocabulary)
            corpus.append(copy)
    return corpus


def sketch(tokens):
    result = datasketch.MinHash(num_perm=K)
    result.update_batch([shingle.encode() for shingle in shingles(tokens)])
    return result


def test_estimates_the_jaccard_similarity_as_well_as_datasketch():
    """Against exact similarity: unbiased within 4 standard errors, and the same spread as the library's."""
    corpus, minhash = variants(40), MinHash(K, NGRAM)
    pairs = [(i, 40 + 4 * i + j) for i in range(20) for j in range(4)]
    exact = np.array([jaccard(shingles(corpus[a]), shingles(corpus[b])) for a, b in pairs])
    assert exact.min() < 0.5 < 0.9 < exact.max()
    ours_NK = [minhash.signature(tokens) for tokens in corpus]
    theirs = [sketch(tokens) for tokens in corpus]
    error = np.array([(ours_NK[a] == ours_NK[b]).mean() for a, b in pairs]) - exact
    reference = np.array([theirs[a].jaccard(theirs[b]) for a, b in pairs]) - exact
    standard = np.sqrt(exact * (1 - exact) / K)
    assert (np.abs(error) < 4.5 * standard).all()
    assert abs((error / standard).mean()) < 4 / np.sqrt(len(pairs))
    assert np.sqrt((error**2).mean()) < 1.3 * np.sqrt((reference**2).mean())


def test_finds_the_duplicates_that_datasketch_finds():
    """Decisions in stream order; the two may differ only where the exact similarity is near the threshold."""
    count, threshold = 120, 0.8
    corpus = variants(count, seed=1)

    def origin(i):
        return i if i < count else (i - count) // 4

    ours = Deduplicator(DedupConfig(threshold, K, NGRAM))
    theirs = datasketch.MinHashLSH(params=choose_bands(threshold, K), num_perm=K)
    sketches, kept_ours, kept_theirs, differ = [sketch(tokens) for tokens in corpus], [], [], 0
    for i, tokens in enumerate(corpus):
        near = [sketches[j].jaccard(sketches[i]) for j in theirs.query(sketches[i])]
        there = max(near, default=0) >= threshold
        if not there:
            theirs.insert(i, sketches[i])
            kept_theirs.append(i)
        here = ours.duplicate(" ".join(tokens)) is not None
        family = [j for j in kept_ours if origin(j) == origin(i)]  # documents of different origin share nothing
        similar = max((jaccard(shingles(corpus[j]), shingles(tokens)) for j in family), default=0)
        if not here:
            kept_ours.append(i)
        if here != there:
            differ += 1
            assert abs(similar - threshold) < 0.12  # 3.4 standard errors
        if similar > 0.92:
            assert here
        if similar < 0.65:
            assert not here
    assert 150 < len(kept_ours) < len(corpus) - 100
    assert differ < 0.1 * len(corpus)


def test_bands_let_pairs_at_the_threshold_meet():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        for permutations in (16, 128, 256):
            bands, rows = choose_bands(threshold, permutations)
            assert bands * rows <= permutations
            assert 1 - (1 - threshold**rows) ** bands >= 0.95
    assert choose_bands(0.8, 128) == (18, 7)
    assert choose_bands(0.01, 4) == (4, 1)


def test_index_returns_exactly_the_documents_that_share_a_bucket():
    """Through several doublings, against a dictionary of buckets; and band mates always share one."""
    generator = np.random.default_rng(0)
    signatures_NK = generator.integers(0, 2, (300, 12), np.uint32)  # few values: long chains
    index = Index(12, bands=4, rows=3, capacity=8)
    for signature_K in signatures_NK:
        index.add(signature_K)
    assert index.size == 300
    buckets = index._buckets(signatures_NK)
    for i, signature_K in enumerate(signatures_NK):
        expected = np.flatnonzero((buckets == buckets[:, i : i + 1]).any(0))
        np.testing.assert_array_equal(index.candidates(signature_K), expected)
        bands_N43 = signatures_NK.reshape(300, 4, 3)
        mates = np.flatnonzero((bands_N43 == bands_N43[i]).all(2).any(1))
        assert set(mates) <= set(expected)
        assert index.similarity(signature_K) == 1.0
    assert Index(12, 4, 3).similarity(signatures_NK[0]) == 0.0


def test_chance_of_meeting_is_the_one_the_docstring_gives():
    generator = np.random.default_rng(0)
    bands, rows = choose_bands(0.8, K)
    index, trials, met = Index(K, bands, rows, capacity=1 << 12), 1000, 0
    base_NK = generator.integers(0, 2**32, (trials, K), np.uint32)
    for signature_K in base_NK:
        index.add(signature_K)
    for i, signature_K in enumerate(base_NK):
        other_K = np.where(generator.random(K) < 0.7, signature_K, generator.integers(0, 2**32, K, np.uint32))
        met += i in index.candidates(other_K)
    expected = 1 - (1 - 0.7**rows) ** bands
    assert abs(met / trials - expected) < 4 * np.sqrt(expected * (1 - expected) / trials) + 0.01


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["a", "b", "c", "你", "é"]), min_size=1, max_size=30), st.integers(1, 6))
def test_ngrams_are_sets_of_runs_of_words(tokens, ngram):
    assert len(ngram_hashes(tokens, ngram)) == len(shingles(tokens, ngram))
    assert (ngram_hashes(tokens, ngram) < 2**32).all()
    minhash, length = MinHash(16, ngram), min(ngram, len(tokens))
    runs = [tokens[i : i + length] for i in range(len(tokens) - length + 1)]
    alone = [minhash.signature(run) for run in runs]
    np.testing.assert_array_equal(minhash.signature(tokens), np.min(alone, axis=0))


def test_signature_of_a_long_document_is_the_minimum_of_its_parts():
    tokens = [f"w{i}" for i in range(20_000)]  # several chunks of n-grams
    minhash = MinHash(16, 1)
    whole_K = minhash.signature(tokens)
    parts_K = np.minimum(minhash.signature(tokens[:7000]), minhash.signature(tokens[7000:]))
    np.testing.assert_array_equal(whole_K, parts_K)


def test_exact_duplicates_ignore_case_and_spacing_and_short_texts_work():
    dedup = Deduplicator(DedupConfig())
    assert dedup.duplicate("Hello  world\n") is None
    assert dedup.duplicate("hello\tWORLD") == "exact_duplicate"
    assert dedup.duplicate("hello word") is None
    assert dedup.duplicate("你好世界") is None
    assert dedup.duplicate("你好 世界") == "exact_duplicate"
    assert dedup.duplicate("") is None
    assert dedup.duplicate(" ") == "exact_duplicate"


def test_decisions_repeat_and_memory_stays_in_the_documented_bounds():
    texts = [" ".join(tokens) for tokens in variants(60, seed=2)]
    dedup = Deduplicator(DedupConfig())
    verdicts = [dedup.duplicate(text) for text in texts]
    again = Deduplicator(DedupConfig())
    assert [again.duplicate(text) for text in texts] == verdicts
    assert {"near_duplicate", None} == set(verdicts)
    index = Index(K, 18, 7, capacity=2)
    for i in range(5000):
        index.add(np.full(K, i, np.uint32))
    held = sum(array.nbytes for array in (index._signatures, index._heads, index._older))
    assert held <= 2 * 5000 * (4 * K + 8 * 18)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_threshold_is_used(threshold):
    generator = random.Random(3)
    tokens = [f"w{generator.randrange(10**6)}" for _ in range(1000)]
    edited = list(tokens)
    for i in range(0, 1000, 25):  # each edit changes 5 of 1000 5-grams: 796 of 1196 left
        edited[i] += "x"
    dedup = Deduplicator(DedupConfig(threshold=threshold))
    assert 0.6 < jaccard(shingles(tokens), shingles(edited)) < 0.75
    assert dedup.duplicate(" ".join(tokens)) is None
    assert dedup.duplicate(" ".join(edited)) == ("near_duplicate" if threshold == 0.5 else None)
