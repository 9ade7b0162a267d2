"""What the validator passes trains as the row says, token by token, compared with a naive encoder of generated rows."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ModelSettings
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.args import DataArgs, InstructArgs
from finetune.data.data_loader import build_data_loader
from finetune.data.dataset import JsonlFile
from finetune.data.exceptions import BadRowError
from finetune.data.tokenize import SampleEncoder, SampleType
from finetune.data.tokenizer_files import load_instruct_tokenizer
from tests.finetune.test_tokenizer_versions import SENTENCEPIECE, SHIPPED
from tests.support.tiny_tekken import load_tiny_tekken
from utils.validation.check_rows import FileToCheck, RowChecker

ROWS = 150
TOKENIZERS = ("sentencepiece v1", "sentencepiece v3", "tekken v3", "tekken v7", "tekken v11", "tekken v13")
WORDS = ("fièvre", "toux", "R50", "</s>", "[INST]", "HTA :", "38,5 °C", "l'été\n", "e\u0301", "{}", "J45.9", " ", "dès")


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory) -> InstructTokenizerBase:
    kind, version = request.param.split()
    folder = tmp_path_factory.mktemp("tokenizer")
    if kind == "tekken":
        return load_tiny_tekken(folder, version).instruct_tokenizer
    shutil.copyfile(SHIPPED / SENTENCEPIECE[version], folder / f"tokenizer.model.{version}")
    return load_instruct_tokenizer(folder, 32768)


# ---- generated rows ----


@dataclasses.dataclass
class Example:
    """A row, and what is in it."""

    row: dict[str, Any]
    faulty: bool = False  # for every tokenizer
    has_tools: bool = False


class Generator:
    """Conversations in many spellings, some of them with a fault."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return "x " + " ".join(self.random.choices(WORDS, k=self.random.randint(1, 5))) + "."

    def content(self) -> Any:
        text = self.text()
        return self.random.choice([text, text, text, [{"type": "text", "text": text}], [{"text": text}]])

    def maybe(self, chance: float = 0.3) -> bool:
        return self.random.random() < chance

    def example(self) -> Example:
        has_tools = self.maybe(0.4)
        messages = []
        for _ in range(self.random.randint(1, 3)):
            messages += self.turn(has_tools)
        row: dict[str, Any] = {self.random.choice(["messages", "interactions"]): messages}
        if self.maybe():
            messages.insert(0, {"role": self.random.choice(["system", "developer"]), "content": self.content()})
        elif self.maybe():
            row[self.random.choice(["system", "system_prompt"])] = self.content()
        if has_tools:
            tools = [self.tool(name) for name in ("chercher", "coder")]
            row[self.random.choice(["tools", "available_tools"])] = json.dumps(tools) if self.maybe() else tools
        if self.maybe():
            row["only_last"] = self.random.choice([True, False, None, 1, 0])
        if self.maybe():
            row |= {"id": 7, "source": self.text(), "metadata": {"split": "train"}, "images": [], "weight": None}
        return Example(row, has_tools=has_tools)

    def turn(self, has_tools: bool) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.content()}]
        if has_tools and self.maybe(0.6):
            ids = ["".join(self.random.choices("abcXYZ019", k=9)) for _ in range(self.random.randint(1, 3))]
            messages.append(
                {"role": "assistant", "tool_calls": [self.call(call_id) for call_id in ids], **self.weight()}
            )
            self.random.shuffle(ids)
            messages += [self.answer(call_id) for call_id in ids]
        messages.append({"role": "assistant", "content": self.content(), **self.weight()})
        for message in messages:
            message |= {"id": "m1", "name": None, "reasoning_content": None} if self.maybe(0.1) else {}
        return messages

    def weight(self) -> dict[str, Any]:
        spellings: tuple[dict[str, Any], ...] = (
            {"weight": 0},
            {"weight": 1},
            {"weight": 0.25},
            {"weight": None},
            {"train": False},
            {"train": True},
            {"loss": False},
            {"training": 1},
            {"trainable": 0},
            {"weight": 0, "train": False},
            {"weight": 0.5, "loss": True},
        )
        return dict(self.random.choice(spellings)) if self.maybe(0.5) else {}

    def call(self, call_id: str) -> dict[str, Any]:
        arguments = {"mot": self.text(), "n": self.random.choice([1, 2.5, None, True, [1, "é"]])}
        spelled: Any = self.random.choice([arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)])
        kind = self.random.choice([{}, {"type": "function"}, {"type": None}, {"index": 0}])
        return {"id": call_id, **kind, "function": {"name": "chercher", "arguments": spelled}}

    def answer(self, call_id: str) -> dict[str, Any]:
        content = self.random.choice(["{}", '{"code": "R50", "n": 1.50}', self.text(), [{"type": "text", "text": "é"}]])
        return {"role": "tool", "content": content, "tool_call_id": call_id, "name": "chercher"}

    def tool(self, name: str) -> dict[str, Any]:
        function: dict[str, Any] = {"name": name}
        if self.maybe(0.6):
            function["description"] = self.random.choice(["Cherche un mot", "", None])
        if self.maybe(0.6):
            schema = {"type": "object", "properties": {"mot": {"type": "string"}}}
            function["parameters"] = self.random.choice([schema, {}, None])
        if self.maybe():
            function["strict"] = True
        return self.random.choice([{"type": "function", "function": function}, {"function": function}, function])

    def faulty_example(self) -> Example:
        example = self.example()
        row, key = example.row, "messages" if "messages" in example.row else "interactions"
        answer = row[key][-1]
        faults = (
            lambda: answer.update(wieght=0),
            lambda: answer.update(reasoning_content="Je pense."),
            lambda: answer.update(loss_mask=0),
            lambda: answer.update(weight=1, train=False),
            lambda: answer.update(loss="no"),
            lambda: answer.update(content=[{"type": "text", "text": "a", "train": False}]),
            lambda: answer.update(content=[{"type": "image_url", "image_url": {"url": "a.png"}}]),
            lambda: row.update(weight=0),
            lambda: row.update(images=["a.png"]),
            lambda: row.update(sytem_prompt="Tu codes."),
            lambda: row.update(only_last="no"),
            lambda: row.update(functions=[{"name": "chercher"}]),
            lambda: row[key].append({"role": "user", "content": "?"}),
            lambda: row[key][-2].update(train=True),
            lambda: answer.update(tool_calls=[self.call("abcdefghi") | {"id": "abcdefghi"}] * 2, content=None),
            lambda: answer.update(tool_calls=[self.bad_call()], content=None),
        )
        self.random.choice(faults)()
        return dataclasses.replace(example, faulty=True)

    def bad_call(self) -> dict[str, Any]:
        bad: tuple[Any, ...] = (
            "",
            "{mot: é}",
            "{'mot': 1}",
            "[]",
            "3",
            '"é"',
            "null",
            '{"n": NaN}',
            '{"a": 1, "a": 2}',
        )
        bad += ([], 3, None, True, '{"n": 1e999}', '{"a": "\\ud800"}', "{" * 5000)
        return {"id": "abcdefghi", "function": {"name": "chercher", "arguments": self.random.choice(bad)}}


def examples(seed: int) -> list[Example]:
    generator = Generator(seed)
    return [generator.faulty_example() if generator.maybe(0.25) else generator.example() for _ in range(ROWS)]


# ---- the naive encoder ----


def plain(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def read_tools(row: dict[str, Any]) -> list[Tool] | None:
    tools = row.get("tools") or row.get("available_tools")
    if tools is None:
        return None
    functions = [tool.get("function", tool) for tool in (json.loads(tools) if isinstance(tools, str) else tools)]
    texts = [(function["name"], function.get("description") or "") for function in functions]
    schemas = [function.get("parameters") or {} for function in functions]
    return [
        Tool(function=Function(name=name, description=description, parameters=schema))
        for (name, description), schema in zip(texts, schemas, strict=True)
    ]


def weight_of(message: dict[str, Any]) -> float:
    given = [message.get(key) for key in ("weight", "train", "training", "trainable", "loss")]
    return min([1.0, *(float(value) for value in given if value is not None)])


def read_call(raw: dict[str, Any], drops_id: bool) -> ToolCall:
    arguments = raw["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = FunctionCall(name=raw["function"]["name"], arguments=text)
    return ToolCall(id="null" if drops_id else raw["id"], function=function)


def in_the_order_of_calls(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From v11 on, answers have the order of their calls."""
    ordered: list[dict[str, Any]] = []
    ids: list[str] = []
    for message in raw:
        if message["role"] == "assistant":
            ids = [call["id"] for call in message.get("tool_calls") or []]
        ordered.append(message)
        if message["role"] == "tool":
            start = next(i for i in range(len(ordered) - 1, -1, -1) if ordered[i]["role"] != "tool") + 1
            ordered[start:] = sorted(ordered[start:], key=lambda answer: ids.index(answer["tool_call_id"]))
    return ordered


def reference(tokenizer: InstructTokenizerBase, row: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Encode a row one message after the other with mistral-common's pieces: tokens, and the weight of each."""
    version = tokenizer.tokenizer.version.version_num
    raw = row.get("messages") or row["interactions"]
    systems = [plain(message["content"]) for message in raw if message["role"] in ("system", "developer")]
    systems += [plain(row[key]) for key in ("system", "system_prompt") if row.get(key)]
    raw = [message for message in raw if message["role"] not in ("system", "developer")]
    raw = in_the_order_of_calls(raw) if version >= 11 else raw
    tools = read_tools(row)
    trains_last_only = bool(row.get("only_last")) or tools is not None
    users = [index for index, message in enumerate(raw) if message["role"] == "user"]
    tokens = tokenizer.start()
    if version >= 7:
        for system in systems:
            tokens = tokens + tokenizer.encode_system_message(SystemMessage(content=system))[0]
    weights = [0.0] * len(tokens)
    for index, message in enumerate(raw):
        is_last, weight = index == len(raw) - 1, 0.0
        text = plain(message.get("content") or "")
        if message["role"] == "user":
            piece, _, _ = tokenizer.encode_user_message(
                UserMessage(content=text),
                tools,
                index == users[-1],
                index == users[0],
                system_prompt=systems[0] if systems and version < 7 else None,
                settings=ModelSettings.none(),
            )
        elif message["role"] == "tool":
            answer = ToolMessage(content=text, tool_call_id=message["tool_call_id"], name=message["name"])
            piece, _, _ = tokenizer.encode_tool_message(answer, index < users[-1])
        else:
            calls = [read_call(call, is_last and version < 13) for call in message.get("tool_calls") or []]
            answered = AssistantMessage(content=text or None, tool_calls=calls or None)
            piece = tokenizer.encode_assistant_message(answered, index < users[-1])
            weight = weight_of(message) if is_last or not trains_last_only else 0.0
        tokens = tokens + piece
        weights += [weight] * len(piece)
    return tokens, weights


# ---- validator, training and reference ----


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refused_lines(tokenizer: InstructTokenizerBase, path: Path) -> set[int]:
    """The lines for which the validator reports an error."""
    file = JsonlFile(path, SampleType.INSTRUCT, chunk=False, rank=0, world_size=1)
    checker = RowChecker([FileToCheck(file)], tokenizer, DataArgs(), 4096)
    return {line for checked in checker.check_all(workers=1) for line, _ in checked.errors}


def line_refused_in_training(encoder: SampleEncoder, path: Path) -> int | None:
    file = JsonlFile(path, SampleType.INSTRUCT, chunk=False, rank=0, world_size=1)
    with path.open("rb") as handle:
        try:
            file.encode(handle, 0, encoder)
        except BadRowError as error:
            return error.line
    return None


def test_the_validator_refuses_exactly_the_rows_with_a_fault_and_training_does_too(tokenizer, tmp_path):
    generated = examples(seed=1)
    has_no_tools = tokenizer.tokenizer.version.version_num == 1
    faulty = {n for n, row in enumerate(generated, 1) if row.faulty or (has_no_tools and row.has_tools)}
    assert 20 < len(faulty) < ROWS - 20
    path = write(tmp_path / "rows.jsonl", [example.row for example in generated])
    assert refused_lines(tokenizer, path) == faulty
    encoder = SampleEncoder(tokenizer)
    for number, example in enumerate(generated, 1):
        alone = write(tmp_path / "row.jsonl", [example.row])
        assert line_refused_in_training(encoder, alone) == (1 if number in faulty else None), example.row


def test_training_yields_exactly_what_the_rows_say(tokenizer, tmp_path):
    has_no_tools = tokenizer.tokenizer.version.version_num == 1
    rows = [e.row for e in examples(seed=2) if not e.faulty and not (has_no_tools and e.has_tools)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert not refused_lines(tokenizer, path)
    expected = [reference(tokenizer, row) for row in rows]
    trained = [(tokens, weights) for tokens, weights in expected if any(weights[1:])]
    assert 20 < len(trained) < len(rows)
    args = DataArgs(instruct_data=str(path), shuffle=False, instruct=InstructArgs(shuffle=False))
    positions = sum(len(tokens) - 1 for tokens, _ in trained)
    loader = build_data_loader(tokenizer, args, 1, positions, 0, 0, 1, is_eval=False)
    batch = next(loader)
    loader.close()
    assert batch.sizes == [len(tokens) - 1 for tokens, _ in trained]
    assert batch.x.tolist() == [token for tokens, _ in trained for token in tokens[:-1]]
    assert batch.y.tolist() == [token for tokens, _ in trained for token in tokens[1:]]
    assert np.asarray(batch.y_mask, dtype=float).tolist() == [w for _, weights in trained for w in weights[1:]]
