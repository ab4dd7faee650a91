"""The ablation tables of SALCR (Cheng et al., IJCV 2025) and FIRM (Rong et al., ACML 2025): every row as settings, with the
numbers that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
        label: what the row is called.
        train: its settings, "a.b=c" each, on top of the configuration.
        rerank: name of the one score that is shown of it, where that is not the table's `shows`.
        paper: by data set, and re-ranking where there is one ("sysu CMFP(te)"): R1, mAP and mINP of the first protocol,
            then of the second; None for what is not printed or not legible.
    """

    label: str
    train: tuple[str, ...]
    rerank: str = ""
    paper: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows of one table.

    Attributes:
        shows: the scores of every row that are shown: "" plain, "CMFP(te)" with the propagation at test time.
        rerank: re-rankings by which the trained networks are scored anew, as `engine.rerank.Rerank.parse` takes them.
        method: whose settings the rows vary.
    """

    title: str
    rows: tuple[Row, ...]
    shows: tuple[str, ...] = ("",)
    rerank: tuple[str, ...] = ()
    method: str = "salcr"


def _modules(*, fgsal: bool, gpcr: bool, cmfp: bool) -> tuple[str, ...]:
    """DAGL with some of the other modules."""
    switches = {"dagl": True, "fgsal": fgsal, "gpcr": gpcr, "cmfp": cmfp}
    return tuple(f"salcr.{module}.enabled={str(on).lower()}" for module, on in switches.items())


def _full(*changes: str) -> tuple[str, ...]:
    return *_modules(fgsal=True, gpcr=True, cmfp=True), *changes


SALCR = {
    "sysu": (64.44, 60.44, 45.19, 67.17, 72.88, 68.73),
    "sysu CMFP(te)": (78.29, 74.08, 60.68, 79.64, 82.75, 79.65),
    "regdb": (90.58, 83.87, 70.76, 88.69, 82.66, 66.89),
    "regdb CMFP(te)": (93.01, 93.16, 91.04, 94.08, 93.46, 90.73),
}
DAGL = {"sysu": (58.89, 53.87, 37.50, 59.87, 66.17, 61.55)}
DAGL_CMFP = {"sysu": (60.12, 55.38, 42.64)}
WITHOUT_GPCR = {"sysu": (62.07, 58.48, 43.40, 64.29, 71.30, 67.47)}

# What the paper's k_te and k_tr tables vary over, with what the full system has there.
K_TR: dict[str, dict[int, Numbers]] = {
    "sysu": {
        10: (62.87, 58.62, 42.94, 64.90, 70.47, 65.95),
        20: (63.38, 59.37, 44.05, 65.97, 72.34, 68.39),
        30: SALCR["sysu"],
        40: (63.42, 59.79, None, 66.60, 72.37, 68.21),
        50: (63.21, 59.60, 44.66, 67.32, 72.86, 68.72),
    },
    "regdb": {
        4: (88.93, 82.81, 69.43, 88.79, 82.19, 65.82),
        8: SALCR["regdb"],
        15: (90.30, 83.83, 71.30, 88.06, 82.81, 67.13),
        20: (90.15, 83.67, 70.92, 87.96, 82.52, 66.80),
        25: (88.74, 82.45, 69.30, 87.53, 81.43, 65.39),
    },
}
K_TE: dict[str, dict[int, Numbers]] = {
    "sysu": {
        10: (76.56, 73.10, 60.51, 78.05, 81.58, 78.48),
        20: (78.00, 73.94, 60.67, 79.14, 82.44, 79.29),
        30: SALCR["sysu CMFP(te)"],
        40: (77.57, 73.39, 59.88, 79.50, 82.54, 79.36),
        50: (76.56, 72.34, 58.68, 78.59, 81.79, 78.47),
    },
    "regdb": {
        4: (92.77, 93.01, 91.44, 92.82, 92.84, 90.88),
        8: SALCR["regdb CMFP(te)"],
        15: (92.18, 92.01, 89.26, 92.28, 92.15, 89.37),
        20: (90.53, 89.09, 84.15, 90.78, 89.51, 84.61),
        25: (88.69, 86.49, 80.80, 89.37, 87.45, 80.96),
    },
}

MODULES = Table(
    "the modules of SALCR",
    (
        Row("B", ("method.name=dcl",), paper={"sysu": (40.83, 39.65)}),
        Row("B + DAGL", _modules(fgsal=False, gpcr=False, cmfp=False), paper=DAGL),
        Row("B + DAGL + FGSAL", _modules(fgsal=True, gpcr=False, cmfp=False)),
        Row("B + DAGL + GPCR", _modules(fgsal=False, gpcr=True, cmfp=False)),
        Row("B + DAGL + FGSAL + GPCR", _modules(fgsal=True, gpcr=True, cmfp=False)),
        Row("B + DAGL + CMFP(tr)", _modules(fgsal=False, gpcr=False, cmfp=True), paper=DAGL_CMFP),
        Row("B + DAGL + FGSAL + CMFP(tr)", _modules(fgsal=True, gpcr=False, cmfp=True), paper=WITHOUT_GPCR),
        Row("B + DAGL + GPCR + CMFP(tr)", _modules(fgsal=False, gpcr=True, cmfp=True)),
        Row("B + DAGL + FGSAL + GPCR + CMFP(tr)", _full(), paper=SALCR),
    ),
    shows=("", "CMFP(te)"),
)

BRANCHES = Table(
    "association in one direction and in both",
    tuple(
        Row(
            label,
            (*_modules(fgsal=False, gpcr=False, cmfp=False), f"salcr.dagl.branch={branch}"),
            paper={"sysu": numbers},
        )
        for label, branch, numbers in (
            ("visible branch", "visible", (53.17, 47.61, 30.68, 54.36, 61.64, 56.92)),
            ("infrared branch", "infrared", (55.67, 51.90, 36.47, 57.61, 64.81, 60.31)),
            ("dual", "dual", DAGL["sysu"]),
        )
    ),
)

LEVELS = Table(
    "the loss terms of GPCR",
    (
        Row("w/o GPCR", _modules(fgsal=True, gpcr=False, cmfp=True), paper=WITHOUT_GPCR),
        Row(
            "+ L^g",
            _full("salcr.gpcr.level=global"),
            paper={"sysu": (63.67, 59.71, 44.88, 66.39, 72.34, 68.35)},
        ),
        Row("+ L^p", _full("salcr.gpcr.level=part"), paper={"sysu": (62.83, 58.97, 44.34, 65.78, 71.85, 68.01)}),
        Row("+ L_gpcr", _full("salcr.gpcr.level=both"), paper=SALCR),
    ),
)

PARTS = Table(
    "the number of parts N_p of FGSAL",
    (
        Row(
            "N_p = 2",
            _full("salcr.fgsal.parts=2"),
            paper={
                "sysu": (64.48, 59.90, 44.36, 68.41, 73.59, 69.21),
                "regdb": (88.98, 82.39, 69.59, 87.29, 81.03, 65.55),
            },
        ),
        Row("N_p = 3", _full("salcr.fgsal.parts=3"), paper=SALCR),
        Row(
            "N_p = 4",
            _full("salcr.fgsal.parts=4"),
            paper={
                "sysu": (62.76, 59.56, 44.55, 65.75, 71.93, 67.69),
                "regdb": (None, 83.49, 71.39, 88.26, 82.70, 66.87),
            },
        ),
    ),
)

# The paper draws these as curves without numbers; at lambda = 0 it calls the module disabled.
SWEEPS = Table(
    "the weight lambda and the neighbours k of GPCR",
    (
        Row("lambda = 0", _modules(fgsal=True, gpcr=False, cmfp=True)),
        *(Row(f"lambda = {weight}", _full(f"salcr.gpcr.weight={weight}")) for weight in (0.1, 0.25, 0.5, 1.0, 2.0)),
        *(Row(f"k = {k}", _full(f"salcr.gpcr.k={k}")) for k in (10, 20, 30, 40, 50)),
    ),
)


FIRM = Table(
    "the modules of FIRM",
    tuple(
        Row(label, changes, paper={"sysu": numbers} if numbers else {})
        for label, changes, numbers in (
            ("w/o VSPF", ("firm.vspf.enabled=false",), (None, 57.9)),
            ("only the last block", ("firm.vspf.blocks=last",), (None, 59.0)),
            ("w/o gated residual", ("firm.vspf.residual=false",), (None, 60.2)),
            ("concatenation", ("firm.vspf.mixing=concat",), (None, 59.5)),
            ("w/o L_align", ("firm.losses.align=0",), (None, 58.1)),
            ("w/o EMCM", ("firm.evolving=false",), ()),
            ("w/o merging", ("firm.merge.enabled=false",), (None, 60.6)),
            ("w/o splitting", ("firm.split.enabled=false",), (None, 60.9)),
            ("FIRM", (), (66.5, 62.1, None, 70.9, 75.2, None)),
        )
    ),
    method="firm",
)


def _k_tr(data: str) -> Table:
    rows = (Row(f"k_tr = {k}", _full(f"salcr.cmfp.k={k}"), paper={data: x}) for k, x in K_TR[data].items())
    return Table("the neighbours k_tr of CMFP(tr)", tuple(rows))


def _k_te(data: str) -> Table:
    rows = (
        Row(f"CMFP(te), k_te = {k}", _full(), f"CMFP(te) k={k}", {f"{data} CMFP(te)": numbers})
        for k, numbers in K_TE[data].items()
    )
    rerank = tuple(f"cmfp:{k}" for k in K_TE[data])
    return Table("the neighbours k_te of CMFP(te)", tuple(rows), ("CMFP(te)",), rerank)


# firm2 is FIRM's Table 2; the others are SALCR's. 9 and 10, fig5 and fig6: the same rows on SYSU-MM01 and on RegDB.
TABLES = {
    "3": MODULES,
    "4": BRANCHES,
    "7": LEVELS,
    "9": PARTS,
    "10": PARTS,
    "11": _k_tr("sysu"),
    "12": _k_tr("regdb"),
    "13": _k_te("sysu"),
    "14": _k_te("regdb"),
    "fig5": SWEEPS,
    "fig6": SWEEPS,
    "firm2": FIRM,
}
