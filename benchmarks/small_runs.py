"""Experiments of minutes on a CPU: the demo's training with other settings, over seeds, on a base model made once."""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.data import WORK_DIR
from benchmarks.measure import RESULTS, ROOT, last_record, measure, print_table, run_json
from finetune.monitoring.metrics_logger import read_metrics
from model.args import MoeArgs
from model.atomic import new_file
from utils.fictional_notes.catalogue import Catalogue, load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.icd10.answers import build_answer
from utils.icd10.codes import Cim10Table
from utils.icd10.prompts import instruct_row

BASE_STEPS = 1500  # of pretraining, as in the demo
Case = dict[str, Any]


def catalogue() -> Catalogue:
    return load_catalogue(Cim10Table.from_file(ROOT / "example/demo_cim10.tsv"))


def notes_file(count: int, seed: int = 0, wordings: str = "train") -> Path:
    """Return a jsonl file with the demo's first `count` notes of a seed; two seeds share no note."""
    path = WORK_DIR / f"notes-{count}-seed-{seed}{'' if wordings == 'train' else f'-{wordings}'}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for note in write_notes(count, seed, catalogue(), "short", wordings):
                row = instruct_row(note.text, build_answer(note.diagnoses), note.id)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def data_settings(notes: int) -> dict[str, str]:
    """Return `data` of a run on this many notes, evaluated on 90 others, as the demo is."""
    held_out = notes_file(90, seed=1)
    return {"instruct_data": str(notes_file(notes)), "eval_instruct_data": str(held_out), "packing": "best_fit"}


def base_model(steps: int = BASE_STEPS, experts: int = 0) -> Path:
    """Return the folder of the demo's base model, or of a mixture with as many active parameters.

    Args:
        steps: of pretraining on fictional notes.
        experts: 0 for a dense model; otherwise the number of experts, half as wide, of which a token uses two.
    """
    from utils.models.demo_model import demo_model_args, make_demo_model  # loads torch

    folder = WORK_DIR / f"base-{steps}-steps-{experts}-experts"
    if not folder.is_dir():
        args = demo_model_args(128, 2)
        if experts:
            args = dataclasses.replace(args, hidden_dim=args.hidden_dim // 2, moe=MoeArgs(experts, 2))
        make_demo_model(folder, args, 0, steps, catalogue())
    return folder


def train_demo(folder: Path, **changes: Any) -> Path:
    """Train in this process with the demo's settings and these changes; return the run folder, in `folder`."""
    import train  # takes seconds, and a process that only starts others does not need it

    settings = yaml.safe_load((ROOT / "example/demo.yaml").read_text(encoding="utf-8"))
    settings |= {"run_dir": str(folder / "run"), "no_ckpt": True, "log_freq": 1} | changes
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    train.train(str(config))
    return folder / "run"


def trained_demo(notes: int, steps: int, seed: int) -> Path:
    """Return the folder of a run with the demo's settings, which is kept between benchmarks."""
    folder = WORK_DIR / f"demo-{notes}-notes-{steps}-steps-seed-{seed}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK_DIR) as temporary:
            data, base = data_settings(notes), str(base_model())
            settings = {"data": data, "model_id_or_path": base, "max_steps": steps, "seed": seed, "no_eval": True}
            run = train_demo(Path(temporary), **settings, no_ckpt=False)
            run.rename(folder)
    return folder


def eval_losses(run_dir: Path) -> dict[int, float]:
    """Return the evaluation losses of a run by step."""
    return {line["step"]: line["eval_loss"] for line in read_metrics(run_dir, "eval") if "eval_loss" in line}


def epochs_seen(run_dir: Path) -> float:
    """Return how many times a run has seen each row, as packed."""
    from finetune.args import read_train_args
    from finetune.data.data_loader import build_data_loader
    from finetune.data.tokenizer_files import load_instruct_tokenizer
    from model.args import load_model_args

    args = read_train_args(run_dir / "args.yaml")
    model = Path(args.model_id_or_path)
    tokenizer = load_instruct_tokenizer(model, load_model_args(model).vocab_size)
    with contextlib.closing(
        build_data_loader(tokenizer, args.data, args.batch_size, args.seq_len, args.seed, 0, 1, is_eval=False)
    ) as loader:
        epoch = loader.count_epoch(show_progress=False)
    return args.max_steps * args.num_microbatches * args.batch_size * args.seq_len / epoch


def latest_results(name: str) -> dict[str, Any]:
    """Return the last record of an experiment, with the latest result of each case, also of earlier records."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    record = last_record(name)
    # What is not a setting of a case was measured: a list [lowest, median, highest], or a string.
    found = {_settings(result): result for line in lines for result in json.loads(line)["results"]}
    return record | {"results": [found[settings] for settings in sorted(found)]}


def _settings(result: Case) -> tuple[tuple[str, float], ...]:
    return tuple(item for item in result.items() if isinstance(item[1], int | float))


def experiment_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all experiments have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each case (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the latest result of each case")
    parser.add_argument("--alone", type=json.loads, metavar="CASE", help="run one case in this process")
    return parser


def run_experiment(
    name: str,
    options: argparse.Namespace,
    cases: Sequence[Case],
    run: Callable[[Case, Path], dict[str, Any]],
    columns: dict[str, Callable[[Case], str]],
) -> None:
    """Run every case once per seed, each in a fresh process, append the record to results/NAME.jsonl and print it.

    Args:
        name: of the benchmark's module.
        options: of `experiment_parser`.
        cases: settings of each case, without the seed.
        run: returns the numbers of a case, which has a `seed`, given an empty folder to work in.
        columns: of the table.
    """
    if options.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(options.alone, Path(folder))))
        return

    def in_fresh_process(case: Case) -> dict[str, Any]:
        seed = next(seeds[json.dumps(case)])
        return run_json(sys.executable, "-m", f"benchmarks.{name}", "--alone", json.dumps(case | {"seed": seed}))

    seeds = {json.dumps(case): iter(range(options.seeds)) for case in cases}
    record = latest_results(name) if options.show else measure(name, cases, options.seeds, in_fresh_process)
    print_table(record, columns)
