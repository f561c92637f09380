import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridgen.text.detokenize import IncrementalDetokenizer

TEXTS = [
    "Hello, world!  Two spaces,\nand\ttabs.\n\n",
    "café naïve Ångström ñ",
    "e\u0301 o\u0302\u0323 combining, a\u20dd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",  # Thai
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "a literal \ufffd mark, and one at the end \ufffd",
    "\u0000\u0001\u001f\u00a0\u2028",
]
SPECIAL = ["<s>", "</s>", "<|tool|>"]


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Metaspace pieces and byte fallback, with the decoder that Llama 2 has."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        "\u2581the",
        "\u2581cat",
        "s",
        "at",
        "c",
        "t",
        "h",
        "e",
        "a",
        "\u2581\u2581",
        ".",
        "\n",
    ]
    merges = [("a", "t"), ("\u2581", "\u2581")]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|tool|>"]
    )


@pytest.fixture(scope="module")
def wordpiece():
    """WordPiece whose `decode()` removes spaces before punctuation afterwards."""
    pieces = ["[UNK]", "[SEP]", "do", "n", "'", "t", "##ing", "hello", ".", ",", "is"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, sep_token="[SEP]", unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


class PythonTokenizer:
    """A tokenizer without a Rust backend: only `decode()`."""

    def __init__(self, fast):
        self._fast = fast

    def decode(self, ids, skip_special_tokens=False):
        return self._fast.decode(ids, skip_special_tokens=skip_special_tokens)


def byte_ids(fast, data):
    """Ids of single-byte tokens."""
    if fast.convert_tokens_to_ids("<0x00>") not in (None, fast.unk_token_id):
        return [fast.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    # GPT-2's alphabet: printable bytes stand for themselves, the others for 256 onwards.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    chars = [chr(byte) if byte in printable else chr(256 + other.index(byte)) for byte in data]
    return fast.convert_tokens_to_ids(chars)


def run(tokenizer, prompt, generated, skip):
    """The pieces, the last one from `flush()`, and the detokenizer."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(token) for token in generated), detokenizer.flush()], detokenizer


def expected(tokenizer, prompt, generated, skip):
    whole = tokenizer.decode(list(prompt) + list(generated), skip_special_tokens=skip)
    return whole[len(tokenizer.decode(list(prompt), skip_special_tokens=skip)) :]


def both_kinds(fast):
    return [fast, PythonTokenizer(fast)]


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_byte_level_equals_decode_on_random_ids(byte_level, skip, data):
    ids = st.lists(st.integers(0, len(byte_level) - 1), max_size=40)
    prompt, generated = data.draw(ids), data.draw(ids)
    for tokenizer in both_kinds(byte_level):
        pieces, detokenizer = run(tokenizer, prompt, generated, skip)
        assert "".join(pieces) == expected(tokenizer, prompt, generated, skip)
        assert detokenizer.restarts == 0


@pytest.mark.parametrize("skip", [True, False])
def test_byte_level_equals_decode_on_bytes(byte_level, skip):
    """Single-byte tokens: valid characters in all splits, and invalid sequences."""
    ids = byte_ids(byte_level, range(256))
    assert len(set(ids)) == 256
    lead = [i for i in ids if byte_level.decode([i]) == "\ufffd"]
    rng = random.Random(3)
    for trial in range(150):
        pool = lead if trial % 2 else ids
        prompt, generated = (rng.choices(pool, k=rng.randint(0, 12)) for _ in range(2))
        for tokenizer in both_kinds(byte_level):
            pieces, _ = run(tokenizer, prompt, generated, skip)
            assert "".join(pieces) == expected(tokenizer, prompt, generated, skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_texts_come_out_whole_at_every_split(request, name, text, skip):
    fast = request.getfixturevalue(name)
    ids = fast(text + "</s>" + text, add_special_tokens=False)["input_ids"]
    for split in range(0, len(ids), max(1, len(ids) // 10)):
        prompt, generated = ids[:split], ids[split:]
        if name == "sentencepiece_like" and fast.decode(prompt).endswith("\ufffd"):
            continue  # inside a character, see test_a_prompt_may_end_inside_a_character
        for tokenizer in both_kinds(fast):
            pieces, _ = run(tokenizer, prompt, generated, skip)
            assert "".join(pieces) == expected(tokenizer, prompt, generated, skip)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_a_character_comes_out_with_its_last_byte(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = byte_ids(tokenizer, "\U0001fae8".encode())
    pieces, _ = run(tokenizer, tokenizer("the")["input_ids"], ids, True)
    assert pieces == ["", "", "", "\U0001fae8", ""]
    pieces, _ = run(tokenizer, [], ids[:3], True)
    assert pieces[:3] == [""] * 3
    assert set(pieces[3]) == {"\ufffd"}


def test_first_space(sentencepiece_like):
    the, cat = sentencepiece_like.convert_tokens_to_ids(["\u2581the", "\u2581cat"])
    bos = sentencepiece_like.bos_token_id
    for tokenizer in both_kinds(sentencepiece_like):
        assert run(tokenizer, [bos, the], [cat], True)[0] == [" cat", ""]
        assert run(tokenizer, [bos], [the, cat], True)[0] == ["the", " cat", ""]
        assert run(tokenizer, [], [the, cat], True)[0] == ["the", " cat", ""]
        assert run(tokenizer, [the] * 500, [bos, cat, bos, bos, cat], True)[0] == [
            "",
            " cat",
            "",
            "",
            " cat",
            "",
        ]


def byte_run_text(tokens, skip):
    """What the pieces of a byte-fallback tokenizer join to: of a run of bytes, the valid characters that it starts
    with, then one U+FFFD for each byte."""
    out, held = [], b""

    def close():
        nonlocal held
        for keep in range(len(held), -1, -1):
            try:
                out.append(held[:keep].decode() + "\ufffd" * (len(held) - keep))
            except UnicodeDecodeError:
                continue
            break
        held = b""

    for token in tokens:
        if token in SPECIAL and skip:
            continue
        if token.startswith("<0x"):
            held += bytes([int(token[3:5], 16)])
        else:
            close()
            out.append(token.replace("\u2581", " "))
    close()
    return "".join(out).removeprefix(" ")


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_byte_fallback_on_random_ids(sentencepiece_like, skip, data):
    # No byte of a space: where a window starts with it, the decoder strips it, and a broken run counts it again.
    interesting = byte_ids(sentencepiece_like, b"\x41\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xff")
    words = list(range(4)) + list(range(260, len(sentencepiece_like)))
    token = st.one_of(st.sampled_from(interesting), st.sampled_from(words))
    # The prompt ends with a word, so that no run of bytes goes across.
    prompt = [*data.draw(st.lists(token, max_size=20)), 261]
    generated = data.draw(st.lists(token, max_size=20))
    names = sentencepiece_like.convert_ids_to_tokens(prompt + generated)
    before = byte_run_text(names[: len(prompt)], skip)
    after = byte_run_text(names, skip)[len(before) :]
    for tokenizer in both_kinds(sentencepiece_like):
        pieces, detokenizer = run(tokenizer, prompt, generated, skip)
        assert "".join(pieces) == after
        if after == expected(tokenizer, prompt, generated, skip):
            continue
        # It differs from decode() only where decode() rewrote what was given out, or would have at the flush.
        assert detokenizer.restarts or pieces[-1]


def test_rewritten_text_stays_and_the_stream_goes_on(sentencepiece_like):
    the, cat = sentencepiece_like.convert_tokens_to_ids(["\u2581the", "\u2581cat"])
    for tokenizer in both_kinds(sentencepiece_like):
        pieces, detokenizer = run(tokenizer, [the], [*byte_ids(sentencepiece_like, b"\xc3\xa9\xff"), cat, the], True)
        assert pieces == ["", "é", "", "\ufffd cat", " the", ""]
        assert detokenizer.restarts == 1


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
def test_a_prompt_may_end_inside_a_character(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = byte_ids(tokenizer, "\U0001fae8".encode())
    word = tokenizer("at", add_special_tokens=False)["input_ids"][-1]
    word_text = tokenizer.decode([word])
    for split in (1, 2, 3):
        pieces, _ = run(tokenizer, [word, *ids[:split]], [*ids[split:], word, word], True)
        assert "".join(pieces) == 2 * word_text
        pieces, _ = run(tokenizer, [word, *ids[:split]], [word, word], True)
        assert "".join(pieces) == 2 * word_text


@pytest.mark.timeout(120)  # without the bound: minutes
def test_long_undecodable_runs(byte_level):
    """Their cost is bounded, and the text is still that of decode()."""
    half = byte_ids(byte_level, b"\xf0\x9f")
    assert byte_level.decode(half) == "\ufffd"
    word = byte_level("at", add_special_tokens=False)["input_ids"]
    rest = byte_ids(byte_level, "\U0001fae8".encode())
    for run_length in (63, 64, 65, 66, 67, 129, 300):
        generated = (half * run_length)[:run_length] + rest + word
        for tokenizer in both_kinds(byte_level):
            pieces, _ = run(tokenizer, word, generated, False)
            assert "".join(pieces) == expected(tokenizer, word, generated, False)
    pieces, _ = run(byte_level, word, half[:1] * 20_000, False)
    assert "".join(pieces) == "\ufffd" * 20_000


def test_long_undecodable_runs_of_byte_fallback(sentencepiece_like):
    the = sentencepiece_like.convert_tokens_to_ids("\u2581the")
    for tokenizer in both_kinds(sentencepiece_like):
        pieces, _ = run(tokenizer, [the], byte_ids(sentencepiece_like, b"\xff") * 300 + [the, the], False)
        assert "".join(pieces) == "\ufffd" * 300 + " the the"
        assert max(map(len, pieces)) < 100


def test_ids_that_give_no_text(sentencepiece_like):
    """Skipped and unknown ids neither pile up nor cost the next word its space."""
    the = sentencepiece_like.convert_tokens_to_ids("\u2581the")
    for nothing in (sentencepiece_like.eos_token_id, 5000):
        for tokenizer in both_kinds(sentencepiece_like):
            pieces, detokenizer = run(tokenizer, [the], [the, *[nothing] * 500, the], True)
            assert "".join(pieces) == " the the"
            assert len(detokenizer._context) < 70


def test_clean_up_of_spaces(wordpiece):
    ids = wordpiece.convert_tokens_to_ids
    generated = ids(["hello", "##ing", ",", "hello", "."])
    pieces, _ = run(wordpiece, ids(["is"]), generated, True)
    assert "".join(pieces) == expected(wordpiece, ids(["is"]), generated, True) == " helloing, hello."
    # decode() makes "don't" of it in the end; the space before the apostrophe was given out by then.
    pieces, _ = run(wordpiece, ids(["is"]), ids(["do", "n", "'", "t", "hello"]), True)
    assert "".join(pieces).replace(" ", "") == "don'thello"
    assert "".join(pieces) != expected(wordpiece, ids(["is"]), ids(["do", "n", "'", "t", "hello"]), True)


def test_without_a_tokenizer():
    detokenizer = IncrementalDetokenizer(None, [1, 2], True)
    assert detokenizer.push(3) == ""
    assert detokenizer.flush() == ""


def test_nothing_after_flush(byte_level):
    detokenizer = IncrementalDetokenizer(byte_level, [], True)
    detokenizer.push(byte_ids(byte_level, b"\xf0")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def pieces_of(tokenizer):
    """Lists of ids, most of which are text: whole tokens, characters in bytes, and now and then anything."""
    whole = "aé€\U0001fae8 \u2581"
    characters = [byte_ids(tokenizer, char.encode()) for char in whole]
    anything = st.integers(0, len(tokenizer) + 3).map(lambda token: [token])
    named = st.sampled_from([[tokenizer.convert_tokens_to_ids(name)] for name in SPECIAL])
    words = st.sampled_from([[i] for i in range(260, len(tokenizer))])
    piece = st.one_of(st.sampled_from(characters), words, words, named)
    valid = st.lists(piece, max_size=25)
    return st.one_of(valid, valid, st.lists(st.one_of(piece, anything), max_size=25)).map(
        lambda runs: [token for run in runs for token in run]
    )


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_like"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_all_at_the_end_is_one_by_one(request, name, skip, data):
    tokenizer = request.getfixturevalue(name)
    prompt, generated = data.draw(pieces_of(tokenizer)), data.draw(pieces_of(tokenizer))
    cut = data.draw(st.integers(0, len(prompt)))
    prompt = prompt[:cut]  # it can end inside a character
    pieces, _ = run(tokenizer, prompt, generated, skip)
    for pushed in {0, data.draw(st.integers(0, len(generated)))}:
        detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
        assert detokenizer.bulk
        before = [detokenizer.push(token) for token in generated[:pushed]]
        assert "".join(before) + detokenizer.flush(generated[pushed:]) == "".join(pieces)
        assert detokenizer.flush([261]) == ""


def test_all_at_the_end_is_decoded_once(byte_level, monkeypatch):
    ids = byte_level("Hello, world! " * 50)["input_ids"]
    detokenizer = IncrementalDetokenizer(byte_level, byte_level("at")["input_ids"], True)
    monkeypatch.setattr(detokenizer, "push", lambda token: pytest.fail("one by one"))
    assert detokenizer.flush(ids) == "Hello, world! " * 50


def test_what_is_not_decoded_at_the_end(sentencepiece_like, wordpiece):
    """Tokenizers of which nobody knows that their text only grows take token by token, in `flush()` too."""
    backend = Tokenizer.from_str(sentencepiece_like.backend_tokenizer.to_str())
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    kinds = {
        False: [decoders.Sequence([*parts, decoders.Strip(" ", 2, 0)]), decoders.WordPiece(), decoders.CTC(), None],
        True: [decoders.Sequence(parts), decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)]), decoders.ByteLevel()],
    }
    for bulk, choices in kinds.items():
        for decoder in choices:
            backend.decoder = decoder
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
            assert IncrementalDetokenizer(tokenizer, [261], True).bulk is bulk, decoder
    ids = wordpiece.convert_tokens_to_ids(["do", "n", "'", "t", "hello"])
    for tokenizer in (wordpiece, PythonTokenizer(wordpiece)):
        pieces, _ = run(tokenizer, ids[:1], ids, True)
        detokenizer = IncrementalDetokenizer(tokenizer, ids[:1], True)
        assert not detokenizer.bulk
        assert detokenizer.flush(ids) == "".join(pieces)
    assert IncrementalDetokenizer(None, [1], True).bulk
    assert IncrementalDetokenizer(None, [1], True).flush([2, 3]) == ""
