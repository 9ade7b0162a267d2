"""vLLM without a server, on an exported model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.data.tokenizer_files import load_instruct_tokenizer
from model.errors import UserError
from model.hf_config import CONFIG_NAME
from utils.engines.engine import DEFAULT_GENERATION, Generation, Reply, seed_of
from utils.engines.grammar import TableGrammar
from utils.engines.prompts import Prompt
from utils.engines.token_codec import TokenCodec
from utils.icd10.codes import Cim10Table
from utils.tables.jsonl import SkippedRowError

_CHUNK = 512  # prompts between two writes of answers; vLLM forms its own batches


class VllmEngine:
    """An exported model that vLLM runs; prompts are encoded as in training.

    Args:
        folder: what `utils.export --to hf --merged` wrote.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.

    Raises:
        UserError: vLLM is not installed, or the folder has another format.
    """

    def __init__(
        self, folder: Path, generation: Generation = DEFAULT_GENERATION, table: Cim10Table | None = None
    ) -> None:
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(
                f"{folder} has no {CONFIG_NAME}; --engine vllm needs a model in Hugging Face's format: "
                "python -m utils.export RUN --to hf --merged --out DIR."
            )
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                "--engine vllm needs vLLM in this environment; it pins its own version of torch, so a server in "
                "another environment (--engine server) may be easier."
            ) from error
        self._grammar = None if table is None else TableGrammar(table)
        if self._grammar is None:
            self._llm, self._constraint = LLM(model=str(folder), skip_tokenizer_init=True), None
        else:
            from vllm.sampling_params import StructuredOutputsParams

            # Its other library, xgrammar, does not finish with the complete CIM-10.
            self._llm = LLM(model=str(folder), structured_outputs_config={"backend": "guidance"})
            self._constraint = StructuredOutputsParams(grammar=self._grammar.lark())
        self._new_params = SamplingParams
        self._codec = TokenCodec(load_instruct_tokenizer(folder, self._llm.model_config.get_vocab_size()), None)
        self._generation = generation

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer prompts in large chunks; see `Engine`."""
        return self._codec.answer_batches(prompts, _CHUNK, self._answer)

    def _answer(self, prompts: Sequence[Prompt], encoded: Sequence[list[int]]) -> list[Reply | SkippedRowError]:
        inputs = [{"prompt_token_ids": tokens} for tokens in encoded]
        outputs = self._llm.generate(inputs, [self._params(prompt) for prompt in prompts], use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        tokens = [answer.token_ids for answer in answers]
        chances = [
            [of_step[token].logprob for token, of_step in zip(answer.token_ids, answer.logprobs)] for answer in answers
        ]
        replies = self._codec.replies(tokens, chances, None)
        return [self._grammar.check(reply) for reply in replies] if self._grammar else [*replies]

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
