from __future__ import annotations

import pytest
import torch
from emulated import cuda_backend
from graph_checks import fixture, same_bits_for_any_thread_count
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_results import same_bits

from engine import ops
from engine.ops.rank import cpu, reference

BACKENDS = ("cpu", "emulator", "reference")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with cuda_backend() if request.param == "emulator" else ops.use_backend(request.param):
        yield request.param


def query_by_query(distance, query_ids, gallery_ids, query_cams, gallery_cams, protocol, max_rank):
    """The protocols as data_and_evaluation describes them, one query at a time."""
    curves, precisions, penalties = [], [], []
    for query, row in enumerate(distance.tolist()):
        shown = []
        for image in sorted(range(len(row)), key=lambda image: (row[image], image)):
            same_place = query_cams[query] == 3 and gallery_cams[image] == 2
            same_view = query_ids[query] == gallery_ids[image] and query_cams[query] == gallery_cams[image]
            if not (protocol == "sysu" and same_place or protocol == "llcm" and same_view):
                shown.append(int(gallery_ids[image]))
        own = int(query_ids[query])
        places = [place for place, identity in enumerate(shown, 1) if identity == own]
        if not places:
            continue
        listed = shown if protocol == "plain" else list(dict.fromkeys(shown))
        curves.append([float(own in listed[: end + 1]) for end in range(max_rank)])
        precisions.append(sum(hits / place for hits, place in enumerate(places, 1)) / len(places))
        penalties.append(len(places) / places[-1])
    valid = len(curves)
    cmc = torch.tensor(curves, dtype=torch.float64).reshape(valid, max_rank).sum(0) / max(valid, 1)
    return cmc, sum(precisions) / max(valid, 1), sum(penalties) / max(valid, 1), valid


@pytest.mark.parametrize("name, protocol", [("sysu", "sysu"), ("regdb", "plain"), ("llcm", "llcm")])
def test_reproduces_the_evaluation_scripts(backend, name, protocol):
    arrays = fixture("f1_eval")
    if backend == "emulator":  # distances that tie or not as they do in float64, of which there is no kernel
        arrays["dist"] = arrays["dist"].unique(return_inverse=True)[1].float()
    inputs = [arrays[key] for key in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    result = ops.rank(*inputs, protocol=protocol, max_rank=20)
    torch.testing.assert_close(result.cmc.float(), arrays[f"{name}_cmc"], rtol=0, atol=1e-7)
    assert result.mAP == pytest.approx(float(arrays[f"{name}_mAP"]), abs=1e-12)
    assert result.mINP == pytest.approx(float(arrays[f"{name}_mINP"]), abs=1e-12)


@settings(max_examples=120, deadline=None)
@given(
    protocol=st.sampled_from(["plain", "sysu", "llcm"]),
    query_count=st.integers(0, 6),
    gallery_count=st.integers(0, 12),
    max_rank=st.integers(1, 15),
    seed=st.integers(0, 10_000),
)
def test_scores_are_those_of_single_queries(protocol, query_count, gallery_count, max_rank, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(1, high, shape, generator=generator)

    distance = draw(6, query_count, gallery_count).float()  # few values: many ties
    ids, cams = (draw(5, query_count), draw(5, gallery_count)), (draw(5, query_count), draw(5, gallery_count))
    result = ops.rank(distance, *ids, *cams, protocol=protocol, max_rank=max_rank)
    cmc, precision, penalty, valid = query_by_query(distance, *ids, *cams, protocol, max_rank)
    assert result.valid_queries == valid
    torch.testing.assert_close(result.cmc, cmc, rtol=0, atol=1e-12)
    assert (result.mAP, result.mINP) == pytest.approx((precision, penalty), abs=1e-12)


def test_without_a_valid_query_all_scores_are_0():
    result = ops.rank(torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([3, 3, 4]), max_rank=5)
    assert result.cmc.tolist() == [0.0] * 5
    assert (result.mAP, result.mINP, result.valid_queries) == (0.0, 0.0, 0)


def test_camera_3_never_sees_camera_2():
    ids = torch.tensor([1]), torch.tensor([1, 2, 1])
    distance, gallery_cams = torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([2, 1, 1])
    from_3 = ops.rank(distance, *ids, torch.tensor([3]), gallery_cams, protocol="sysu", max_rank=2)
    from_6 = ops.rank(distance, *ids, torch.tensor([6]), gallery_cams, protocol="sysu", max_rank=2)
    assert from_3.cmc.tolist() == [0.0, 1.0] and from_3.mAP == 0.5
    assert from_6.cmc.tolist() == [1.0, 1.0] and from_6.mAP == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("protocol", ["plain", "sysu", "llcm"])
def test_blocks_of_queries_change_nothing(backend, protocol, monkeypatch):
    arrays = fixture("f1_eval")
    inputs = [arrays[key] for key in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    expected = ops.rank(*inputs, protocol=protocol)
    monkeypatch.setitem(reference.__globals__, "BLOCK_ENTRIES", 300)
    result = ops.rank(*inputs, protocol=protocol)
    assert torch.equal(result.cmc, expected.cmc)
    assert (result.mAP, result.mINP) == pytest.approx((expected.mAP, expected.mINP), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_distances_keep_the_order_of_the_gallery(dtype):
    ids = torch.tensor([7]), torch.tensor([5, 7, 6])
    assert ops.rank(torch.zeros(1, 3, dtype=dtype), *ids, max_rank=3).cmc.tolist() == [0.0, 1.0, 1.0]


def test_reads_any_layout_and_any_thread_count():
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(301, 400, generator=generator).T
    ids = torch.randint(30, (400,), generator=generator), torch.randint(30, (602,), generator=generator)[::2]

    def run():
        result = ops.rank(distance, *ids)
        return result.cmc, torch.tensor([result.mAP, result.mINP], dtype=torch.float64)

    same_bits_for_any_thread_count(run)
    expected = ops.rank(distance.contiguous(), *ids)
    assert ops.rank(distance, *ids).mAP == expected.mAP


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("protocol", ["plain", "sysu", "llcm"])
@pytest.mark.parametrize("identity_count", [2, 40])  # hundreds of hits, and a few
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_scores_are_those_of_the_reference(backend, isa, protocol, identity_count, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(high, count):
        return torch.randint(high, (count,), generator=generator)

    distance = draw(50, 90 * 317).reshape(90, 317).to(dtype)  # few values: many ties
    distance[0, 5:9] = torch.inf
    ids = draw(identity_count, 90) - 2**62, draw(identity_count, 317) - 2**62
    arguments = distance, *ids, 1 + draw(4, 90), 1 + draw(4, 317)
    native = ops.rank(*arguments, protocol=protocol, max_rank=400)
    with ops.use_backend("reference"):
        expected = ops.rank(*arguments, protocol=protocol, max_rank=400)
    assert native.valid_queries == expected.valid_queries
    assert torch.equal(native.cmc, expected.cmc)
    assert (native.mAP, native.mINP) == pytest.approx((expected.mAP, expected.mINP), abs=1e-12)


@pytest.mark.parametrize("backend", ["emulator"], indirect=True)
@pytest.mark.parametrize("protocol", ["plain", "sysu", "llcm"])
@pytest.mark.parametrize(("gallery_count", "identity_count"), [(617, 1), (617, 2), (1100, 700), (70000, 60000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_galleries_on_the_emulator(backend, protocol, gallery_count, identity_count, dtype):
    """More images of an identity, or more identities, than a block counts in one reading."""
    generator = torch.Generator().manual_seed(0)

    def draw(high, count):
        return torch.randint(high, (count,), generator=generator)

    query_count = 3 if gallery_count > 10_000 else 9
    distance = (draw(500, query_count * gallery_count).reshape(query_count, gallery_count) - 100).to(dtype)
    distance[0, 5:9], distance[1, 5:600] = torch.inf, -torch.inf
    gallery_ids = draw(identity_count, gallery_count) + 2**62
    query_ids = gallery_ids[draw(gallery_count, query_count)]
    arguments = (
        distance,
        query_ids,
        gallery_ids,
        torch.tensor([3, 1, 4]).repeat(3)[:query_count],
        draw(5, gallery_count),
    )
    options = {"protocol": protocol, "max_rank": gallery_count}
    result = ops.rank(*arguments, **options)
    with cuda_backend(descending=True):
        assert same_bits(ops.rank(*arguments, **options), result)
    expected = cpu(*arguments, **options)
    assert result.valid_queries == expected.valid_queries > 0
    assert torch.equal(result.cmc, expected.cmc)
    assert (result.mAP, result.mINP) == pytest.approx((expected.mAP, expected.mINP), abs=1e-12)


def test_unknown_distances_stop_nothing():
    ids = torch.zeros(100, dtype=torch.int64)
    distance = torch.arange(1e4).reshape(100, 100)
    distance[::2, ::3] = torch.nan
    result = ops.rank(distance, ids, ids)
    assert result.valid_queries == 100 and result.mAP == pytest.approx(1)


def test_wrong_arguments_are_named(monkeypatch):
    distance, query_ids, gallery_ids = torch.ones(2, 3), torch.tensor([1, 2]), torch.tensor([1, 2, 3])
    with pytest.raises(TypeError, match="distance must be a tensor"):
        ops.rank(distance.numpy(), query_ids, gallery_ids)
    with pytest.raises(ValueError, match=r"gallery_ids must be of size 3 in dimension 0 \(the columns of distance\)"):
        ops.rank(distance, query_ids, query_ids)
    with pytest.raises(ValueError, match="protocol must be one of 'plain', 'sysu', 'llcm'"):
        ops.rank(distance, query_ids, gallery_ids, protocol="regdb")
    with pytest.raises(TypeError, match="query_cams must be a tensor for protocol 'sysu', got None"):
        ops.rank(distance, query_ids, gallery_ids, protocol="sysu")
    with pytest.raises(ValueError, match="max_rank must be an integer of at least 1"):
        ops.rank(distance, query_ids, gallery_ids, max_rank=0)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    distance[1, 2] = torch.nan
    with pytest.raises(ValueError, match="distance must be without NaN, got 1 of 6 entries"):
        ops.rank(distance, query_ids, gallery_ids)
