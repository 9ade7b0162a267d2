"""Write docs/configuration.md from the dataclasses, and other tools' settings into docs/migration.md: `make docs`."""

import re
from pathlib import Path

from finetune.args import known_settings
from finetune.settings_help import default_as_yaml
from finetune.translations import TRANSLATIONS, Translation
from model.settings import Setting

PAGE = Path(__file__).with_name("configuration.md")
MIGRATION_PAGE = Path(__file__).with_name("migration.md")
_SETTINGS = re.compile(r"(?<=by `make docs` -->\n).*(?=<!-- end of settings -->)", re.DOTALL)  # of other tools
_INTRODUCTION = """\
# Configuration

<!-- Generated from the comments in finetune/args.py, finetune/data/args.py, finetune/monitoring/args.py and
model/args.py: change those and run `make docs`. -->

A run is configured by one YAML file: `torchrun --nproc-per-node 1 -m train CONFIG.yaml`. Start from one of those in
[example/](../example). Only the data, the model and the run folder are required:

```yaml
data:
  instruct_data: notes.jsonl
model_id_or_path: models/mistral-7B-v0.3
run_dir: runs/first
lora:
  rank: 64
optim.lr: 6e-5 # the same as `lr: 6e-5` inside `optim:`
```

- All problems are reported in one message, before anything is written. `python -m utils.validate_data
  CONFIG.yaml` checks settings and data without a GPU.
- A key inside a block may be written with dots, as `optim.lr` above, but only once.
- A block or key that is left out has its default. `null` is accepted only where it is listed.
- Numbers are decimal: `010`, `1:30` and `0b101`, which have several meanings in YAML, are refused. Counts are at most
  1,000,000,000, fewer where memory would not suffice; the message about a larger one states the limit.
- Arguments replace settings of the file, with the same checks: `python -m train CONFIG.yaml run_dir=b optim.lr=1e-4
  'lora.targets=[wq, wv]'`. `args.yaml` records them. `utils.validate_data` and `utils.plan` accept them, too.
- `python -m train --help` prints this page.
- Keys of Hugging Face's TrainingArguments, PEFT, TRL, axolotl, LLaMA-Factory and unsloth are refused with the lines to
  write instead, which [migration.md](migration.md#settings) lists.
- Paths are relative to the folder in which training is started. `~` and environment variables, `$NAME` or `${NAME}`,
  are expanded in each of them; a path that exists as it is written stays as it is.
- `run_dir` may contain `{date}`, `{time}`, `{name}` (`wandb.run_name`, or else the file name of the YAML without
  `.yaml`) and `{seed}`: `runs/{date}_{name}`. All processes use the folder that the first one names. `resume: auto`,
  which must find the folder again, is refused with `{date}` and `{time}`.
- `log_freq`, `ckpt_freq`, `eval_freq` and `eval_generation.freq` are a number of steps, a share of the run between 0
  and 1 (`0.1` is ten times), or `epoch`: at the end of each. `1` is every step; `1.0`, which could also be the whole
  run, is refused. `epochs` may be 0.5 or 2.5.
- The `args.yaml` of a run is a configuration, too: it records every setting with the values that were used.

"""
# Sections of the settings outside of blocks, by the first setting of each.
_TOPICS = {
    "data": "Required",
    "lora": "Training",
    "ckpt_freq": "Checkpoints",
    "eval_freq": "Evaluation",
    "checkpoint": "Memory and speed",
    "world_size": "Other",
}


def configuration_page() -> str:
    """Return the page."""
    sections: dict[str, list[str]] = {}
    topic = ""
    for key, setting in known_settings().items():
        block = key.rpartition(".")[0]
        topic = _TOPICS.get(key, topic)
        sections.setdefault(f"`{block}`" if block else topic, []).append(_row(key, setting))
    titles = sorted(sections, key=lambda title: title not in _TOPICS.values())  # blocks last
    return _INTRODUCTION + "\n".join(_section(title, sections[title]) for title in titles)


def _section(title: str, rows: list[str]) -> str:
    block = known_settings().get(title.strip("`"))
    about = [block.description, ""] if block else []
    table = ["| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"## {title}", "", *about, *table, ""])


def _row(key: str, setting: Setting) -> str:
    default = _quoted(default_as_yaml(setting.default))
    if setting.is_block:
        link = f"[`{key}`](#{key.replace('.', '')})"
        return f"| {link} | {setting.expected} | {default} | {setting.description.splitlines()[0]} |"
    meaning = setting.description[0].upper() + setting.description[1:].rstrip(".")
    return f"| `{key}` | {setting.expected} | {default} | {meaning}. |"


def _quoted(default: str) -> str:
    return f"`{default}`" if default not in ("", "required") else default


def migration_page() -> str:
    """Return the migration guide with a current table of other tools' settings."""
    lines = ["| elsewhere | here |", "| --- | --- |"]
    for title, entries in TRANSLATIONS.items():
        rows = [_translation_row(entry) for entry in entries if not known_settings().keys() >= set(entry.names)]
        lines += [f"| **{title}** | |", *rows]
    table = "\n".join(lines) + "\n"
    return _SETTINGS.sub(lambda match: table, MIGRATION_PAGE.read_text(encoding="utf-8"))


def _translation_row(entry: Translation) -> str:
    others = [name for name in entry.names if name not in known_settings()]  # the rest are our keys with other values
    names, ours = (", ".join(f"`{key}`" for key in keys) for keys in (others, entry.ours))
    here = f"{ours} ({entry.remark})" if ours and entry.remark else ours or f"leave out: {entry.remark}"
    return f"| {names} | {here} |"


if __name__ == "__main__":
    MIGRATION_PAGE.write_text(migration_page(), encoding="utf-8")
    PAGE.write_text(configuration_page(), encoding="utf-8")
