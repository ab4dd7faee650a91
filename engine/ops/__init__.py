"""Operators of the engine: one file each, a plain torch reference, and faster back ends held to it."""

from __future__ import annotations

from engine.ops._backend import backends, use_backend
from engine.ops.affinity import affinity
from engine.ops.cluster_contrast import cluster_contrast
from engine.ops.cmfp import cmfp
from engine.ops.dbscan import dbscan
from engine.ops.jaccard import jaccard
from engine.ops.knn_intersection import knn_intersection
from engine.ops.memory_update_ import memory_update_
from engine.ops.neighbor_contrast import neighbor_contrast
from engine.ops.ot_assign import ot_assign
from engine.ops.propagate import propagate
from engine.ops.rank import Ranking, rank
from engine.ops.segment_mean import segment_mean
from engine.ops.set_intersection import set_intersection
from engine.ops.set_union import set_union
from engine.ops.sinkhorn import Sinkhorn, sinkhorn
from engine.ops.soft_contrast import soft_contrast
from engine.ops.topk import topk

__all__ = [
    "Ranking",
    "Sinkhorn",
    "affinity",
    "backends",
    "cluster_contrast",
    "cmfp",
    "dbscan",
    "jaccard",
    "knn_intersection",
    "memory_update_",
    "neighbor_contrast",
    "ot_assign",
    "propagate",
    "rank",
    "segment_mean",
    "set_intersection",
    "set_union",
    "sinkhorn",
    "soft_contrast",
    "topk",
    "use_backend",
]
