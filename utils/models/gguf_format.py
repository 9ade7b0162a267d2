"""Write a model as one GGUF file, which llama.cpp, Ollama and llama-cpp-python load; through the package `gguf`.

llama.cpp's architecture "llama" covers dense models and mixtures of experts, and rotates adjacent channels as Mistral's
layout does. Shapes: E experts.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tqdm import tqdm

from model.errors import UserError
from model.hf_config import DEFAULT_MAX_POSITIONS
from model.weights import TensorSource
from utils.models.hf_tokenizer import chat_template, converted, sentencepiece_model
from utils.models.rounding import rounded

GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # names here and there
_BLOCK = 32  # numbers that share a scale in q8_0


def import_gguf() -> Any:
    """Return the library gguf; raise UserError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("gguf is not installed: pip install 'recode-mistral-finetune[gguf,transformers]'.") from error
    return gguf


class GgufLayout:
    """The tensors of a GGUF file: which it has, in which format, and the weights that each is made of.

    Attributes:
        tensors: name in the file -> names of the weights, of which several are the experts of one layer.
        sizes: size of each tensor in bytes.
    """

    def __init__(self, weights: TensorSource, n_layers: int, dtype: str) -> None:
        self._gguf, self._weights, self._dtype = import_gguf(), weights, GGUF_TYPES[dtype]
        names = self._gguf.get_tensor_name_map(self._gguf.MODEL_ARCH.LLAMA, n_layers)
        self.tensors: dict[str, list[str]] = {}
        for name in weights.shapes:
            stem, _, part = name.removesuffix(".weight").partition(".experts.")
            common = f"{stem}.experts.{part.partition('.')[2]}" if part else stem
            self.tensors.setdefault(f"{names.get_name(common)}.weight", []).append(name)
        for parts in self.tensors.values():
            parts.sort(key=lambda name: int(name.partition(".experts.")[2].partition(".")[0] or 0))
        self.sizes = {name: self._bytes(name) for name in self.tensors}

    def format_of(self, name: str) -> Any:
        """Return the type of a tensor: norms and routers are tiny and sensitive, hence in fp32."""
        shape = self.shape(name)
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return self._gguf.GGMLQuantizationType.F32
        fits = self._dtype != "Q8_0" or shape[-1] % _BLOCK == 0
        return self._gguf.GGMLQuantizationType[self._dtype if fits else "F16"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, [E, out, in] for experts."""
        parts = self.tensors[name]
        shape = self._weights.shapes[parts[0]]
        return (len(parts), *shape) if ".experts." in parts[0] else shape

    def _bytes(self, name: str) -> int:
        block, size = self._gguf.GGML_QUANT_SIZES[self.format_of(name)]
        return math.prod(self.shape(name)) // block * size

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield the tensors in order; only one is in memory."""
        for name, parts in self.tensors.items():
            kind = self.format_of(name)
            arrays = [self._array(part, kind) for part in parts]
            yield np.stack(arrays) if ".experts." in parts[0] else arrays[0]

    def _array(self, name: str, kind: Any) -> np.ndarray:
        tensor = self._weights.read(name).float()
        if kind.name in ("F32", "F16"):
            return rounded(tensor, torch.float16 if kind.name == "F16" else torch.float32, name).numpy()
        return self._gguf.quants.quantize(tensor.numpy(), kind)


def write_gguf(file: Path, layout: GgufLayout, params: dict[str, Any], tokenizer: InstructTokenizerBase) -> None:
    """Write a GGUF file with a model's tensors, shapes, tokenizer and chat template.

    Args:
        file: to create, in an existing folder.
        layout: the tensors.
        params: the model's parameters, as `model.args.read_params` returns them.
        tokenizer: of the model.

    Raises:
        UserError: a value is too large for fp16, or the tokenizer cannot be converted.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _add_shapes(writer, params)
    if isinstance(tokenizer.tokenizer, Tekkenizer):
        _add_tekken(gguf, writer, tokenizer, params["vocab_size"])
    else:
        _add_sentencepiece(gguf, writer, tokenizer, params["vocab_size"])
    _add_special_tokens(writer, tokenizer)
    matrix = max(layout.sizes, key=lambda name: layout.sizes[name])
    kind = layout.format_of(matrix).name
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, size in layout.sizes.items():
        writer.add_tensor_info(name, layout.shape(name), np.dtype(np.float32), size, layout.format_of(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in tqdm(layout.arrays(), total=len(layout.sizes), desc="writing", unit="tensor", disable=None):
        writer.write_tensor_data(array)
    writer.close()


def _add_shapes(writer: Any, params: dict[str, Any]) -> None:
    writer.add_name(f"{params['dim']} x {params['n_layers']}")
    writer.add_vocab_size(params["vocab_size"])
    writer.add_context_length(params.get("max_position_embeddings", DEFAULT_MAX_POSITIONS))
    writer.add_embedding_length(params["dim"])
    writer.add_block_count(params["n_layers"])
    writer.add_feed_forward_length(params["hidden_dim"])
    writer.add_head_count(params["n_heads"])
    writer.add_head_count_kv(params["n_kv_heads"])
    writer.add_key_length(params["head_dim"])
    writer.add_value_length(params["head_dim"])
    writer.add_rope_dimension_count(params["head_dim"])
    writer.add_rope_freq_base(params.get("rope_theta", 1e4))
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    if moe := params.get("moe"):
        writer.add_expert_count(moe["num_experts"])
        writer.add_expert_used_count(moe["num_experts_per_tok"])


def _add_sentencepiece(gguf: Any, writer: Any, tokenizer: InstructTokenizerBase, vocab_size: int) -> None:
    pieces = sentencepiece_model(tokenizer.tokenizer.file_path).pieces
    types = [gguf.TokenType(piece.type) for piece in pieces]  # of the same numbers as SentencePiece's
    rest = vocab_size - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in pieces] + [f"[UNUSED_{number}]" for number in range(rest)])
    writer.add_token_scores([piece.score for piece in pieces] + [0.0] * rest)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * rest)
    writer.add_add_space_prefix(True)


def _add_tekken(gguf: Any, writer: Any, tokenizer: InstructTokenizerBase, vocab_size: int) -> None:
    model = json.loads(converted(tokenizer).to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    specials = tokenizer.tokenizer.num_special_tokens
    control, normal, unused = (gguf.TokenType[name] for name in ("CONTROL", "NORMAL", "UNUSED"))
    rest = vocab_size - len(names)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(names + [f"[UNUSED_{number}]" for number in range(rest)])
    writer.add_token_types([control] * specials + [normal] * (len(names) - specials) + [unused] * rest)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])


def _add_special_tokens(writer: Any, tokenizer: InstructTokenizerBase) -> None:
    inner = tokenizer.tokenizer
    writer.add_bos_token_id(inner.bos_id)
    writer.add_eos_token_id(inner.eos_id)
    writer.add_unk_token_id(inner.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if (template := chat_template(tokenizer)) is not None:
        writer.add_chat_template(template)
