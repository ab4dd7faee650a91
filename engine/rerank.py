"""Re-ranking at test time: distances that take in the neighbours of two images, not the two alone.

A re-ranker holds its settings and turns the features of one trial, of any model, into distances. All of them look at the
whole gallery, and all but AIM at all queries at once (transductive): a query's result then hangs on what else is asked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.errors import UserError
from engine.ops import _check, _csr
from engine.ops._neighbors import largest
from engine.ops._reciprocal import ONE, expanded, min_products, query_expansion, reciprocal

BLOCK_ROWS = 1024
"""Rows of a distance matrix whose neighbours are searched at a time."""


def check_weight(name: str, value: float) -> None:
    """Check a share of a sum."""
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise _check.fail(name, "a number in [0, 1]", value)


@dataclass(frozen=True)
class Reranker:
    """What all re-rankers share.

    Raises:
        ValueError: a setting is out of range.
    """

    title: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "weight":
                check_weight(name, value)
            else:
                _check.count(name, value, 1)

    @property
    def label(self) -> str:
        """The name of a row: "CMFP(te) k=30"."""
        return " ".join([self.title, *(f"{name}={value:g}" for name, value in asdict(self).items())])

    def __call__(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Distances of one trial.

        Args:
            query: `[Q, D]` float, finite; rows need not be unit, they are normalised first.
            gallery: `[G, D]`, likewise. Where a count of neighbours exceeds the rows there are, all are used.

        Returns:
            `[Q, G]`, smaller is more alike; comparable within a row, and with nothing that another re-ranker gives.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        _check.tensor("query", query, "Q D")
        _check.tensor("gallery", gallery, "G D")
        _check.like("gallery", gallery, "query", query)
        _check.size("gallery", gallery, 1, query.shape[1], "the width of query")
        for name, rows in (("query", query), ("gallery", gallery)):
            if not bool(rows.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, gallery = (F.normalize(rows.to(dtype), dim=1) for rows in (query, gallery))
        if len(query) == 0 or len(gallery) == 0:
            return query.new_empty(len(query), len(gallery))
        return self._distance(query, gallery)

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        """`__call__` for unit rows, of which there are some."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cmfp(Reranker):
    """CMFP(te): cosine distance of features that CMFP has propagated (SALCR, IJCV 2025, Eq. 28, 29). Transductive.

    Attributes:
        k: neighbours per block; the paper has 30 on SYSU-MM01, 8 on RegDB.
    """

    title = "CMFP(te)"
    k: int = 30

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        query, gallery = ops.cmfp(query, gallery, self.k)
        return 1 - query @ gallery.T


@dataclass(frozen=True)
class Aim(Reranker):
    """AIM: the affinity inference module of SAAI (Fang et al., ICCV 2023). Looks at one query at a time.

    With S the cosine similarities and T(.) keeping the k1 largest of each row, 0 elsewhere:

        a_q = T(S_qG),  a_g = mean of T(S_hG) over the k2 nearest h of g in the gallery, g included
        distance = 2 - cos(a_q, a_g) - S_qg

    That is the form which the authors' release scores with; it names relations among queries as a further choice, which
    is not used. What differs: of entries that tie with the k1-th, the release keeps all, this the ones of lower index.

    Attributes:
        k1: similarities kept per row; the release has 30 on SYSU-MM01, 8 on RegDB.
        k2: gallery rows that a mean is taken of; 6 and 2.
    """

    title = "AIM"
    k1: int = 30
    k2: int = 6

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        values, nearest = ops.topk(gallery, gallery, min(max(self.k1, self.k2), len(gallery)))
        of_gallery = _dense(values[:, : self.k1], nearest[:, : self.k1], len(gallery))
        of_gallery = F.embedding_bag(nearest[:, : self.k2], of_gallery, mode="mean")
        of_query = _dense(*ops.topk(query, gallery, min(self.k1, len(gallery))), len(gallery))
        return 2 - F.normalize(of_query, dim=1) @ F.normalize(of_gallery, dim=1).T - query @ gallery.T


@dataclass(frozen=True)
class KReciprocal(Reranker):
    """k-reciprocal encoding (Zhong et al., CVPR 2017) of queries and gallery together. Transductive.

    `engine.compat.re_ranking` has the equation. Modalities make no difference to it: where images of one modality are
    more alike than images of one person, the neighbours of a query are other queries.

    Attributes:
        k1: neighbours of the reciprocal sets, besides the image itself.
        k2: neighbours of the query expansion, itself included.
        weight: of the distance itself, in the sum with the Jaccard distance.
    """

    title = "k-reciprocal"
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        return k_reciprocal(_joint_distance(query, gallery), len(query), self.k1, self.k2, self.weight)


@dataclass(frozen=True)
class Cmrr(Reranker):
    """CMRR: k-reciprocal encoding across modalities, after Liang et al., TIP 2021 (H2H). Transductive.

    The paper's text is not openly available, and no release of it is known. What is built here is k-reciprocal encoding
    with one change, which is our reading of the name: neighbours are searched in either modality on its own, so that
    neither can crowd out the other. With N(i, k) the k nearest of i among the queries and the k nearest among the
    gallery, i itself included:

    - R(i, k): the j in N(i, k) that have i in N(j, k): mutual within a modality and across.
    - R*(i), V_i, J_il: as for k-reciprocal encoding (`engine.compat.re_ranking`), with R(j, round(k / 2)) for expansion.
    - The query expansion is a mean of V over N(i, k2).

    Attributes:
        k: neighbours per modality; SALCR's Tables 5 and 6 have 15 and 25 on SYSU-MM01, 8 and 15 on RegDB.
        k2: neighbours per modality of the query expansion.
        weight: of the distance itself, in the sum with the Jaccard distance.
    """

    title = "CMRR"
    k: int = 15
    k2: int = 6
    weight: float = 0.3

    def _distance(self, query: Tensor, gallery: Tensor) -> Tensor:
        distance = _joint_distance(query, gallery)
        count, most = len(query), max(self.k, self.k2)
        to_query = _nearest(distance[:, :count], most)
        to_gallery = _nearest(distance[:, count:], most) + count

        def neighbors(k: int) -> Tensor:
            return torch.cat([to_query[:, :k], to_gallery[:, :k]], dim=1)

        half = max(1, round(self.k / 2))
        return _encoded(distance, count, neighbors(self.k), neighbors(half), neighbors(self.k2), self.weight)


@dataclass(frozen=True)
class Rerank:
    """Which re-ranked rows there are, and the settings of every re-ranker.

    Attributes:
        rows: re-rankers that score a network, in training too, beside the plain rows.
    """

    rows: tuple[Literal["cmfp", "cmrr", "aim", "k_reciprocal"], ...] = ()
    cmfp: Cmfp = Cmfp()
    cmrr: Cmrr = Cmrr()
    aim: Aim = Aim()
    k_reciprocal: KReciprocal = KReciprocal()

    @property
    def chosen(self) -> list[Reranker]:
        """The re-rankers of `rows`."""
        return [getattr(self, name) for name in self.rows]

    def parse(self, text: str) -> Reranker:
        """A re-ranker as a command line names it: "cmrr" has these settings, "cmrr:25" and "aim:30,6" others.

        Values are given in the order of the settings; what is left out is as it stands here.

        Raises:
            UserError: no such re-ranker, too many values, or a value that is none.
        """
        name, colon, values = text.partition(":")
        known = [item.name.replace("_", "-") for item in fields(self) if item.name != "rows"]
        if name.replace("_", "-") not in known:
            raise UserError(f"--rerank {text}: expected one of {', '.join(known)}, with values as in cmrr:25")
        settings: Reranker = getattr(self, name.replace("-", "_"))
        given = values.split(",") if colon else []
        names = list(asdict(settings))
        if len(given) > len(names):
            raise UserError(f"--rerank {text}: {name} has {len(names)} settings ({', '.join(names)}), got {len(given)}")
        try:
            changes = {
                key: _number(key, type(getattr(settings, key)), value) for key, value in zip(names, given, strict=False)
            }
            return replace(settings, **changes)
        except ValueError as error:
            raise UserError(f"--rerank {text}: {error}") from error


def _number(name: str, kind: type, text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} must be a {'whole ' if kind is int else ''}number, got '{text}'") from None


def k_reciprocal(distance: Tensor, query_count: int, k1: int, k2: int, weight: float) -> Tensor:
    """k-reciprocal re-ranking of one matrix of distances among queries, then gallery.

    Args:
        distance: `[Q + G, Q + G]` float in [0, 1].
        query_count: Q.
        k1, k2, weight: as for `engine.compat.re_ranking`.

    Returns:
        `[Q, G]` in the dtype of `distance`.
    """
    rank = _nearest(distance, max(k1 + 1, k2))
    half = rank[:, : round(k1 / 2) + 1]
    return _encoded(distance, query_count, rank[:, : k1 + 1], half, rank[:, :k2], weight)


def _encoded(
    distance: Tensor, query_count: int, near: Tensor, half: Tensor, expansion: Tensor, weight: float
) -> Tensor:
    """Jaccard distance of the k-reciprocal encodings, and its sum with the distance itself.

    Args:
        near, half, expansion: `[N, .]` neighbours of every row: for its reciprocal set, for the sets that may expand it,
            for the query expansion.
    """
    row_count = len(distance)
    members = expanded(reciprocal(near), reciprocal(half), row_count)
    weights, full = _softmax(distance, members), ONE
    if expansion.shape[1] > 1:
        weights, full = query_expansion(weights, expansion), expansion.shape[1] * ONE
    queries, gallery = _rows(weights, 0, query_count), _rows(weights, query_count, row_count)
    shared = torch.cat([sums.double() / full for _, sums in min_products(queries, gallery.t().to_sparse_csr())])
    jaccard = (1 - shared / (2 - shared)).to(distance.dtype)
    return torch.lerp(jaccard, distance[:query_count, query_count:], weight)


def _dense(values: Tensor, columns: Tensor, width: int) -> Tensor:
    """The `[B, width]` matrix with `values` in `columns`, 0 elsewhere."""
    return values.new_zeros(len(values), width).scatter_(1, columns, values)


def _joint_distance(query: Tensor, gallery: Tensor) -> Tensor:
    """Squared Euclidean distances among unit rows of queries, then gallery, each row over its maximum, `[N, N]`."""
    rows = torch.cat([query, gallery])
    distance = (2 - 2 * rows @ rows.T).clamp_(min=0).fill_diagonal_(0)
    largest_of_row = distance.amax(dim=1, keepdim=True)
    return distance / largest_of_row.masked_fill(largest_of_row == 0, 1)


def _nearest(distance: Tensor, k: int) -> Tensor:
    """The k columns of least distance in every row, all if fewer, the lower index first among equals, `[N, k]`."""
    k = min(k, distance.shape[1])
    return torch.cat([largest(-rows, k)[1] for rows in distance.split(BLOCK_ROWS)])


def _softmax(distance: Tensor, members: Tensor) -> Tensor:
    """Softmax of the negative distances over each row's members (keys row * N + column), CSR in fixed point."""
    count = len(distance)
    row, column = members // count, members % count
    row_counts = torch.bincount(row, minlength=count)
    weights = distance.flatten()[members].double().neg().exp()
    weights /= torch.segment_reduce(weights, "sum", lengths=row_counts, unsafe=True)[row]
    return _csr.build(row_counts, column, (weights * ONE).round().long(), count)


def _rows(csr: Tensor, first: int, last: int) -> Tensor:
    """Rows `first` to `last` (excluded) of a CSR matrix."""
    starts = csr.crow_indices()[first : last + 1]
    entries = slice(int(starts[0]), int(starts[-1]))
    return _csr.build(starts.diff(), csr.col_indices()[entries], csr.values()[entries], csr.shape[1])
