"""Decide which rows train, which validate and which test. Pure, and blind to order, labels, templates and tasks.

A row's place follows from its input text alone, so it does not move when rows are added. Rows whose texts are nearly
equal would leak from training into the test; they are found first and share one place. With strata a row's place also
depends on how many rows its stratum has, and rows at the borders between splits may move when rows are added.

Texts, and the numbers that each of them and each row has, lie where the caller wants them; memory holds a portion of
them at a time, but all groups and what strata are cut by. MinHash signatures are a library's. Candidates are found
here, by sorting: the library's index takes 1.5 KB of memory a text, and of n texts that are all alike it returns n²
candidates.
"""

import hashlib
import math
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from finetune_trainer.errors import DataError
from finetune_trainer.records import ListRecords, Records
from finetune_trainer.text_order import order_texts

N = TypeVar("N", bound=np.generic)

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
_SIGNATURE_SEED = 0
_SHINGLES_AT_ONCE = 1 << 17
_TEXTS_AT_ONCE = 1 << 11
_NUMBERS_AT_ONCE = 1 << 16
_HASHES_AT_ONCE = 1 << 17
_HASHES = 1 << 64

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
Draws = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
"""Places, each as its number in `SPLITS`."""
_Hashed = tuple[Hashes, Numbers]
"""Hashes, and the numbers of the texts that they are of."""


class Split(StrEnum):
    """What a row is for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


SPLITS = tuple(Split)
_IN_MEMORY = ListRecords()
_TRAIN, _VALIDATION, _TEST = range(len(SPLITS))


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
    inputs: Iterable[str],
    validation: float,
    test: float,
    seed: int,
    groups: Iterable[str] | None = None,
    strata: Iterable[str] | None = None,
    allowed: Iterable[Collection[Split]] | None = None,
    kind: Records = _IN_MEMORY,
) -> tuple[Codes, Numbers, DuplicateStats]:
    """Return of every input its split as a number in `SPLITS` and its cluster's number; how many were near-duplicates.

    Args:
        inputs: the texts. They are not held in memory.
        validation: share of the rows, met on average: a row's place is a draw of its own.
        test: likewise.
        seed: of the draws.
        groups: one per input: a film, a customer. Rows of one group stay together.
        strata: one per input: a label. Each is cut by itself, so that its shares are met as well as whole clusters can.
        allowed: one per input: where the row may be. Several places include train. Default: anywhere.
        kind: of records that texts and numbers lie in.

    Raises:
        DataError: a split that was asked for would be empty.
    """
    order = order_texts(map(normalise, inputs), kind)
    clusters = _Clusters(kind.numbers(len(order.distinct), np.int64))
    _join_near_duplicates(order.distinct, clusters, kind)
    alike = _taken(clusters.roots(), order.ranks, kind)
    if groups is None:
        members = clusters.roots()
        keys: Iterable[str] = (f"text {text}" for text in order.distinct)
    else:
        first_of_group: dict[str, int] = {}
        for rank, group in zip(_each(order.ranks), groups, strict=True):
            clusters.join(rank, first_of_group.setdefault(group, rank))
        members = clusters.roots()[np.fromiter(first_of_group.values(), dtype=np.int64)]
        keys = (f"group {group}" for group in first_of_group)
    roots = _taken(clusters.roots(), order.ranks, kind)
    draws = _draws(members, keys, len(order.distinct), seed, kind)
    cut = (validation, test)
    places = _places(draws, *cut, kind) if strata is None else _stratified(roots, draws, strata, *cut, kind)
    codes = _taken(places, roots, kind) if allowed is None else _within(allowed, roots, places, kind)
    _refuse_empty(codes, validation, test, seed, largest=_most(_counts(roots, len(draws), kind)))
    return codes, roots, _duplicate_stats(alike, order.ranks, codes, kind)


def _slices(size: int) -> Iterator[slice]:
    """Yield the places below ``size``, some at a time."""
    return (slice(start, start + _NUMBERS_AT_ONCE) for start in range(0, size, _NUMBERS_AT_ONCE))


def _each(values: Numbers) -> Iterator[int]:
    for some in _slices(len(values)):
        yield from values[some].tolist()


def _taken(values: npt.NDArray[N], places: Numbers, kind: Records) -> npt.NDArray[N]:
    """Return ``values[places]``."""
    taken = kind.numbers(len(places), values.dtype)
    for some in _slices(len(places)):
        taken[some] = values[places[some]]
    return taken


def _counts(values: Numbers, size: int, kind: Records) -> Numbers:
    """Return how often each number below ``size`` is among ``values``."""
    counts = kind.numbers(size, np.int64)
    for some in _slices(len(values)):
        np.add.at(counts, values[some], 1)
    return counts


def _most(counts: Numbers) -> int:
    return max((int(counts[some].max()) for some in _slices(len(counts))), default=0)


def _draws(members: Numbers, keys: Iterable[str], size: int, seed: int, kind: Records) -> Draws:
    """Return for every cluster the draw of the least hash among ``keys``, which belong to ``members``."""
    least = kind.numbers(size, f"S{hashlib.sha256().digest_size * 2}")
    for root, key in zip(_each(members), keys, strict=True):
        digest = _digest(key).encode()
        found = least[root]
        if not found or digest < found:
            least[root] = digest
    draws = kind.numbers(size, np.float64)
    for some in _slices(size):
        draws[some] = [draw(seed, "split", key.decode()) if key else math.nan for key in least[some].tolist()]
    return draws


def _places(draws: Draws, validation: float, test: float, kind: Records) -> Codes:
    """Return the place for every draw."""
    places = kind.numbers(len(draws), np.int8)
    for some in _slices(len(draws)):
        places[some] = _cut(draws[some], validation, test)
    return places


def _cut(positions: Draws, validation: float, test: float) -> Codes:
    """Return the place for every position between 0 and 1."""
    unseen = np.where(positions < test, _TEST, _VALIDATION)
    return np.where(positions < test + validation, unseen, _TRAIN).astype(np.int8)


def _stratified(
    roots: Numbers, draws: Draws, strata: Iterable[str], validation: float, test: float, kind: Records
) -> Codes:
    """Return the place of every cluster: in its stratum by rank, not by its draw itself."""
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(stratum, len(numbers)) for stratum in strata), np.int64, len(roots))
    alphabetical = np.argsort(np.argsort(np.array(list(numbers), dtype=object)))
    pairs, counts = np.unique(roots * len(numbers) + alphabetical[found], return_counts=True)
    owners, values = np.divmod(pairs, len(numbers))
    # A cluster belongs to its commonest value, of equally common ones to the first in the alphabet.
    order = np.lexsort((values, -counts, owners))
    clusters, first = np.unique(owners[order], return_index=True)
    belongs = values[order][first]
    order = np.lexsort((draws[clusters], belongs))
    clusters, belongs = clusters[order], belongs[order]
    sizes = np.bincount(roots, minlength=len(draws))[clusters]
    totals = np.bincount(belongs, weights=sizes)
    before = np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[belongs]
    places = kind.numbers(len(draws), np.int8)
    places[clusters] = _cut((before + sizes / 2) / totals[belongs], validation, test)
    return places


def _within(allowed: Iterable[Collection[Split]], roots: Numbers, places: Codes, kind: Records) -> Codes:
    """Return the place of every row: with rows that cannot move where one is alike, else as drawn, else in training.

    ``places`` of clusters become those of their rows that cannot move.
    """
    numbers: dict[frozenset[Split], int] = {}
    choices = kind.numbers(len(roots), np.int8)
    found = (numbers.setdefault(frozenset(choice), len(numbers)) for choice in allowed)
    for some in _slices(len(roots)):
        choices[some] = np.fromiter(islice(found, _NUMBERS_AT_ONCE), np.int8)
    for split in (Split.VALIDATION, Split.TEST):
        if (number := numbers.get(frozenset({split}))) is not None:
            for some in _slices(len(roots)):
                places[roots[some][choices[some] == number]] = SPLITS.index(split)
    codes = _taken(places, roots, kind)
    for choice, number in numbers.items():
        instead = next(iter(choice)) if len(choice) == 1 else Split.TRAIN
        elsewhere = [code for code, split in enumerate(SPLITS) if split not in choice]
        for some in _slices(len(roots)):
            codes[some][(choices[some] == number) & np.isin(codes[some], elsewhere)] = SPLITS.index(instead)
    return codes


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


def count_by_split(codes: Codes) -> dict[Split, int]:
    """Return how many rows are in each split."""
    return {split: int(np.count_nonzero(codes == code)) for code, split in enumerate(SPLITS)}


def _refuse_empty(codes: Codes, validation: float, test: float, seed: int, largest: int) -> None:
    rows = count_by_split(codes)
    wanted = {Split.TRAIN: 1.0 - validation - test, Split.VALIDATION: validation, Split.TEST: test}
    empty = [split.value for split, share in wanted.items() if share > 0 and not rows[split]]
    if empty:
        sizes = ", ".join(f"{split.value} {rows[split]}" for split in Split)
        remedy = "Add rows, raise the share or take another spec.data.splits.seed."
        if 4 * largest > len(codes) > 8:
            remedy = "Rows whose inputs are alike stay together: let the prompts name a column that tells them apart."
        raise DataError(
            f"spec.data.splits: no rows for {' and '.join(empty)} (of {len(codes)} rows: {sizes}; shares validation "
            f"{validation}, test {test}, seed {seed}; the largest set of rows that must stay together has {largest}). "
            f"{remedy}"
        )


def _duplicate_stats(roots: Numbers, ranks: Numbers, codes: Codes, kind: Records) -> DuplicateStats:
    count = len(roots)
    sizes, equal = _counts(roots, count, kind), _counts(ranks, count, kind)
    trained = kind.numbers(count, np.bool_)
    for some in _slices(count):
        trained[roots[some][codes[some] == _TRAIN]] = True
    rows = clusters = exact = 0
    leaks: list[int] = []
    for some in _slices(count):
        several = sizes[some] > 1
        rows += int(sizes[some][several].sum())
        clusters += int(several.sum())
        exact += int(equal[some][equal[some] > 1].sum())
        leaks += (some.start + np.flatnonzero((codes[some] != _TRAIN) & trained[roots[some]])).tolist()
    largest = _most(sizes)
    return DuplicateStats(rows, clusters, largest if largest > 1 else 0, exact, tuple(leaks))


class _Clusters:
    """Union-find over the numbers below the length of ``parents``, whose content is written over."""

    def __init__(self, parents: Numbers) -> None:
        for some in _slices(len(parents)):
            parents[some] = np.arange(some.start, min(some.stop, len(parents)))
        self._parents = parents
        self._items = parents.data

    def root(self, item: int) -> int:
        while self._items[item] != item:
            self._items[item] = self._items[self._items[item]]
            item = self._items[item]
        return item

    def roots(self) -> Numbers:
        """Return the root of every number; what is joined later changes them."""
        for some in _slices(len(self._parents)):
            # A parent is never above its child: those of earlier slices are roots by now.
            while ((above := self._parents[self._parents[some]]) != self._parents[some]).any():
                self._parents[some] = above
        return self._parents

    def join(self, left: int, right: int) -> None:
        left, right = self.root(left), self.root(right)
        self._items[max(left, right)] = min(left, right)


def _join_near_duplicates(distinct: Sequence[str], clusters: _Clusters, kind: Records) -> None:
    """Join the texts that are nearly equal."""

    # A text's shingles are needed again while candidates of one hash are compared, and seldom later.
    @lru_cache(maxsize=2 * _ALL_PAIRS_UP_TO)
    def shingles(number: int) -> frozenset[str]:
        return shingles_of(distinct[number])

    def are_alike(left: int, right: int) -> bool:
        return jaccard(shingles(left), shingles(right)) >= SIMILARITY

    for portion in _bands(distinct, kind):
        for left, right in _candidates(portion):
            if clusters.root(left) != clusters.root(right) and are_alike(left, right):
                clusters.join(left, right)


def _candidates(portion: _Hashed) -> Iterator[tuple[int, int]]:
    for members in _equal_runs(portion):
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


def _bands(texts: Sequence[str], kind: Records) -> Iterator[_Hashed]:
    """Yield for each band one hash per text, some hashes at a time: equal ones together make candidate pairs."""
    numbers = kind.numbers(len(texts), np.int64)
    bands = kind.numbers(_BANDS * len(texts), np.uint64).reshape(_BANDS, len(texts))
    count = 0
    for some in _portions(texts):
        signatures = _sign([text for _, text in some]).reshape(len(some), _BANDS, _HASHES_PER_BAND)
        combined = np.zeros((len(some), _BANDS), dtype=np.uint64)
        for place in range(_HASHES_PER_BAND):
            combined = _mix(combined ^ signatures[:, :, place])
        numbers[count : count + len(some)] = [number for number, _ in some]
        bands[:, count : count + len(some)] = combined.T
        count += len(some)
    span = _HASHES // (1 + count // _HASHES_AT_ONCE) + 1
    for hashes in bands[:, :count]:
        for least in range(0, _HASHES, span):
            yield _between(hashes, numbers[:count], least, min(least + span, _HASHES) - 1)


def _between(hashes: Hashes, numbers: Numbers, least: int, most: int) -> _Hashed:
    found = [
        some.start + np.flatnonzero((hashes[some] >= least) & (hashes[some] <= most)) for some in _slices(len(hashes))
    ]
    places = np.concatenate([np.empty(0, np.int64), *found])
    return hashes[places], numbers[places]


def _portions(texts: Iterable[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield the texts that are long enough to be compared, each with its number, some at a time."""
    some: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        if len(text) < SHORTEST_COMPARED:
            continue
        if some and (size + len(text) > _SHINGLES_AT_ONCE or len(some) == _TEXTS_AT_ONCE):
            yield some
            some, size = [], 0
        some.append((number, text))
        size += len(text)
    if some:
        yield some


def _sign(texts: list[str]) -> npt.NDArray[np.uint32]:
    """Return the MinHash signatures ``[texts, hashes]`` of the texts' shingles."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    hashed = np.zeros(len(codes) - SHINGLE_CHARACTERS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_CHARACTERS):
        hashed = _mix(hashed ^ codes[offset : offset + len(hashed)])
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    within = np.ones(len(hashed), dtype=np.bool_)
    for reach in range(1, SHINGLE_CHARACTERS):
        # Shingles that reach over the end of a text belong to none.
        within[np.cumsum(lengths)[:-1] - reach] = False
    offsets = np.concatenate([[0], np.cumsum(lengths - SHINGLE_CHARACTERS + 1)]).astype(np.uint64)
    count = _BANDS * _HASHES_PER_BAND
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashed[within], offsets, count, _SIGNATURE_SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _mix(values: Hashes) -> Hashes:
    """Return a scrambled copy (the finaliser of SplitMix64): every bit of the input moves every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _equal_runs(hashed: _Hashed) -> Iterator[list[int]]:
    """Yield the numbers, ascending, of every hash that occurs more than once."""
    hashes, numbers = hashed
    order = np.argsort(hashes, kind="stable")
    hashes, numbers = hashes[order], numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    stops = np.concatenate([starts[1:], [len(hashes)]])
    several = stops - starts > 1
    for start, stop in zip(starts[several].tolist(), stops[several].tolist(), strict=True):
        yield numbers[start:stop].tolist()
