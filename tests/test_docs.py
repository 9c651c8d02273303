"""The pages build without a broken link, fetch nothing, and show what the code draws and says."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import mmedx_fast.ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_page_is_built_and_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r"""<(?:script|img|link)[^>]+(?:src|href)=["']?(https?://[^"'\s>]+)""", text
        )
        foreign = [url for url in fetched if "canonical" not in text[: text.index(url)][-120:]]
        assert not foreign, (page, foreign)


def test_every_figure_a_page_shows_is_there() -> None:
    for page in PAGES:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (page, target)


def test_the_pages_name_only_public_ops() -> None:
    """What stands in ``from mmedx_fast.ops import`` can be imported."""
    for page in PAGES:
        for names in re.findall(
            r"from mmedx_fast\.ops import ([^\n#;\"]+)", page.read_text(encoding="utf-8")
        ):
            for name in names.split(","):
                assert name.strip() in mmedx_fast.ops.__all__, (page, name)


def test_the_figures_are_those_the_code_draws(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    drawn["main"].__globals__["HERE"] = tmp_path
    drawn["main"]()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    # The reported counts are text in the figure; outlines may differ with matplotlib's version.
    for name in names:
        fresh, kept = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs/figures"))
        assert re.findall(r"<text[^>]*>([^<]+)", fresh) == re.findall(r"<text[^>]*>([^<]+)", kept)
