"""Notes that are too long: what is removed, what is always kept, and what is counted."""

import itertools
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.args import TrainArgs
from finetune.data.args import DataArgs, InstructArgs
from finetune.data.data_loader import EvalLoader, TrainLoader, build_data_loader
from finetune.data.exceptions import RowError
from finetune.data.packing import PackingCounts
from finetune.data.shorten import FittingEncoder, removable_words, without_middle
from finetune.data.tokenize import SampleEncoder, SampleType, TokenSample
from finetune.distributed import World
from model.args import LoraArgs
from model.errors import UserError
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.golden import instruct_tokenizer
from tests.support.tiny_tekken import load_tiny_tekken
from train import run_training

ENDS = 256  # characters kept at both ends of a string
WORD = re.compile(r"\s*\S+")

SYSTEM = "Vous codez les séjours selon la CIM-10."
ANSWER = "Diagnostic principal : pneumopathie (J189), diagnostic associé : fibrillation auriculaire (I489)"
BODIES = {
    "Motif d'hospitalisation": "Dyspnée fébrile évoluant depuis trois jours au retour d'un voyage.",
    "Antécédents": "Fibrillation auriculaire sous apixaban.\nHTA : depuis 2010\nDiabète : de type 2, sous metformine",
    "Histoire de la maladie": " ".join(f"Événement {n} sans gravité." for n in range(60)),
    "Examens complémentaires": " ".join(f"Dosage {n} à {n * 7 % 90},{n % 10} mmol/L." for n in range(50)),
    "Évolution": " ".join(f"Jour {n} : apyrexie." for n in range(40)),
    "Conclusion": "Pneumopathie lobaire inférieure droite d'évolution favorable sous amoxicilline.",
}
HEAD = "Générez le codage du compte rendu suivant : Hôpital général, service de médecine interne. " * 4
TAIL = "Bien confraternellement, le médecin responsable de l'unité. " * 5

STYLES = {
    "plain": "{title} :\n{body}",
    "markdown": "**{title} :**\n{body}",
    "heading": "## {title} :\n{body}",
    "inline": "{title} : {body}",
    "capitals": "{TITLE}\n{body}",
    "numbered": "{n}. {title} :\n{body}",
    "roman": "{roman} - {TITLE}\n{body}",
}


def section(title: str, style: str = "plain") -> str:
    number = list(BODIES).index(title) + 1
    roman = ("I", "II", "III", "IV", "V", "VI")[number - 1]
    return STYLES[style].format(title=title, TITLE=title.upper(), body=BODIES[title], n=number, roman=roman)


def note(style: str = "plain") -> str:
    return "\n\n".join([HEAD, *(section(title, style) for title in BODIES), TAIL])


def row(*messages: dict, **others) -> dict:
    return {"messages": list(messages), **others}


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **others) -> dict:
    return {"role": "assistant", "content": content, **others}


def icd_row(text: str, answer: str = ANSWER) -> dict:
    return row({"role": "system", "content": SYSTEM}, user(text), assistant(answer))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> InstructTokenizerBase:
    """A reversible tokenizer with one token per byte."""
    return load_tiny_tekken(tmp_path_factory.mktemp("tekken"), "v3").instruct_tokenizer


def encode(
    tokenizer: InstructTokenizerBase,
    item: dict,
    seq_len: int,
    overlong: str = "shorten",
    keep: tuple[str, ...] = (),
    kind: SampleType = SampleType.INSTRUCT,
) -> TokenSample:
    return FittingEncoder(SampleEncoder(tokenizer), seq_len, overlong, list(keep)).encode(item, kind)


def whole(tokenizer: InstructTokenizerBase, item: dict, kind: SampleType = SampleType.INSTRUCT) -> TokenSample:
    return SampleEncoder(tokenizer).encode(item, kind)


def trained(sample: TokenSample) -> list[int]:
    return [token for token, is_trained in zip(sample.tokens, sample.masks, strict=True) if is_trained]


def is_subsequence(part: list, of: list) -> bool:
    rest = iter(of)
    return all(item in rest for item in part)


def assert_shortened(new: TokenSample, old: TokenSample, seq_len: int) -> None:
    """The sample fits, its answer is complete, and the removed tokens are counted."""
    assert 0 < len(new.tokens) - 1 <= seq_len
    assert len(new.tokens) == len(new.masks)
    assert trained(new) == trained(old)
    assert new.removed == len(old.tokens) - len(new.tokens) > 0


# ---- the text


SEPARATORS = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\n\n- "])
WORDS = st.sampled_from(
    ["le", "patient", "39,5", "°C", "Motif :", "\nCONCLUSION\n", "\n**Antécédents :**\n", "HTA : 2010", "d'admission,"]
)
TEXTS = st.lists(st.tuples(SEPARATORS, WORDS), max_size=250).map(lambda parts: "".join(map("".join, parts)))


@given(TEXTS, st.integers(0, 2000), st.sampled_from([(), ("motif",), ("conclusion", "antecedents")]))
@settings(max_examples=200, deadline=None)
def test_only_whole_words_inside_the_text_are_removed(text, count, keep):
    words = removable_words(text, keep)
    removable = sum(end - start for group in words for start, end in group)
    left = without_middle(text, words, count)
    assert left.startswith(text[:ENDS]) and left.endswith(text[-ENDS:])
    # Each remaining word keeps the blanks before it: no word is new, no words are joined.
    assert is_subsequence(WORD.findall(left), WORD.findall(text))
    longest = max(map(len, WORD.findall(text)), default=0)
    assert min(count, removable) <= len(text) - len(left) <= count + 4 * longest
    assert without_middle(text, words, 0) == text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("keep", "titles"),
    [
        (["motif"], ["Motif d'hospitalisation"]),
        (["MOTIF", "CONCLUSION"], ["Motif d'hospitalisation", "Conclusion"]),
        (["Antecedents", "conclusion"], ["Antécédents", "Conclusion"]),
        (["antécédents", "évolution"], ["Antécédents", "Évolution"]),
    ],
)
def test_sections_to_keep_are_shortened_last(tiny, style, keep, titles):
    """Accents and case are ignored; all other words are removed before the first word of a section to keep."""
    folded = FittingEncoder(SampleEncoder(tiny), 1, "shorten", keep)._keep_sections
    text = note(style)
    others, kept = removable_words(text, folded)
    first = sum(end - start for start, end in others)
    sections = [section(title, style) for title in titles]
    if style == "inline":  # there each line is a section
        sections = [body.splitlines()[0] for body in sections]
    for count in range(0, first + 1, 97):
        left = without_middle(text, (others, kept), count)
        assert all(body in left for body in sections)
    emptied = without_middle(text, (others, kept), first)
    assert "Dosage 25" not in emptied and re.search(r"\n\W*(\d. |I+ - )?" + titles[0], emptied, re.IGNORECASE)
    assert not all(body in without_middle(text, (others, kept), first + 100) for body in sections)


def test_without_sections_to_keep_the_middle_is_removed():
    text = note()
    left = without_middle(text, removable_words(text, ()), 2000)
    start = next(index for index, (old, new) in enumerate(zip(text, left)) if old != new)
    removed = len(text) - len(left)
    assert left == text[:start] + text[start + removed :]  # one piece
    assert abs((start + removed / 2) - len(text) / 2) < 100


def test_a_text_without_blanks_or_shorter_than_both_ends_is_unchanged():
    for text in ("x" * 5000, "un mot " * 60, "", "mot"):
        assert without_middle(text, removable_words(text, ()), 400) == text


# ---- the sample


@given(seq_len=st.integers(1300, 7000), style=st.sampled_from(list(STYLES)), keep=st.sampled_from([(), ("Motif",)]))
@settings(max_examples=40, deadline=None)
def test_only_the_note_is_shortened(tiny, seq_len, style, keep):
    item = icd_row(note(style))
    old, new = whole(tiny, item), encode(tiny, item, seq_len, keep=keep)
    if len(old.tokens) - 1 <= seq_len:
        assert new == old
        return
    assert_shortened(new, old, seq_len)
    before, after = (tiny.tokenizer.decode(sample.tokens) for sample in (old, new))
    assert after.startswith(before[: len(SYSTEM) + ENDS]) and after.endswith(before[-ENDS - len(ANSWER) :])
    assert is_subsequence(WORD.findall(after), WORD.findall(before))
    assert new == encode(tiny, item, seq_len, keep=keep)


@pytest.mark.parametrize("seq_len", [600, 1000, 1500, 2000])
def test_little_more_is_removed_than_necessary(seq_len):
    tokenizer = instruct_tokenizer("v3")
    new = encode(tokenizer, icd_row(note()), seq_len, keep=("Conclusion", "Motif"))
    assert_shortened(new, whole(tokenizer, icd_row(note())), seq_len)
    assert len(new.tokens) >= 0.95 * seq_len
    text = tokenizer.tokenizer.decode(new.tokens)
    assert all(BODIES[title] in text for title in ("Motif d'hospitalisation", "Conclusion"))


def test_a_note_that_is_a_small_part_of_its_conversation_is_shortened(tiny):
    """Most tokens are elsewhere, so the first estimate of what to remove is far too small."""
    others = [user("Une question de plus ? " * 40), assistant("Une réponse. " * 400)] * 3
    item = row(*others, user(note()), assistant(ANSWER))
    old = whole(tiny, item)
    seq_len = len(old.tokens) - 3000
    calls = []
    encoder = SampleEncoder(tiny)
    encoder.encode_conversation = lambda c: calls.append(c) or SampleEncoder.encode_conversation(encoder, c)
    new = FittingEncoder(encoder, seq_len, "shorten", []).encode(item, SampleType.INSTRUCT)
    assert_shortened(new, old, seq_len)
    assert len(new.tokens) > 0.98 * seq_len
    assert len(calls) <= 8


def test_the_longest_of_several_messages_is_shortened(tiny):
    questions = ["Première question, courte mais pas trop ? " * 15, note(), "Dernière question ? " * 20]
    item = row(*itertools.chain.from_iterable((user(text), assistant(ANSWER)) for text in questions))
    old = whole(tiny, item)
    new = encode(tiny, item, len(old.tokens) - 2500)
    assert_shortened(new, old, len(old.tokens) - 2500)
    text = tiny.tokenizer.decode(new.tokens)
    assert questions[0] in text and questions[2] in text and text.count(ANSWER) == 3


def test_a_long_tool_result_is_shortened_inside(tiny):
    tools = [{"type": "function", "function": {"name": "dossier", "description": "Le dossier.", "parameters": {}}}]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "dossier", "arguments": '{"ipp": 7}'}}
    item = row(
        user("Quels codes pour ce séjour ?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": note()},
        assistant(ANSWER),
        tools=tools,
    )
    old = whole(tiny, item)
    new = encode(tiny, item, 3000)
    assert_shortened(new, old, 3000)
    text = tiny.tokenizer.decode(new.tokens)
    for kept in ("Quels codes pour ce séjour ?", "Le dossier.", "abcdefghi", '"ipp": 7', TAIL.strip()):
        assert kept in text


def test_the_longest_chunk_of_user_content_is_shortened(tiny):
    chunks = [{"type": "text", "text": text} for text in ("Consigne. " * 20, note(), "Rappel de la consigne. " * 20)]
    item = row(user(chunks), assistant(ANSWER))
    new = encode(tiny, item, 3000)
    assert_shortened(new, whole(tiny, item), 3000)
    text = tiny.tokenizer.decode(new.tokens)
    assert chunks[0]["text"] in text and chunks[2]["text"] in text


def test_a_pretrain_text_is_shortened(tiny):
    old = whole(tiny, {"text": note()}, SampleType.PRETRAIN)
    new = encode(tiny, {"text": note()}, 2000, kind=SampleType.PRETRAIN)
    assert 0.95 * 2000 <= len(new.tokens) - 1 <= 2000 and all(new.masks)
    assert (new.tokens[0], new.tokens[-1]) == (old.tokens[0], old.tokens[-1])
    assert new.tokens[:ENDS] == old.tokens[:ENDS] and new.tokens[-ENDS:] == old.tokens[-ENDS:]
    assert new.removed == len(old.tokens) - len(new.tokens)


@pytest.mark.parametrize(
    "item",
    [
        icd_row(note(), answer="Diagnostic. " * 400),  # the answer alone is too long
        icd_row("x" * 6000),  # one word
        row(*[user("Question courte ? " * 20), assistant(ANSWER)] * 20),  # none of many messages is long
    ],
)
def test_samples_that_cannot_be_shortened_are_dropped_and_counted(tiny, item):
    assert encode(tiny, item, 1500) == TokenSample([], [], removed=len(whole(tiny, item).tokens))


def test_drop_and_error_shorten_nothing(tiny):
    item = icd_row(note())
    length = len(whole(tiny, item).tokens)
    assert encode(tiny, item, length - 2, "drop") == TokenSample([], [], removed=length)
    with pytest.raises(RowError, match=rf"It has {length} tokens, more than `seq_len` \({length - 2}\) can hold"):
        encode(tiny, item, length - 2, "error")
    for overlong in ("shorten", "drop", "error"):  # n tokens have n - 1 positions
        assert encode(tiny, item, length - 1, overlong) == whole(tiny, item)


# ---- in training

FITTING, LONG, IMPOSSIBLE = 20, 6, 3


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [icd_row(f"<{n}> " + "note " * (n * 10)) for n in range(FITTING)]
    rows += [icd_row(f"<{n}> {note()}") for n in range(FITTING, FITTING + LONG)]
    rows += [icd_row(note(), answer="Diagnostic. " * 400)] * IMPOSSIBLE
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def loader(tokenizer: InstructTokenizerBase, path: Path, is_eval: bool = False, **keys) -> TrainLoader | EvalLoader:
    sources = {"eval_instruct_data" if is_eval else "instruct_data": str(path)}
    args = DataArgs(**sources, packing="best_fit", instruct=InstructArgs(True, False), **keys)
    return build_data_loader(tokenizer, args, 1, 1500, 0, rank=0, world_size=1, is_eval=is_eval)


def row_numbers(batch, tokenizer: InstructTokenizerBase) -> list[int]:
    return [int(number) for number in re.findall(r"<(\d+)>", tokenizer.tokenizer.decode(batch.x.tolist()))]


def test_an_evaluation_has_each_row_that_fits_once(tiny, rows_file):
    batches = loader(tiny, rows_file, is_eval=True)
    for _ in range(2):
        assert sorted(n for batch in batches for n in row_numbers(batch, tiny)) == list(range(FITTING + LONG))


@pytest.mark.slow
def test_training_counts_warns_once_and_resumes(tiny, rows_file, caplog):
    batches = loader(tiny, rows_file)
    taken = [(batch.x.tolist(), batch.sizes, batches.counts, batches.state_dict()) for batch in batches_of(batches, 30)]
    batches.close()

    counts = taken[-1][2]
    assert counts.positions == 30 * 1500 and 0.9 < counts.filled / counts.positions < 1
    # Reading ahead covers about whole epochs, so the shares are those of the file.
    rows = FITTING + LONG + IMPOSSIBLE
    assert counts.samples > 10 * rows
    assert counts.shortened == pytest.approx(counts.samples * LONG / rows, abs=LONG)
    assert counts.dropped == pytest.approx(counts.samples * IMPOSSIBLE / rows, abs=IMPOSSIBLE)
    lost = [whole(tiny, item).tokens for item in map(json.loads, rows_file.open(encoding="utf-8"))]
    kept = [len(encode(tiny, item, 1500).tokens) for item in map(json.loads, rows_file.open(encoding="utf-8"))]
    mean = sum(len(tokens) - left for tokens, left in zip(lost, kept, strict=True)) / rows
    assert counts.removed_tokens == pytest.approx(counts.samples * mean, rel=0.05)

    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.match(rf"The sample in line \d+ of {re.escape(str(rows_file))} is longer than `seq_len`: ", warning)

    for place in (0, 12):
        again = loader(tiny, rows_file)
        again.load_state_dict(json.loads(json.dumps(taken[place][3])))
        assert again.counts == taken[place][2]
        rest = [(batch.x.tolist(), batch.sizes, again.counts, again.state_dict()) for batch in batches_of(again, 10)]
        again.close()
        assert rest == taken[place + 1 : place + 11]


def batches_of(batches: TrainLoader, count: int):
    return itertools.islice(batches, count)


def test_counts_are_those_of_the_batches_returned(tiny, rows_file):
    """However many batches the background thread has prepared."""
    batches = loader(tiny, rows_file)
    assert batches.wait_for_first().counts == PackingCounts()
    next(batches)
    assert batches.counts.positions == 1500
    batches.close()


def test_a_source_without_a_fitting_row_gives_a_clear_error(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(icd_row(note())) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has a trainable token: .* every sample longer than `seq_len`"):
        loader(tiny, path, overlong="drop").wait_for_first()
    with pytest.raises(UserError, match=r"line 1 of dataset .*rows.jsonl .* more than `seq_len` \(1500\)"):
        loader(tiny, path, overlong="error").wait_for_first()


@pytest.mark.slow
def test_the_run_summary_reports_packing(rows_file, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    args = TrainArgs(
        data=DataArgs(instruct_data=str(rows_file), packing="best_fit"),
        model_id_or_path=str(make_tiny_checkpoint(tmp_path / "model")),
        run_dir=str(tmp_path / "run"),
        lora=LoraArgs(rank=2),
        seq_len=700,
        max_steps=3,
        no_ckpt=True,
    )
    run_training(args, World(rank=0, size=1, device=torch.device("cpu")))
    facts = caplog.records[-1].getMessage()
    assert re.search(
        r"packing +\d\d\.\d% of positions filled; \d+ of \d+ samples shortened, \d+ dropped \([\d,]+ tokens removed\)",
        facts,
    )
