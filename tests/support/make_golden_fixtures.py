"""Copy a small part of ../shared/golden to tests/fixtures/golden: `python -m tests.support.make_golden_fixtures`.

Run this manually when the reference outputs in ../shared/golden change. Paths in tests/fixtures/golden:

    inputs/*.jsonl, inputs/folder/       unchanged
    expected/tokens/*.jsonl.gz           unchanged
    expected/tokens/rows_that_differ_under_mistral_common_1.5.4.json.gz
    expected/lr/one_cycle.json           unchanged
    expected/train/tensors/*.safetensors LoRA initializations and final adapters, unchanged
    expected/batches/digests.json.gz     {"folder_order_used": [...], "settings": [...]}: a setting has the keys of
        index.json and `digests`: {"x", "y", "y_mask", "sizes"}, each a list with one `digest` per batch
        (null for a batch without a mask)
    expected/train/trajectories.json.gz  {name: run}: a run is expected/train/NAME.json with fewer keys:
        settings, param_dtype, world_size,
        steps: [{step, loss, lr, grad_norm, betas}, ...],
        per_rank: [{microbatch_loss: [...]}, ...],
        eval_metrics: [{step, train_loss, eval_loss}, ...]  (on 2 ranks only the first is correct),
        run_dir_listing: [...], lora_init,
        checkpoints: {"checkpoint_000020": {"params.json", files: {name: bytes}, safetensors_file, file,
                      tensors: {key: {shape, dtype, sum, abs_sum, l2}} (last checkpoint only)}}
        Numbers are rounded to 9 significant digits.
"""

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.golden import FIXTURES, GOLDEN

COPIES = (
    "inputs/*.jsonl",
    "inputs/folder/**/*",
    "expected/tokens/*.jsonl.gz",
    "expected/lr/one_cycle.json",
    "expected/train/tensors/lora_init_895e8a856a29.safetensors",  # dense, fp32, rank 8, seed 0
    "expected/train/tensors/dense_lora_float32_mb1_w1_checkpoint_000020_lora.safetensors",
    "expected/train/tensors/dense_lora_bfloat16_mb1_w1_checkpoint_000020_lora.safetensors",
    "expected/train/tensors/moe_lora_float32_mb1_w2_checkpoint_000020_lora.safetensors",
)
RUNS = ("dense_*", "moe_*", "x_*", "fork_*")
OTHER_VERSION = "expected/tokens/rows_that_differ_under_mistral_common_1.5.4.json"


def digest(array: np.ndarray) -> str:
    """Return a hash of the values as little-endian int64, independent of the array's dtype."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).hexdigest()[:16]


def condense_batches(golden: Path) -> dict[str, Any]:
    """Return the 250 data loader settings with one digest per batch and array instead of the arrays."""
    index = json.loads((golden / "expected/batches/index.json").read_text(encoding="utf-8"))
    settings = []
    for setting in index["settings"]:
        kept = {key: value for key, value in setting.items() if not key.endswith("_per_batch")}
        if "file" in kept:
            kept["digests"] = _digests(golden / "expected/batches" / kept.pop("file"), kept["batch_size"])
        settings.append(kept)
    return {"folder_order_used": index["folder_order_used"], "settings": settings}


def _digests(file: Path, batch_size: int) -> dict[str, list[str | None]]:
    with np.load(file) as arrays:
        x, y, offsets = arrays["x"], arrays["y"], arrays["sizes_offset"]
        masks = np.unpackbits(arrays["y_mask"], axis=1, count=x.shape[1])
        has_mask, sizes = arrays["has_mask"], arrays["sizes"]
    return {
        "x": [digest(row) for row in x],
        "y": [digest(row) for row in y],
        "y_mask": [digest(mask) if has else None for mask, has in zip(masks, has_mask)],
        "sizes": [digest(sizes[offsets[i] : offsets[i + 1]]) for i in range(len(x))],
    }


def condense_runs(golden: Path) -> dict[str, Any]:
    """Return the reference runs by name, with the values to compare; runs that crashed before a step are omitted."""
    files = sorted(file for pattern in RUNS for file in (golden / "expected/train").glob(f"{pattern}.json"))
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: _condense_run(run) for name, run in runs.items() if run["steps"]}


def _condense_run(run: dict[str, Any]) -> dict[str, Any]:
    kept = _pick(run, "settings", "param_dtype", "world_size", "run_dir_listing", "lora_init")
    kept["steps"] = [_pick(step, "step", "loss", "lr", "grad_norm", "betas") for step in run["steps"]]
    kept["per_rank"] = [_pick(rank, "microbatch_loss") for rank in run["per_rank"]]
    kept["eval_metrics"] = [_pick(metrics, "step", "train_loss", "eval_loss") for metrics in run["eval_metrics"]]
    kept["checkpoints"] = {
        name: _pick(checkpoint, "params.json", "files", "safetensors_file", "file")
        for name, checkpoint in run["checkpoints"].items()
    }
    if run["checkpoints"]:
        last = max(run["checkpoints"])
        kept["checkpoints"][last]["tensors"] = run["checkpoints"][last]["tensors"]
    return _rounded(kept)


def _pick(item: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: item[key] for key in keys if key in item}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _write_json_gz(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))  # no date, so that the file is reproducible


def main() -> None:
    assert GOLDEN is not None, "../shared/golden does not exist"
    for pattern in COPIES:
        for source in filter(Path.is_file, GOLDEN.glob(pattern)):
            target = FIXTURES / source.relative_to(GOLDEN)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    _write_json_gz(FIXTURES / f"{OTHER_VERSION}.gz", json.loads((GOLDEN / OTHER_VERSION).read_text(encoding="utf-8")))
    _write_json_gz(FIXTURES / "expected/batches/digests.json.gz", condense_batches(GOLDEN))
    _write_json_gz(FIXTURES / "expected/train/trajectories.json.gz", condense_runs(GOLDEN))


if __name__ == "__main__":
    main()
