"""The datasheet of a built data set, as Markdown and as the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmedx_fast.meter import render_table

_FUNNEL = {
    "rejected": "rejected by the loader",
    "answer_type": "answer type not wanted",
    "image": "image unreadable",
    "contaminated": "in an evaluation set",
    "duplicate": "near-duplicate",
}
_FAILED = {
    "answer": "wrong or unreadable answer",
    "format": "format",
    "guideline": "guideline not followed",
    "length": "length",
    "row": "row rules",
    "leak": "mentions the revealed answer",
}


def funnel_text(sheet: Mapping[str, Any]) -> str:
    """The funnel of questions and that of answers, for the terminal."""
    parts = [render_table(["questions", "number"], _question_rows(sheet))]
    if "traces" in sheet:
        parts.append(render_table(["answers of the teacher", "number"], _trace_rows(sheet)))
        teacher = sheet["teacher"]
        parts.append(
            f"{teacher['answers_in_journal']:,} answers in all, {teacher['tokens_in']:,} tokens in, "
            f"{teacher['tokens_out']:,} out, {teacher['cost']:,.4f} {teacher['currency']}"
        )
    return "\n\n".join(parts)


def estimate_text(found: Mapping[str, Any]) -> str:
    """The answer of ``--dry-run``."""
    rows = [
        [name.replace("_", " "), f"{found[name]['least']:,}", f"{found[name]['most']:,}"]
        for name in ("requests", "tokens_in", "tokens_out")
    ]
    cost = found["cost"]
    rows.append([f"cost in {found['currency']}", f"{cost['least']:,.4f}", f"{cost['most']:,.4f}"])
    return "\n\n".join(
        [
            funnel_text(found),
            render_table(["still to be asked", "all pass at once", "at most"], rows),
            f"An estimate: {found['mean_output_tokens']} tokens an answer, images at 784 pixels a token; "
            f"every attempt made at that length costs {cost['expected_all_attempts']:,.4f} "
            f"{found['currency']}. {found['answered_before']:,} answers are in the journal already "
            f"({found['spent_before']:,.4f} {found['currency']}). Nothing was asked.",
        ]
    )


def _question_rows(sheet: Mapping[str, Any]) -> list[list[Any]]:
    return [[_FUNNEL.get(name, name), f"{count:,}"] for name, count in sheet["funnel"]]


def _trace_rows(sheet: Mapping[str, Any]) -> list[list[Any]]:
    traces = sheet["traces"]
    rows = [["answers", traces["answers"]]]
    rows += [[_FAILED[name], count] for name, count in traces["failed"].items()]
    rows += [["passed", traces["passed"]]]
    rows += [["in questions that were dropped", traces["in_questions_dropped"]]]
    rows += [["kept", traces["kept"]]]
    rows += [
        [f"no answer ({name.replace('_', ' ')})", count]
        for name, count in traces["without_answer"].items()
        if count
    ]
    return [[name, f"{count:,}"] for name, count in rows]


def render_datasheet(sheet: Mapping[str, Any]) -> str:
    """Markdown of ``datasheet.json``."""
    data, traces, counts = sheet["data"], sheet["traces"], sheet["counts"]
    lines = [
        "# Datasheet",
        "",
        f"`{data['file']}`: {data['questions']:,} questions with {traces['kept']:,} reasoning traces, made "
        f"{sheet['made']} with mmedx-fast {sheet['made_with']['mmedx_fast']}.",
        f"SHA-256 `{data['sha256']}`.",
        "",
        "The traces were written by a model, not by physicians. They passed automatic filters, which check "
        "answer and form, not medical truth.",
        "",
        *_section("Questions", ["step", "number"], _question_rows(sheet)),
        *_section("Answers of the teacher", ["", "number"], _trace_rows(sheet)),
    ]
    for name, title in (
        ("specialty", "Specialties"),
        ("source", "Sources of the questions"),
        ("license", "Licences"),
        ("dataset", "Data sets"),
        ("answer_type", "Answer types"),
        ("images", "Images in a question"),
    ):
        lines += _section(title, [name.replace("_", " "), "questions"], _items(counts[name]))
    lines += _section("Guidelines", ["guideline", "traces"], _items(traces["kept_by_guideline"]))
    lines += _section("Attempts needed", ["attempt", "traces"], _items(traces["kept_by_attempt"]))
    by_source = [
        [s, r, n] for s, found in sheet["dropped_by_source"].items() for r, n in found.items()
    ]
    lines += _section("Questions dropped by source", ["source", "reason", "questions"], by_source)
    lines += _section("Teacher", ["setting", "value"], _items(sheet["teacher"]))
    for name, settings in sheet["settings"].items():
        if isinstance(settings, dict):
            rows = [[k, v] for k, v in settings.items() if k not in ("evaluation", "run_configs")]
            lines += _section(f"Settings: {name}", ["setting", "value"], rows)
        else:
            lines += [f"Setting `{name}`: {_cell(settings)}", ""]
    lines += _data_sets("Source files", sheet["sources"])
    lines += _data_sets("Evaluation sets it was checked against", sheet["evaluation_sets"])
    lines += _section("Files", ["file", "SHA-256"], _items(sheet["files"]))
    return "\n".join(lines)


def _items(mapping: Mapping[str, Any]) -> list[list[Any]]:
    return [[name, value] for name, value in mapping.items()]


def _data_sets(title: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return [f"## {title}", "", "None.", ""]
    rows = [
        [item["name"], item["questions"], file, digest]
        for item in found
        for file, digest in item.get("files", {"(made by the program)": ""}).items()
    ]
    return _section(title, ["name", "questions", "file", "SHA-256"], rows)


def _section(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    table = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    head = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    return [f"## {title}", "", *(head + table if table else ["None."]), ""]


def _cell(value: Any) -> str:
    """Text that stays inside its cell of a Markdown table."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.replace("|", "\\|").split())
