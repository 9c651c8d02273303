"""`mmedx data build` against vLLM's own OpenAI server with the tiny model, and with vLLM in process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from mmedx_fast.builder.build import build
from mmedx_fast.builder.config import BuildConfig
from mmedx_fast.builder.prompt import teacher_messages
from mmedx_fast.builder.teacher import TeacherError
from mmedx_fast.config import DataConfig, ModelConfig, RolloutConfig
from mmedx_fast.data.loaders import load_records
from mmedx_fast.data.mmedexpert import write_mmedexpert
from mmedx_fast.data.phantom import make_split
from mmedx_fast.data.records import GUIDELINE_NAMES
from mmedx_fast.prompts import PromptBuilder
from mmedx_fast.scoring import strict_score
from mmedx_fast.tiny import assets_folder

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
RECORDS = make_split("train", 6, 1, set())
TOKENS = 112


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from mmedx_fast.rollout.server_process import ServerProcess
    from mmedx_fast.rollout.vllm_options import engine_options

    options = engine_options(
        ModelConfig(path=str(assets_folder()), dtype="float32"),
        RolloutConfig(max_num_seqs=32, kv_cache_memory_bytes=64 << 20, block_size=32),
        device="cpu",
        max_model_len=480,
        max_images=1,
        lora=False,
        seed=0,
        own_workers=True,
    )
    process = ServerProcess(
        options,
        extra=["--served-model-name", "tiny"],
        log=tmp_path_factory.mktemp("log") / "server.log",
    )
    try:
        until = time.monotonic() + 600
        while True:
            process.check()
            try:
                if httpx.get(f"{process.url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"{process.url}/v1"
    finally:
        process.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_mmedexpert([replace(r, reasoning={}) for r in RECORDS], folder, "train")
    return folder


def config(source: Path, out: Path, **teacher: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "output": str(out),
            "sources": [{"name": "clinic", "path": str(source)}],
            "teacher": {
                "model": "tiny",
                "extra_instruction": "",
                "answer_format": "text",
                "max_tokens": TOKENS,
                "attempts": 6,
                "price_input": 1.0,
                "price_output": 1.0,
                **teacher,
            },
            # The tiny model knows form and findings but no rule book: its answers are guesses.
            "filters": {"min_adherence": 0.5},
            "decontamination": {"none_to_check": True},
        }
    )


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def check(out: Path, sheet: dict[str, Any]) -> None:
    """What any build must hold, whatever the model said."""
    made = load_records(out, split="train", require_reasoning=True)
    assert not made.rejected and len(made.records) == sheet["data"]["questions"] > 0
    entries = journal(out)
    answers = {(e["id"], e["guideline"], e["attempt"]): e["text"] for e in entries}
    originals = {record.id: record for record in RECORDS}
    for record in made.records:
        for guideline, trace in record.reasoning.items():
            text = answers[record.id, guideline, record.meta["traces"][guideline]["attempt"]]
            assert trace in text
            original = originals[record.id]
            assert strict_score(text, original.options, original.answer) == 1.0
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    traces = sum(len(record.reasoning) for record in made.records)
    assert traces == sheet["traces"]["kept"] and len({e["key"] for e in entries}) == len(entries)
    assert len(entries) == sheet["traces"]["passed"] + sum("guideline" in row for row in dropped)
    assert len(made.records) + sum(row["reason"] == "no_trace" for row in dropped) == len(RECORDS)


def test_prompts_are_the_training_prompts():
    builder = PromptBuilder.from_folder(assets_folder(), DataConfig(answer_format="text"))
    cfg = config(Path("x"), Path("y"), base_urls=["http://localhost/v1"]).teacher
    several = replace(RECORDS[0], images=RECORDS[0].images * 3)
    for record in (*RECORDS, several):
        for guideline in GUIDELINE_NAMES:
            theirs = builder.messages(record, guideline)
            assert teacher_messages(record, guideline, cfg) == theirs


def test_a_real_server_answers_and_is_never_asked_twice(server, source, tmp_path):
    cfg = config(source, tmp_path / "out", base_urls=[server], concurrency=8)
    sheet = build(cfg)
    check(tmp_path / "out", sheet)
    entries = journal(tmp_path / "out")
    builder = PromptBuilder.from_folder(assets_folder(), DataConfig(answer_format="text"))
    records = {record.id: record for record in RECORDS}
    for entry in entries:
        # The server made of image and text just what the trainer makes of them.
        prompt = builder.question(records[entry["id"]]).prompt_ids(entry["guideline"])
        assert entry["tokens_in"] == len(prompt) and 0 < entry["tokens_out"] <= TOKENS
        assert not entry["estimated"] and entry["model"] == "tiny"
    tokens = sum(e["tokens_in"] + e["tokens_out"] for e in entries)
    assert sheet["teacher"]["cost"] == pytest.approx(tokens / 1e6, abs=1e-6)
    first = (tmp_path / "out" / "train.jsonl").read_bytes()
    again = build(cfg)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == first
    assert journal(tmp_path / "out") == entries
    assert again["traces"] == sheet["traces"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"model": "nobody"}, "answers with 404.*nobody.*teacher.model"),
        ({"max_tokens": 100_000}, "answers with 400.*teacher settings"),
    ],
)
def test_its_refusals_stop_the_build_in_its_own_words(server, source, tmp_path, teacher, message):
    with pytest.raises(TeacherError, match=f"(?s){message}"):
        build(config(source, tmp_path / "out", base_urls=[server], **teacher))


def test_vllm_in_process(source, tmp_path):
    vllm = {
        "dtype": "float32",
        "max_prompt_length": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "batch": 10,
    }
    cfg = config(source, tmp_path / "out", kind="vllm", vllm=vllm)
    sheet = build(cfg)
    check(tmp_path / "out", sheet)
    assert sheet["teacher"]["engine"] == "vllm in process"
    before = journal(tmp_path / "out")
    build(cfg)
    assert journal(tmp_path / "out") == before
