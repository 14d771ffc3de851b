"""Codes of the vectors of a segment, one byte a number, in a file beside them: with bounds that `quantized` proves by.

A row x and a query q have the inner product (Rx)·(Rq) in the basis R, whose first directions hold most of the energy of
the rows. The first numbers of Rx, the head, are coded in a plane of their own, which a search reads for all rows; the
rest, the tail, in another, read for the few rows that the head leaves. Of the tail the head holds the length, in a few
groups: by Cauchy and Schwarz, no group adds more to the product than its length times that of the query's group.

A block of rows has one scale s for its codes k and the largest length e of a residual, so with a query of codes j and
scale t, and what it leaves over, f:

    q·x <= s t (j·k) + s |k| |f| + |q| e + what is rounded

Where a few directions hold most of the energy, as in vectors of small models, e would be theirs: their residuals are
coded in further columns of the head, and what is left of them has a term |q| e of its own. With a head, a query has two
codes, the second of what the first leaves over; kernels multiply two as fast as one.

Worked by hand, with one number a row: rows 1.0 and 0.5 have s = 1/127, the codes 127 and 64 (63.5 is rounded to even)
and e = 0.5/127; a query of 1 has j = 127, t = 1/127 and f = 0: the bounds are 1 + 0.0039 and 0.5039 + 0.0039.
"""

# N rows, B blocks, D dimensions, C columns of a plane, G groups of the tail, S rows of a sample, Q queries

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from cn_clip.errors import DataError
from cn_clip.retrieval.manifest import ADVICE, SegmentFacts
from cn_clip.retrieval.parts import Part
from cn_clip.retrieval.scanning import norms
from cn_clip.retrieval.segments import VECTORS, FloatArray, IntArray, MappedFile, Segment

NAME = "codes.bin"
# Segments of fewer rows have no such file: reading their vectors is as fast.
SMALLEST = 4096
# Rows of a scale.
BLOCK = 256

CodeArray = NDArray[np.int8]
DoubleArray = NDArray[np.float64]

_FORMAT = 1
_HEADER_BYTES = 4096
_CHUNK = 32 * BLOCK
_SAMPLE = 16384
_GROUPS = 8
# Residuals that are coded, too, if these first numbers of the head hold more than this share of the energy.
_RESIDUALS, _SHARE_OF_RESIDUALS = 16, 0.25
# What is left of a number after its first code, in parts of its scale: the second code is between -127 and 127.
_FINE = 254
# What residuals add to bounds, about.
_ADDED = 0.004
_LARGEST_CODE = 127
_ROUNDOFF = 2.0**-24
# Columns are filled up to a multiple of so many: the kernels are fastest then.
_COLUMNS = 64
# Of these widths of the head, or none, that one is taken that lets a search expect the least work. Kernels of more
# columns are slower a byte.
_HEADS = (64, 128, 192, 256, 320)
# Nanoseconds: of a row of a head and of each of its bytes; of a row of a whole code; of a row that the head leaves.
# Measured with numkong 7.8 on one core of an EPYC of the fourth generation.
_ROW_OF_HEAD, _BYTE_OF_HEAD, _ROW_OF_WHOLE, _BYTE_OF_WHOLE, _ROW_LEFT = 6.0, 0.024, 13.0, 0.016, 400.0
# Of longer vectors the codes overflow float32, and numbers that are smaller are below its normal ones when divided.
_LONGEST, _SHORTEST = 1e18, 1e-18

# What is kept of a block, for the head and then for the tail: scale, largest length of what is left of the numbers with
# coded residuals, and of the others, and of the codes; and the largest length of a vector.
_FACTS = 4
_NORM = 2 * _FACTS
_UNKNOWN = [*[1.0, np.inf, np.inf, 0.0] * 2, 1.0]


@dataclass(frozen=True)
class Layout:
    """The header. vectors: the digest of the file of vectors that the codes are of.

    head, tail: numbers of the head and the tail; residuals: of how many of the head they are coded, too;
    rotation_error: how far the basis is from an orthogonal one.
    """

    vectors: str
    vector_type: str
    num_rows: int
    embed_dim: int
    head: int
    residuals: int
    rotation_error: float
    format: int = _FORMAT

    @property
    def tail(self) -> int:
        """Numbers of the tail."""
        return self.embed_dim - self.head

    @property
    def is_rotated(self) -> bool:
        """Whether there is a basis: a code without a tail has no need of one."""
        return self.tail > 0

    @property
    def groups(self) -> int:
        """Groups of the tail."""
        return min(_GROUPS, self.tail)

    @property
    def columns(self) -> tuple[int, int]:
        """Columns of the planes of head and tail."""
        return _filled(self.head + self.residuals + self.groups), _filled(self.tail)

    @property
    def lengths(self) -> slice:
        """The columns of the head that hold the lengths of groups of the tail."""
        first = self.head + self.residuals
        return slice(first, first + self.groups)

    @property
    def num_blocks(self) -> int:
        """Blocks of rows."""
        return -(-self.num_rows // BLOCK)

    def regions(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
        """Where each array begins, its shape and type."""
        head, tail = self.columns
        shapes: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = [
            ("basis", (self.embed_dim, self.embed_dim) if self.is_rotated else (0, 0), np.dtype("<f4")),
            ("weights", (head + tail,), np.dtype("<f4")),
            ("head", (self.num_rows, head), np.dtype("i1")),
            ("tail", (self.num_rows, tail), np.dtype("i1")),
            ("table", (self.num_blocks, len(_UNKNOWN)), np.dtype("<f8")),
        ]
        found, start = {}, _HEADER_BYTES
        for name, shape, dtype in shapes:
            found[name] = start, shape, dtype
            start += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        start, shape, dtype = self.regions()["table"]
        return start + math.prod(shape) * dtype.itemsize


def _filled(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _groups_of(tail_ND: NDArray[Any], groups: int) -> list[NDArray[Any]]:
    return np.array_split(tail_ND, groups, axis=1) if groups else []


def write(parts: Sequence[Part], stream: IO[Any], facts: SegmentFacts) -> None:
    """Writes the codes of a segment that consists of these parts; memory: a sample of the rows, and a few blocks.

    facts: of that segment. Raises DataError for a damaged part, OSError.
    """
    num_rows = sum(part.num_rows for part in parts)
    sample_SD = _sample(parts, num_rows)
    basis_DD, head, residuals = _planned(sample_SD, num_rows)
    embed_dim = sample_SD.shape[1]
    error_DD = np.eye(embed_dim) - basis_DD.T.astype(np.float64) @ basis_DD.astype(np.float64)
    rotation_error = float(np.linalg.norm(error_DD)) if head < embed_dim else 0.0
    first = parts[0].segment
    digest = facts.files[VECTORS].digest
    layout = Layout(digest, first.vector_type, num_rows, embed_dim, head, residuals, rotation_error)
    encoder = _Encoder(layout, basis_DD, sample_SD)
    regions = layout.regions()
    header = json.dumps(asdict(layout)).encode()
    stream.write(header.ljust(_HEADER_BYTES))
    for name, array in (("basis", basis_DD if layout.is_rotated else basis_DD[:0, :0]), ("weights", encoder.weights_C)):
        stream.seek(regions[name][0])
        stream.write(array.astype("<f4").tobytes())
    tables, row = [], 0
    for chunk_ND in _chunks(parts, _CHUNK):
        head_NC, tail_NC, table_BT = encoder.encode(chunk_ND)
        for name, codes_NC in (("head", head_NC), ("tail", tail_NC)):
            stream.seek(regions[name][0] + row * codes_NC.shape[1])
            stream.write(codes_NC.tobytes())
        tables.append(table_BT)
        row += len(chunk_ND)
    stream.seek(regions["table"][0])
    stream.write(np.concatenate(tables).astype("<f8").tobytes())


def _chunks(parts: Sequence[Part], size: int) -> Iterator[FloatArray]:
    """The kept rows of the parts, float32, `size` at a time but for the last."""
    pending: list[FloatArray] = []
    missing = size
    for part in parts:
        rows = np.flatnonzero(part.kept_N)
        start = 0
        while start < len(rows):
            chosen = rows[start : start + missing]
            pending.append(part.segment.gather(chosen).astype(np.float32))
            start, missing = start + len(chosen), missing - len(chosen)
            if not missing:
                yield np.concatenate(pending)
                pending, missing = [], size
    if pending:
        yield np.concatenate(pending)


def _sample(parts: Sequence[Part], num_rows: int) -> FloatArray:
    """Up to `_SAMPLE` rows, evenly spread."""
    step = max(1.0, num_rows / _SAMPLE)
    wanted = np.unique(np.arange(0, num_rows, step).astype(np.int64))
    found, start = [], 0
    for part in parts:
        rows = np.flatnonzero(part.kept_N)
        here = wanted[(wanted >= start) & (wanted < start + len(rows))] - start
        found.append(part.segment.gather(rows[here]).astype(np.float32))
        start += len(rows)
    return np.concatenate(found)


def _planned(sample_SD: FloatArray, num_rows: int) -> tuple[FloatArray, int, int]:
    """The basis (D, D), directions of the most energy first, how many are the head, and residuals of how many."""
    dimensions = sample_SD.shape[1]
    norm_S = norms(sample_SD)
    usual_SD = sample_SD[(norm_S > _SHORTEST) & (norm_S < _LONGEST)].astype(np.float64)
    if dimensions <= _HEADS[0] or len(usual_SD) < dimensions:
        return np.eye(dimensions, dtype=np.float32), dimensions, 0
    usual_SD /= np.linalg.norm(usual_SD, axis=1, keepdims=True)
    energies_D, vectors_DD = np.linalg.eigh(usual_SD.T @ usual_SD)
    first_share = energies_D[-_RESIDUALS:].sum() / energies_D.sum()
    residuals = _RESIDUALS if first_share > _SHARE_OF_RESIDUALS else 0
    basis_DD = np.ascontiguousarray(vectors_DD.T[::-1], dtype=np.float32)
    turned_SD = usual_SD.astype(np.float32) @ basis_DD.T
    queries_QD, rank = _trials(turned_SD), max(1, round(10 * len(turned_SD) / num_rows))
    score_QS = queries_QD @ turned_SD.T
    # One more for the row itself.
    limit_Q = np.partition(score_QS, -rank - 1, axis=1)[:, -rank - 1] - _ADDED
    # Those of a trial by its logarithm: what one kind of query gains counts as much as what another loses.
    costs = {dimensions: math.log(_ROW_OF_WHOLE + _BYTE_OF_WHOLE * dimensions)}
    for columns in _HEADS:
        head = columns - residuals - _GROUPS
        if columns < dimensions:
            bound_QS = queries_QD[:, :head] @ turned_SD[:, :head].T
            pairs = zip(
                _groups_of(queries_QD[:, head:], _GROUPS), _groups_of(turned_SD[:, head:], _GROUPS), strict=True
            )
            for of_queries, of_rows in pairs:
                bound_QS += np.linalg.norm(of_queries, axis=1)[:, None] * np.linalg.norm(of_rows, axis=1)
            left_Q = (bound_QS >= limit_Q[:, None]).mean(axis=1)
            rest_Q = np.minimum(_ROW_LEFT * left_Q, _ROW_OF_WHOLE + _BYTE_OF_WHOLE * (dimensions - head))
            costs[head] = float(np.log(_ROW_OF_HEAD + _BYTE_OF_HEAD * columns + rest_Q).mean())
    head = min(costs, key=lambda head: costs[head])
    return basis_DD, head, residuals if head < dimensions else 0


def _trials(rows_SD: FloatArray) -> FloatArray:
    """Queries to plan by: rows, and others as far from a row as a text is from its picture."""
    generator = np.random.default_rng(0)
    rows_QD = rows_SD[generator.integers(0, len(rows_SD), 64)]
    noise_QD = generator.standard_normal(rows_QD.shape, dtype=np.float32)
    noise_QD /= np.linalg.norm(noise_QD, axis=1, keepdims=True)
    cosine_Q1 = np.where(np.arange(64) % 2, 0.4, 1.0).astype(np.float32)[:, None]
    trials_QD = cosine_Q1 * rows_QD + np.sqrt(1 - cosine_Q1**2) * noise_QD
    return cast(FloatArray, trials_QD.astype(np.float32))


class _Encoder:
    """Codes rows, and says how far they are from them."""

    def __init__(self, layout: Layout, basis_DD: FloatArray, sample_SD: FloatArray) -> None:
        self.layout, self._turning_DD = layout, basis_DD.T.astype(np.float64)
        with np.errstate(all="ignore"):
            head_SC, tail_SC = self._columns(sample_SD)
            norm_S = norms(sample_SD)
            is_usual_S = (norm_S > _SHORTEST) & (norm_S < _LONGEST)
            usual = [columns_SC[is_usual_S] for columns_SC in (head_SC, tail_SC)]
            self.weights_C: FloatArray = np.concatenate([_weights(columns_SC) for columns_SC in usual])
        residuals = slice(layout.head, layout.head + layout.residuals)
        self.weights_C[residuals] = self.weights_C[: layout.residuals] / np.float32(_FINE)

    def _columns(self, rows_ND: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What the columns of head and tail stand for, before it is divided by the weights; without residuals."""
        layout, turned_ND = self.layout, cast(NDArray[Any], rows_ND)
        if layout.is_rotated:  # in float64, for what float32 may round would be the largest part of the bounds
            turned_ND = rows_ND.astype(np.float64) @ self._turning_DD
        head_NC, tail_NC = (np.zeros((len(rows_ND), columns), dtype=np.float32) for columns in layout.columns)
        head_NC[:, : layout.head] = turned_ND[:, : layout.head]
        tail_NC[:, : layout.tail] = turned_ND[:, layout.head :]
        groups = _groups_of(tail_NC[:, : layout.tail], layout.groups)
        for number, group_ND in enumerate(groups, layout.lengths.start):
            head_NC[:, number] = norms(group_ND) * (1 + 4 * _ROUNDOFF)
        return head_NC, tail_NC

    def encode(self, rows_ND: FloatArray) -> tuple[CodeArray, CodeArray, DoubleArray]:
        """Codes of head and tail, and the table of the blocks."""
        layout, starts = self.layout, np.arange(0, len(rows_ND), BLOCK)
        with np.errstate(all="ignore"):
            head_NC, tail_NC = self._columns(rows_ND)
            width = layout.columns[0]
            head = _coded(head_NC / self.weights_C[:width], starts, layout.head, layout.residuals)
            tail = _coded(tail_NC / self.weights_C[width:], starts, layout.columns[1], 0)
            norm_N = norms(rows_ND) * (1 + 1e-9)
            norm_B = np.maximum.reduceat(norm_N, starts)
            table_BT = np.concatenate([head[1], tail[1], norm_B[:, None]], axis=1)
        # Of such rows the codes prove nothing.
        table_BT[~(norm_B < _LONGEST) | ~np.isfinite(table_BT).all(axis=1)] = _UNKNOWN
        return head[0], tail[0], table_BT


def _weights(columns_SC: FloatArray) -> FloatArray:
    """About how large the numbers of a column are."""
    mean_C = (
        np.sqrt(np.square(columns_SC, dtype=np.float64).mean(axis=0))
        if len(columns_SC)
        else np.zeros(columns_SC.shape[1])
    )
    largest = mean_C.max(initial=0.0)
    if not 0 < largest < np.inf:
        return np.ones(columns_SC.shape[1], dtype=np.float32)
    weights_C: FloatArray = np.maximum(mean_C, 1e-4 * largest).astype(np.float32)
    return weights_C


def _coded(values_NC: FloatArray, starts: IntArray, head: int, residuals: int) -> tuple[CodeArray, DoubleArray]:
    """Codes, and the facts of the blocks.

    The columns are `head` numbers, the residuals of the first of them, which are made here, and lengths, which are
    rounded up and are no part of what is left.
    """
    largest_B = np.maximum.reduceat(np.abs(values_NC).max(axis=1, initial=0.0), starts).astype(np.float64)
    is_coded_B = (largest_B > _SHORTEST) & (largest_B < np.inf)
    scale_B = np.where(is_coded_B, largest_B * (1 + 1e-6) / _LARGEST_CODE, 1.0).astype(np.float32)
    scale_N1 = np.repeat(scale_B, np.diff([*starts.tolist(), len(values_NC)]))[:, None]
    limit = head + residuals
    steps_NC = values_NC / scale_N1
    steps_NC[:, :head] = np.rint(steps_NC[:, :head])
    steps_NC[:, limit:] = np.ceil(steps_NC[:, limit:] * np.float32(1 + 4 * _ROUNDOFF))
    left_NC = values_NC[:, :head] - steps_NC[:, :head] * scale_N1
    steps_NC[:, head:limit] = np.rint(left_NC[:, :residuals] / scale_N1 * _FINE)
    left_NC[:, :residuals] -= steps_NC[:, head:limit] * (scale_N1 / _FINE)
    steps_NC = np.clip(np.nan_to_num(steps_NC, nan=0.0), -_LARGEST_CODE, _LARGEST_CODE)
    length_N = norms(steps_NC[:, :limit])
    # What float32 rounded on the way, in each of two subtractions.
    rounded_N = 8 * _ROUNDOFF * scale_N1[:, 0] * norms(steps_NC[:, :residuals])
    rest_N = 8 * _ROUNDOFF * scale_N1[:, 0] * norms(steps_NC[:, residuals:head])
    facts = [
        norms(left_NC[:, :residuals]) * (1 + 1e-6) + rounded_N,
        norms(left_NC[:, residuals:]) * (1 + 1e-6) + rest_N,
        length_N * (1 + 1e-9),
    ]
    table_B4 = np.stack([scale_B, *(np.maximum.reduceat(fact_N, starts) for fact_N in facts)], axis=1)
    if values_NC[:, limit:].any():  # lengths that are nothing beside the scale would be rounded up to all of it
        table_B4[~is_coded_B & (largest_B > 0), 1] = np.inf
    return steps_NC.astype(np.int8), table_B4.astype(np.float64)


@dataclass(frozen=True)
class PlaneQuery:
    """Queries as one plane is asked for them.

    codes_QC: for the kernel; with a `fine` above 1, Q second codes follow, and a product is `fine` times the first and
    once the second. A row of the block b has at most factor_QB[:, b] times the product, and slack_QB[:, b] more.
    """

    codes_QC: CodeArray
    fine: int
    factor_QB: DoubleArray
    slack_QB: DoubleArray

    def of(self, number: int) -> "PlaneQuery":
        """One of the queries."""
        codes_QC = self.codes_QC[number :: len(self.factor_QB)]
        return PlaneQuery(np.ascontiguousarray(codes_QC), self.fine, self.factor_QB[[number]], self.slack_QB[[number]])

    def exact(self, number: int) -> IntArray:
        """The whole code (C,) of one of the queries."""
        first, *second = self.codes_QC[number :: len(self.factor_QB)].astype(np.int64)
        code_C: IntArray = self.fine * first + second[0] if second else first
        return code_C


class Codes:
    """The codes of a segment, memory-mapped. Call `check` before they are read."""

    def __init__(self, file: MappedFile, segment: Segment) -> None:
        """Raises DataError for a file that is not of the vectors of this segment."""
        self._file = file
        self.layout = _layout_of(file, segment)
        arrays: dict[str, Any] = {}
        for name, (start, shape, dtype) in self.layout.regions().items():
            arrays[name] = np.ndarray(shape, dtype, buffer=file.data, offset=start) if math.prod(shape) else None
        self._basis_DD, self._weights_C, self._table_BT = (arrays[name] for name in ("basis", "weights", "table"))
        self.head_NC: CodeArray = arrays["head"]
        self.tail_NC: CodeArray | None = arrays["tail"]
        self._turning_DD: DoubleArray | None = None

    def __len__(self) -> int:
        return self.layout.num_rows

    @property
    def num_blocks(self) -> int:
        """Blocks of rows."""
        return self.layout.num_blocks

    def check(self) -> None:
        """Raises DataError naming a damaged block of the file."""
        self._file.check(0, self._file.num_bytes)
        if self.layout.is_rotated and self._turning_DD is None:
            self._turning_DD = np.asarray(self._basis_DD).T.astype(np.float64)

    def asked(self, queries_QD: FloatArray) -> "Asked":
        """The queries as these codes are asked for them."""
        exact_QD = queries_QD.astype(np.float64)
        turned_QD = exact_QD @ self._turning_DD if self._turning_DD is not None else exact_QD
        return Asked(self.layout, turned_QD, exact_QD, self._weights_C, self._table_BT)


class Asked:
    """Queries as the codes of a segment are asked for them.

    The bound by the head is of the whole product. That by both planes is the sum of theirs, without what the head has
    of the lengths of the tail.
    """

    def __init__(
        self,
        layout: Layout,
        turned_QD: DoubleArray,
        exact_QD: DoubleArray,
        weights_C: FloatArray,
        table_BT: DoubleArray,
    ) -> None:
        self._layout, self._turned_QD, self._exact_QD = layout, turned_QD, exact_QD
        self._weights_C, self._table_BT = weights_C, table_BT

    @functools.cached_property
    def head(self) -> PlaneQuery:
        """For the head."""
        layout, tail_QD = self._layout, self._turned_QD[:, self._layout.head :]
        width = layout.columns[0]
        head_QC = np.zeros((len(tail_QD), width))
        head_QC[:, : layout.head] = self._turned_QD[:, : layout.head]
        head_QC[:, layout.head : layout.lengths.start] = self._turned_QD[:, : layout.residuals]
        for number, group_QD in enumerate(_groups_of(tail_QD, layout.groups), layout.lengths.start):
            head_QC[:, number] = np.sqrt(np.square(group_QD).sum(axis=1)) * (1 + 1e-9)
        # What was rounded to float32 are the turned rows, and these divided by the weights.
        relative = layout.rotation_error + 16 * _ROUNDOFF
        norm_Q1 = np.sqrt(np.square(self._exact_QD).sum(axis=1))[:, None]
        slack_QB = norm_Q1 * (relative * self._table_BT[:, _NORM] + layout.embed_dim * _SHORTEST)
        # As large as the sum of products still fits: 127² a column, of a number of at most `fine` + 1 such codes.
        fine = min(_FINE, (2**31 - 1) // (_LARGEST_CODE**2 * width) - 1) if layout.is_rotated else 1
        values_QC = head_QC * self._weights_C[:width]
        return _asked(values_QC, self._table_BT[:, :_FACTS], (layout.head, layout.residuals), fine, slack_QB)

    @functools.cached_property
    def tail(self) -> PlaneQuery:
        """For the tail, if there is one."""
        layout = self._layout
        width, columns = layout.columns
        tail_QC = np.zeros((len(self._turned_QD), columns))
        tail_QC[:, : layout.tail] = self._turned_QD[:, layout.head :]
        values_QC = tail_QC * self._weights_C[width:]
        return _asked(values_QC, self._table_BT[:, _FACTS:_NORM], (columns, 0), 1, np.zeros((1, 1)))


def _asked(
    values_QC: DoubleArray, facts_B4: DoubleArray, numbers: tuple[int, int], fine: int, slack_QB: DoubleArray
) -> PlaneQuery:
    head, residuals = numbers
    limit = head + residuals
    largest_Q = np.abs(values_QC).max(axis=1, initial=0.0)
    step_Q1 = np.where(largest_Q > 0, largest_Q * (1 + 1e-9) / _LARGEST_CODE, 1.0)[:, None]
    left_QC = values_QC / step_Q1
    codes = []
    for part in (1, fine) if fine > 1 else (1,):
        codes_QC = np.rint(left_QC * part)
        if part == fine:
            codes_QC[:, limit:] = np.ceil(left_QC[:, limit:] * part)
        codes.append(codes_QC.astype(np.int8))
        left_QC = left_QC - codes_QC / part
    scale_B, first_B, rest_B, code_B = facts_B4.T
    with np.errstate(invalid="ignore"):  # a query of zeros, and a block of which nothing is known
        slack_QB = slack_QB + (1 + 1e-9) * (
            _norms(values_QC[:, :residuals]) * first_B
            + _norms(values_QC[:, residuals:head]) * rest_B
            + step_Q1 * _norms(left_QC[:, :limit]) * (scale_B * code_B)
        )
    slack_QB[np.isnan(slack_QB)] = np.inf
    return PlaneQuery(np.concatenate(codes), fine, step_Q1 / fine * scale_B, slack_QB)


def _norms(rows_QC: DoubleArray) -> DoubleArray:
    norms_Q1: DoubleArray = np.sqrt(np.square(rows_QC).sum(axis=1, keepdims=True))
    return norms_Q1


def _layout_of(file: MappedFile, segment: Segment) -> Layout:
    """Raises DataError when it is not that of the vectors of the segment, or damaged."""
    try:
        values = json.loads(file.piece(0, min(_HEADER_BYTES, file.num_bytes)))
        layout = Layout(**values)
        num_bytes = layout.num_bytes
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"its header cannot be read ({error}); {ADVICE}", at=file.path) from error
    found = (layout.vectors, layout.vector_type, layout.num_rows, layout.embed_dim, layout.format)
    vectors = segment.facts.files[VECTORS].digest
    if found != (vectors, segment.vector_type, len(segment), segment.embed_dim, _FORMAT) or num_bytes != file.num_bytes:
        raise DataError(f"its codes are not of the vectors of this segment; {ADVICE}", at=file.path)
    return layout


def fits(segment: Segment, file: MappedFile) -> bool:
    """Whether the codes say that they are of the vectors of this segment; reads their header."""
    try:
        _layout_of(file, segment)
    except DataError:
        return False
    return True
