"""Decide which rows train, which validate and which test. Pure, and blind to order, labels, templates and tasks.

A row's place follows from its input text alone, so it does not move when rows are added. Rows whose texts are nearly
equal would leak from training into the test; they are found first and share one place. With strata a row's place also
depends on how many rows its stratum has, and rows at the borders between splits may move when rows are added.
"""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from finetune_trainer.errors import DataError

SIMILARITY = 0.8
"""Jaccard similarity of their shingles from which two texts count as nearly equal."""
SHINGLE_CHARACTERS = 5
SHORTEST_COMPARED = 32
"""Characters. Shorter texts must be equal: in so few, one other letter or digit makes another example."""

# LSH (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3): texts are compared when all hashes of one band
# agree. With 20 bands of 5, that is missed for 1 pair in 2,800 at similarity 0.8 and for 1 in a million at 0.87.
_BANDS = 20
_HASHES_PER_BAND = 5
_ALL_PAIRS_UP_TO = 32  # candidates in one band; beyond, each is compared with its neighbours in alphabetical order
_NEIGHBOURS = 4
_SHINGLES_AT_ONCE = 1 << 19  # keeps the working set near 10 MB

Hashes = npt.NDArray[np.uint64]


class Split(StrEnum):
    """What a row is for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class DuplicateStats:
    """Rows that share their place with another because their texts are equal or nearly equal."""

    rows: int
    clusters: int
    largest: int
    """Rows of the largest cluster, 0 when there is none."""
    exact: int = 0
    """Those of ``rows`` whose normalised text equals another row's."""
    leaks: tuple[int, ...] = ()
    """Numbers of the validation and test rows that are nearly equal to a training row; only rows whose sources fix
    their split can be."""


ANYWHERE = frozenset(Split)
"""The places of a row whose split is drawn."""


def assign_splits(
    inputs: Sequence[str],
    validation: float,
    test: float,
    seed: int,
    groups: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    allowed: Sequence[Collection[Split]] | None = None,
) -> tuple[list[Split], DuplicateStats]:
    """Return the split of every input, and how many were near-duplicates.

    Args:
        inputs: the texts.
        validation: share of the rows, met on average: a row's place is a draw of its own.
        test: likewise.
        seed: of the draws.
        groups: one per input: a film, a customer. Rows of one group stay together.
        strata: one per input: a label. Each is cut by itself, so that its shares are met as well as whole clusters can.
        allowed: one per input: where the row may be. Several places include train. Default: anywhere.

    Raises:
        DataError: a split that was asked for would be empty.
    """
    texts = [normalise(text) for text in inputs]
    distinct = sorted(set(texts))
    index = {text: position for position, text in enumerate(distinct)}
    clusters = _Clusters(len(distinct))
    _join_near_duplicates(distinct, clusters)
    alike = [clusters.root(index[text]) for text in texts]

    keys = [f"group {group}" for group in groups] if groups is not None else [f"text {text}" for text in texts]
    if groups is not None:
        first_of_group: dict[str, int] = {}
        for text, group in zip(texts, groups, strict=True):
            clusters.join(index[text], first_of_group.setdefault(group, index[text]))
    roots = [clusters.root(index[text]) for text in texts]
    smallest: dict[int, str] = {}
    for root, key in zip(roots, map(_digest, keys), strict=True):
        smallest[root] = min(key, smallest.get(root, key))
    if strata is None:
        places = {root: _place(draw(seed, "split", key), validation, test) for root, key in smallest.items()}
    else:
        places = _stratified(roots, smallest, strata, validation, test, seed)
    splits = [places[root] for root in roots] if allowed is None else _within(allowed, roots, places)
    _refuse_empty(splits, validation, test, seed, Counter(roots))
    return splits, _duplicate_stats(alike, texts, splits)


def _stratified(
    roots: Sequence[int], keys: dict[int, str], strata: Sequence[str], validation: float, test: float, seed: int
) -> dict[int, Split]:
    """Return the place of every cluster: in its stratum by rank, not by its draw itself."""
    values: dict[int, Counter[str]] = defaultdict(Counter)
    for root, stratum in zip(roots, strata, strict=True):
        values[root][stratum] += 1
    members: dict[str, list[int]] = defaultdict(list)
    for root, found in values.items():
        members[min(found, key=lambda value: (-found[value], value))].append(root)
    sizes = Counter(roots)
    places: dict[int, Split] = {}
    for clusters in members.values():
        total = sum(sizes[root] for root in clusters)
        before = 0
        for root in sorted(clusters, key=lambda root: draw(seed, "split", keys[root])):
            places[root] = _place((before + sizes[root] / 2) / total, validation, test)
            before += sizes[root]
    return places


def _within(allowed: Sequence[Collection[Split]], roots: Sequence[int], places: dict[int, Split]) -> list[Split]:
    """Return the place of every row: with rows that cannot move where one is alike, else as drawn, else in training."""
    fixed: dict[int, set[Split]] = defaultdict(set)
    for root, choice in zip(roots, allowed, strict=True):
        if len(choice) == 1:
            fixed[root].update(choice)
    splits = []
    for root, choice in zip(roots, allowed, strict=True):
        wanted = next((split for split in (Split.TEST, Split.VALIDATION) if split in fixed[root]), places[root])
        splits.append(next(iter(choice)) if len(choice) == 1 else wanted if wanted in choice else Split.TRAIN)
    return splits


def normalise(text: str) -> str:
    """Return ``text`` without what does not make another example: case, spacing, width, punctuation at its edges."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    start, end = 0, len(spaced)
    while start < end and _is_edge(spaced[start]):
        start += 1
    while end > start and _is_edge(spaced[end - 1]):
        end -= 1
    return spaced[start:end] or spaced


def input_key(text: str) -> str:
    """Return the hash of the normalised ``text``: equal for rows that are the same example."""
    return _digest(f"text {normalise(text)}")


def draw(seed: int, purpose: str, key: str) -> float:
    """Return a number in [0, 1) that depends on the arguments alone: a coin that any machine throws alike."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def _is_edge(character: str) -> bool:
    return character == " " or unicodedata.category(character).startswith("P")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _place(position: float, validation: float, test: float) -> Split:
    if position < test:
        return Split.TEST
    return Split.VALIDATION if position < test + validation else Split.TRAIN


def _refuse_empty(splits: list[Split], validation: float, test: float, seed: int, together: Counter[int]) -> None:
    rows = Counter(splits)
    wanted = {Split.TRAIN: 1.0 - validation - test, Split.VALIDATION: validation, Split.TEST: test}
    empty = [split.value for split, share in wanted.items() if share > 0 and not rows[split]]
    if empty:
        sizes = ", ".join(f"{split.value} {rows[split]}" for split in Split)
        largest = max(together.values(), default=0)
        remedy = "Add rows, raise the share or take another spec.data.splits.seed."
        if 4 * largest > len(splits) > 8:
            remedy = "Rows whose inputs are alike stay together: let the prompts name a column that tells them apart."
        raise DataError(
            f"spec.data.splits: no rows for {' and '.join(empty)} (of {len(splits)} rows: {sizes}; shares validation "
            f"{validation}, test {test}, seed {seed}; the largest set of rows that must stay together has {largest}). "
            f"{remedy}"
        )


def _duplicate_stats(roots: Sequence[int], texts: Sequence[str], splits: Sequence[Split]) -> DuplicateStats:
    sizes = [size for size in Counter(roots).values() if size > 1]
    trained = {root for root, split in zip(roots, splits, strict=True) if split is Split.TRAIN}
    return DuplicateStats(
        rows=sum(sizes),
        clusters=len(sizes),
        largest=max(sizes, default=0),
        exact=sum(size for size in Counter(texts).values() if size > 1),
        leaks=tuple(
            number
            for number, (root, split) in enumerate(zip(roots, splits, strict=True))
            if split is not Split.TRAIN and root in trained
        ),
    )


class _Clusters:
    """Union-find over the numbers below ``size``."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, item: int) -> int:
        while self._parents[item] != item:
            self._parents[item] = self._parents[self._parents[item]]
            item = self._parents[item]
        return item

    def join(self, left: int, right: int) -> None:
        left, right = self.root(left), self.root(right)
        self._parents[max(left, right)] = min(left, right)


def _join_near_duplicates(texts: list[str], clusters: _Clusters) -> None:
    """Join the ``texts`` (sorted) that are nearly equal."""
    long = [index for index, text in enumerate(texts) if len(text) >= SHORTEST_COMPARED]
    if len(long) < 2:
        return
    different: set[tuple[int, int]] = set()
    # Candidates come in alphabetical order, so a text's shingles are needed again soon or not for long.
    shingles = lru_cache(maxsize=4096)(shingles_of)
    for band in _bands([texts[index] for index in long]):
        for left, right in _candidates(band):
            pair = (long[left], long[right])
            if pair in different or clusters.root(pair[0]) == clusters.root(pair[1]):
                continue
            if jaccard(shingles(texts[pair[0]]), shingles(texts[pair[1]])) >= SIMILARITY:
                clusters.join(*pair)
            else:
                different.add(pair)


def _candidates(band: Hashes) -> Iterator[tuple[int, int]]:
    for members in _equal_runs(band):
        reach = len(members) if len(members) <= _ALL_PAIRS_UP_TO else _NEIGHBOURS
        for position, left in enumerate(members):
            for right in members[position + 1 : position + 1 + reach]:
                yield left, right


def shingles_of(text: str) -> frozenset[str]:
    """Return every run of SHINGLE_CHARACTERS characters of ``text``: they keep word order and need no word limits."""
    return frozenset(
        text[start : start + SHINGLE_CHARACTERS] for start in range(max(1, len(text) - SHINGLE_CHARACTERS + 1))
    )


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Return the share of shingles that both have among those that either has."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)


def _bands(texts: list[str]) -> Iterator[Hashes]:
    """Yield for each band one hash per text; equal hashes make a candidate pair."""
    signatures = np.empty((_BANDS * _HASHES_PER_BAND, len(texts)), dtype=np.uint64)
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and (stop == start or size + len(texts[stop]) <= _SHINGLES_AT_ONCE):
            size += len(texts[stop])
            stop += 1
        _sign(texts[start:stop], signatures[:, start:stop])
        start = stop
    for first in range(0, len(signatures), _HASHES_PER_BAND):
        combined = np.zeros(len(texts), dtype=np.uint64)
        for row in signatures[first : first + _HASHES_PER_BAND]:
            combined = _mix(combined ^ row)
        yield combined


def _sign(texts: list[str], signatures: Hashes) -> None:
    """Fill ``signatures [hashes, texts]`` with the least value that each hash function takes on a text's shingles."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    hashed = np.zeros(len(codes) - SHINGLE_CHARACTERS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_CHARACTERS):
        hashed = _mix(hashed ^ codes[offset : offset + len(hashed)])
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    ends = np.cumsum(lengths)
    # Shingles that reach over the end of a text stand between a text's own and the next text's: reduceat takes pairs
    # of start and stop and every second result is a text's.
    bounds = np.stack([ends - lengths, ends - SHINGLE_CHARACTERS + 1], axis=1).ravel()
    bounds = bounds[:-1] if bounds[-1] >= len(hashed) else bounds
    for function in range(len(signatures)):
        salt, factor = _mix(np.array([2 * function, 2 * function + 1], dtype=np.uint64) + np.uint64(1))
        # Multiply-shift: the high bits of an odd multiple are close to min-wise independent.
        signatures[function] = np.minimum.reduceat((hashed ^ salt) * (factor | np.uint64(1)), bounds)[::2]


def _mix(values: Hashes) -> Hashes:
    """Return a scrambled copy (the finaliser of SplitMix64): every bit of the input moves every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _equal_runs(values: Hashes) -> Iterator[list[int]]:
    """Yield the positions, ascending, of every value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))
    stops = np.concatenate([starts[1:], [len(values)]])
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if stop - start > 1:
            yield order[start:stop].tolist()
