"""Re-rankers against their definitions, row by row in float64."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import compat, config, ops, rerank
from engine.errors import UserError
from engine.rerank import Aim, Cmfp, Cmrr, KReciprocal, Rerank

ALL = [Cmfp(3), Cmrr(4, 2), Aim(4, 2), KReciprocal(5, 2)]


def named(rerankers):
    return pytest.mark.parametrize("reranker", rerankers, ids=lambda one: type(one).__name__)


def people(query_count, gallery_count, gap=0.0, seed=0, width=12):
    """Features of five people in two modalities that lie `gap` apart, and whose they are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=generator, dtype=torch.float64)
    away = gap * F.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)

    def rows(count, shift):
        ids = torch.arange(count) % 5
        return centres[ids] + 0.5 * torch.randn(count, width, generator=generator, dtype=torch.float64) + shift, ids

    (query, query_ids), (gallery, gallery_ids) = rows(query_count, away), rows(gallery_count, -away)
    return query, gallery, query_ids, gallery_ids


def unit(rows):
    rows = rows.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest(similarity, k):
    """Columns of the k largest entries of each row, the lower index first among equals."""
    return [[int(i) for i in np.argsort(-row, kind="stable")[:k]] for row in similarity]


def top(similarity, k):
    kept = np.zeros_like(similarity)
    for row, columns in enumerate(nearest(similarity, k)):
        kept[row, columns] = similarity[row, columns]
    return kept


def propagated(query, gallery, k):
    """CMFP's distance."""

    def spread(rows):
        total = np.zeros_like(rows)
        for bank in (query, gallery):
            kept = np.maximum(top(rows @ bank.T, k), 0)
            share = kept.sum(axis=1, keepdims=True)
            total += kept / np.where(share > 0, share, 1) @ bank
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    return 1 - spread(query) @ spread(gallery).T


def inferred(query, gallery, k1, k2):
    """AIM's distance."""
    to_query, to_gallery = top(query @ gallery.T, k1), top(gallery @ gallery.T, k1)
    mean = np.array([to_gallery[columns].mean(axis=0) for columns in nearest(gallery @ gallery.T, k2)])
    return np.array(
        [
            [2 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) - q @ g for b, g in zip(mean, gallery, strict=True)]
            for a, q in zip(to_query, query, strict=True)
        ]
    )


def mutual(query, gallery, k, k2, weight):
    """CMRR's distance, with sets as sets."""
    rows = np.vstack([query, gallery])
    count, places = len(query), range(len(rows))
    distance = np.maximum(2 - 2 * rows @ rows.T, 0)
    np.fill_diagonal(distance, 0)
    distance /= distance.max(axis=1, keepdims=True)

    def neighbors(k):
        to_query, to_gallery = nearest(-distance[:, :count], k), nearest(-distance[:, count:], k)
        return [[*a, *(count + column for column in b)] for a, b in zip(to_query, to_gallery, strict=True)]

    def reciprocal(k):
        lists = neighbors(k)
        return [{j for j in lists[i] if i in lists[j]} for i in places]

    near, half = reciprocal(k), reciprocal(max(1, round(k / 2)))
    weights = np.zeros_like(distance)
    for i in places:
        members = set(near[i])
        for j in near[i]:
            if 3 * len(half[j] & near[i]) > 2 * len(half[j]):
                members |= half[j]
        columns = sorted(members)
        weights[i, columns] = np.exp(-distance[i, columns])
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.array([weights[columns].mean(axis=0) for columns in neighbors(k2)])
    shared = np.minimum(weights[:count, None], weights[None, count:]).sum(axis=2)
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * distance[:count, count:]


@pytest.mark.parametrize(("query_count", "gallery_count"), [(17, 11), (1, 9), (13, 1), (1, 1)])
@pytest.mark.parametrize("k", [1, 3, 6, 40])
def test_each_is_what_it_is_defined_to_be(query_count, gallery_count, k):
    query, gallery, *_ = people(query_count, gallery_count, gap=0.5)
    rows = unit(query), unit(gallery)
    for k2 in (1, 4, 40):
        assert Aim(k, k2)(query, gallery).numpy() == pytest.approx(inferred(*rows, k, k2))
        assert Cmrr(k, k2, 0.4)(query, gallery).numpy() == pytest.approx(mutual(*rows, k, k2, 0.4))
    assert Cmfp(k)(query, gallery).numpy() == pytest.approx(propagated(*rows, k))


@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (4, 1, 0.0), (200, 300, 1.0)])
def test_k_reciprocal_is_the_drop_in_on_euclidean_distances(k1, k2, weight):
    query, gallery, *_ = people(17, 11)
    rows = np.vstack([unit(query), unit(gallery)])
    joint = np.sqrt(np.maximum(2 - 2 * rows @ rows.T, 0))
    np.fill_diagonal(joint, 0)
    expected = compat.re_ranking(joint[:17, 17:], joint[:17, :17], joint[17:, 17:], k1, k2, weight)
    assert KReciprocal(k1, k2, weight)(query, gallery).numpy() == pytest.approx(expected, abs=2e-6)


@named(ALL)
def test_order_and_length_of_the_rows_do_not_matter(reranker):
    query, gallery, *_ = people(17, 11)
    expected = reranker(query, gallery)
    generator = torch.Generator().manual_seed(1)
    to_query, to_gallery = (torch.randperm(count, generator=generator) for count in (17, 11))
    shuffled = reranker(3 * query[to_query], 0.1 * gallery[to_gallery])
    torch.testing.assert_close(shuffled, expected[to_query][:, to_gallery])


@named([Cmfp(3), Cmrr(4, 2, 0.0), KReciprocal(5, 2, 0.0)])
def test_exchanging_queries_and_gallery_transposes(reranker):
    query, gallery, *_ = people(17, 11)
    torch.testing.assert_close(reranker(gallery, query), reranker(query, gallery).T)


@named(ALL)
def test_only_aim_gives_a_query_the_same_result_alone(reranker):
    query, gallery, *_ = people(17, 11)
    alone = torch.cat([reranker(query[i : i + 1], gallery) for i in range(17)])
    assert torch.allclose(alone, reranker(query, gallery)) == isinstance(reranker, Aim)


def test_a_gap_between_modalities_hides_the_gallery_from_k_reciprocal_and_not_from_cmrr():
    query, gallery, query_ids, gallery_ids = people(60, 20, gap=20.0, width=64)
    scores = {
        reranker.title: ops.rank(reranker(query, gallery), query_ids, gallery_ids).mAP
        for reranker in (KReciprocal(10, 3, 0.0), Cmrr(6, 2, 0.0))
    }
    assert scores["CMRR"] > 0.95 and scores["k-reciprocal"] < 0.6


@named(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_zero_rows_give_finite_distances(reranker, dtype):
    query, gallery, *_ = people(9, 7)
    query[3], gallery[2] = 0, 0
    distance = reranker(query.to(dtype), gallery.to(dtype))
    assert distance.shape == (9, 7) and bool(distance.isfinite().all())
    assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@named(ALL)
def test_without_queries_or_gallery_there_are_no_distances(reranker):
    assert reranker(torch.ones(0, 3), torch.ones(2, 3)).shape == (0, 2)
    assert reranker(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)


@named(ALL)
def test_rows_that_are_all_equal_are_in_nobodys_way(reranker):
    assert bool(reranker(torch.ones(4, 3), torch.ones(5, 3)).isfinite().all())


def test_a_long_distance_matrix_is_searched_in_blocks(monkeypatch):
    query, gallery, *_ = people(17, 11)
    expected = Cmrr(4, 2)(query, gallery)
    monkeypatch.setattr(rerank, "BLOCK_ROWS", 5)
    assert torch.equal(Cmrr(4, 2)(query, gallery), expected)


def test_wrong_features_and_settings_are_named():
    rows = torch.ones(2, 3)
    with pytest.raises(TypeError, match="query must be a tensor"):
        Cmfp()(rows.numpy(), rows)
    with pytest.raises(ValueError, match="gallery must be of size 3 in dimension 1"):
        Aim()(rows, torch.ones(2, 4))
    with pytest.raises(ValueError, match="gallery must be float32 like query"):
        Cmrr()(rows, rows.double())
    with pytest.raises(ValueError, match="query must be finite"):
        KReciprocal()(rows * torch.nan, rows)
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got int 0"):
        Cmfp(0)
    with pytest.raises(ValueError, match=r"weight must be a number in \[0, 1\], got float 1.5"):
        Cmrr(weight=1.5)


def test_a_label_says_all_settings():
    labels = [one.label for one in (Cmfp(), Cmrr(25), Aim(), KReciprocal())]
    assert labels == [
        "CMFP(te) k=30",
        "CMRR k=25 k2=6 weight=0.3",
        "AIM k1=30 k2=6",
        "k-reciprocal k1=20 k2=6 weight=0.3",
    ]


def test_every_reranker_can_be_a_row():
    choices = get_args(get_args(get_type_hints(Rerank)["rows"])[0])
    assert set(choices) == {item.name for item in fields(Rerank)} - {"rows"}
    assert [type(one) for one in Rerank(rows=choices).chosen] == [Cmfp, Cmrr, Aim, KReciprocal]


def test_a_command_line_names_rerankers_by_the_settings_of_the_run():
    settings = Rerank(cmfp=Cmfp(8), aim=Aim(8, 2))
    assert settings.parse("cmfp") == Cmfp(8)
    assert settings.parse("cmfp:5") == Cmfp(5)
    assert settings.parse("aim:4") == Aim(4, 2)
    assert settings.parse("cmrr:9,3,0.5") == Cmrr(9, 3, 0.5)
    assert settings.parse("k-reciprocal") == settings.parse("k_reciprocal") == KReciprocal()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cmpf", "expected one of cmfp, cmrr, aim, k-reciprocal, with values as in cmrr:25"),
        ("rows:1", "expected one of"),
        ("", "expected one of"),
        ("cmfp:", "k must be a whole number, got ''"),
        ("cmrr:1.5", "k must be a whole number, got '1.5'"),
        ("cmrr:5,2,much", "weight must be a number, got 'much'"),
        ("cmrr:5,2,nan", r"weight must be a number in \[0, 1\]"),
        ("aim:0", "k1 must be an integer of at least 1"),
        ("aim:3,2,1", r"aim has 2 settings \(k1, k2\), got 3"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_explained(text, message):
    with pytest.raises(UserError, match=f"--rerank {text}: {message}"):
        Rerank().parse(text)


def test_a_configuration_has_them_under_evaluate():
    loaded = config.load("regdb", ["evaluate.rerank.rows=[cmfp, k_reciprocal]", "evaluate.rerank.cmrr.k=25"])
    assert loaded.evaluate.rerank.chosen == [Cmfp(8), KReciprocal()]
    assert loaded.evaluate.rerank.parse("cmrr") == Cmrr(25)
    with pytest.raises(UserError, match=r"evaluate.rerank.rows.0: expected one of cmfp.* got 'cmpf'; did you mean"):
        config.load("regdb", ["evaluate.rerank.rows=[cmpf]"])
    with pytest.raises(UserError, match="evaluate.rerank.cmfp.k must be an integer of at least 1, got int 0"):
        config.load("regdb", ["evaluate.rerank.cmfp.k=0"])
