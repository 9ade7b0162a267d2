"""Write docs/configuration.md, the reference of the training YAML, from its dataclasses: `make docs`."""

import dataclasses
from pathlib import Path
from typing import Any

from finetune.args import known_settings
from model.settings import Setting

PAGE = Path(__file__).with_name("configuration.md")
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
- Paths are relative to the folder in which training is started.
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
    default = _as_yaml(setting.default)
    if setting.is_block:
        link = f"[`{key}`](#{key.replace('.', '')})"
        return f"| {link} | {setting.expected} | {default} | {setting.description.splitlines()[0]} |"
    meaning = setting.description[0].upper() + setting.description[1:].rstrip(".")
    return f"| `{key}` | {setting.expected} | {default} | {meaning}. |"


def _as_yaml(value: Any) -> str:
    """Format a default as it would be written in a YAML file."""
    if value is dataclasses.MISSING:
        return "required"
    if callable(value):  # of a block
        return ""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(value)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else '`""`'


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
