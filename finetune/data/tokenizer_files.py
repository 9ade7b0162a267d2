"""Find, read and check the tokenizer of a model folder."""

from pathlib import Path

from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerBase,
    InstructTokenizerV1,
    InstructTokenizerV3,
    InstructTokenizerV7,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from model.errors import UserError

from .chat_template import layout_differences, layout_of

V3_VOCABULARY = 32768
_MAX_REASON_LENGTH = 500  # characters of another library's message

_UNVERSIONED_NAME = "tokenizer.model"
_VERSIONED_PATTERNS = ("*.model.v*", "tekken*.json")
# Hugging Face's files, from which no tokenizer is read: a folder with only these has a tokenizer that we do not know.
UNREAD_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_VERSION_PIECES = {  # a piece that earlier versions lack; v2 was not published for any open model
    "[SYSTEM_PROMPT]": (TokenizerVersion.v7, InstructTokenizerV7),
    "[INST]": (TokenizerVersion.v3, InstructTokenizerV3),
    "<s>": (TokenizerVersion.v1, InstructTokenizerV1),
}


def load_instruct_tokenizer(model_folder: Path, vocab_size: int) -> InstructTokenizerBase:
    """Load the tokenizer in the model's folder.

    A folder without any tokenizer file gets mistral-common's v3, or tekken for larger vocabularies, as in
    mistral-finetune. See `tokenizer_warnings` for what the user should know about the result.

    Raises:
        UserError: the folder has several tokenizers, one that cannot be read, one with more tokens than the model, or
            only Hugging Face's tokenizer files.
    """
    files = [file for pattern in _VERSIONED_PATTERNS for file in sorted(model_folder.glob(pattern))]
    files = files or [*model_folder.glob(_UNVERSIONED_NAME)]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise UserError(f"{model_folder} contains several tokenizers ({names}); keep only the model's own.")
    if files:
        source = f"The tokenizer {files[0]}"
        tokenizer = _read_tokenizer(files[0])
    else:
        _refuse_unread(model_folder, vocab_size)
        source = f"{model_folder} contains no tokenizer, and mistral-common's"
        tokenizer = _instruct_tokenizer(MistralTokenizer.v3(is_tekken=vocab_size > V3_VOCABULARY))
    if tokenizer.tokenizer.n_words > vocab_size:
        raise UserError(
            f"{source} has {tokenizer.tokenizer.n_words} tokens but the model's vocabulary is {vocab_size}; "
            "put the model's own tokenizer (tokenizer.model.v3 or tekken.json) into its folder."
        )
    return tokenizer


def _refuse_unread(model_folder: Path, vocab_size: int) -> None:
    """Raise UserError if the folder has a tokenizer of its own, in files that are not read."""
    unread = [name for name in UNREAD_NAMES if (model_folder / name).is_file()]
    if not unread:
        return
    large = vocab_size > V3_VOCABULARY
    expected = "tekken.json" if large else f"tokenizer.model.v3 (or {_UNVERSIONED_NAME})"
    raise UserError(
        f"The tokenizer in {model_folder} is not read: {', '.join(unread)} are Hugging Face's files, and there is no "
        f"{'tekken.json' if large else _UNVERSIONED_NAME}. Put the {expected} of the model that this one was trained "
        "from into the folder; another tokenizer could number the tokens differently."
    )


def tokenizer_warnings(model_folder: Path, tokenizer: InstructTokenizerBase, vocab_size: int) -> list[str]:
    """Return what a user should know about the tokenizer and the chat layout of a model folder; one line each.

    Args:
        model_folder: folder of the model.
        tokenizer: as `load_instruct_tokenizer` returned it.
        vocab_size: of the model.
    """
    inner = tokenizer.tokenizer
    layout = layout_of(inner.version)
    if Path(str(inner.file_path)).parent != model_folder:
        return [
            f"{model_folder} has no tokenizer: mistral-common's own is used, with {inner.n_words:,} tokens and "
            f"{layout}. If the model has another tokenizer, put its file into the folder."
        ]
    differences = layout_differences(model_folder, inner, vocab_size)
    if not differences:
        return []
    return [
        f"{model_folder}: the chat layout is {layout}, which differs from what the folder's own files say: "
        f"{'; '.join(differences)}. Only Mistral's layouts can be trained: prompt the trained model in this one."
    ]


def _read_tokenizer(file: Path) -> InstructTokenizerBase:
    try:
        if file.name == _UNVERSIONED_NAME:
            tokenizer = _read_unversioned_tokenizer(file)
        else:
            tokenizer = _instruct_tokenizer(MistralTokenizer.from_file(str(file)))
        tokenizer.tokenizer.encode("A 1", bos=False, eos=False)  # fails if the split pattern is invalid
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # three libraries raise many kinds of errors for invalid files; Rust panics are none
        raise UserError(f"The tokenizer {file} cannot be read: {str(error)[:_MAX_REASON_LENGTH]}") from error


def _instruct_tokenizer(tokenizer: MistralTokenizer) -> InstructTokenizerBase:
    instruct = tokenizer.instruct_tokenizer
    assert isinstance(instruct, InstructTokenizerBase)
    return instruct


def _read_unversioned_tokenizer(file: Path) -> InstructTokenizerBase:
    """Detect the version, which Hugging Face's file name lacks, from the vocabulary."""
    pieces = SentencePieceTokenizer(file).vocab()
    version, instruct = next(found for piece, found in _VERSION_PIECES.items() if piece in pieces)
    return instruct(SentencePieceTokenizer(file, version))
