"""Exact and near duplicates, found in one pass: of documents that are alike the first one stays.

Exact: equal BLAKE2b digests of the words. Near: MinHash (Broder 1997) over word n-grams, with locality-sensitive
hashing (Leskovec et al., Mining of Massive Datasets, section 3.4): a signature holds K minima, cut into b bands of r;
two documents meet if a band agrees, with probability 1 - (1 - J^r)^b at Jaccard similarity J, and the share of equal
minima then estimates J with standard error sqrt(J (1 - J) / K), 0.035 at J = 0.8 and K = 128.

Memory per document kept: 4 K bytes of signature, 8 b of bucket chains, up to twice that since arrays grow by
doubling, and about 120 of digest: 0.8 to 1.5 kB with K = 128 (b = 18); never any text.
"""

import hashlib
import zlib

import numpy as np

from dsv2_jax.config import DedupConfig
from dsv2_jax.data.filters import words

_RECALL = 0.95  # chance, at least, that a pair at the threshold meets in some band
_CHUNK = 1 << 12  # n-grams hashed at once: 4 MB at K = 128
_NONE = -1
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def choose_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(b, r) with b r <= K and the most selective r for which a pair at the threshold still meets with `_RECALL`."""
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return permutations, 1


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads uint64 keys over all bits (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_hashes(tokens: list[str], ngram: int) -> np.ndarray:
    """The distinct word n-grams as 32-bit keys, uint64; a shorter document is one n-gram, its whole."""
    crc = np.array([zlib.crc32(token.encode()) for token in tokens], np.uint64)
    keys, length = _mix(crc + _ODD), min(ngram, len(tokens))
    count = len(tokens) - length + 1
    hashes = np.zeros(count, np.uint64)
    for i in range(length):
        hashes = hashes * _ODD + keys[i : i + count]
    return np.unique(_mix(hashes) >> np.uint64(32))


class MinHash:
    """Signatures of K minima under h_k(x) = (a_k x + b_k mod 2^64) >> 32: pairwise independent for 32-bit x."""

    def __init__(self, permutations: int, ngram: int):
        generator = np.random.Generator(np.random.PCG64(0))  # fixed: signatures must not differ between runs
        self._a_K, self._b_K = generator.integers(0, 2**64, (2, permutations), np.uint64, endpoint=False)
        self._ngram = ngram

    def signature(self, tokens: list[str]) -> np.ndarray:
        """uint32 [K]; needs one word at least."""
        hashes = ngram_hashes(tokens, self._ngram)
        minima_K = np.full(len(self._a_K), 2**64 - 1, np.uint64)
        for start in range(0, len(hashes), _CHUNK):
            mixed = hashes[start : start + _CHUNK, None] * self._a_K + self._b_K
            minima_K = np.minimum(minima_K, mixed.min(0))
        return (minima_K >> np.uint64(32)).astype(np.uint32)


class Index:
    """Signatures in hash buckets, one table per band; the documents of a bucket form a chain, newest first."""

    def __init__(self, permutations: int, bands: int, rows: int, capacity: int = 1024):
        self.bands, self.rows, self.size = bands, rows, 0
        self._odd_R = _mix(np.arange(1, rows + 1, dtype=np.uint64)) | np.uint64(1)
        self._signatures = np.empty((0, permutations), np.uint32)
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        old = self._signatures
        self._signatures = np.empty((capacity, old.shape[1]), np.uint32)
        self._signatures[: len(old)] = old
        self._heads = np.full((self.bands, capacity), _NONE, np.int32)  # newest document of a bucket
        self._older = np.full((self.bands, capacity), _NONE, np.int32)  # the one before it in its bucket
        for start in range(0, len(old), _CHUNK):
            for document, buckets in enumerate(self._buckets(old[start : start + _CHUNK]).T, start):
                self._link(document, buckets)

    def _link(self, document: int, buckets: np.ndarray) -> None:
        bands = np.arange(self.bands)
        self._older[:, document] = self._heads[bands, buckets]
        self._heads[bands, buckets] = document

    def _buckets(self, signatures_NK: np.ndarray) -> np.ndarray:
        """int64 [bands, N]: which bucket of each band's table."""
        parts = signatures_NK[:, : self.bands * self.rows].reshape(-1, self.bands, self.rows).astype(np.uint64)
        keys = _mix((parts * self._odd_R).sum(-1, dtype=np.uint64))
        return (keys % np.uint64(self._heads.shape[1])).astype(np.int64).T

    def candidates(self, signature_K: np.ndarray) -> np.ndarray:
        """Documents that may share a band with the signature (a bucket may hold others too), ascending."""
        found = []
        bands = np.arange(self.bands)
        documents = self._heads[bands, self._buckets(signature_K[None])[:, 0]]
        while (alive := documents != _NONE).any():
            bands, documents = bands[alive], documents[alive]
            found.append(documents)
            documents = self._older[bands, documents]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int32)

    def similarity(self, signature_K: np.ndarray) -> float:
        """The largest estimated Jaccard similarity with any candidate; 0 without one."""
        candidates = self.candidates(signature_K)
        return float((self._signatures[candidates] == signature_K).mean(1).max()) if len(candidates) else 0.0

    def add(self, signature_K: np.ndarray) -> None:
        if self.size == len(self._signatures):
            self._allocate(2 * self.size)
        self._signatures[self.size] = signature_K
        self._link(self.size, self._buckets(signature_K[None])[:, 0])
        self.size += 1


class Deduplicator:
    """Says of each document, in order, whether it repeats one seen before; those that do are not remembered."""

    def __init__(self, config: DedupConfig):
        self._threshold = config.threshold
        self._minhash = MinHash(config.permutations, config.ngram)
        self._index = Index(config.permutations, *choose_bands(config.threshold, config.permutations))
        self._digests: set[bytes] = set()

    def duplicate(self, text: str) -> str | None:
        """'exact_duplicate', 'near_duplicate', or None for a document that is new, which is then remembered."""
        tokens = words(text.casefold())
        digest = hashlib.blake2b(" ".join(tokens).encode(), digest_size=16).digest()
        if digest in self._digests:
            return "exact_duplicate"
        if tokens:
            signature_K = self._minhash.signature(tokens)
            if self._index.similarity(signature_K) >= self._threshold:
                return "near_duplicate"
            self._index.add(signature_K)
        self._digests.add(digest)
        return None
