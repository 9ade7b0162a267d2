"""The YAML and the batches of a setting of benchmarks.train."""

import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.data import rows_file
from finetune.args import TrainArgs, read_train_args
from finetune.data.data_loader import TrainLoader, build_data_loader
from finetune.data.tokenizer_files import V3_VOCABULARY, load_instruct_tokenizer

from .presets import Preset

_MEGABYTES = 4  # of rows, read repeatedly


def train_args(preset: Preset, case: dict[str, Any]) -> TrainArgs:
    """Write a YAML for this setting and read it like a user's; `case["set"]` adds or overrides keys."""
    source = "data" if preset.rows == "texts" else "instruct_data"
    packing = case.get("packing", preset.packing)
    settings = {
        "data": {source: str(preset_rows(preset)), "packing": packing},
        "model_id_or_path": case["preset"],
        "run_dir": "none",
        "seq_len": case["seq_len"],
        "batch_size": preset.batch_size,
        "num_microbatches": preset.num_microbatches,
        "max_steps": case["warmup"] + case["steps"],
        "lora.rank": preset.rank,
        "checkpoint": case["checkpoint"],
        "param_dtype": case["dtype"],
        "attention": case["attention"],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return read_train_args(path, overrides=case["set"])


def preset_rows(preset: Preset) -> Path:
    """Return the rows that a preset trains on, generated at the first call on a machine."""
    return rows_file(preset.rows, _MEGABYTES)


def packed_batches(args: TrainArgs) -> TrainLoader:
    """Return the batches of a setting: tokens of mistral-common's v3, for any vocabulary size."""
    tokenizer = load_instruct_tokenizer(Path("has no tokenizer"), V3_VOCABULARY)
    return build_data_loader(tokenizer, args.data, args.batch_size, args.seq_len, args.seed, 0, 1, is_eval=False)
