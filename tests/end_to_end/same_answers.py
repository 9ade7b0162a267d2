"""Compare greedy answers of a run's exports in other engines with ours, note by note, and record the result.

python -m tests.end_to_end.same_answers --run demo/run --notes demo/held_out/notes_instruct.jsonl --n 50

In process: transformers on the merged export, and PEFT on the exported base and adapter. By `utils.predict_icd10`:
`--engine local` in batches, and `--engine server` with `transformers serve` on the loopback address, in fp32, killed
half-way and restarted, and in the export's own dtype. `--server URL` asks a running server instead, such as vLLM or
llama.cpp with another export of the run; with `--cim10 TABLE` under its grammar.

Where answers part, the result has the difference between our logits of the two tokens: rounding explains a small one.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import measure, print_table
from finetune.args import read_train_args
from finetune.cli import run_cli
from finetune.inference import load_trained
from finetune.run_dir import ARGS_NAME
from model.errors import UserError
from model.generate import collect_tokens, stream
from tests.support.other_engines import transformers_answers
from tests.support.patience import wait_until
from tests.support.transformers_serve import transformers_serve
from utils.engines.prompts import Prompt, read_prompts
from utils.engines.token_codec import TokenCodec
from utils.icd10.codes import Cim10Table
from utils.models.exports import export

_MAX_TOKENS = 200
_ROUNDING = 0.1  # between two logits of about 20, which bf16 rounds by up to 0.06 each
_ENGINES = {
    "local": "this project, in batches",
    "transformers": "transformers, merged export",
    "peft": "transformers and PEFT, exports of base and adapter",
    "served": "transformers serve, merged export in fp32, killed half-way",
    "served_as_it_is": "transformers serve, merged export in its own dtype",
}
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "engine": lambda result: result["engine"],
    "equal answers": lambda result: f"{result['equal'][0]:.0f} of {result['notes']}",
    "logit gaps where answers part": lambda result: result["gaps"] or "-",
}


class _Ours:
    """Our greedy answers to each prompt on its own, which others are compared with.

    Args:
        run: folder of the run.
        prompts: to answer.
        table: codes that answers may contain; None for unconstrained answers.

    Attributes:
        encoded: tokens of each prompt.
        eos_id: ends an answer.
    """

    def __init__(self, run: Path, prompts: Sequence[Prompt], table: Cim10Table | None) -> None:
        self._model, tokenizer = load_trained(run)
        self._tokenizer = tokenizer.tokenizer
        codec = TokenCodec(tokenizer, table)
        self.eos_id = codec.eos_id
        _, self.encoded, _ = codec.encode(prompts)
        self._answers: list[list[int]] = []
        self._texts: dict[str, str] = {}
        for prompt, tokens in zip(prompts, tqdm(self.encoded, desc="ours", disable=None), strict=True):
            constraints = codec.constraints(1)
            steps = stream(self._model, [tokens], _MAX_TOKENS, self.eos_id, constraints=constraints)
            self._answers += collect_tokens(steps)
            (reply,) = codec.replies(self._answers[-1:], [[]], constraints)
            self._texts[prompt.id] = reply.text

    def compare(self, theirs: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return how many answers are equal, and the gaps of the others."""
        pairs = enumerate(zip(self._answers, map(list, theirs), strict=True))
        gaps = [self._gap(index, other) for index, (answer, other) in pairs if answer != other]
        equal = len(self._answers) - len(gaps)
        return {
            "equal": equal,
            "gaps": ", ".join(f"{gap:.2g}" for gap in sorted(gaps)),
            "largest": max(gaps, default=0.0),
        }

    def compare_texts(self, theirs: dict[str, str]) -> dict[str, Any]:
        """Compare like `compare`, given the text of the answer to each prompt."""
        tokens = []
        for (name, text), answer in zip(self._texts.items(), self._answers, strict=True):
            encoded = [*self._tokenizer.encode(theirs[name], bos=False, eos=True)]
            tokens.append(answer if theirs[name] == text else encoded)
        return self.compare(tokens)

    @torch.no_grad()
    def _gap(self, index: int, theirs: list[int]) -> float:
        """Return by how much our logit of our token is above that of theirs where the answers part."""
        ours = self._answers[index]
        at = next((at for at, (own, other) in enumerate(zip(ours, theirs)) if own != other), None)
        if at is None:
            return math.inf  # one continues where the other ends
        context = torch.tensor(self.encoded[index] + ours[:at])
        logits = self._model(context, [len(context)])[-1]
        return float(logits[ours[at]] - logits[theirs[at]])


class _Engines:
    """Each method answers the notes with an engine and compares its answers.

    Args:
        ours: our answers.
        run: folder of the run.
        notes: file of the notes.
            Exports and answers are written next to it.
        options: of `utils.predict_icd10` for a server.
    """

    def __init__(self, ours: _Ours, run: Path, notes: Path, options: Sequence[str]) -> None:
        self._ours, self._run, self._notes, self._folder = ours, run, notes, notes.parent
        self._options = options

    def local(self) -> dict[str, Any]:
        self._run_to_its_end(self._predict("local", "--run", str(self._run)))
        return self._ours.compare_texts(self._read("local"))

    def transformers(self) -> dict[str, Any]:
        export(self._run, "hf", self._folder / "merged", merged=True)
        return self._in_process(self._folder / "merged")

    def peft(self) -> dict[str, Any]:
        export(Path(read_train_args(self._run / ARGS_NAME).model_id_or_path), "hf", self._folder / "base")
        export(self._run, "peft", self._folder / "adapter")
        return self._in_process(self._folder / "base", self._folder / "adapter")

    def _in_process(self, model: Path, adapter: Path | None = None) -> dict[str, Any]:
        return self._ours.compare(
            transformers_answers(model, self._ours.encoded, _MAX_TOKENS, self._ours.eos_id, adapter)
        )

    def served(self) -> dict[str, Any]:
        """Kill the command as soon as half the answers are there, and start it again."""
        answers, half = self._folder / "served.jsonl", len(self._ours.encoded) // 2
        with self._serve("--dtype", "float32") as options:
            command = self._predict("served", *options)
            with subprocess.Popen(command) as process:
                wait_until(lambda: answers.exists() and len(answers.read_bytes().splitlines()) >= half, "no answers")
                process.kill()
            killed_after = len(answers.read_bytes().splitlines())
            self._run_to_its_end(command)
        return {"killed_after": f"{killed_after} answers"} | self._ours.compare_texts(self._read("served"))

    def served_as_it_is(self) -> dict[str, Any]:
        with self._serve() as options:
            self._run_to_its_end(self._predict("as_it_is", *options))
        return self._ours.compare_texts(self._read("as_it_is"))

    @contextlib.contextmanager
    def _serve(self, *options: str) -> Iterator[list[str]]:
        """Serve the merged export with transformers; yield the options of `utils.predict_icd10` for it."""
        merged = self._folder / "merged"
        with transformers_serve(merged, self._folder / "server.log", *options) as url:
            yield ["--engine", "server", "--server", url, "--model", str(merged)]

    def server(self) -> dict[str, Any]:
        self._run_to_its_end(self._predict("server", "--engine", "server", *self._options))
        return self._ours.compare_texts(self._read("server"))

    def _predict(self, name: str, *options: str) -> list[str]:
        files = ["--notes", str(self._notes), "--out", str(self._folder / f"{name}.jsonl")]
        command = [sys.executable, "-m", "utils.predict_icd10", *files, "--max_tokens", str(_MAX_TOKENS)]
        return [*command, *options]

    @staticmethod
    def _run_to_its_end(command: Sequence[str]) -> None:
        """Raise UserError if the command fails, which has then printed why."""
        if subprocess.run(command).returncode:
            raise UserError(f"{command[2]} failed.")

    def _read(self, name: str) -> dict[str, str]:
        """Return the text of each answer.

        Raises:
            UserError: not every note has exactly one.
        """
        rows = [json.loads(line) for line in (self._folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
        answers = {row["id"]: row["answer"] for row in rows}
        if not len(rows) == len(answers) == len(self._ours.encoded):
            raise UserError(f"{len(rows)} answers to {len(answers)} of {len(self._ours.encoded)} notes.")
        return answers


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="conversations (jsonl)")
    parser.add_argument("--n", type=int, default=50, help="number of notes (default: %(default)s)")
    parser.add_argument("--server", metavar="URL", help="compare only the answers of this server")
    parser.add_argument("--model", metavar="NAME", help="model of the server")
    parser.add_argument("--name", default="server", help="of the server in the result, such as its version")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="restrict the server to codes of this table")
    options = parser.parse_args()
    if not options.server and (options.model or options.cim10):
        parser.error("--model and --cim10 are for --server")
    return options


def main() -> None:
    options = _arguments()
    for_server = {"--server": options.server, "--model": options.model, "--cim10": options.cim10}
    names = {"server": options.name} if options.server else _ENGINES
    table = Cim10Table.from_file(options.cim10) if options.cim10 else None
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.jsonl"
        notes.write_text("".join(options.notes.read_text("utf-8").splitlines(keepends=True)[: options.n]), "utf-8")
        prompts, _ = read_prompts(notes)
        ours = _Ours(options.run, prompts, table)
        engines = _Engines(
            ours, options.run, notes, [part for option in for_server.items() if option[1] for part in map(str, option)]
        )
        cases = [{"engine": name, "notes": len(prompts)} for name in names.values()]
        methods = {name: getattr(engines, method) for method, name in names.items()}
        record = measure("same_answers", cases, 1, lambda case: methods[case["engine"]]())
    print_table(record, _COLUMNS)
    if any(result["largest"][0] > _ROUNDING for result in record["results"]):
        raise UserError(f"Answers part where logits differ by more than {_ROUNDING}: rounding does not explain that.")


if __name__ == "__main__":
    run_cli(main)
