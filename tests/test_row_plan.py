"""What ``mmedx gba --plan`` and ``mmedx dsa --plan`` show is what the step packs."""

import pytest

from mmedx_fast import cli
from mmedx_fast._paths import find_config
from mmedx_fast.config import load_config
from mmedx_fast.run_folder import RunFolder
from mmedx_fast.stages.context import Context, batches
from mmedx_fast.stages.dsa import sft_tree, training_questions
from mmedx_fast.stages.row_plan import dsa_plan, gba_plan
from mmedx_fast.tree import count_tokens

SMALL = ["phantom.train=40", "phantom.validation=20", "phantom.test=20", "gba.questions_per_step=3"]


def table(text):
    """The numbers of the table's rows, and the line under it."""
    lines = text.splitlines()
    return [[int(cell) for cell in line.split()] for line in lines[3:-1]], lines[-1]


@pytest.mark.parametrize("command", ["gba", "dsa"])
def test_a_plan_leaves_the_run_folder_as_it_is(command, tmp_path, capsys):
    where = tmp_path / "run"
    plan = [command, "demo.yaml", "--plan", f"run_dir={where}", *SMALL]
    assert cli.main(plan) == 0
    assert not where.exists()
    first = capsys.readouterr().out
    cfg = load_config(find_config("demo.yaml"), [f"run_dir={where}", *SMALL])
    with RunFolder.open(cfg):  # a run is at work
        before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
        assert cli.main([*plan, "gba.max_row_tokens=4096", "dsa.steps=3"]) == 0
        after = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    assert before == after and len(before) == 2
    assert "tokens instead of" in first and "tokens instead of" in capsys.readouterr().out


def test_the_tables_are_those_of_the_first_steps_rows(tmp_path, monkeypatch):
    cfg = load_config(find_config("demo.yaml"), [f"run_dir={tmp_path}", *SMALL])
    with RunFolder.open(cfg) as run, Context(cfg, run) as ctx:
        questions = training_questions(ctx, "pediatrics")
        order = batches(len(questions), cfg.dsa.questions_per_step, 1, (cfg.seed, "pediatrics"))
        picked = [questions[i] for i in next(iter(order))]
        traces = cfg.dsa.traces_per_question
        trees = [sft_tree(q, traces, 1 + n)[0] for n, q in enumerate(picked)]
        rows, said = table(dsa_plan(ctx, "pediatrics"))
        assert sum(row[4] for row in rows) == sum(map(count_tokens, trees))
        assert sum(row[3] for row in rows) == sum(len(tree.branches) for tree in trees)
        assert f"{sum(row[4] for row in rows):,} tokens instead of " in said

        monkeypatch.setenv("WORLD_SIZE", "2")
        rows, _ = table(gba_plan(ctx))
        ranks = [row[0] for row in rows]
        assert ranks.count(0) == ranks.count(1) > 0 and set(ranks) == {0, 1}
        generations = cfg.rollout.num_generations * len(cfg.gba.guidelines)
        assert sum(row[3] for row in rows) == 3 * generations
        length = cfg.rollout.max_completion_length // 2
        assert all(row[6] == row[3] * length for row in rows if row[3])
