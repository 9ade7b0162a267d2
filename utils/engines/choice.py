"""The choice of an engine and its model, and the command-line options for it. Imports nothing heavy."""

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.cli import add_step_option
from finetune.redaction import redacted
from finetune.run_dir import find_checkpoint, run_of
from model.errors import UserError
from model.sampling import Sampling
from utils.engines.engine import DEFAULT_GENERATION, Engine, Generation
from utils.engines.server_address import DEFAULT_CONCURRENCY, ServerAddress
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import RuleSet, add_rules_option, guide_rules, parse_rules

ENGINES = ("local", "transformers", "vllm", "server")
_UNBATCHED = ("vllm", "server")
DEFAULT_BATCH_SIZE = 16
_TEMPERATURES = (0.001, 100.0)  # above 0; beyond these, 32-bit logits overflow or all tokens are equally likely


@dataclasses.dataclass
class EngineChoice:
    """An engine that is not open yet.

    Attributes:
        name: one of ENGINES.
        folder: a run, a checkpoint or a model; for a server None.
        step: checkpoint of a run: a step number or "best"; None for the latest.
        server: where the model is, for the engine `server`.
        table: codes that answers may contain; None for unconstrained answers.
        generation: length and sampling of the answers.
        batch_size: prompts at once, for engines that do not decide it themselves.
        rules: coding rules that answers with a table follow.

    Raises:
        UserError: the settings do not fit together, or there is no such folder.
    """

    name: str = "local"
    folder: Path | None = None
    step: int | str | None = None
    server: ServerAddress | None = None
    table: Cim10Table | None = None
    generation: Generation = DEFAULT_GENERATION
    batch_size: int = DEFAULT_BATCH_SIZE
    rules: RuleSet = dataclasses.field(default_factory=guide_rules)

    def __post_init__(self) -> None:
        if self.name == "server":
            if self.server is None:
                raise UserError("--engine server needs --server URL, such as http://127.0.0.1:8000/v1.")
            if self.folder is not None:
                raise UserError(
                    f"--engine server runs the server's own model: leave out {self.folder}; --model NAME chooses among "
                    "several models of the server."
                )
            self.server.require_allowed()
        elif self.server is not None:
            raise UserError(f"--server needs --engine server, and the engine is {self.name}.")
        elif self.folder is None:
            raise UserError(f"--engine {self.name} needs the folder of a model.")
        else:
            self.folder = find_checkpoint(self.folder, self.step)

    @property
    def model(self) -> str:
        """The model, for people; a link such as `best` is replaced by the name of its checkpoint."""
        if self.folder is None:
            assert self.server is not None, "checked above"
            return f"{self.server.model or 'the model'} of {redacted(self.server.url)}"
        in_run = run_of(self.folder) is not None
        return str(self.folder.with_name(self.folder.resolve().name) if in_run else self.folder)

    def origin(self) -> dict[str, Any]:
        """Return what an evaluation shows about the answers."""
        run_dir = run_of(self.folder) if self.folder else None
        answered = f"{datetime.now():%Y-%m-%d %H:%M}"
        return {"run_name": run_dir and run_dir.name, "checkpoint": self.model, "answered": answered}

    def identity(self) -> dict[str, Any]:
        """Return what answers depend on besides the prompts; None where it is as it was before there were choices."""
        sampling = self.generation.sampling
        return {
            "run": fingerprint(self.folder) if self.folder else None,
            "max_tokens": self.generation.max_tokens,
            "cim10": None if self.table is None else sha256(repr(list(self.table)).encode()),
            "rules": None if self.table is None else self.rules.digest,
            "engine": None if self.name == "local" else self.name,
            "model": self.server.model if self.server else None,
            "sampling": dataclasses.asdict(sampling) if sampling.temperature else None,
        }

    def broken_rules(self, coding: Sequence[Diagnosis], person: Mapping[str, Any]) -> list[str]:
        """Return the names of the rules that an answer breaks, if a table was given; `person` has sex and age."""
        return [] if self.table is None else self.rules.in_year(None).broken(coding, self.table, person)

    def open(self) -> Engine:
        """Load the model, or connect to the server.

        Raises:
            UserError: it cannot be used.
        """
        if self.server is not None:
            from utils.engines.server import ServerEngine

            return ServerEngine(self.server, self.generation, self.table, self.rules)
        assert self.folder is not None, "checked above"
        if self.name == "vllm":
            from utils.engines.vllm_engine import VllmEngine

            return VllmEngine(self.folder, self.generation, self.table, self.rules)
        if self.name == "transformers":
            from utils.engines.transformers_engine import TransformersEngine

            return TransformersEngine(self.folder, self.generation, self.table, self.batch_size, self.rules)
        from utils.engines.local import LocalEngine

        return LocalEngine(self.folder, self.generation, self.table, self.batch_size, self.rules)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `parse_engine` makes an EngineChoice, except the folder of the model."""
    group = parser.add_argument_group("model and engine")
    group.add_argument("--engine", choices=ENGINES, default="local", help="what runs the model (default: %(default)s)")
    group.add_argument("--server", metavar="URL", help="an OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", metavar="NAME", help="model of the server (default: the only one that it lists)")
    group.add_argument("--concurrency", type=int, help=f"prompts sent at once (default: {DEFAULT_CONCURRENCY})")
    group.add_argument("--allow_remote", action="store_true", help="the server may be another machine")
    group.add_argument("--log_probabilities", action="store_true", help="ask the server for them, if it supports that")
    group.add_argument("--batch_size", type=int, help=f"rows answered at once (default: {DEFAULT_BATCH_SIZE})")
    add_step_option(group)
    add_sampling_options(group)


def add_coding_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that code stays, except `--cim10`; `parse_coding_engine` makes an EngineChoice."""
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run, a checkpoint or a model")
    add_rules_option(parser)
    parser.add_argument("--columns", metavar="MAPPING", help="FIELD=COLUMN,... or a YAML file")
    parser.add_argument("--auto", type=float, metavar="SHARE", help="mark stays that need no reading: 0.98 right DPs")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="default: the run's")
    add_engine_options(parser)


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that `utils.engines.shards.parse_shard` reads."""
    parser.add_argument("--shard", metavar="I/N", help="answer every N-th row from row I on; then run without --shard")


def add_sampling_options(parser: argparse._ActionsContainer) -> None:
    """Add the options from which `parse_generation` makes a Generation."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely tokens (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from tokens with this total probability")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=DEFAULT_GENERATION.max_tokens,
        help="maximum answer length (default: %(default)s)",
    )


def parse_generation(options: argparse.Namespace) -> Generation:
    """Return the settings of `add_sampling_options`.

    Raises:
        UserError: a value is out of range, or has no effect.
    """
    lowest, highest = _TEMPERATURES
    if not (options.temperature == 0 or lowest <= options.temperature <= highest):
        raise UserError(f"--temperature must be 0, or between {lowest} and {highest}.")
    if not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_tokens < 1:
        raise UserError("--top_p must be above 0 and at most 1, --top_k at least 0, --max_tokens at least 1.")
    if not 0 <= options.seed < 2**63:
        raise UserError("--seed must be at least 0 and less than 2**63.")
    if options.temperature == 0 and (options.top_p < 1 or options.top_k > 0 or options.seed):
        raise UserError("--top_p, --top_k and --seed have no effect on the most likely tokens; give --temperature.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    return Generation(options.max_tokens, sampling)


def parse_engine(
    options: argparse.Namespace, folder: Path | None, table: Cim10Table | None = None, rules: RuleSet | None = None
) -> EngineChoice:
    """Return the choice of `add_engine_options`.

    Raises:
        UserError: as for `EngineChoice`.
    """
    batch_size, concurrency = options.batch_size, options.concurrency
    if (batch_size is not None and batch_size < 1) or (concurrency is not None and concurrency < 1):
        raise UserError("--batch_size and --concurrency must be at least 1.")
    of_server = (options.model, options.allow_remote, options.log_probabilities, concurrency)
    if options.engine != "server" and any(of_server):
        raise UserError("--model, --allow_remote, --log_probabilities and --concurrency are for --engine server.")
    if options.engine in _UNBATCHED and batch_size:
        raise UserError(f"--batch_size is for the engines local and transformers; {options.engine} forms its own.")
    if options.engine == "server" and options.step is not None:
        raise UserError("--step selects a checkpoint of a run, and --engine server takes no run.")
    server = None
    if options.server:
        flags = (options.allow_remote, options.log_probabilities)
        server = ServerAddress(options.server, options.model, concurrency or DEFAULT_CONCURRENCY, *flags)
    generation = parse_generation(options)
    size = batch_size or DEFAULT_BATCH_SIZE
    return EngineChoice(options.engine, folder, options.step, server, table, generation, size, rules or guide_rules())


def parse_coding_engine(options: argparse.Namespace) -> EngineChoice:
    """Return the choice of `add_coding_options` and `--cim10`.

    Raises:
        UserError: the settings do not fit together, or a file cannot be read.
    """
    if options.run is None and options.engine != "server":
        raise UserError("--run is missing: give the folder of a run, a checkpoint or a model.")
    table = Cim10Table.from_file(options.cim10) if options.cim10 else None
    if options.rules and table is None:
        raise UserError("--rules needs --cim10: without a table of codes, answers are free.")
    return parse_engine(options, options.run, table, parse_rules(options.rules))


def given_options(options: argparse.Namespace) -> list[str]:
    """Return the options of `add_engine_options` that have another value than their default."""
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name}" for name, default in defaults.items() if getattr(options, name) != default]


def fingerprint(folder: Path) -> str:
    """Return a hash that identifies a checkpoint or model folder, without reading its weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256(repr((str(folder.resolve()), facts)).encode())


def sha256(content: bytes) -> str:
    """Return the hash as hexadecimal text."""
    return hashlib.sha256(content).hexdigest()
