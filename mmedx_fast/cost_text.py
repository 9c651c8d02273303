"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmedx_fast.meter import render_table


def plan_text(estimate: Mapping[str, Any]) -> str:
    """A plan as text: stages, total, memory and everything that was assumed."""
    model, assumed, total = estimate["model"], estimate["assumptions"], estimate["total"]
    rows = [
        [
            stage["stage"],
            f"{stage['rows']:,}",
            f"{stage['responses']:,}",
            _count(stage["tokens"]),
            f"{stage['tokens_plain'] / stage['tokens']:.2f}x" if stage["tokens"] else "-",
            f"{stage['flops'] / 1e15:,.3g}",
            f"{stage['gpu_hours']:,.3g}",
            f"{stage['gpu_hours_plain']:,.3g}",
            f"{stage['seconds_per_step']:,.3g}" if stage["steps"] > 1 else "-",
        ]
        for stage in estimate["stages"]
    ]
    hours = [f"{total[key]:,.3g}" for key in ("gpu_hours", "gpu_hours_plain")]
    rows.append(["total", "", "", "", "", f"{total['flops'] / 1e15:,.3g}", *hours, ""])
    headers = [
        "stage",
        "questions",
        "responses",
        "tokens",
        "saved",
        "PFLOP",
        "GPU h",
        "plain GPU h",
        "s/step",
    ]
    memory = [
        [part["name"], part["phase"], f"{part['bytes'] / 1e9:.2f}"] for part in estimate["memory"]
    ]
    parts = [
        f"{model['path']}: {_count(model['parameters'])} parameters, "
        f"{_count(model['lora_parameters'])} in a LoRA, "
        f"{_count(model['trained_parameters'])} trained in GBA, "
        f"{model['gflops_per_token']:.3g} GFLOP/token",
        render_table(headers, rows),
        _evaluation_text(estimate["evaluation"]),
        render_table(["memory of one GPU", "held", "GB"], memory),
        *_bill_text(estimate),
        "An estimate, assuming: "
        + ", ".join(f"{k} {v}" for k, v in assumed.items() if v is not None),
        "'plain' is the same work with one sequence per response and no shared prefix.",
    ]
    return "\n\n".join(parts)


def _evaluation_text(asked: Mapping[str, Any]) -> str:
    """What is asked of whom, and which sets are of unknown size."""
    sets = ", ".join(
        f"{name} {size['questions']:,}" + (" (assumed)" if size["assumed"] else "")
        for name, size in asked["sets"].items()
    )
    models, prompts, answers = (
        f"{count} {noun}{'s' if count > 1 else ''}"
        for count, noun in (
            (asked["models"], "model"),
            (asked["prompts_per_question"], "prompt"),
            (asked["answers_per_prompt"], "answer"),
        )
    )
    return (
        f"Evaluation: {models} on {sets} questions, {prompts} of each question, {answers} to each "
        "prompt."
    )


def _bill_text(estimate: Mapping[str, Any]) -> list[str]:
    """Whether it fits, and what 1,000 questions cost."""
    machine, bill = estimate["machine"], estimate["per_1000_questions"]
    hours = [bill["gpu_hours"], bill["gpu_hours_plain"]]
    costs = [bill["dollars"], bill["dollars_plain"]]
    money = [f", ${cost:,.2f}" if cost is not None else "" for cost in costs]
    text = (
        f"1,000 questions of GBA ({bill['responses']:,} responses): {hours[0]:.3g} GPU h{money[0]}; "
        f"plain {hours[1]:.3g} GPU h{money[1]}."
    )
    if machine is None:
        return [text]
    price, total = machine["dollars_per_hour"], estimate["total"]
    sequences = machine["sequences"]
    rollouts = (
        "the rollout engine is on other GPUs"
        if sequences is None
        else f"the KV cache holds {sequences} sequences at full length"
    )
    verdict = "fits" if machine["fits"] else "does NOT fit: " + "; ".join(machine["problems"])
    return [
        f"{machine['gpus']} x {machine['name']}: {verdict}. Peak {machine['peak'] / 1e9:.1f} of "
        f"{machine['memory'] / 1e9:.0f} GB; {rollouts}.",
        f"{text} The run: ${price * total['gpu_hours']:,.2f} (plain "
        f"${price * total['gpu_hours_plain']:,.2f}) at an assumed ${price:.2f} an hour.",
    ]


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
