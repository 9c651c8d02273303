"""Draws the figures of these pages from the code they explain: ``python docs/figures.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from mmedx_fast.ops import guideline_advantages
from mmedx_fast.tree import Branch, RopeIndex, Tree, count_tokens, pack_row

HERE = Path(__file__).resolve().parent / "figures"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a8569b")
GUIDELINES = ("differential", "intuitive", "analytic", "bayesian")
# Mid-grey reads on the light and on the dark page, whose backgrounds the figures leave transparent.
GREY = "#888888"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmedx-fast",
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def question(prompt: int, guideline: int, response: int, guidelines: int, rollouts: int) -> Tree:
    """One question with text tokens only; all ids differ where the texts would."""
    branches = []
    for k in range(guidelines):
        asked = [1] * prompt + [10 + k] * guideline
        for n in range(rollouts):
            branches.append(Branch(asked, [100 + guidelines * n + k] * response))
    return Tree(tuple(branches))


def packed_row() -> Any:
    """The attention of a small row, coloured by whose keys are seen."""
    tree = question(prompt=10, guideline=3, response=5, guidelines=2, rollouts=2)
    row = pack_row([tree], RopeIndex(image_token_id=-1, spatial_merge_size=2))
    t = row.n_tokens
    q, k = torch.arange(t)[:, None], torch.arange(t)[None, :]
    seen = (k <= q) & (q < row.end[None, :])
    names = (
        "image and question",
        "guideline 1",
        "rollout",
        "rollout",
        "guideline 2",
        "rollout",
        "rollout",
    )
    shades = ("#0072b2", "#d55e00", "#e8a06a", "#e8a06a", "#009e73", "#6fc3a6", "#6fc3a6")
    picture = np.zeros((t, t, 4))
    for (start, length, _), shade in zip(row.segments, shades, strict=True):
        column = np.array(matplotlib.colors.to_rgba(shade))
        inside = seen[:, start : start + length].numpy()[..., None]
        picture[:, start : start + length] = inside * column
    figure, axes = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
    axes.imshow(picture, interpolation="nearest")
    for start, _length, _ in row.segments:
        axes.axhline(start - 0.5, color=GREY, linewidth=0.4)
        axes.axvline(start - 0.5, color=GREY, linewidth=0.4)
    middles = [start + (length - 1) / 2 for start, length, _ in row.segments]
    axes.set_yticks(middles, names)
    axes.set_xticks(middles, names, rotation=45, ha="right")
    axes.tick_params(length=0)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_title(
        f"{row.n_tokens} tokens computed; one row per rollout: {row.n_tokens_plain}", fontsize=9
    )
    return figure


def token_ratio() -> Any:
    """Plain rows' tokens over the tree's, counted by the tree itself."""
    figure, axes = plt.subplots(figsize=(5.4, 3.0), layout="constrained")
    lengths = [32, 64, 128, 192, 256, 384, 512, 768, 1024]
    for color, prompt in zip(PALETTE, (256, 512, 1024, 2048), strict=True):
        ratios = []
        for response in lengths:
            tree = question(prompt, 32, response, guidelines=4, rollouts=4)
            plain = sum(len(b.prompt_ids) + len(b.response_ids) for b in tree.branches)
            ratios.append(plain / count_tokens(tree))
        axes.plot(
            lengths,
            ratios,
            color=color,
            marker="o",
            markersize=3,
            label=f"{prompt} tokens of image and question",
        )
    axes.axhline(1, color=GREY, linewidth=0.6)
    axes.set_ylim(0)
    axes.set_xlabel("tokens of a response (4 guidelines, 4 rollouts each)")
    axes.set_ylabel("times fewer tokens")
    axes.legend(fontsize=8)
    return figure


def advantages() -> Any:
    """Sixteen rewards, and what the default formula makes of them."""
    rewards = torch.tensor(
        [1.2, 1.5, 0.2, 1.3, 0.2, 0.0, 1.2, 0.2, 1.5, 1.4, 1.5, 1.2, 0.1, 0.3, 0.2, 1.3]
    )
    group, guideline = torch.zeros(16, dtype=torch.long), torch.arange(16) // 4
    parts = [
        guideline_advantages(rewards[:, None], group, guideline, within=w, between=b)[0].numpy()
        for w, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    _, stats = guideline_advantages(rewards[:, None], group, guideline)
    figure, (top, below) = plt.subplots(2, 1, figsize=(5.8, 4.2), sharex=True, layout="constrained")
    x = np.arange(16) + np.repeat(np.arange(4), 4) * 0.8
    for k, color in enumerate(PALETTE):
        own = slice(4 * k, 4 * k + 4)
        top.bar(x[own], rewards[own], color=color, width=0.7, label=GUIDELINES[k])
        mean = float(stats.mu_pk[4 * k])
        top.plot([x[4 * k] - 0.4, x[4 * k + 3] + 0.4], [mean, mean], color=color, linewidth=1.5)
    top.axhline(float(stats.mu_p[0]), color=GREY, linestyle="--", linewidth=0.8)
    top.set_ylabel("reward")
    top.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    below.bar(x - 0.18, parts[0], width=0.34, color="#56606b", label="within the guideline")
    below.bar(x + 0.18, parts[1], width=0.34, color="#c2a23a", label="between guidelines")
    below.axhline(0, color=GREY, linewidth=0.6)
    below.set_ylabel("advantage")
    below.set_xticks([])
    below.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, -0.28))
    return figure


def main() -> None:
    HERE.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in (packed_row, token_ratio, advantages):
            figure = draw()
            figure.savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
