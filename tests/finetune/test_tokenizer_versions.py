"""Every version of Mistral's tokenizers, from the model's folder: the right encoder, the right loss mask."""

import itertools
import shutil
from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import ConversationFormatError
from finetune.data.tokenize import SampleEncoder, SampleType
from finetune.data.tokenizer_files import load_instruct_tokenizer
from tests.finetune.test_tokenize import TOOL_ROW
from tests.support.tiny_tekken import write_tiny_tekken

SHIPPED = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
}
TEKKEN = {"v3": "tekken_240718.json", "v3 with images": "tekken_240911.json"}
TINY = ("v3", "v7", "v11", "v13", "v15")
NAMES = [*(f"sentencepiece {v}" for v in SENTENCEPIECE), *(f"tekken {v}" for v in TEKKEN), *(f"tiny {v}" for v in TINY)]
ROW = {
    "messages": [
        {"role": "system", "content": "Tu codes."},
        {"role": "user", "content": "Fièvre"},
        {"role": "assistant", "content": "R50"},
        {"role": "user", "content": "Toux"},
        {"role": "assistant", "content": "R05"},
    ]
}


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request, tmp_path_factory) -> tuple[InstructTokenizerBase, MistralTokenizer]:
    """Loaded from a model's folder, and by mistral-common itself."""
    kind, version = request.param.split(" ", 1)
    folder = tmp_path_factory.mktemp("model")
    if kind == "tiny":
        file = write_tiny_tekken(folder / "tekken.json", version)
    elif kind == "tekken":
        file = Path(shutil.copyfile(SHIPPED / TEKKEN[version], folder / "tekken.json"))
    else:
        file = Path(shutil.copyfile(SHIPPED / SENTENCEPIECE[version], folder / f"tokenizer.model.{version}"))
    ours = load_instruct_tokenizer(folder, 131072)
    assert ours.tokenizer.version.value == version.split()[0].split("m")[0]
    return ours, MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning)


def runs(tokenizer: InstructTokenizerBase, row: dict) -> list[tuple[bool, str]]:
    """Runs of trained and untrained tokens of a row, as text with control tokens."""
    sample = SampleEncoder(tokenizer).encode(row, SampleType.INSTRUCT)
    return [
        (trains, _text(tokenizer, [token for token, _ in pairs]))
        for trains, pairs in itertools.groupby(zip(sample.tokens, sample.masks, strict=True), key=lambda pair: pair[1])
    ]


def _text(tokenizer: InstructTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    return text.replace("▁", " ").replace("<0x0A>", "\n")


def test_only_answers_are_trained(tokenizer):
    ours, _ = tokenizer
    found = runs(ours, ROW)
    assert [trains for trains, _ in found] == [False, True, False, True]
    assert [text.strip() for _, text in found[1::2]] == ["R50</s>", "R05</s>"]
    first, last = found[0][1].replace(" ", ""), found[2][1].replace(" ", "")
    version = ours.tokenizer.version.version_num
    if version >= 7:
        assert first == "<s>[SYSTEM_PROMPT]Tucodes.[/SYSTEM_PROMPT][INST]Fièvre[/INST]" and last == "[INST]Toux[/INST]"
    elif version == 1:  # ordinary text before the first question
        assert first == "<s>[INST]Tucodes.\n\nFièvre[/INST]" and last == "[INST]Toux[/INST]"
    else:  # before the last question
        assert first == "<s>[INST]Fièvre[/INST]" and last == "[INST]Tucodes.\n\nToux[/INST]"


@pytest.mark.parametrize("row", [ROW, TOOL_ROW], ids=["plain", "tools"])
def test_tokens_equal_those_of_mistral_common(tokenizer, row):
    ours, theirs = tokenizer
    if row is TOOL_ROW and theirs.version.value == "v1":
        with pytest.raises(ConversationFormatError, match="Tools not implemented for tokenizer V1"):
            runs(ours, row)
        return
    conversation = parse_conversation(row)
    request = ChatCompletionRequest(messages=conversation.messages, tools=conversation.tools)
    expected = theirs.encode_chat_completion(request).tokens
    assert SampleEncoder(ours).encode(row, SampleType.INSTRUCT).tokens == expected


def test_a_trained_call_is_trained_with_its_control_token(tokenizer):
    ours, _ = tokenizer
    if ours.tokenizer.version.value == "v1":
        return
    row = {"messages": TOOL_ROW["messages"][:5], "tools": TOOL_ROW["tools"]}
    (_, before), (trains, call) = runs(ours, row)
    assert trains and call.startswith("[TOOL_CALLS]") and call.endswith("</s>")
    assert "meteo" in call and "Brest" in call and "abcdefghi" not in call
    assert "[AVAILABLE_TOOLS]" in before and before.endswith("[/INST]")


@pytest.mark.parametrize(("file", "version"), [("v1", "v1"), ("v3", "v3"), ("v7", "v7")])
def test_hugging_face_file_name_without_a_version(tmp_path, file, version):
    shutil.copyfile(SHIPPED / SENTENCEPIECE[file], tmp_path / "tokenizer.model")
    plain = load_instruct_tokenizer(tmp_path, 32768)
    shutil.copyfile(SHIPPED / SENTENCEPIECE[file], tmp_path / f"tokenizer.model.{version}")
    versioned = load_instruct_tokenizer(tmp_path, 32768)  # some repositories contain both files
    assert plain.tokenizer.version == versioned.tokenizer.version
    assert type(plain) is type(versioned) and runs(plain, ROW) == runs(versioned, ROW)
