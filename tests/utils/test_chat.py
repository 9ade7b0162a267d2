"""Answers of a trained model in a terminal."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from finetune.run_dir import find_checkpoint
from model.args import LoraArgs
from tests.support.checkpoints import make_tiny_checkpoint
from utils import chat
from utils.engines.chat_model import BASE, TUNED, Answer, ChatModel
from utils.engines.engine import Generation
from utils.engines.local import LocalEngine
from utils.engines.prompts import Prompt
from utils.icd10.prompts import prompt_messages

pytestmark = pytest.mark.slow
QUESTION = "Quel est le code du diabète ?"
RunChat = Callable[..., tuple[int, str]]


def trained(folder: Path, kind: str) -> Path:
    """Train a tiny model on one question; return the run folder."""
    row = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "E119"}]}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    args = TrainArgs(
        data=DataArgs(instruct_data=str(folder / "train.jsonl")),
        model_id_or_path=str(make_tiny_checkpoint(folder / "model")),
        run_dir=str(folder / "run"),
        lora=LoraArgs(enable=False) if kind == "full" else LoraArgs(rank=4),
        save_adapters=kind == "adapter",
        seq_len=64,
        max_steps=12,
    )
    args.optim.lr = 3e-2
    train.run_training(args, World(0, 1, torch.device("cpu")))
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("chat"), "adapter")


class EndsAtOnce:
    """A tokenizer for which every token ends an answer."""

    class Any:
        def __eq__(self, other: object) -> bool:
            return True

    eos_id = Any()


def answers(output: str) -> dict[str, str]:
    return {name: answer["answer"] for name, answer in json.loads(output.splitlines()[-1]).items()}


def predicted(folder: Path, messages: list[dict[str, str]]) -> str:
    ((_, reply),) = LocalEngine(find_checkpoint(folder), Generation(20)).answers([Prompt("1", {"messages": messages})])
    return reply.text


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_both_models_answer_as_they_do_in_predictions(kind: str, tmp_path: Path, run_command: RunChat) -> None:
    run_dir = trained(tmp_path, kind)
    code, output = run_command(chat, run_dir, "--prompt", QUESTION, "--compare", "--max_tokens", 20, "--json")
    assert code == 0
    question = [{"role": "user", "content": QUESTION}]
    expected = {BASE: predicted(run_dir.parent / "model", question), TUNED: predicted(run_dir, question)}
    assert {name: answer.strip() for name, answer in answers(output).items()} == expected
    assert expected[TUNED] == "E119" != expected[BASE]


def test_answer_is_printed_as_it_is_written(run_dir: Path) -> None:
    answer = ChatModel(run_dir).answer(TUNED, [{"role": "user", "content": QUESTION}], Generation(20))
    pieces = list(answer)
    assert len(pieces) > 1 and "".join(pieces) == answer.text == "E119"
    assert answer.is_complete and answer.tokens == len(pieces) + 1


def test_notes_are_asked_for_codes_as_in_training(run_dir: Path, run_command: RunChat, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Patient de 70 ans.\n"))
    code, output = run_command(chat, run_dir, "--prompt", "-", "--icd10", "--max_tokens", 20, "--json")
    assert code == 0
    assert answers(output)[TUNED].strip() == predicted(run_dir, prompt_messages("Patient de 70 ans.\n"))


def test_a_conversation_remembers_and_starts_again(run_dir: Path, run_command: RunChat, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Bonjour\n\n{QUESTION}\n/new\n{QUESTION}\n"))
    code, output = run_command(chat, run_dir, "--system", "Répondez.", "--max_tokens", 20, "--json")
    first, second, again = (answers(line)[TUNED] for line in output.splitlines() if line.startswith("{"))
    system, asked = {"role": "system", "content": "Répondez."}, {"role": "user", "content": QUESTION}
    earlier = [{"role": "user", "content": "Bonjour"}, {"role": "assistant", "content": first}]
    assert code == 0
    assert second.strip() == predicted(run_dir, [system, *earlier, asked])
    assert again.strip() == predicted(run_dir, [system, asked])


def test_sampled_answers_depend_on_the_seed(run_dir: Path, run_command: RunChat) -> None:
    def sampled(seed: int) -> str:
        options = ["--temperature", 3, "--top_p", 0.99, "--top_k", 500, "--max_tokens", 20, "--seed", seed, "--json"]
        return answers(run_command(chat, run_dir, "--prompt", QUESTION, *options)[1])[TUNED]

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", " "], "The prompt is empty."),
        (["--prompt", "a", "--top_p", 0], "--top_p must be above 0 and at most 1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be 0, or between 0.001 and 100"),
        (["--prompt", "a", "--temperature", 1e-300], "--temperature must be 0, or between 0.001 and 100"),
        (["--prompt", "a", "--temperature", 1, "--seed", 2**63], "--seed must be at least 0 and less than 2**63."),
        (
            ["--prompt", "a", "--server", "http://127.0.0.1:1/v1"],
            "--server needs --engine server, and the engine is local.",
        ),
        (["--prompt", "a", "--concurrency", 3], "and --concurrency are for --engine server."),
        (["--prompt", "a\udce9"], "The prompt is not UTF-8; convert it"),
        (["--prompt", "a", "--system", "\udce9"], "The prompt is not UTF-8; convert it"),
        (["--prompt", "a", "--top_p", 0.5], "have no effect on the most likely tokens; give --temperature."),
        (["--prompt", "a", "--step", 77], "has no checkpoint of step 77"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments: list, expected: str, run_dir: Path, run_command: RunChat) -> None:
    code, output = run_command(chat, run_dir, *arguments)
    assert code == 1 and expected in output and "Traceback" not in output


@pytest.mark.parametrize("options", [["--prompt", "-"], []])
def test_an_input_in_another_encoding_ends_with_a_sentence(options, run_dir, run_command: RunChat, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né\n".encode("cp1252")), encoding="utf-8"))
    code, output = run_command(chat, run_dir, *options)
    assert code == 1 and "The prompt is not UTF-8; convert it" in output and "Traceback" not in output


def test_a_row_that_the_tokenizer_refuses_does_not_stop_the_others(run_dir, tmp_path, run_command: RunChat) -> None:
    rows = [
        {"id": "lost", "messages": [{"role": "system", "content": "Secret"}]},
        {"id": "asked", "messages": [{"role": "user", "content": QUESTION}]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "a.jsonl"
    code, output = run_command(chat, run_dir, "--batch", tmp_path / "q.jsonl", "--out", out, "--max_tokens", 20)
    assert code == 1 and "1 row was not used (lost): it cannot be encoded" in output and "Secret" not in output
    assert [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()] == ["E119"]


def test_a_model_that_was_not_fine_tuned_here_has_nothing_to_compare_with(run_dir: Path, run_command: RunChat) -> None:
    code, output = run_command(chat, run_dir.parent / "model", "--prompt", "a", "--compare")
    assert code == 1 and "is not in a run folder: the model that it was fine-tuned from is not recorded" in output


@pytest.mark.parametrize("ending", ["by the model", "by Ctrl-C"])
def test_the_adapter_is_back_after_an_answer_of_the_base_model(ending: str, run_dir: Path) -> None:
    model, question = ChatModel(run_dir, compare=True), [{"role": "user", "content": QUESTION}]
    base = model.answer(BASE, question, Generation(20))
    if ending == "by the model":
        base._tokenizer = EndsAtOnce()
        assert list(base) == [] and base.is_complete
    else:
        pieces = iter(base)
        next(pieces)
        pieces.close()
    assert "".join(model.answer(TUNED, question, Generation(20))) == "E119"


def test_ctrl_c_ends_an_answer_and_not_the_conversation(run_dir: Path, run_command: RunChat, monkeypatch) -> None:
    pieces, answers_begun = Answer.__iter__, []

    def interrupted(answer: Answer) -> Iterator[str]:
        answers_begun.append(answer)
        for piece in pieces(answer):
            yield piece
            if len(answers_begun) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Answer, "__iter__", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/new\n{QUESTION}\n"))
    code, output = run_command(chat, run_dir)
    assert code == 0
    assert output.splitlines()[-2:] == ["E [incomplete]", "E119"]
