"""vLLM without a server, on an exported model."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data.tokenizer_files import load_instruct_tokenizer
from model.args import read_params
from model.errors import UserError
from model.hf_config import CONFIG_NAME, DEFAULT_MAX_POSITIONS
from utils.engines.engine import DEFAULT_GENERATION, Generation, Reply, seed_of
from utils.engines.grammar import TableGrammar
from utils.engines.prompts import Prompt
from utils.engines.token_codec import TokenCodec
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError

_CHUNK = 512  # prompts between two writes of answers; vLLM forms its own batches
_TOO_LONG = "longer than the model's context"


class VllmEngine:
    """An exported model that vLLM runs; prompts are encoded as in training.

    Args:
        folder: what `utils.export --to hf --merged` wrote.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.
        rules: coding rules that such answers follow; None for those of the guide.

    Raises:
        UserError: vLLM is not installed, or the folder has another format.
    """

    def __init__(
        self,
        folder: Path,
        generation: Generation = DEFAULT_GENERATION,
        table: Cim10Table | None = None,
        rules: RuleSet | None = None,
    ) -> None:
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(
                f"{folder} has no {CONFIG_NAME}; --engine vllm needs a model in Hugging Face's format: "
                "python -m utils.export RUN --to hf --merged --out DIR."
            )
        try:
            import vllm
            from vllm.sampling_params import StructuredOutputsParams
        except ImportError as error:
            raise UserError(
                "--engine vllm needs vLLM in this environment; it pins its own version of torch, so a server in "
                "another environment (--engine server) may be easier."
            ) from error
        params = read_params(folder)
        self._context = params.get("max_position_embeddings", DEFAULT_MAX_POSITIONS)
        self._codec = TokenCodec(load_instruct_tokenizer(folder, params["vocab_size"]), None)
        self._generation = generation
        self._grammar = None if table is None else TableGrammar(table, rules)
        self._constraint = self._grammar and StructuredOutputsParams(grammar=self._grammar.lark())
        # Its other library for grammars, xgrammar, does not finish with the complete CIM-10.
        backend = {"structured_outputs_config": {"backend": "guidance"}} if table else {"skip_tokenizer_init": True}
        self._load = functools.partial(vllm.LLM, model=str(folder), **backend)
        self._new_params = vllm.SamplingParams

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer prompts in large chunks; see `Engine`."""
        # vLLM reserves memory for the longest sequence that it accepts, by default the model's complete context.
        longest = max(map(len, self._codec.encode(prompts)[1]), default=0) + self._generation.max_tokens
        llm = self._load(max_model_len=min(longest, self._context))
        return self._codec.answer_batches(prompts, _CHUNK, functools.partial(self._answer, llm))

    def _answer(
        self, llm: Any, prompts: Sequence[Prompt], encoded: Sequence[list[int]]
    ) -> list[Reply | SkippedRowError]:
        fitting = [index for index, tokens in enumerate(encoded) if len(tokens) < self._context]
        inputs = [{"prompt_token_ids": encoded[index]} for index in fitting]
        outputs = llm.generate(inputs, [self._params(prompts[index]) for index in fitting], use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        tokens = [answer.token_ids for answer in answers]
        chances = [
            [of_step[token].logprob for token, of_step in zip(answer.token_ids, answer.logprobs)] for answer in answers
        ]
        found: list[Reply | SkippedRowError] = [SkippedRowError(_TOO_LONG)] * len(prompts)
        for index, reply in zip(fitting, self._codec.replies(tokens, chances, None)):
            found[index] = self._grammar.check(reply) if self._grammar else reply
        return found

    def _params(self, prompt: Prompt):  # noqa: ANN202 - vllm.SamplingParams, which is not installed everywhere
        max_tokens, sampling = self._generation
        return self._new_params(
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=seed_of(prompt, sampling),
            stop_token_ids=[self._codec.eos_id],
            logprobs=0,
            detokenize=False,
            structured_outputs=self._constraint,
        )
