"""Folders whose tokenizer or chat template is not the one that is trained are refused or named; others are silent."""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest

from finetune.data.tokenizer_files import load_instruct_tokenizer, tokenizer_warnings
from model.errors import UserError
from tests.support.tiny_tekken import write_tiny_tekken

SHIPPED = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
V1 = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}{{ eos_token }}"
V3 = "{{ bos_token }}[AVAILABLE_TOOLS] {{ tools }}[/AVAILABLE_TOOLS][INST] {{ user }}[/INST] {{ answer }}</s>"
V7 = "{{ bos_token }}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT][INST]{{ user }}[/INST]{{ answer }}</s>"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA3 = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
LLAMA2 = "[INST] <<SYS>>\n{{ system }}\n<</SYS>>\n\n{{ user }} [/INST]"
VICUNA = "USER: {{ user }} ASSISTANT: {{ answer }}</s>"


def folder_with(folder: Path, version: str | None, vocab_size: int = 32768, **files) -> list[str]:
    """Write a folder with a tokenizer and JSON or text files (`__` in a name is a dot) and return its warnings."""
    if version in FILES:
        shutil.copyfile(SHIPPED / FILES[version], folder / "tokenizer.model")
    elif version:
        write_tiny_tekken(folder / "tekken.json", version.removeprefix("tiny "))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return tokenizer_warnings(folder, load_instruct_tokenizer(folder, vocab_size), vocab_size)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": {"added_tokens": []}},
        {"tokenizer_config__json": {"chat_template": V7}},
        {"added_tokens__json": {"<|im_end|>": 32000}},
        {"special_tokens_map__json": {"eos_token": "</s>"}},
        {"vocab__json": {}, "merges__txt": ""},
        {"chat_template__jinja": V3},
    ],
    ids=lambda files: next(iter(files)),
)
@pytest.mark.parametrize(
    ("vocab_size", "remedy"), [(131072, "Put the tekken.json of"), (32768, "Put the tokenizer.model.v3 (or tokenizer")]
)
def test_a_tokenizer_that_is_not_read_is_refused(tmp_path, files, vocab_size, remedy):
    with pytest.raises(UserError) as error:
        folder_with(tmp_path, None, vocab_size, **files)
    message = str(error.value)
    assert next(iter(files)).replace("__", ".") in message and remedy in message and str(tmp_path) in message


def test_the_default_tokenizer_is_named(tmp_path):
    """mistral-finetune's convention: a folder without any tokenizer file."""
    (tmp_path / "generation_config.json").write_text("{}", encoding="utf-8")
    (warning,) = folder_with(tmp_path, None)
    assert f"{tmp_path} has no tokenizer: mistral-common's own is used, with 32,768 tokens" in warning
    assert "Mistral's v3 layout ([INST] ... [/INST] ...</s>)" in warning


@pytest.mark.parametrize("name", ["tekken.json", "tekken_240718.json"])
def test_published_names_of_tekken_are_read(tmp_path, name):
    write_tiny_tekken(tmp_path / name, "v7")
    tokenizer = load_instruct_tokenizer(tmp_path, 400)
    assert tokenizer.tokenizer.version.value == "v7"
    assert tokenizer_warnings(tmp_path, tokenizer, 400) == []


@pytest.mark.parametrize(("version", "template"), [("v1", V1), ("v3", V3), ("v3", V1), ("v7", V7), ("tiny v13", V7)])
@pytest.mark.parametrize("place", ["config", "named", "jinja", "json", "none"])
def test_official_folders_give_no_warning(tmp_path, version, template, place):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": {"2": {"content": "</s>"}}}
    files: dict = {"special_tokens_map__json": {"eos_token": "</s>"}, "tokenizer__json": {"added_tokens": []}}
    if place == "config":
        config["chat_template"] = template
    elif place == "named":
        config["chat_template"] = [{"name": "rag", "template": CHATML}, {"name": "default", "template": template}]
    elif place == "jinja":
        files["chat_template__jinja"] = "{#- not <|im_start|> #}" + template
        config["chat_template"] = CHATML  # transformers prefers the file
    elif place == "json":
        files["chat_template__json"] = {"chat_template": template}
    files["generation_config__json"] = {"eos_token_id": 2}
    files["config__json"] = {"eos_token_id": [2, 0]}
    vocab_size = {"v1": 32000, "tiny v13": 400}.get(version, 32768)
    assert folder_with(tmp_path, version, vocab_size, tokenizer_config__json=config, **files) == []


@pytest.mark.parametrize(
    ("version", "template", "finding"),
    [
        ("v1", CHATML, "its chat template (tokenizer_config.json) does not use [INST] but <|im_end|>, <|im_start|>"),
        ("v3", LLAMA3, "does not use [INST] but <|end_header_id|>, <|eot_id|>, <|start_header_id|>"),
        ("v3", VICUNA, "its chat template (tokenizer_config.json) does not use [INST]."),
        ("v1", LLAMA2, "uses <</SYS>>, <<SYS>>"),
        ("v3", V7, "uses [SYSTEM_PROMPT]"),
        ("v7", V3, "does not use [SYSTEM_PROMPT]"),
        ("v3", V3 + CHATML, "uses <|im_end|>, <|im_start|>"),
    ],
)
def test_another_chat_template_is_named(tmp_path, version, template, finding):
    (warning,) = folder_with(tmp_path, version, tokenizer_config__json={"chat_template": template})
    assert finding in warning and f"the chat layout is Mistral's {version} layout (" in warning


@pytest.mark.parametrize("name", ["chat_template__jinja", "chat_template__json"])
def test_another_chat_template_in_its_own_file(tmp_path, name):
    content = CHATML if name.endswith("jinja") else {"chat_template": CHATML}
    (warning,) = folder_with(tmp_path, "v3", **{name: content})
    assert f"its chat template ({name.replace('__', '.')}) does not use [INST] but <|im_end|>" in warning


@pytest.mark.parametrize("name", ["tokenizer_config__json", "special_tokens_map__json"])
@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_another_end_of_sequence_token_is_named(tmp_path, name, token):
    (warning,) = folder_with(tmp_path, "v3", **{name: {"eos_token": token}})
    assert "its end-of-sequence token is <|im_end|>" in warning


@pytest.mark.parametrize("name", ["generation_config__json", "config__json"])
@pytest.mark.parametrize("ids", [32000, [32000, 5]])
def test_another_end_of_sequence_token_without_a_name(tmp_path, name, ids):
    (warning,) = folder_with(tmp_path, "v3", **{name: {"eos_token_id": ids}})
    assert "its end-of-sequence token is number 32000." in warning


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens__json": {"<|im_end|>": 32000, "<|im_start|>": 32001}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"32000": {"content": "<|im_end|>"}}}},
        {"tokenizer__json": {"added_tokens": [{"id": 32000, "content": "<|im_end|>"}, {"id": [], "content": 1}]}},
    ],
    ids=lambda files: next(iter(files)),
)
def test_added_tokens_without_a_piece_are_counted(tmp_path, files):
    (warning,) = folder_with(tmp_path, "v1", 32002, **files)
    assert "2 of the model's 32,002 tokens have no piece in tokenizer.model, among them <|im_end|>" in warning


def test_a_vocabulary_padded_for_speed_gives_no_warning(tmp_path):
    assert folder_with(tmp_path, "v1", 32064, tokenizer_config__json={"added_tokens_decoder": {"2": "</s>"}}) == []


@pytest.mark.parametrize(("version", "vocab_size", "missing"), [("v3", 131072, "98,304"), ("v1", 32768, "768")])
def test_a_tokenizer_much_smaller_than_the_vocabulary_is_named(tmp_path, version, vocab_size, missing):
    """The second is a model with an extended vocabulary and its old tokenizer."""
    (warning,) = folder_with(tmp_path, version, vocab_size)
    assert f"{missing} of the model's {vocab_size:,} tokens have no piece in tokenizer.model." in warning


def test_renamed_control_tokens_are_named(tmp_path):
    """A usual way to add ChatML's tokens without new rows of the embeddings."""
    (warning,) = folder_with(tmp_path, "v3", added_tokens__json={"<|im_start|>": 20, "[INST]": 3, "[PAD]": 10})
    assert "it gives tokens the names <|im_start|>." in warning


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"eos_token": 7, "chat_template": 8, "added_tokens_decoder": 9, "added_tokens": 5, "eos_token_id": "x"}',
        '{"eos_token": [], "chat_template": [{"name": [], "template": {}}, 1], "added_tokens_decoder": {"a": 1}}',
        '{"added_tokens": [1, {"id": {}, "content": []}], "eos_token_id": [[], true]}',
    ],
)
def test_files_that_say_nothing_are_ignored(tmp_path, content):
    files = dict.fromkeys(("tokenizer_config__json", "special_tokens_map__json", "tokenizer__json"), content)
    assert folder_with(tmp_path, "v3", **files, added_tokens__json=content, chat_template__json=content) == []


@pytest.mark.parametrize("pattern", ["", "(", "[^"])
def test_a_tokenizer_that_cannot_encode_is_refused(tmp_path, pattern):
    """tiktoken panics, with an exception that is not an Exception, when such a pattern is first used."""
    path = write_tiny_tekken(tmp_path / "tekken.json", "v7")
    content = json.loads(path.read_text(encoding="utf-8"))
    load_instruct_tokenizer(tmp_path, 32768)
    content["config"]["pattern"] = pattern
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"The tokenizer .*tekken\.json cannot be read: "):
        load_instruct_tokenizer(tmp_path, 32768)
