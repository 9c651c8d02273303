"""report.html: complete, self-contained, escaped, and written whatever is missing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from mmedx_fast.config import Config
from mmedx_fast.report import write_report
from mmedx_fast.report_data import load_run, series, totals
from mmedx_fast.report_plots import running_mean
from mmedx_fast.report_samples import choose
from mmedx_fast.report_sections import samples_section

MODELS = ["base", "pediatrics", "rl_start", "rl", "merged"]
OPTIONS = {"A": "Normal", "B": "Rickets", "C": "Fracture", "D": "Tumour"}
EVIL = "<script>alert('x')</script>\" onload=\"y"


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prediction(folder, i, right):
    return {
        "id": f"q{i}",
        "specialty": "pediatrics" if i % 2 else "brain_senses",
        "guideline": "bayesian",
        "question": f"Question {i}: {EVIL}",
        "options": OPTIONS | {"D": EVIL},
        "answer": "Rickets",
        "completion": f"Thinking {EVIL}",
        "predicted": "Rickets" if right else None,
        "correct": right,
        "images": [str(folder / "a.png"), str(folder / "missing.png")],
    }


@pytest.fixture
def run(tmp_path):
    return _make(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, text, parsed page) of one report that nothing is missing from."""
    folder = _make(tmp_path_factory.mktemp("run"))
    return folder, *_page(folder)


def _make(tmp_path):
    cfg = Config(name="x", run_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    Image.new("RGB", (50, 40), (200, 10, 10)).save(tmp_path / "a.png")
    for name in ("pediatrics", "brain_senses", "pediatrics.old-1"):
        rows = [{"step": t, "loss": 2.0 / t} for t in range(1, 30)]
        _write(tmp_path / "dsa" / name / "metrics.jsonl", rows)
    rl = [
        {
            "step": t,
            "reward": 0.5,
            "rewards/accuracy_reward/mean": 0.3,
            "reward_guideline/bayesian": None if t == 3 else 0.4,
            "reward_guideline/intuitive": 0.2,
            "kl": 0.01,
            "entropy": 1.0,
            "completions/mean_length": 50,
            "sampling/sampling_logp_difference/mean": 0.01,
            "tokens_saved": 2.5,
            "seconds/rollout": 1.5,
            "tokens/rollout": 300,
        }
        for t in range(1, 6)
    ]
    _write(tmp_path / "gba" / "metrics.jsonl", rl)
    linears = {
        f"model.language_model.layers.{i}.{module}": {"sign_conflict": 0.1 * i}
        for i in range(12)
        for module in ("self_attn.q_proj", "mlp.up_proj")
    }
    cosine = [[1.0, -0.25], [-0.25, 1.0]]
    conflicts = {
        "experts": ["pediatrics", "rl"],
        "linears": linears,
        "summed": {"sign_conflict": 0.314, "kept_fraction": [0.3, 0.5], "cosine": cosine},
    }
    (tmp_path / "caci").mkdir()
    (tmp_path / "caci" / "conflicts.json").write_text(json.dumps(conflicts))
    for m, model in enumerate(MODELS):
        rows = [_prediction(tmp_path, i, (i + m) % 3 == 0) for i in range(12)]
        _write(tmp_path / "eval" / model / "predictions.jsonl", rows)
    accuracy = {model: 0.2 + 0.1 * i for i, model in enumerate(MODELS)}
    summary = {
        "macro_accuracy": accuracy,
        "macro_interval": {model: [x - 0.05, x + 0.05] for model, x in accuracy.items()},
        "accuracy": {model: {"pediatrics": x} for model, x in accuracy.items()},
        "intervals": {model: {"pediatrics": [x - 0.1, x + 0.1]} for model, x in accuracy.items()},
        "format_rate": dict.fromkeys(MODELS, 0.98),
        "unparsed_rate": dict.fromkeys(MODELS, 0.01),
        "adherence": {model: {"bayesian": 0.77} for model in MODELS},
        "seconds": {"dsa": 60.0, "gba": 125.0},
        "tokens": {"eval": 12345},
        "seed": 3,
        "versions": {"torch": "2.13.0"},
        "start_energy_kept": 0.873,
        "merge": {
            "chosen": {"density": 0.5},
            "candidates": [{"spec": {"density": d}, "validation_accuracy": d} for d in (0.25, 0.5)],
        },
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


class _Page(HTMLParser):
    """Collects what could load or run something, and checks that tags are balanced."""

    void = {"meta", "img", "br", "hr", "use", "path", "rect", "stop"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.stack, self.alts = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        assert not [name for name in values if name.startswith("on")], (tag, attrs)
        self.links += [values[k] for k in ("src", "href", "xlink:href") if k in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag in ("img", "svg"):
            self.alts.append(values.get("alt") or values.get("aria-label"))
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.stack.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.stack.pop() == tag


def _page(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return text, _Page(text)


def test_nothing_is_loaded_or_run_and_every_user_text_is_escaped(whole):
    _, text, page = whole
    assert page.stack == [] and "script" not in page.tags and "iframe" not in page.tags
    assert all(re.match(r"#|data:image/(jpeg|png);base64,", link) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert "&lt;script&gt;" in text and "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets <= set(page.ids)
    assert page.alts and all(page.alts)


def test_content_is_that_of_the_files(whole):
    _, text, page = whole
    assert "60.0 %" in text and "55.0–65.0" in text  # merged, with its interval
    assert "+40.0" in text and "+10.0" in text  # over base; RL over its start
    for part in ("31.4 %", "40.0 %", "87.3 %", "12,345", "1,500", "2 min 05 s", "torch 2.13.0"):
        assert part in text, part
    assert "seed 3" in text and "not run yet" not in text
    assert "missing.png" in text  # an image that is gone is said so, not left out
    assert "The phantom clinic is synthetic" in text
    picture = next(link for link in page.links if link.startswith("data:image/jpeg"))
    image = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1])))
    assert image.size == (50, 40) and image.getpixel((5, 5))[0] > 180
    for line in ("pediatrics", "brain senses", "bayesian", "intuitive", "accuracy"):
        assert line in text
    for chart in ("Experts: loss", "reward by guideline", "entropy and KL", "plain over tree"):
        assert chart in text
    assert text.count("<figure>") == 13
    assert "old-1" not in text


def test_colours_of_the_figures_follow_the_page(whole):
    _, text, _ = whole
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--ink)" in figures and "var(--c1)" in figures and "#0072b2" not in figures
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text))
    assert used <= set(re.findall(r"(--[a-z0-9]+):", text))


def test_heatmap_file_is_a_picture(whole):
    with Image.open(whole[0] / "caci" / "conflicts.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_every_model_is_shown_right_and_wrong(run):
    predictions = load_run(run).predictions
    assert list(predictions) == MODELS
    chosen = choose(predictions, 4)
    assert len(chosen) == len(set(chosen)) == 4
    for rows in predictions.values():
        outcomes = {row["correct"] for row in rows if row["id"] in chosen}
        assert outcomes == {True, False}
    assert choose(predictions, 4) == chosen
    assert len(choose(predictions, 99)) == 12 and choose(predictions, 0) == []


def test_number_of_samples_is_the_configured_one(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["eval"]["samples_in_report"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert samples_section(load_run(run)).count("<article>") == 3


def test_empty_folder_is_a_report_of_stages_not_run(tmp_path):
    text, page = _page(tmp_path)
    assert text.count("not run yet") >= 6 and page.stack == []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


PARTS = ["summary.json", "config.yaml", "caci/conflicts.json", "gba/metrics.jsonl"]
PARTS += ["dsa/pediatrics/metrics.jsonl", "eval/rl/predictions.jsonl"]


def _damage(path, kind):
    if kind == "missing":
        path.unlink()
    else:
        path.write_text("{: [\n\n" if kind == "damaged" else "[1]\n[2]\n")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["missing", "damaged", "other shape"])
def test_one_missing_or_damaged_file_is_named_and_the_rest_is_read(run, part, kind):
    _damage(run / part, kind)
    data = load_run(run)
    named = [text for text in data.problems if text.startswith(f"{part} could not be read: ")]
    assert len(named) == len(data.problems) == (kind != "missing")
    found = [data.summary, data.config, data.conflicts, data.rl, len(data.sft) == 2]
    found.append(list(data.predictions) == MODELS)
    assert [bool(x) for x in found] == [name != part for name in PARTS]


def test_report_on_damaged_files_says_so(run):
    for part in PARTS:
        _damage(run / part, "damaged")
    text, page = _page(run)
    assert page.stack == []
    assert all(f"{part} could not be read" in text for part in PARTS)


def test_summary_with_nulls_and_strange_shapes(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["macro_accuracy"]["rl"] = None
    summary["accuracy"] = {"base": {"pediatrics": None}, "merged": 3}
    summary |= {"intervals": [], "format_rate": 0.5, "adherence": None, "merge": "ties"}
    summary |= {"seconds": {"dsa": None}, "versions": None, "tokens": {"a": {"b": 7}}}
    (run / "summary.json").write_text(json.dumps(summary))
    text, page = _page(run)
    assert page.stack == [] and "a b" in text


def test_layers_and_modules_of_the_heatmap(run):
    layers, modules, values = load_run(run).conflicts.grid("sign_conflict")
    assert layers == [str(i) for i in range(12)] and modules == ["q_proj", "up_proj"]
    assert values[3] == pytest.approx([0.3, 0.3])


def test_series_leave_out_gaps_and_totals_add_up(run):
    rows = load_run(run).rl
    assert series(rows, "reward_guideline/bayesian") == ([1, 2, 4, 5], [0.4] * 4)
    assert totals(rows, "seconds") == {"rollout": 7.5}


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert running_mean([], 3) == []
