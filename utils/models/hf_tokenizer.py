"""A tokenizer in Hugging Face's files: tokenizer.json, its settings, and the chat template of Mistral's layouts.

transformers and vLLM then encode conversations as training does, token by token; docs/export.md lists the exceptions.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy, SpecialTokens, TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from finetune.data.tokenize import SampleEncoder
from model.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_TEMPLATES = Path(__file__).parent / "templates"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of SentencePiece's pieces
# What converters get wrong: blanks at the beginning and in a row, line ends, accents, characters without a piece.
_SAMPLES = (
    "Fièvre à 39 °C",
    "  deux  blancs ",
    "\n\nligne\r\n\tsuite",
    "🩺 œdème ≥ 3 mg/l",
    "ﬁ½ \u00a0‑ \u4e2d",
    "1234,5",
)


def write_hf_tokenizer(tokenizer: InstructTokenizerBase, folder: Path) -> None:
    """Write Hugging Face's tokenizer files to an existing folder.

    Raises:
        UserError: transformers is not installed, or converts the tokenizer incorrectly.
    """
    fast = converted(tokenizer)
    fast.save(str(folder / "tokenizer.json"))
    inner = tokenizer.tokenizer
    names = {"bos_token": inner.bos_id, "eos_token": inner.eos_id, "unk_token": inner.unk_id}
    if inner.pad_id >= 0:
        names["pad_token"] = inner.pad_id
    special = {name: inner.id_to_piece(token) for name, token in names.items()}
    # Of all classes, only this one takes tokenizer.json as it is.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", settings)
    template = chat_template(tokenizer)
    if template is None:
        print(f"The export has no chat template: there is none for layout {inner.version.value}.")
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template(tokenizer: InstructTokenizerBase) -> str | None:
    """Return the Jinja text that lays out a conversation as training does; None for v2, which no open model has."""
    version = tokenizer.tokenizer.version
    if version == TokenizerVersion.v2:
        return None
    if version == TokenizerVersion.v1:
        return _template("v1")
    if version == TokenizerVersion.v3:
        return _template("macros") + _template("v3")
    settings = json.dumps(_model_settings(tokenizer))
    head = f"{{%- set version = {version.version_num} %}}\n{{%- set model_settings = {settings} %}}\n"
    return head + _template("macros") + _template("v7")


def _template(name: str) -> str:
    return (_TEMPLATES / f"chat_{name}.jinja").read_text(encoding="utf-8")


def _model_settings(tokenizer: InstructTokenizerBase) -> str:
    """Return the text before the first question that a v15 tokenizer prescribes; empty for others."""
    prompt = SampleEncoder(tokenizer).encode_prompt([UserMessage(content="")])
    inner = tokenizer.tokenizer
    end = prompt.index(inner.get_special_token(SpecialTokens.begin_inst.value))
    return inner.decode(prompt[1:end], special_token_policy=SpecialTokenPolicy.KEEP)


def converted(tokenizer: InstructTokenizerBase) -> "FastTokenizer":
    """Return the tokenizer in the form of tokenizer.json, compared with mistral-common's on some texts."""
    try:
        import transformers
        from tokenizers.processors import TemplateProcessing
    except ImportError as error:
        raise UserError(
            "The export converts the tokenizer with transformers, which is not installed: "
            "pip install 'recode-mistral-finetune[transformers]'"
        ) from error
    inner = tokenizer.tokenizer
    fast = _from_tekken(inner) if isinstance(inner, Tekkenizer) else _from_sentencepiece(inner.file_path)
    bos = inner.id_to_piece(inner.bos_id)
    fast.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, inner.bos_id)])
    for text in _SAMPLES:
        if fast.encode(text, add_special_tokens=False).ids != inner.encode(text, bos=False, eos=False):
            raise UserError(
                f"transformers {transformers.__version__} converts {inner.file_path} incorrectly: {text!r} has other "
                "tokens than in training. Install the version in constraints.txt."
            )
    return fast


def _from_tekken(tokenizer: Tekkenizer) -> "FastTokenizer":
    from transformers.integrations.mistral import MistralConverter

    return MistralConverter(str(tokenizer.file_path)).converted()


def _from_sentencepiece(file: Path) -> "FastTokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    proto = sentencepiece_model(file)
    vocabulary = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    fast = Tokenizer(BPE(vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Each text between control tokens is encoded on its own, with a blank before it.
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(blanks)
    kept = [piece for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)]  # whole, wherever they occur
    fast.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in kept])
    return fast


def sentencepiece_model(file: Path) -> Any:
    """Return the content of a SentencePiece file; mistral-common does not show the types of its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2  # generated code, without type information
    return model.ModelProto.FromString(file.read_bytes())


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece joins, in its order: by the score of the piece that they make."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    pairs = [
        (-score, piece[:end], piece[end:])
        for piece, score in scores.items()
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    pairs.sort(key=lambda pair: pair[0])  # stable: pieces of one score stay in the order of their numbers
    return [(left, right) for _, left, right in pairs]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
