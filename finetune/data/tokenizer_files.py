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

V3_VOCABULARY = 32768
_MAX_REASON_LENGTH = 500  # characters of another library's message

_UNVERSIONED_NAME = "tokenizer.model"
_VERSION_PIECES = {  # a piece that earlier versions lack; v2 was not published for any open model
    "[SYSTEM_PROMPT]": (TokenizerVersion.v7, InstructTokenizerV7),
    "[INST]": (TokenizerVersion.v3, InstructTokenizerV3),
    "<s>": (TokenizerVersion.v1, InstructTokenizerV1),
}


def load_instruct_tokenizer(model_folder: Path, vocab_size: int) -> InstructTokenizerBase:
    """Load the tokenizer in the model's folder, else mistral-common's v3, or tekken for larger vocabularies.

    Raises:
        UserError: the folder has several tokenizers, one that cannot be read, or one with more tokens than the model.
    """
    files = [*model_folder.glob("tokenizer.model.v*"), *model_folder.glob("tekken.json")]
    files = files or [*model_folder.glob(_UNVERSIONED_NAME)]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise UserError(f"{model_folder} contains several tokenizers ({names}); keep only the model's own.")
    if files:
        source = f"The tokenizer {files[0]}"
        tokenizer = _read_tokenizer(files[0])
    else:
        source = f"{model_folder} contains no tokenizer, and mistral-common's"
        tokenizer = _instruct_tokenizer(MistralTokenizer.v3(is_tekken=vocab_size > V3_VOCABULARY))
    if tokenizer.tokenizer.n_words > vocab_size:
        raise UserError(
            f"{source} has {tokenizer.tokenizer.n_words} tokens but the model's vocabulary is {vocab_size}; "
            "put the model's own tokenizer (tokenizer.model.v3 or tekken.json) into its folder."
        )
    return tokenizer


def _read_tokenizer(file: Path) -> InstructTokenizerBase:
    try:
        if file.name == _UNVERSIONED_NAME:
            return _read_unversioned_tokenizer(file)
        return _instruct_tokenizer(MistralTokenizer.from_file(str(file)))
    except Exception as error:  # three libraries raise many kinds of errors for invalid files
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
