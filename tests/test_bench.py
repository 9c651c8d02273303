"""The benchmarks check before they time, take turns, list what is missing, and lose nothing when stopped."""

import dataclasses
import gc
import json
import math
import sys
import time

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import head, registry, results, run, step, table, timing
from bench.measure import Settings, measure
from bench.memory import watched
from bench.registry import FLOOR, OURS, Bound, Case, Op, Provider, Shape
from bench.saved import saved_for_backward
from mmedx_fast import cli, doctor
from mmedx_fast.cost import KNOWN_MODELS
from mmedx_fast.flops import ModelShape

CPU = torch.device("cpu")
OPS = registry.load()
SETS = ("tiny", "qwen2_5_vl_7b", "qwen2_vl_2b")
NAMES = (
    *("guideline_advantages", "gdpo_advantages"),
    *("linear_logprob", "linear_logprob_backward", "policy_loss"),
    *("lora_merge", "lora_conflicts", "lora_interference"),
)
HEAD = ("linear_logprob", "linear_logprob_backward", "policy_loss")


def tiny(op: Op):
    shape = op.shapes["tiny"][0]
    return shape, op.inputs(Case(shape.sizes, CPU, torch.float32))


def provider_of(op: Op, kind: str) -> Provider:
    return next(p for p in op.providers if p.kind == kind)


def test_every_op_is_registered() -> None:
    assert set(OPS) == {*NAMES, "train_step"}


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_whole(name: str) -> None:
    op = OPS[name]
    assert [p.kind for p in op.ordered()[:2]] == [OURS, FLOOR]
    assert sum(p.kind == FLOOR for p in op.providers) == 1
    assert len({p.name for p in op.providers}) == len(op.providers)
    assert set(op.shapes) == {*SETS, *(["cpu_large"] if name in HEAD else [])}
    for shape in (shape for shapes in op.shapes.values() for shape in shapes):
        assert op.flops(shape.sizes) > 0 and op.bytes(shape.sizes, 2) > 0
        assert op.bytes(shape.sizes, 4) >= op.bytes(shape.sizes, 2)
    _, inputs = tiny(op)
    got = provider_of(op, OURS).make(inputs)()
    errors, wrong = registry.compare(got, op.reference(inputs), op.bounds, {})
    assert set(errors) == set(got) and not wrong


@pytest.mark.parametrize("name", ["guideline_advantages", "gdpo_advantages"])
def test_advantages_are_measured_up_to_65536_values(name: str) -> None:
    for shapes in (OPS[name].shapes[models] for models in SETS[1:]):
        assert max(s.sizes["B"] * s.sizes["M"] for s in shapes) == 65_536


def test_gdpo_is_judged_by_trls_formula() -> None:
    (trl,) = (p for p in OPS["gdpo_advantages"].providers if p.name == "TRL formula")
    assert trl.limits is not None


GEMMS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm_": 1}


def gemm_flops(call) -> float:
    """Counted where the GEMMs run, so that those inside custom ops are seen too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        call()
    counted = 0.0
    for event in record.events():
        if event.name in GEMMS:
            left, right = event.input_shapes[GEMMS[event.name] :][:2]
            counted += 2.0 * math.prod(left) * right[-1]
    return counted


@pytest.mark.parametrize("name", HEAD)
def test_ours_does_exactly_the_gemms_of_the_formula(name: str) -> None:
    op = OPS[name]
    shape, inputs = tiny(op)
    assert gemm_flops(provider_of(op, OURS).make(inputs)) == op.flops(shape.sizes)
    assert gemm_flops(op.floor.make(inputs)) == op.flops(shape.sizes)


def test_recomputing_peers_do_one_gemm_more() -> None:
    op = OPS["linear_logprob_backward"]
    shape, inputs = tiny(op)
    trl = next(p for p in op.providers if p.name == "TRL chunked")
    assert gemm_flops(trl.make(inputs)) == 1.5 * op.flops(shape.sizes)


@pytest.mark.parametrize("name", ["lora_merge", "lora_conflicts", "lora_interference"])
def test_the_formula_is_least_work(name: str) -> None:
    op = OPS[name]
    shape, inputs = tiny(op)
    counted = gemm_flops(provider_of(op, OURS).make(inputs))
    assert op.flops(shape.sizes) <= counted


def operands(name: str, x, out) -> list[torch.Tensor]:
    """What the op must read, and what it must write."""
    if name.endswith("_advantages"):
        return [x.rewards, x.group, x.guideline, out["advantages"]]
    if name in HEAD:
        shared = [x.hidden, x.weight, x.targets, *out.values()]
        tokens = [x.advantages, x.old_logprob, x.token_weight]
        extra = {"linear_logprob": [], "linear_logprob_backward": [x.d_logprob]}
        return shared + extra.get(name, tokens)
    factors = [t for fs in x.experts.values() for f in fs for t in (f.A, f.B)]
    return factors + (2 * list(x.weights.values()) if name == "lora_merge" else [])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_operands(name: str) -> None:
    op = OPS[name]
    shape, inputs = tiny(op)
    out = provider_of(op, OURS).make(inputs)()
    counted = sum(t.numel() * t.element_size() for t in operands(name, inputs, out))
    assert op.bytes(shape.sizes, 4) == counted


@pytest.mark.parametrize("name", NAMES)
def test_peers_agree_with_the_reference(name: str) -> None:
    op = OPS[name]
    shape, inputs = tiny(op)
    reference = op.reference(inputs)
    checked = 0
    for p in op.providers:
        if p.kind == FLOOR or p.unavailable(CPU, shape.sizes) is not None:
            continue
        errors, wrong = registry.compare(p.make(inputs)(), reference, op.bounds, p.limits)
        assert not wrong, p.name
        assert all(math.isfinite(e) for e in errors.values())
        checked += 1
    assert checked >= 2


def test_logits_are_peaked_as_a_models() -> None:
    sizes = {"N": 256, "H": 64, "V": 5000, "T": 8}
    x = head.inputs(Case(sizes, CPU, torch.float32))
    assert 0.2 < float(x.entropy.mean()) < 4 < math.log(5000)
    likely = x.logprob.exp()
    assert float((likely > 0.5).float().mean()) > 0.25
    assert float((likely < 0.05).float().mean()) > 0.05
    ratio = (x.logprob - x.old_logprob).exp()
    assert ratio.min() > 1 - head.EPSILON and ratio.max() < 1 + head.EPSILON


def test_the_references_gradient_is_that_of_autograd() -> None:
    _, x = tiny(OPS["linear_logprob_backward"])
    hidden = x.hidden.detach().double().requires_grad_()
    log_p = torch.log_softmax(hidden @ x.weight.double().t(), 1)
    logprob = log_p.gather(1, x.targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logprob, hidden, x.d_logprob.double())
    torch.testing.assert_close(head.reference_gradient(x, x.d_logprob), gradient)
    torch.testing.assert_close(x.logprob, logprob.detach())


def doubled(kind: str = "peer", name: str = "double", **fields) -> Provider:
    return Provider(name, lambda x: lambda: {"y": 2 * x}, kind, **fields)


def toy(*more: Provider) -> Op:
    """y = 2 x, and whatever providers a test wants beside the right ones."""
    return Op(
        name="toy",
        title="doubling",
        inputs=lambda case: torch.arange(case.sizes["n"], dtype=torch.float64),
        reference=lambda x: {"y": x + x},
        bounds={"y": Bound("absolute", 1e-9)},
        flops=lambda s: float(s["n"]),
        bytes=lambda s, itemsize: 2.0 * s["n"] * itemsize,
        shapes={"tiny": (Shape("n=4", {"n": 4}, 4), Shape("n=8", {"n": 8}, 8))},
        providers=(
            doubled(OURS, "ours"), Provider("copy", lambda x: lambda: {}, FLOOR), *more
        ),
        dispatch="toy",
    )  # fmt: skip


def wrong(kind: str, name: str, **fields) -> Provider:
    return Provider(name, lambda x: lambda: {"y": 2 * x + 1}, kind, **fields)


def run_toy(op: Op, folder, *arguments: str) -> tuple[int, dict, str]:
    options = run.parser().parse_args(["--minutes", "0.01", "--rounds", "3", *arguments])
    options.out = folder
    code = run.run([op], "tiny", Settings(CPU, torch.float32, rounds=3), options, "command")
    (path,) = folder.glob("*.json")
    return code, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def providers_in(row: dict) -> dict[str, dict]:
    return {p["name"]: p for p in row["providers"]}


def test_ours_wrong_times_nothing_and_fails(tmp_path) -> None:
    op = toy(doubled())
    op = dataclasses.replace(op, providers=(wrong(OURS, "ours"), *op.providers[1:]))
    code, data, text = run_toy(op, tmp_path, "--no-plots")
    assert code == 1
    assert "off by 1" in data["rows"][0]["failed"]
    assert not any("median_ms" in p for row in data["rows"] for p in row["providers"])
    assert "Nothing was timed" in text


def test_ours_raising_fails_the_run(tmp_path) -> None:
    def broken(x):
        raise RuntimeError("no such kernel")

    op = toy()
    op = dataclasses.replace(op, providers=(Provider("ours", broken, OURS), *op.providers[1:]))
    code, data, _ = run_toy(op, tmp_path, "--no-plots")
    assert code == 1
    assert data["rows"][0]["failed"] == "failed: RuntimeError: no such kernel"


def test_what_is_not_timed_is_listed_with_its_reason(tmp_path) -> None:
    def broken(x):
        raise RuntimeError("illegal\nmemory")

    op = toy(
        wrong("peer", "wrong"),
        wrong("peer", "another op", limits=None),
        Provider("broken", broken),
        doubled(name="absent", needs=("no-such-distribution",)),
        doubled(name="gpu only", cuda=True),
        doubled(name="huge", memory=lambda sizes, itemsize: 1e18),
        doubled(name="unsuited", lacking=lambda sizes: f"n is {sizes['n']}"),
    )
    code, data, text = run_toy(op, tmp_path, "--no-plots")
    assert code == 0
    found = {name: p["status"] for name, p in providers_in(data["rows"][0]).items()}
    assert found.pop("wrong").startswith("wrong: y is off by 1")
    assert found.pop("huge").startswith("skipped: needs about 1000000000 GB")
    assert found == {
        "ours": "ok",
        "copy": "ok",
        "another op": "ok",
        "broken": "failed: RuntimeError: illegal",
        "absent": "not installed: no-such-distribution",
        "gpu only": "skipped: needs CUDA",
        "unsuited": "skipped: n is 4",
    }
    timed = {name for name, p in providers_in(data["rows"][0]).items() if "median_ms" in p}
    assert timed == {"ours", "copy", "another op"}
    assert all(name in text for name in ("absent", "gpu only", "not installed"))


def test_without_time_ours_and_the_floor_still_run() -> None:
    op = toy(doubled())
    row = measure(op, op.shapes["tiny"][0], Settings(CPU, torch.float32, rounds=3), seconds=0.0)
    found = providers_in(row)
    assert found["double"]["status"] == "skipped: no time left"
    assert found["ours"]["calls"] >= 1 and found["copy"]["calls"] >= 1
    assert found["copy"]["ratio_to_floor"] == 1.0
    expected = found["ours"]["median_ms"] / found["copy"]["median_ms"]
    assert found["ours"]["ratio_to_floor"] == pytest.approx(expected)


def test_only_the_named_peers_run() -> None:
    op = toy(doubled(name="TRL chunked"), doubled(name="Liger GRPO"))
    settings = Settings(CPU, torch.float32, rounds=2, providers=("liger",))
    row = measure(op, op.shapes["tiny"][0], settings, seconds=1.0)
    assert set(providers_in(row)) == {"ours", "copy", "Liger GRPO"}


def test_a_stopped_run_has_written_what_it_measured(tmp_path) -> None:
    def interrupted(case):
        if case.sizes["n"] == 8:
            raise KeyboardInterrupt
        return torch.arange(4.0)

    with pytest.raises(KeyboardInterrupt):
        run_toy(dataclasses.replace(toy(), inputs=interrupted), tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert [row["shape"] for row in json.loads(path.read_text())["rows"]] == ["n=4"]
    assert path.with_suffix(".md").exists()


def test_main_shapes_of_all_ops_come_first() -> None:
    first, second = toy(), dataclasses.replace(toy(), name="other")
    units = [(u.op.name, u.shape.name) for u in run.in_turn([first, second], "tiny")]
    assert units == [("toy", "n=4"), ("other", "n=4"), ("toy", "n=8"), ("other", "n=8")]


def test_end_to_end_on_a_cpu(tmp_path, capsys, monkeypatch) -> None:
    real = registry.installed
    monkeypatch.setattr(registry, "installed", lambda n: None if n == "trl" else real(n))
    code = run.main(
        ["--op", "guideline_advantages", "policy_loss", "--shapes", "qwen2_5_vl_7b"]
        + ["--minutes", "0.04", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    )
    said = capsys.readouterr().out
    assert code == 0
    assert "small shapes (tiny) instead of qwen2_5_vl_7b" in said
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".json", ".md", ".md"] + [
        ".png",
        ".png",
    ]
    (path,) = tmp_path.glob("policy_loss-cpu-*.json")
    data = json.loads(path.read_text())
    assert data["schema"] == results.SCHEMA and data["command"].startswith("python -m bench.run")
    assert data["versions"]["torch"] == torch.__version__ and data["shapes"] == "tiny"
    assert data["peaks"]["tflops"] > 0 and data["peaks"]["gb_s"] > 0
    for row in data["rows"]:
        found = providers_in(row)
        assert set(found) == {p.name for p in OPS["policy_loss"].providers}
        assert found["TRL chunked"]["status"] == "not installed: trl"
        ours = found["ours"]
        assert ours["p20_ms"] <= ours["median_ms"] <= ours["p80_ms"]
        assert ours["errors"]["d_hidden"] < 1e-5 and ours["peak_bytes"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "no_such_op"],
        ["--shapes", "no_such_set"],
        ["--op", "lora_merge", "--device", "cpu", "--shapes", "cpu_large"],
        ["--device", "cuda"],
    ],
)
def test_bad_arguments_are_named(arguments: list[str], capsys) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert run.main(arguments) == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.gpu
def test_every_op_is_right_and_timed_on_cuda(tmp_path) -> None:
    command = ["--shapes", "tiny", "--minutes", "1", "--rounds", "3", "--out", str(tmp_path)]
    assert run.main([*command, "--no-plots"]) == 0
    for path in tmp_path.glob("*.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert providers_in(row)["ours"]["median_ms"] > 0


def test_compare_judges() -> None:
    reference = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64), "z": torch.tensor(8.0)}
    bounds = {"y": Bound("absolute", 0.1), "z": Bound("relative", 0.1, against="y")}
    good = {"y": torch.tensor([1.0, 2.05]), "unknown": torch.tensor(0.0)}
    errors, faults = registry.compare(good, reference, bounds, {})
    assert errors == {"y": pytest.approx(0.05, rel=1e-3)} and not faults
    assert registry.compare(good, reference, bounds, {"y": 0.01})[1]
    nan = {"y": torch.tensor([1.0, math.nan])}
    assert registry.compare(nan, reference, bounds, {})[1]
    assert not registry.compare(nan, reference, bounds, None)[1]
    off = registry.compare({"z": torch.tensor(9.0)}, reference, bounds, {})[0]
    assert off["z"] == pytest.approx(1 / math.sqrt(5))
    with pytest.raises(ValueError, match="none of the outputs"):
        registry.compare({"unknown": torch.tensor(0.0)}, reference, bounds, {})
    with pytest.raises(ValueError, match="shape"):
        registry.compare({"y": torch.tensor(0.0)}, reference, bounds, {})


class FakeClock:
    """Each call takes as long as its place among all calls."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._pending: list[tuple[str, float]] = []

    def once(self, name, call) -> None:
        call()
        self.said.append(name)
        self._pending.append((name, float(len(self.said))))

    def collect(self):
        found, self._pending = self._pending, []
        return found


def test_providers_take_turns() -> None:
    clock = FakeClock()
    calls = {name: lambda: None for name in "abc"}
    times = timing.interleave(calls, {"a": 3, "b": 3, "c": 1}, clock)
    assert "".join(clock.said) == "abc" + "ba" + "ab"
    assert times["c"] == timing.Times(3.0, 3.0, 3.0, 1)
    assert times["a"].median == 5.0 and times["a"].calls == 3


def test_every_provider_stands_once_in_every_place() -> None:
    names = list("abcd")
    places = list(zip(*(timing.order(names, turn) for turn in range(4)), strict=True))
    assert all(sorted(place) == names for place in places)


def test_the_first_of_many_rounds_is_discarded() -> None:
    times = timing.interleave({"a": lambda: None}, {"a": timing.DISCARDING}, FakeClock())
    assert times["a"].calls == timing.DISCARDING - 1 and times["a"].p20 > 2


def test_rounds_share_the_budget() -> None:
    rounds = timing.rounds_for({"quick": 0.001, "slow": 10.0, "middle": 0.1}, 3.0, most=50)
    assert rounds == {"quick": 50, "slow": 1, "middle": 10}


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_quantiles_are_numpys(n: int) -> None:
    samples = list(np.random.default_rng(n).normal(size=n))
    for q in (0.2, 0.5, 0.8):
        assert timing.quantile(samples, q) == pytest.approx(np.quantile(samples, q))


def test_memory_is_what_was_held_at_once() -> None:
    held = [torch.zeros(1000)]

    def call() -> torch.Tensor:
        held.clear()  # released memory that was there before is no gain
        a = torch.zeros(10_000)
        b = a + 1
        del a
        return (b * 2).view(10, 1000)

    out, peak = watched(call, CPU)
    assert out.shape == (10, 1000)
    assert 80_000 - 4_000 <= peak <= 81_000


def test_garbage_of_earlier_work_is_no_gain() -> None:
    before = gc.get_threshold()

    def leave_garbage() -> None:
        ring: list[object] = [torch.zeros(100_000)]
        ring.append(ring)

    def call() -> torch.Tensor:
        gc.set_threshold(1, 1, 1)  # the collector would come now
        made = [[i] for i in range(10)]
        return torch.zeros(1000 * len(made))

    gc.collect()
    gc.set_threshold(0)
    try:
        watched(leave_garbage, CPU)  # the profiler counts the release of what it saw allocated
        _, peak = watched(call, CPU)
    finally:
        gc.set_threshold(*before)
    assert peak == 40_000


README = f"# Title\n\nbefore\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n"


def test_the_readmes_table_is_exchanged_and_stays(tmp_path) -> None:
    _, data, _ = run_toy(toy(doubled(), doubled(name="absent", needs=("nothing",))), tmp_path)
    (path,) = tmp_path.glob("*.json")
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for _ in range(2):
        assert table.main([str(path), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("# Title\n\nbefore\n\n") and text.endswith("\n\nafter\n")
        assert "old" not in text and "**`toy`**: doubling" in text and "| double |" in text
        assert "absent: not installed: nothing" in text and "| n=4 | n=8 | MiB |" in text
    once = text
    assert table.main([str(path), "--readme", str(readme)]) == 0
    assert readme.read_text() == once
    assert data["device"]["name"] in once


@pytest.mark.parametrize("text", ["no place", README + README, f"{table.END}\n{table.BEGIN}\n"])
def test_a_readme_without_one_place_is_refused(text: str, tmp_path, capsys) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    results.write_json(tmp_path / "x.json", results.document(toy(), "tiny", {}, []))
    with pytest.raises(ValueError, match="once each"):
        table.replaced(text, "new")
    assert readme.read_text() == text


def test_mmedx_bench_runs_the_checkouts(capsys, monkeypatch, tmp_path) -> None:
    assert cli.main(["bench", "--list", "--op", "policy_loss"]) == 0
    assert "torch.mm (floor)" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "site-packages/mmedx_fast/doctor.py"))
    assert cli.main(["bench", "--list"]) == 2
    assert "clone the repository" in capsys.readouterr().err
    assert str(tmp_path) not in sys.path


STEP = OPS["train_step"]
STEP_SHAPE = step.shape(4, step._TINY, P=24, G=4, R=6, K=2, n=2, L=2, V=300)


@pytest.fixture(scope="module")
def step_case():
    """(inputs, reference) of the update at a size of a few dozen tokens."""
    x = STEP.inputs(Case(STEP_SHAPE.sizes, CPU, torch.float32))
    return x, STEP.reference(x)


def test_every_provider_makes_the_same_update(step_case) -> None:
    x, reference = step_case
    for p in STEP.providers:
        if p.kind == FLOOR:
            continue
        assert p.unavailable(CPU, x.sizes) is None
        call = p.make(x)
        for _ in range(2):  # a second call starts from nothing again
            errors, wrong = registry.compare(call(), reference, STEP.bounds, {})
            assert set(errors) == {"loss", "d_adapter"} and not wrong, p.name
    assert abs(float(reference["loss"])) > 0.01 and float(reference["d_adapter"].norm()) > 0.01
    assert all(param.grad is None for param in x.model.parameters())


def test_a_wrong_advantage_is_seen(step_case) -> None:
    x, reference = step_case
    other = dataclasses.replace(x, advantages=x.advantages.roll(1, 0))
    got = provider_of(STEP, OURS).make(other)()
    assert len(registry.compare(got, reference, STEP.bounds, {})[1]) == 2


def test_the_updates_formula_counts_the_gemms_of_ours(step_case) -> None:
    x, _ = step_case
    formula, counted = STEP.flops(x.sizes), gemm_flops(provider_of(STEP, OURS).make(x))
    # beside these GEMMs it has the attention, the patch convolution and layer 0's own dX
    assert 0.85 * formula < counted < formula
    assert gemm_flops(STEP.floor.make(x)) < counted
    assert gemm_flops(step.plain_call(x, micro=4)) > 1.5 * counted
    assert STEP.shapes["qwen2_5_vl_7b"][0].tokens == 1200 + 4 * 60 + 16 * 256


def test_the_tree_saves_less_for_backward_and_checkpoints_less_still(step_case) -> None:
    x, reference = step_case
    again = STEP.inputs(Case({**x.sizes, "checkpoint": 1}, CPU, torch.float32))
    kept = []
    for call in (
        step.plain_call(x, 4),
        step.tree_call(x, "varlen"),
        step.plain_call(again, 4),
        step.tree_call(again, "varlen"),
    ):
        with saved_for_backward([*x.model.parameters(), *again.model.parameters()]) as saved:
            assert not registry.compare(call(), reference, STEP.bounds, {})[1]
        assert saved.live == 0
        kept.append(saved.peak)
    plain, tree, plain_again, tree_again = kept
    assert 0 < tree_again < plain_again < tree < plain
    assert tree_again / plain_again == pytest.approx(x.row.n_tokens / x.row.n_tokens_plain, rel=0.3)


def test_layers_alike_the_tree_saves_what_its_tokens_save(step_case) -> None:
    x, _ = step_case
    kept = {}
    for name in ("ours", "plain rows", "plain rows, our layers"):
        call = next(p for p in STEP.providers if p.name == name).make(x)
        with saved_for_backward(x.model.parameters()) as saved:
            call()
        kept[name] = saved.peak
    tokens = x.row.n_tokens_plain / x.row.n_tokens
    assert kept["plain rows, our layers"] / kept["ours"] == pytest.approx(tokens, rel=0.05)
    # One of the four tensors as wide as the MLP that transformers' own keeps in each layer.
    freed = 4 * x.row.n_tokens_plain * x.sizes["I"] * x.sizes["L"]
    assert kept["plain rows"] - kept["plain rows, our layers"] == freed


def test_the_7bs_sizes_are_the_published_ones() -> None:
    made = ModelShape.from_config(step.model_config(STEP.shapes["qwen2_5_vl_7b"][0].sizes))
    known = ModelShape.from_config(KNOWN_MODELS["qwen2.5-vl-7b-instruct"])
    assert made == known


def test_saved_storages_count_once_and_are_released() -> None:
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with saved_for_backward([weight]) as saved:
        y = (x @ weight).exp()  # x, and y itself; weight is there anyway
        z = y * y.view(4, 8)  # y again, through a view
        assert saved.live == saved.peak == 2 * 4 * 8 * 4
        z.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (y * y).detach() @ weight.detach().t())
    del y, z
    assert saved.live == 0 and saved.peak == 256


def test_process_time_does_not_count_waiting() -> None:
    def waiting() -> None:
        time.sleep(0.05)

    times = {}
    for process in (False, True):
        clock = timing.Clock(CPU, process)
        clock.once("wait", waiting)
        ((_, times[process]),) = clock.collect()
    assert times[False] >= 50 and times[True] < 10
