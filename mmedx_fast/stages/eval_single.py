"""Any Qwen-VL checkpoint or PEFT adapter on any data set: predictions, figures and a page in a folder of its
own. The config says how the model is run and how it is asked."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from mmedx_fast import ranks
from mmedx_fast.config import Config, ConfigError, EvalSetConfig
from mmedx_fast.evaluation.results import JOURNAL, METRICS, PREDICTIONS
from mmedx_fast.evaluation.sets import EvalSet
from mmedx_fast.run_folder import RunFolder, write_json
from mmedx_fast.stages.common import finish, is_done
from mmedx_fast.stages.context import Context, resolve_model
from mmedx_fast.stages.evaluate import answer_set, asked_fingerprint

ADAPTER = "adapter_config.json"
_STATE = "state"


class _Single(Context):
    """A context whose only data is one set."""

    @cached_property
    def eval_sizes(self) -> dict[str, tuple[int, int]]:
        return {name: chosen.sized() for name, chosen in self.eval_sets.items()}

    @cached_property
    def max_images(self) -> int:
        return max(1, *(images for _, images in self.eval_sizes.values()))


def evaluate(
    cfg: Config, model: str | None, data: EvalSetConfig, out: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Ask ``model`` the questions of ``data``; returns the folder and the figures. Under a launcher every rank
    calls it. A run that was stopped goes on where it was; a finished one is not done again.

    ``model``: a checkpoint, or a PEFT adapter on ``model.path``; None is ``model.path`` itself. ``out`` gets
    ``predictions.jsonl``, ``metrics.json``, ``predictions.html`` and the resolved config.

    Raises ConfigError for a folder that is neither, and for an adapter of another base.
    """
    base, adapter = find_model(cfg, model)
    name = Path(data.path).resolve().stem if data.path != "phantom" else "phantom"
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-") or "data"
    out = out or Path("evals") / f"{(adapter or base).resolve().name}-{name}"
    settings = cfg.eval.model_copy(update={"sets": {name: data}})
    used = cfg.model.model_copy(update={"path": str(base)})
    cfg = cfg.model_copy(update={"eval": settings, "model": used, "run_dir": str(out)})
    ranks.join()
    run = ranks.main_first(lambda: RunFolder.open(cfg, exclusive=ranks.is_main()))
    with run, _Single(cfg, run) as ctx:
        ranks.main_first(lambda: ctx.eval_sets)  # the phantom's files, once
        result = _evaluate(ctx, name, adapter)
    ranks.leave()
    return out, result


def _evaluate(ctx: Context, name: str, adapter: Path | None) -> dict[str, Any]:
    chosen = ctx.eval_sets[name]
    folder = ctx.run.path
    fingerprint = asked_fingerprint(ctx.cfg, chosen) + _weights(adapter or ctx.model_path)
    ranks.main_only(lambda: _refuse_other(folder, fingerprint))
    stage = ctx.run.stage(_STATE, fingerprint)
    if not is_done(stage):
        engine = ctx.serve_weights(ctx.model_path)
        engine.load_adapter(adapter, version=0)
        total = ctx.eval_sizes[name][0]
        result = answer_set(ctx, chosen, folder, stage.fingerprint, total, name)
        if ranks.is_main():
            write_json(folder / METRICS, result)
            write_page(ctx, adapter or ctx.model_path, chosen)
        finish(stage, result)
        ranks.main_only(lambda: (folder / JOURNAL).unlink(missing_ok=True))
    return stage.result()


def write_page(ctx: Context, model: Path, chosen: EvalSet) -> None:
    """``predictions.html``, unless ``eval.browse_rows`` is 0."""
    from mmedx_fast.evaluation.browse import Source, write_browser

    settings, folder = ctx.cfg.eval, ctx.run.path
    if settings.browse_rows:
        source = Source(model.resolve().name, chosen.name, folder / PREDICTIONS, chosen)
        title = f"{source.model} on {source.set}"
        page = folder / "predictions.html"
        write_browser(page, title, [source], settings.browse_rows, settings.browse_images)


def find_model(cfg: Config, model: str | None) -> tuple[Path, Path | None]:
    """(checkpoint, adapter on it or None) that ``model`` names.

    Raises ConfigError for a folder that is neither, or an adapter whose base is known to be another one.
    """
    folder = Path(model or cfg.model.path)
    if model is not None and (folder / ADAPTER).is_file():
        base = resolve_model(cfg)
        _check_base(folder, {base.name, Path(cfg.model.path).name})
        return base, folder
    if model is not None and folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {folder}: holds neither config.json (a checkpoint) nor {ADAPTER} (a PEFT adapter); "
            "give the folder that does"
        )
    path = model or cfg.model.path
    return resolve_model(
        cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": path})})
    ), None


def _check_base(adapter: Path, names: set[str]) -> None:
    try:
        config = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))
        theirs = str(config.get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"--model {adapter}: {ADAPTER} cannot be read ({error})") from None
    if theirs and Path(theirs).name not in names:
        raise ConfigError(
            f"--model {adapter}: an adapter on {theirs}, but model.path is {' or '.join(sorted(names))}: add "
            f"model.path={theirs}"
        )


def _weights(folder: Path) -> str:
    """What tells one state of a model folder from another without reading its weights."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((str(folder.resolve()), parts)).encode()).hexdigest()[:16]


def _refuse_other(folder: Path, fingerprint: str) -> None:
    """Results of another model, set or way of asking are not overwritten."""
    mark = folder / _STATE / "stage.json"
    if not mark.is_file() or json.loads(mark.read_text())["fingerprint"] == fingerprint:
        return
    raise ConfigError(
        f"{folder} holds results of another model, data set or settings (its config.old-*.yaml has them): give "
        "another folder with --out, or delete that one"
    )
