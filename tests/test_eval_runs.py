"""Evaluation inside a run, on several sets, and of any model without one; the page of answers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmedx_fast import cli
from mmedx_fast.config import Config, ConfigError, EvalSetConfig, load_config
from mmedx_fast.evaluation.browse import Source, read_page, write_browser
from mmedx_fast.evaluation.metrics import read_rows
from mmedx_fast.pipeline import headline, make_report, write_summary
from mmedx_fast.report_data import load_run
from mmedx_fast.stages import eval_single
from mmedx_fast.stages.context import Context, open_context
from mmedx_fast.stages.evaluate import eval_stage, run_eval
from tests._canned import CannedEngine

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
SMALL = ["phantom.train=20", "phantom.validation=20", "phantom.test=20", "eval.chunk_size=7"]
SMALL += ["data.max_prompt_length=400"]
EVIL = "</script><script>alert('x')</script><!-- <b onload=\"y\"> \u2028 {0} %s"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CannedEngine:
    """The canned engine, for every context."""
    made = CannedEngine()
    monkeypatch.setattr(Context, "_start_engine", lambda self: made)
    return made


def write_set(folder: Path, count: int, extra: list[dict[str, Any]] | None = None) -> Path:
    """Questions as MMedExpert has them, with one that names a missing image and one that is open."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (50, 40), (200, 10, 10)).save(folder / "images" / "a.png")
    options = {"A": "rickets", "B": "fracture", "C": EVIL, "D": "tumour"}
    rows: list[dict[str, Any]] = [
        {
            "id": f"{folder.name}{i}",
            "question": f"{EVIL} Which, of {folder.name} {i}?",
            "options": options,
            "answer_label": "ABCD"[i % 4],
            "answer": options["ABCD"[i % 4]],
            "images": ["a.png"] * (i % 3),
            "specialty": "pediatrics" if i % 2 else "brain_senses",
            "body_system": "Skeletal",
        }
        for i in range(count)
    ]
    rows.append({**rows[0], "id": "gone", "images": ["gone.png"]})
    rows.append(
        {"id": "open", "question": "Which organ?", "answer": "liver", "answer_type": "open"}
    )
    text = "".join(json.dumps(row) + "\n" for row in [*rows, *(extra or [])])
    (folder / "test.jsonl").write_text(text)
    return folder


def config(folder: Path, *more: str) -> Config:
    return load_config(CONFIG, [f"run_dir={folder}", *SMALL, *more])


def of_sets(tmp_path: Path) -> list[str]:
    one, two = write_set(tmp_path / "one", 9), write_set(tmp_path / "two", 5)
    sets = f"{{one: {{path: {one}}}, two: {{path: {two}, limit: 4}}, ph: {{path: phantom}}}}"
    return [f"eval.sets={sets}", "eval.models=[base]"]


# -- inside a run --------------------------------------------------------------------------------


def test_without_sets_results_lie_where_they_always_did(
    tmp_path: Path, engine: CannedEngine
) -> None:
    with open_context(config(tmp_path / "run")) as ctx:
        found = run_eval(ctx, ["base"])
        assert run_eval(ctx, ["base"]) == found
        folder = eval_stage(ctx, "base").dir
        summary = write_summary(ctx)
    assert folder == tmp_path / "run" / "eval" / "base"
    assert len(engine.asked) == 20, "what is done is not asked again"
    rows = list(read_rows(folder / "predictions.jsonl"))
    assert [row["set"] for row in rows] == ["test"] * 20
    assert list(found) == ["base"] and found["base"]["questions"] == 20
    assert set(found["base"]["phases"]) == {"load", "eval"} and "sets" not in summary
    assert sorted(p.name for p in folder.iterdir()) == [
        *("done.json", "metrics.json", "predictions.jsonl", "stage.json")
    ]
    page = read_page((tmp_path / "run" / "eval" / "predictions.html").read_text())
    assert len(page["rows"]) == 20 and len(page["images"]) == 20


def test_sets_have_places_figures_and_pages_of_their_own(
    tmp_path: Path, engine: CannedEngine
) -> None:
    overrides = of_sets(tmp_path)
    with open_context(config(tmp_path / "run", *overrides)) as ctx:
        assert ctx.max_images == 2
        found = run_eval(ctx)
        asked = len(engine.asked)
        summary = write_summary(ctx)
        report = make_report(ctx.run.path).read_text()
    assert {name: part["questions"] for name, part in found.items()} == {
        "base/one": 10,
        "base/two": 4,
        "base/ph": 20,
    }
    rejected = tmp_path / "run" / "eval" / "base" / "one" / "rejected.jsonl"
    assert [json.loads(line)["id"] for line in rejected.read_text().splitlines()] == ["gone"]
    assert found["base/one"]["rejected"] == 1 and found["base/two"]["rejected"] == 0
    assert list(summary["sets"]) == ["one", "two", "ph"]
    assert summary["macro_accuracy"] == {"base": summary["sets"]["one"]["base"]["macro_accuracy"]}
    text = headline(summary)
    assert [line for line in text.splitlines() if line in ("one", "two", "ph")] == [
        "one",
        "two",
        "ph",
    ]
    data = load_run(tmp_path / "run")
    assert [row["set"] for row in data.predictions["base"]] == ["one"] * 10
    assert "<script>alert" not in report and not data.problems
    # One set more, and the limit of another: only what changed is asked.
    three = write_set(tmp_path / "three", 3)
    more = [f"eval.sets.three.path={three}", "eval.sets.two.limit=3"]
    with pytest.warns(UserWarning, match="base/two"):
        with open_context(config(tmp_path / "run", *overrides, *more)) as ctx:
            run_eval(ctx)
    assert len(engine.asked) == asked + 4 + 3


def test_a_set_that_is_trained_on_is_refused(tmp_path: Path, engine: CannedEngine) -> None:
    from mmedx_fast.data.phantom import write_phantom

    sizes = {"train": 20, "validation": 20, "test": 20}
    folder = write_phantom(tmp_path / "ph", **sizes, seed=0)
    sets = f"eval.sets={{x: {{path: {folder}, split: train}}}}"
    with open_context(config(tmp_path / "run", sets)) as ctx:
        with pytest.raises(ValueError, match="overlap in 20 questions"):
            run_eval(ctx, ["base"])


def test_a_set_that_is_not_there_is_named(tmp_path: Path, engine: CannedEngine) -> None:
    with open_context(config(tmp_path / "run", "eval.sets={x: {path: nowhere}}")) as ctx:
        with pytest.raises(ConfigError, match=r"set x: path = nowhere"):
            run_eval(ctx, ["base"])


# -- any model on any data -----------------------------------------------------------------------


def test_any_data_without_a_run(
    tmp_path: Path, engine: CannedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_set(tmp_path / "mine", 9), tmp_path / "out"
    command = ["eval", str(CONFIG), "--data", str(data), "--out", str(out), *SMALL]
    command += ["eval.num_samples=3"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "pass@3" in said and "left out" in said
    for name in ("predictions.jsonl", "metrics.json", "predictions.html", "rejected.jsonl"):
        assert (out / name).is_file(), name
    assert json.loads((out / "metrics.json").read_text())["questions"] == 10
    asked = len(engine.asked)
    assert cli.main(command) == 0 and len(engine.asked) == asked
    assert cli.main([*command, "eval.num_samples=2"]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli.main([*command, "--limit", "2"]) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "nowhere"], ["nowhere", "no such file"]),
        (["--data", "phantom", "--limit", "0"], ["--limit 0"]),
        (["--data", "phantom", "--model", "no/model"], ["no/model"]),
        (["--data", "phantom", "--only", "base"], ["--only", "--data"]),
        (["--model", "somewhere"], ["--model", "--data"]),
        (["--set", "x"], ["--set x", "test"]),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    more: list[str],
    words: list[str],
    tmp_path: Path,
    engine: CannedEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = [] if "--set" in more or "somewhere" in more else ["--out", str(tmp_path / "out")]
    where = [f"run_dir={tmp_path / 'run'}", *SMALL]
    assert cli.main(["eval", str(CONFIG), *more, *out, *where]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_a_model_folder_is_told_from_an_adapter_and_from_neither(tmp_path: Path) -> None:
    from mmedx_fast.tiny import assets_folder

    cfg, tiny = load_config(CONFIG), assets_folder()
    assert eval_single.find_model(cfg, None) == (tiny, None)
    assert eval_single.find_model(cfg, str(tiny)) == (tiny, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(ConfigError, match="neither config.json"):
        eval_single.find_model(cfg, str(adapter))
    for base, fits in ((f"/elsewhere/{tiny.name}", True), ("some/7B", False), (None, True)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        if fits:
            assert eval_single.find_model(cfg, str(adapter)) == (tiny, adapter)
        else:
            with pytest.raises(ConfigError, match=r"an adapter on some/7B.*model.path=some/7B"):
                eval_single.find_model(cfg, str(adapter))
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        eval_single.find_model(cfg, str(adapter))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_real_engine_answers_for_checkpoint_and_adapter(kind: str, tmp_path: Path) -> None:
    """Both engines, whole: the bare checkpoint and an adapter on it give different, readable answers."""
    import sys

    from mmedx_fast.tiny import assets_folder
    from tests.test_rollout import make_adapter

    adapter = make_adapter(assets_folder(), tmp_path / "adapter", 1)
    program = [sys.executable, "-m", "mmedx_fast.cli", "eval", str(CONFIG), "--data=phantom"]
    settings = ["--limit=6", f"rollout.engine={kind}", "eval.max_completion_length=24", *SMALL]
    found = []
    for name, more in (("base", []), ("adapter", [f"--model={adapter}"])):
        out = tmp_path / name
        done = subprocess.run(
            [*program, f"--out={out}", *more, *settings], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append([row["completion"] for row in read_rows(out / "predictions.jsonl")])
    assert len(found[0]) == len(found[1]) == 6 and found[0] != found[1]


# -- the page ------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags in order, ids, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "meta" and given.get("http-equiv"):
            self.policy = str(given["content"])
        assert not any(name.startswith("on") for name in given), (tag, attrs)
        assert "src" not in given and "href" not in given, "nothing is loaded"

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture
def page(tmp_path: Path, engine: CannedEngine) -> Iterator[Path]:
    write_set(tmp_path / "evil", 30)
    cfg = config(tmp_path / "unused")
    chosen = EvalSetConfig(path=str(tmp_path / "evil"))
    out, _ = eval_single.evaluate(cfg, None, chosen, tmp_path / "out")
    yield out / "predictions.html"


def test_the_page_holds_text_of_data_and_model_as_text_only(page: Path) -> None:
    text = page.read_text()
    found = Elements(text)
    assert found.tags.count("script") == 2 and len(found.scripts) == 2
    assert len(set(found.ids)) == len(found.ids)
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in found.policy and "default-src 'none'" in found.policy
    assert "innerHTML" not in text and "http://" not in text and "https://" not in text
    rows = read_page(text)["rows"]
    assert rows[0]["question"].startswith(EVIL) and rows[0]["options"]["C"] == EVIL
    wanted = set(re.findall(r"\$\('(\w+)'\)", found.scripts[1])) | {"specialty", "outcome", "model"}
    assert wanted <= set(found.ids), "the script finds what it looks for"


def test_a_page_of_many_answers_is_a_fixed_sample_and_says_so(page: Path, tmp_path: Path) -> None:
    predictions = page.parent / "predictions.jsonl"
    sources = [Source("a", "evil", predictions), Source("<b>", "evil", predictions)]
    write_browser(tmp_path / "few.html", "T <i>", sources, 14, 3)
    text = (tmp_path / "few.html").read_text()
    rows = read_page(text)["rows"]
    by_model = {m: [row["id"] for row in rows if row["model"] == m] for m in ("a", "<b>")}
    assert len(by_model["a"]) == 7 and by_model["a"] == by_model["<b>"]
    assert "14 of 62 answers" in text and "other 48 are in predictions.jsonl" in text
    assert "&lt;b&gt;" in text and "T &lt;i&gt;" in text and "<b>" not in text.split("<script")[0]
    # The same questions whatever the order of the file, and counts of all of them.
    lines = predictions.read_text().splitlines(keepends=True)  # whatever a text's own line ends
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(lines)))
    write_browser(tmp_path / "other.html", "T", [Source("a", "evil", other)], 7, 3)
    again = [row["id"] for row in read_page((tmp_path / "other.html").read_text())["rows"]]
    assert sorted(again) == sorted(by_model["a"])
    right = sum(json.loads(line)["correct"] for line in lines)
    assert f"<td>{right}</td>" in text


def test_images_of_some_questions_are_in_the_page(page: Path) -> None:
    found = read_page(page.read_text())
    assert set(found["images"]) == {f"evil/mmedexpert:evil{i}" for i in range(30) if i % 3}
    for images in found["images"].values():
        for image in images:
            assert image.startswith("data:image/jpeg;base64,")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium to run the page")
def test_a_browser_shows_the_answers(page: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    body = shown.stdout.rpartition('<script type="application/json"')[0]
    assert body.count("<article>") == 20
    assert "1–20 of 31 answers" in body and "&lt;script&gt;alert" in body
    assert "<script>" not in body and "<b " not in body
