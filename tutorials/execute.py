"""Run the tutorials in their order and save them with their outputs: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = (
    "generate_fictives_notes",
    "prepare_data_for_generative_finetuning",
    "mistral_finetune_7b",
    "icd10_weekly_loop",
)


def main() -> None:
    for name in NAMES:
        path = FOLDER / f"{name}.ipynb"
        print(f"Running {path.name} ...")
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(FOLDER)}}
        # Without timestamps, and with one output per stream, diffs stay small.
        NotebookClient(
            notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=resources
        ).execute()
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
