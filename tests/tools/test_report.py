"""The HTML report: what stands in it, why something does not, and how a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import report

from engine import pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROW = re.compile(r"<tr>(.*?)</tr>")
CELL = re.compile(r"<t[dh][^>]*>(.*?)</t[dh]>")


def write(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments), "--out", str(out)])
    assert report.main() == 0
    return out.read_text()


@pytest.fixture(scope="module")
def page(salcr, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return write(monkeypatch, tmp_path_factory.mktemp("report") / "new" / "report.html", salcr, "--queries", 2)


def section(page, name):
    return re.search(f'<section id="{name}">(.*?)</section>', page, re.DOTALL)[1]


def rows(part):
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in CELL.findall(row)] for row in ROW.findall(part)]


def test_a_report_has_everything_and_needs_nothing_else(page):
    assert "<title>Report: salcr</title>" in page
    names = re.findall(r'<section id="(\w+)">', page)
    assert names == ["runs", "results", *report.SECTIONS, "settings", "environment"]
    assert re.findall(r'<a href="#(\w+)">', page) == names
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page and "@import" not in page
    images = re.findall(r'<img src="data:image/(?:svg\+xml|webp);base64,[\w+/=]{3000,}" alt="([^"]+)"', page)
    assert len(images) == page.count("<img") == 4 + 5 + 1 + 4 + 1
    assert any(alt.startswith("all single-shot: the first answer is right for") for alt in images)
    assert 150_000 < len(page) < 1_500_000
    missing = re.findall(r'<p class="missing">(.*?)</p>', page)
    assert missing == ["Not shown: salcr: its method (salcr) has no memory that evolves, and so no events"]


def test_plain_and_reranked_scores_stand_apart(page, salcr):
    part = section(page, "results")
    plain, reranked, way = (rows(text) for text in part.split("<h3>")[1:])
    scores = json.loads((salcr / "metrics.jsonl").read_text().splitlines()[-1])["scores"]
    assert [row[0] for row in plain[1:]] == [score["protocol"] for score in scores if not score["rerank"]]
    assert all(row[0].endswith(" + CMFP(te) k=3") for row in reranked[1:]) and len(reranked) == len(plain)
    assert plain[1][3] == f"{scores[0]['values']['R1']:.2f} ± {scores[0]['spread']['R1']:.2f}"
    assert [row[1] for row in way[1:4]] == ["untrained", "after warm-up", "after stage 1"]
    assert way[-1][1].endswith("chosen on these scores")
    assert rows(section(page, "runs"))[1][:6] == ["salcr", "salcr", "sysu, test", "small", "0", "4 of 4"]


def test_runs_stand_side_by_side_and_say_what_they_lack(salcr, firm, footage, tmp_path, monkeypatch):
    bare = tmp_path / "<b>&bare"
    bare.mkdir()
    shutil.copy(salcr / "config.yaml", bare)
    lines = (salcr / "metrics.jsonl").read_text().splitlines()
    (bare / "metrics.jsonl").write_text("\n".join(lines[:3]))
    monkeypatch.setattr(pictures, "encode", lambda figure, kind, dpi: b"")
    page = write(monkeypatch, tmp_path / "report.html", salcr, firm, bare, footage, "--quick")
    name = html.escape("<b>&bare")
    assert "<b>&bare" not in page and f"<h3>{name}</h3>" in page
    assert rows(section(page, "runs"))[3][5] == "3 of 4, unfinished"
    for text in (
        f"Not shown: {name}: {html.escape(str(bare))}/last.pt: no such checkpoint",
        f"Not shown: {name}: has no environment.json",
        "Not shown: unscored: no epoch has scores",
        "Not shown: unscored: has no test images with identities",
        f"Not shown: {name}: its method (salcr) has no memory that evolves, and so no events",
        "Not shown: left out by --quick",
    ):
        assert text in page, text
    differing = section(page, "settings").partition("<details>")[0]
    changed = {row[0]: row[1:] for row in rows(differing)}
    assert changed["setting"] == ["salcr", "firm", "<b>&bare", "unscored"]
    assert changed["method.name"] == ["salcr", "firm", "salcr", "dcl"] and "seed" not in changed
    assert changed["train.stages.1.epochs"] == ["2", "2", "2", "not there"]
    assert "data.root (where and how fast it runs)" in changed
    same = [row for row in rows(section(page, "results")) if row[0] == "all single-shot"]
    assert [row[1] for row in same] == ["salcr", "firm", "<b>&bare"]
    bold = re.findall("<b>(.*?)</b>", section(page, "results").split("<h3>")[1])
    assert same[0][3] in bold or same[1][3] in bold or same[2][3] in bold
    assert "commit" in section(page, "environment")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_on_a_phone(page, tmp_path):
    found, console = browse(page, tmp_path)
    assert console == ["ready"]
    assert found["title"] == "Report: salcr" and found["width"] <= 375
    assert len(found["images"]) == page.count("<img") and min(found["images"]) > 100


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_would_tell_of_faults(tmp_path):
    wide = '<title>x</title><p style="width: 400px">x</p><img src="data:image/png;base64,AAAA">'
    found, console = browse(f"{wide}<script>undefined_name()</script>", tmp_path)
    assert found == {"title": "x", "width": 408, "images": [0]} and len(console) == 2


def browse(page, folder):
    """What a browser makes of a page in a window of 375 pixels, and what it says on its console."""
    script = """addEventListener("load", () => {
        const shown = frames[0].document, images = [...shown.images].map(image => image.naturalWidth);
        const found = {title: shown.title, width: shown.documentElement.scrollWidth, images};
        document.querySelector("pre").textContent = JSON.stringify(found);
        console.log("ready");
    })"""
    frame = f'<iframe width="375" height="800" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
    file = folder / "frame.html"
    file.write_text(f"<!DOCTYPE html><body>{frame}<pre></pre><script>{script}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, "--enable-logging=stderr", "--dump-dom", file.as_uri()]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    console = re.findall(r':CONSOLE[:(]\d+\)?\] "(.*)", source:', ended.stderr)
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", ended.stdout)[1])), console
