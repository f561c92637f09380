import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridgen.text.stops import StopChecker


def reference(text, stops):
    """The text before the first stop string of a whole text, and that string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces, stops):
    """Feed the pieces; returns the text given out and the match, and checks what is held back on the way."""
    checker = StopChecker(stops)
    fed, given, match = "", "", None
    for piece in pieces:
        text, match = checker.push(piece)
        fed += piece
        given += text
        if match is not None:
            assert checker.push("more") == ("", match)
            break
        held = fed[len(given) :]
        assert fed == given + held
        # Held back is exactly the longest suffix that can still become a stop string.
        suffixes = [fed[i:] for i in range(len(fed) + 1)]
        assert held == next(s for s in suffixes if any(stop.startswith(s) for stop in stops) or not s)
    return given + checker.flush(), match


def cut(text, random_):
    pieces = []
    while text:
        count = random_.randint(0, 4)
        pieces.append(text[:count])
        text = text[count:]
    return pieces


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_the_whole_text(text, stops, seed):
    assert run(cut(text, random.Random(seed)), stops) == reference(text, stops)


def test_many_texts_over_two_letters():
    rng = random.Random(0)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
        text = "".join(rng.choices("ab", k=rng.randint(0, 25)))
        assert run(cut(text, rng), stops) == reference(text, stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["abcd", "ef"], ["cd", "abcdef"], ("ab", "cd")),  # the first to be complete
        (["abcd"], ["cd", "bcd", "d"], ("a", "bcd")),  # the longest of those that end together
        (["x\n", "\ny"], ["\n\n"], ("x", "\n\n")),
        (["aab"], ["ab"], ("a", "ab")),  # a match that starts inside a failed one
        (["no stop"], ["stopped"], ("no stop", None)),
        (["a", "", "b"], ["ab"], ("", "ab")),
        (["the ", "end", "END"], ["END"], ("the end", "END")),
        (["\U0001f600x\U0001f601"], ["\U0001f601"], ("\U0001f600x", "\U0001f601")),
    ],
)
def test_cases(pieces, stops, expected):
    assert run(pieces, stops) == expected


def test_no_stop_strings():
    checker = StopChecker(())
    assert checker.push("anything") == ("anything", None)
    assert checker.flush() == ""


def test_after_a_match_nothing_is_left():
    checker = StopChecker(["stop"])
    assert checker.push("text stop more") == ("text ", "stop")
    assert checker.flush() == ""


@pytest.mark.timeout(60)  # quadratic work would take minutes
def test_long_stop_strings_cost_time_in_proportion():
    rng = random.Random(1)
    stops = ["a" * 999 + chr(99 + i) for i in range(10)] + ["".join(rng.choices("ab", k=1000)) for _ in range(10)]
    text = "a" * 50_000 + "".join(rng.choices("ab", k=50_000))
    checker = StopChecker(stops)
    given = "".join(checker.push(text[i : i + 7])[0] for i in range(0, len(text), 7))
    assert given + checker.flush() == text


def reference_hidden(pieces, stops):
    """The shown text before the first stop string of all pieces, and that string."""
    text = "".join(piece for piece, _ in pieces)
    cut, match = reference(text, stops)
    flags = [shown for piece, shown in pieces for _ in piece]
    return "".join(char for char, shown in zip(cut, flags, strict=False) if shown), match


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text("ab", max_size=4), st.booleans()), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5),
)
def test_hidden_pieces_are_seen_and_not_given(pieces, stops):
    checker, given = StopChecker(stops), ""
    for piece, shown in pieces:
        text, match = checker.push(piece, shown=shown)
        given += text
        if match is not None:
            break
    assert (given + checker.flush(), checker.push("")[1]) == reference_hidden(pieces, stops)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|im_end|>x", ("hi", "<|im_end|>x")),  # a special token and what follows it
        ("im_end", ("hi", "im_end")),  # a part of a special token
        ("i<|im", ("h", "i<|im")),
        ("<|im_end|><|im_end|>", ("hixhix", None)),
    ],
)
def test_special_tokens_that_are_not_shown(stop, expected):
    checker, given = StopChecker([stop]), ""
    for piece, shown in [("h", True), ("i", True), ("<|im_end|>", False), ("x", True)] * 2:
        text, match = checker.push(piece, shown=shown)
        given += text
        if match is not None:
            break
    assert (given + checker.flush(), match) == expected


def test_stop_strings_cost_what_the_text_has_of_them():
    """Four megabytes of stop strings: nothing is made of them but a sorted list until a text goes along one."""
    rng = random.Random(2)
    stops = ["".join(rng.choices("abcdefgh", k=1_000_000)) for _ in range(4)]
    tracemalloc.start()
    try:
        checker = StopChecker(stops)
        text = stops[1][:20_000] + "x" + "".join(rng.choices("abcdefgh", k=20_000))
        given = "".join(checker.push(text[i : i + 3])[0] for i in range(0, len(text), 3)) + checker.flush()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert given == text
    assert peak < 20 * 2**20


def test_many_short_stop_strings():
    stops = [chr(i) * 2 for i in range(0x4E00, 0x4E00 + 20_000)]
    checker = StopChecker(stops)
    text = "".join(chr(i) for i in range(0x4E00, 0x4E00 + 20_000))
    assert checker.push(text)[1] is None
    assert checker.push(text[-1]) == ("", text[-1] * 2)
