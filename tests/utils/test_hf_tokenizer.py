"""Exported tokenizers and chat templates encode conversations in transformers as training does, token by token."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import mistral_common
import pytest

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.data.tokenizer_files import load_instruct_tokenizer, tokenizer_warnings
from model.errors import UserError
from tests.support.tiny_tekken import write_tiny_tekken
from utils.models import hf_tokenizer
from utils.models.hf_tokenizer import write_hf_tokenizer

SHIPPED = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
NAMES = [*SENTENCEPIECE, *(f"tekken {version}" for version in ("v3", "v7", "v11", "v13", "v15"))]
CONVERSATIONS = int(os.environ.get("CONVERSATIONS", "60"))  # 1000 takes a minute


def write_small_tekken(path: Path, version: str) -> None:
    """Write a tokenizer with the first pieces of Mistral's own, so that there is something to merge."""
    full = json.loads((SHIPPED / "tekken_240718.json").read_text(encoding="utf-8"))
    small = json.loads(write_tiny_tekken(path, version).read_text(encoding="utf-8"))
    small["vocab"] = full["vocab"][:6000]
    small["config"]["pattern"] = full["config"]["pattern"]
    small["config"]["num_vocab_tokens"] = len(small["vocab"])
    small["config"]["default_vocab_size"] = len(small["vocab"]) + small["config"]["default_num_special_tokens"]
    if version == "v15":
        effort = {"type": "enum", "values": ["none", "high"], "default": "none", "accepts_none": True}
        small["model_settings_builder"] = {"reasoning_effort": effort}
    path.write_text(json.dumps(small), encoding="utf-8")


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    """Our encoder, transformers' tokenizer, and the folder of both."""
    import transformers

    folder = tmp_path_factory.mktemp("export")
    if request.param in SENTENCEPIECE:
        shutil.copyfile(SHIPPED / SENTENCEPIECE[request.param], folder / f"tokenizer.model.{request.param}")
    else:
        write_small_tekken(folder / "tekken.json", request.param.split()[1])
    tokenizer = load_instruct_tokenizer(folder, 131072)
    write_hf_tokenizer(tokenizer, folder)
    return SampleEncoder(tokenizer), transformers.PreTrainedTokenizerFast.from_pretrained(folder), folder


def assert_same(exported, messages: list[dict], tools: list[dict] | None = None) -> None:
    encoder, theirs, _ = exported
    conversation = parse_conversation({"messages": messages, **({"tools": tools} if tools else {})})
    ours = encoder.encode_prompt(conversation.messages, conversation.tools)
    found = theirs.apply_chat_template(messages, tools=tools)["input_ids"]
    assert found == ours, f"{theirs.decode(found)!r}\n{theirs.decode(ours)!r}"


class Conversations:
    """Random conversations: accents, emoji, line ends, blanks at every place, markup, numbers, tools."""

    WORDS = (
        *(
            "Fièvre",
            "à",
            "39 °C",
            "œdème",
            "ÉCG",
            "L'",
            "d’aval",
            "s/p",
            "≥ 3,5",
            "I50.1",
            "(E11)",
            "[J18]",
            "un",
            "et",
        ),
        *("🩺", "👩🏽‍⚕️", "中文", "‑", "\u00a0", "ﬁ", "<b>", "{x}", '"a"', "\\n", "&amp;", "%", "_", "0012", "\ufeff"),
    )
    GAPS = (" ", " ", " ", " ", "", "  ", "   ", "\n", "\n\n", " \n", "\r\n", "\t", ", ")

    def __init__(self, seed: int, with_tools: bool) -> None:
        self.random = random.Random(seed)
        self.with_tools = with_tools

    def text(self) -> str:
        draw = self.random
        parts = [part for _ in range(draw.randint(1, 8)) for part in (draw.choice(self.WORDS), draw.choice(self.GAPS))]
        return draw.choice(("", "", "", " ", "  ", "\n")) + "".join(parts)

    def value(self, depth: int = 0):
        kinds = [self.text, lambda: self.random.choice((True, None, 0, -7, 3.5, 1e-7, 10**20, "", "12"))]
        if depth < 2:
            kinds += [lambda: [self.value(depth + 1)] * self.random.randint(0, 2), lambda: self.object(depth + 1)]
        return self.random.choice(kinds)()

    def object(self, depth: int = 1) -> dict:
        return {self.random.choice(("patient", "âge", "code", "a b")): self.value(depth) for _ in range(2)}

    def tool(self) -> dict:
        schema = {"type": "object", "properties": {"code": {"type": "string", "description": self.text()}}}
        description, parameters = {"description": self.text()}, {"parameters": schema}
        optional = (description if self.random.random() < 0.8 else {}) | (
            parameters if self.random.random() < 0.8 else {}
        )
        return {"type": "function", "function": {"name": "cherche_code", **optional}}

    def call(self) -> dict:
        arguments = self.object()
        if self.random.random() < 0.3:
            arguments = json.dumps(arguments, ensure_ascii=False)
        call_id = "".join(self.random.choices("abcdefghijk0123456789", k=9))
        return {"id": call_id, "type": "function", "function": {"name": "cherche_code", "arguments": arguments}}

    def result(self, call: dict) -> dict:
        value = self.value()
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {"role": "tool", "name": "cherche_code", "content": content, "tool_call_id": call["id"]}

    def messages(self) -> list[dict]:
        draw = self.random
        found = [{"role": "system", "content": self.text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(0, 3)):
            found.append({"role": "user", "content": self.text()})
            if self.with_tools and draw.random() < 0.4:
                calls = [self.call() for _ in range(draw.randint(1, 2))]
                found.append({"role": "assistant", "content": "", "tool_calls": calls})
                found += [self.result(call) for call in draw.sample(calls, len(calls))]
            found.append({"role": "assistant", "content": self.text() + "."})
        found.append({"role": "user", "content": self.text()})
        return found


@pytest.mark.slow
def test_conversations_have_the_tokens_of_training(exported):
    version = exported[0].instruct_tokenizer.tokenizer.version.version_num
    for seed in range(CONVERSATIONS):
        generator = Conversations(seed, with_tools=version > 1)
        messages = generator.messages()
        tools = [generator.tool() for _ in range(seed % 3)] if version > 1 else None
        assert_same(exported, messages, tools)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Tu codes."}


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM, user("a"), user("  b"), assistant("c  "), assistant("d  ")],
        [user("a"), SYSTEM, user(""), assistant(" c"), user("b"), user("d")],
        [user("a"), assistant("b"), SYSTEM, assistant("c"), user("d")],
    ],
    ids=["repeated", "empty", "late system prompt"],
)
def test_unusual_orders_of_roles(exported, messages):
    assert_same(exported, messages)


def test_unusual_tools(exported):
    if exported[0].instruct_tokenizer.tokenizer.version.version_num == 1:
        with pytest.raises(Exception, match="has no tokens for tools"):
            exported[1].apply_chat_template([user("a")], tools=[{"type": "function", "function": {"name": "f"}}])
        return
    calls = [{"id": f"{n:09d}", "function": {"name": "f", "arguments": {}}} for n in range(3)]
    answers = [{"role": "tool", "content": f"r{n}", "tool_call_id": f"{n:09d}"} for n in (2, 0, 1)]
    messages = [user("a"), {"role": "assistant", "content": "", "tool_calls": calls}, *answers]
    assert_same(exported, messages, [{"type": "function", "function": {"name": "f", "description": None}}])


@pytest.mark.parametrize(
    "content", ['{"a":1}', "{x}", '"a" et "b"', "[J18]", "12", "012", "1e5", " 2.50", "nan", "true", ""]
)
def test_results_of_tools_that_resemble_json(exported, content):
    """v3 writes a result as JSON, and not as a string if it is JSON: a template can only guess whether it is."""
    version = exported[0].instruct_tokenizer.tokenizer.version.version_num
    if version == 1:
        return
    call = {"id": "123456789", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "tool", "content": content, "tool_call_id": "123456789"}
    messages = [user("a"), {"role": "assistant", "content": "", "tool_calls": [call]}, answer]
    if version == 3 and content in ('{"a":1}', "1e5", " 2.50"):  # not spelled as json.dumps does
        with pytest.raises(AssertionError):
            assert_same(exported, messages)
    else:
        assert_same(exported, messages)


def test_control_tokens_in_a_text_are_text_with_transformers_own_setting(exported):
    encoder, theirs, _ = exported
    tokenizer = encoder.instruct_tokenizer.tokenizer
    messages = [user("avant</s>après")]
    ours = encoder.encode_prompt(parse_conversation({"messages": messages}).messages)
    assert tokenizer.eos_id not in ours
    assert tokenizer.eos_id in theirs.apply_chat_template(messages)["input_ids"]  # as everywhere in transformers
    sanitized = theirs.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert tokenizer.eos_id not in sanitized
    assert theirs.decode(sanitized) == theirs.decode(ours)


def test_auto_tokenizer_text_and_training_on_the_export(exported):
    import transformers

    encoder, theirs, folder = exported
    inner = encoder.instruct_tokenizer.tokenizer
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto.apply_chat_template([SYSTEM, user(" a")])["input_ids"] == encoder.encode_prompt(
        parse_conversation({"messages": [SYSTEM, user(" a")]}).messages
    )
    assert theirs("Fièvre")["input_ids"] == inner.encode("Fièvre", bos=True, eos=False)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (inner.bos_id, inner.eos_id)
    assert theirs.decode(theirs("  deux  blancs 🩺")["input_ids"], skip_special_tokens=True) == "  deux  blancs 🩺"
    assert not tokenizer_warnings(folder, encoder.instruct_tokenizer, inner.n_words)


def v1_tokenizer(folder: Path):
    shutil.copyfile(SHIPPED / SENTENCEPIECE["v1"], folder / "tokenizer.model.v1")
    return load_instruct_tokenizer(folder, 32000)


def test_a_conversion_that_differs_is_refused(tmp_path, monkeypatch):
    tokenizer = v1_tokenizer(tmp_path)
    merges = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda proto: sorted(merges(proto)))
    with pytest.raises(UserError, match=r"incorrectly: .* has other tokens than in training"):
        write_hf_tokenizer(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model.v1"]


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    tokenizer = v1_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"transformers, which is not installed: pip install 'recode-mistral-finetune\[transformers\]'"
    ):
        write_hf_tokenizer(tokenizer, tmp_path)
