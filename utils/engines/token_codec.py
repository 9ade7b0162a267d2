"""What engines share that take token ids: encoding as in training, constraints, decoding."""

from collections.abc import Callable, Iterator, Sequence

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.conversation import parse_conversation
from finetune.data.exceptions import RowError
from finetune.data.tokenize import SampleEncoder
from finetune.inference import token_bytes
from utils.engines.engine import Reply, by_length
from utils.engines.prompts import Prompt
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError

Refused = tuple[Prompt, SkippedRowError]


class TokenCodec:
    """Prompts to token ids, and the tokens of answers to text.

    Args:
        tokenizer: of the model.
        table: codes that answers may contain; None for unconstrained answers.
        rules: coding rules that such answers follow; None for those of the guide.

    Attributes:
        eos_id: id of the token that ends an answer.
    """

    def __init__(
        self, tokenizer: InstructTokenizerBase, table: Cim10Table | None, rules: RuleSet | None = None
    ) -> None:
        self._encoder = SampleEncoder(tokenizer)
        self._tokenizer = tokenizer.tokenizer
        self.eos_id = self._tokenizer.eos_id
        self._grammar = None
        self._pieces = token_bytes(tokenizer)
        if table is not None:
            self._vocabulary = Vocabulary(self._pieces, self.eos_id)
            # SentencePiece starts a string with a space, which decoding removes.
            space = " " if self._tokenizer.encode("a", bos=False, eos=False) != [self._pieces.index(b"a")] else ""
            self._grammar = AnswerGrammar(table, prefix=space, rules=rules)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[list[int]], list[Refused]]:
        """Return exactly the tokens that precede the answers in training.

        Returns:
            The prompts that can be encoded, their tokens, and the others with the reason.
        """
        kept, encoded, refused = [], [], []
        for prompt in prompts:
            try:
                conversation = parse_conversation(prompt.row)
                encoded.append(self._encoder.encode_prompt(conversation.messages, conversation.tools))
                kept.append(prompt)
            except RowError as error:
                refused.append((prompt, SkippedRowError(f"it cannot be encoded ({type(error).__name__})", str(error))))
        return kept, encoded, refused

    def encode_answer(self, answer: str) -> tuple[list[int], list[bytes]]:
        """Return the tokens of an answer as training encodes it, and the bytes of each."""
        tokens = self._tokenizer.encode(answer, bos=False, eos=False)
        return tokens, [self._pieces[token] or b"" for token in tokens]

    def answer_batches(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        answer: Callable[[Sequence[Prompt], Sequence[list[int]]], Sequence[Reply | SkippedRowError]],
    ) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer prompts, those of similar length together; see `Engine.answers`.

        Args:
            prompts: to answer.
            batch_size: prompts per call of `answer`.
            answer: answers prompts, given their tokens.
        """
        ordered = by_length(prompts)
        for start in range(0, len(ordered), batch_size):
            kept, encoded, refused = self.encode(ordered[start : start + batch_size])
            yield from refused
            if kept:
                yield from zip(kept, answer(kept, encoded))

    def constraints(self, count: int) -> list[AnswerConstraint] | None:
        """Return constraints for that many new answers, or None if answers are free."""
        if self._grammar is None:
            return None
        return [AnswerConstraint(self._grammar, self._vocabulary) for _ in range(count)]

    def replies(
        self,
        answers: Sequence[Sequence[int]],
        log_probabilities: Sequence[Sequence[float]],
        constraints: Sequence[AnswerConstraint] | None,
    ) -> list[Reply]:
        """Return the answers that tokens form, each with its end token if it has one.

        `constraints` have taken all tokens; their texts leave out an incomplete last code.
        """
        if constraints is not None:
            texts = [constraint.text for constraint in constraints]
        else:
            texts = [self._tokenizer.decode(list(tokens)).strip() for tokens in answers]
        ended = [tokens[-1] == self.eos_id for tokens in answers]
        pieces = [tuple(self._pieces[token] or b"" for token in tokens) for tokens in answers]
        return list(map(Reply, texts, map(tuple, log_probabilities), ended, pieces))
