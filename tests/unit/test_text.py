"""Text as characters: what a file gives, what is refused, and how sequences are cut into windows."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pctt.data import Text, excerpts, load_text, windows

LIMIT = settings(derandomize=True, deadline=None, max_examples=150)
WORDS = "Zuerst war das Wort. \N{GREEK SMALL LETTER PI} \N{SNOWMAN} \N{MUSICAL SYMBOL G CLEF}\n"


def written(folder, content: bytes | str):
    path = folder / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# load_text


def test_the_three_parts_are_the_file_in_its_order(tmp_path):
    """A part that overlapped another would be a test on what was trained on."""
    text = load_text(written(tmp_path, WORDS), validation=0.25, test=0.125)
    parts = [text.train, text.validation, text.test]
    assert len(WORDS) == 27
    assert [len(part) for part in parts] == [27 - 7 - 3, 7, 3]  # of 6.75 and 3.375
    assert "".join(text.decode(part) for part in parts) == WORDS
    assert all(part.dtype == torch.int64 for part in parts)


def test_symbols_are_the_characters_by_code_point(tmp_path):
    text = load_text(written(tmp_path, "b\U0001f600aB\uffee" * 8))
    assert text.symbols == ("B", "a", "b", "\uffee", "\U0001f600")
    assert text.train[:5].tolist() == [2, 4, 1, 0, 3]


def test_a_part_that_was_not_asked_for_is_empty(tmp_path):
    text = load_text(written(tmp_path, "abc"), validation=0, test=0)
    assert (len(text.train), len(text.validation), len(text.test)) == (3, 0, 0)
    assert text.decode(text.test) == ""


def test_line_ends_and_byte_order_mark_do_not_count_as_characters(tmp_path):
    text = load_text(written(tmp_path, b"\xef\xbb\xbfa\r\nb\rc\nd"), validation=0, test=0)
    assert text.decode(text.train) == "a\nb\nc\nd"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; give a file with text in it"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"abc\xff" + b"d" * 90, "is not UTF-8 at byte 3"),
        ("Grüße".encode("latin-1") * 20, "is not UTF-8 at byte 2"),
        ("text".encode("utf-16"), "is not UTF-8 at byte 0"),
        (b"abc\xe2\x82", "is not UTF-8 at byte 3"),
        (
            b"a" * 14,
            "has 14 characters, of which training, validation and test would get 12, 1, 1; each needs 2",
        ),
        (b"a", "has 1 characters, of which training, validation and test would get 1, 0, 0"),
    ],
)
def test_a_file_that_is_no_text_or_too_short_is_refused_by_name(tmp_path, content, words):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=words) as caught:
        load_text(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "nowhere.txt"])
def test_what_is_no_file_is_refused_by_name(tmp_path, path):
    with pytest.raises(FileNotFoundError, match='is not a file; give the path of a UTF-8 text, or "pydoc"'):
        load_text(tmp_path / path)


@pytest.mark.parametrize(
    ("fractions", "words"),
    [
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1.0"),
        ({"test": -0.1}, r"test must be in \[0, 1\), got -0.1"),
        ({"test": float("nan")}, r"test must be in"),
        ({"test": "0.1"}, r"test must be in"),
        ({"validation": 0.5, "test": 0.5}, "must leave something to train on, got 0.5 and 0.5"),
    ],
)
def test_fractions_that_leave_nothing_are_refused(tmp_path, fractions, words):
    with pytest.raises(ValueError, match=words):
        load_text(written(tmp_path, WORDS), **fractions)


def test_the_text_that_comes_with_python_is_its_documentation(tmp_path, monkeypatch):
    """Half a million characters of English; each topic is there as `help` would show it."""
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    written(tmp_path, "another text").rename(tmp_path / "pydoc")
    text = load_text("pydoc")
    whole = text.decode(torch.cat([text.train, text.validation, text.test]))
    assert all(topic.strip("\n") in whole for topic in topics.values())
    assert whole.startswith('The "assert" statement\n')
    assert len(whole) > 300_000 and len(text.symbols) < 256
    assert abs(len(text.train) / len(whole) - 0.8) < 1e-5
    own = load_text("./pydoc", validation=0, test=0)
    assert own.decode(own.train) == "another text"


def test_without_that_text_the_message_says_what_to_give_instead(monkeypatch):
    for name in ("pydoc_data", "pydoc_data.topics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"lacks pydoc_data.*give the path of a text file"):
        load_text("pydoc")


# encode and decode


@LIMIT
@given(text=st.text(alphabet=st.characters(exclude_categories=[]), min_size=1, max_size=50))
def test_encoding_is_the_place_in_the_sorted_characters_and_decoding_its_reverse(text):
    """Against Python's own sorting and indexing, for every kind of character, lone surrogates included."""
    symbols = sorted(set(text))
    book = Text(tuple(symbols), ids(), ids(), ids())
    found = book.encode(text)
    assert found.dtype == torch.int64
    assert found.tolist() == [symbols.index(character) for character in text]
    assert book.decode(found) == text


BOOK = Text(("a", "c", "\N{SNOWMAN}"), ids(0, 1, 2), ids(), ids())


def test_nothing_is_encoded_and_decoded_as_nothing():
    assert BOOK.encode("").tolist() == [] and BOOK.encode("").dtype == torch.int64
    assert BOOK.decode(ids()) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acb", "character 'b' at position 2 is not among the 3 symbols"),
        ("\U0010ffffa", r"character '\\U0010ffff' at position 0"),
        ("ac\n", r"character '\\n' at position 2"),
        ("B", "character 'B' at position 0"),
        ("a\ud800", r"character '\\ud800' at position 1"),
    ],
)
def test_an_unknown_character_is_refused_with_its_place(text, words):
    """Before, between and beyond the known ones: a search that rounds would encode a neighbour."""
    with pytest.raises(ValueError, match=words) as caught:
        BOOK.encode(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (ids(0, 3), "got 3 at position 1"),
        (ids(0, 1, -1), "got -1 at position 2"),
        (torch.zeros(2, 2).long(), r"must be a torch.int64 tensor \[N\], got torch.int64 \[2, 2\]"),
        (torch.zeros(2), "got torch.float32"),
        ([0, 1], "got list"),
    ],
)
def test_what_stands_for_no_text_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        BOOK.decode(wrong)
    with pytest.raises(ValueError, match=words):
        Text(BOOK.symbols, ids(0), wrong, ids())


@pytest.mark.parametrize("symbols", [(), ("b", "a"), ("a", "a"), ("ab",), ("a", ""), (1,)])
def test_symbols_that_are_not_sorted_single_characters_are_refused(symbols):
    with pytest.raises(ValueError, match=r"symbols must be .*; give tuple\(sorted\(set\(text\)\)\)"):
        Text(symbols, ids(), ids(), ids())


# windows


def test_windows_of_a_small_sequence_are_these():
    """Written out by hand: 14 numbers, two streams, three steps a chunk; the last one is dropped."""
    inputs, targets = windows(torch.arange(14), length=3, batch_size=2)
    assert inputs.tolist() == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    assert targets.tolist() == [[[1, 2, 3], [7, 8, 9]], [[4, 5, 6], [10, 11, 12]]]


@LIMIT
@given(num=st.integers(2, 200), length=st.integers(1, 9), batch_size=st.integers(1, 9))
def test_every_row_goes_on_where_it_ended_and_every_target_comes_next(num, length, batch_size):
    """On 0, 1, 2, ... the rows must count on from chunk to chunk, or a carried state would not fit."""
    sequence = torch.arange(num)
    if num <= length * batch_size:
        with pytest.raises(ValueError, match=f"need {batch_size * length + 1}, and there are {num};"):
            windows(sequence, length, batch_size)
        return
    inputs, targets = windows(sequence, length, batch_size)
    assert inputs.shape == targets.shape == ((num - 1) // (length * batch_size), batch_size, length)
    assert inputs.is_contiguous() and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    for row in range(batch_size):
        steps = inputs[:, row].flatten().tolist()
        assert all(after == before + 1 for before, after in pairwise(steps))
    used = sorted(inputs.flatten().tolist())
    assert used == list(range(len(used)))  # each once, from the beginning
    assert num - 1 - len(used) < length * batch_size  # and no more is dropped than must be


@pytest.mark.parametrize("cut", [windows, excerpts])
@pytest.mark.parametrize(
    ("sequence", "sizes", "words"),
    [
        (torch.arange(9.0), (2, 2), "ids must be a torch.int64 tensor"),
        (torch.arange(9)[None], (2, 2), r"got torch.int64 \[1, 9\]"),
        ("abc", (2, 2), "got str"),
        (torch.arange(9), (0, 2), "length must be a whole number of at least 1, got 0"),
        (torch.arange(9), (2, 0), "must be a whole number of at least 1, got 0"),
        (torch.arange(9), (2.0, 2), "length must be a whole number of at least 1, got 2.0"),
        (torch.arange(9), (9, 1), "need 10, and there are 9;"),
        (torch.arange(0), (1, 1), "need 2, and there are 0;"),
    ],
)
def test_sequences_and_sizes_that_do_not_fit_are_refused(cut, sequence, sizes, words):
    seed = {"seed": 0} if cut is excerpts else {}
    with pytest.raises(ValueError, match=words):
        cut(sequence, *sizes, **seed)


# excerpts


@LIMIT
@given(num=st.integers(2, 40), data=st.data(), count=st.integers(1, 20), seed=st.integers(0, 2**63))
def test_an_excerpt_is_a_run_of_the_sequence_and_its_target_comes_next(num, data, count, seed):
    length = data.draw(st.integers(1, num - 1))
    inputs, targets = excerpts(torch.arange(num), length, count, seed)
    assert inputs.shape == targets.shape == (count, length)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(length))
    assert torch.equal(targets, inputs + 1)
    assert inputs.min() >= 0 and targets.max() < num


def test_every_place_is_reached_the_first_and_the_last_too():
    """5 places, 200 draws: one is missed with a chance of 5 * 0.8**200, below 1e-18."""
    inputs, _ = excerpts(torch.arange(7), length=2, count=200, seed=0)
    assert sorted(set(inputs[:, 0].tolist())) == [0, 1, 2, 3, 4]


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    """Two seeds agree on 50 of a million places with a chance of 1e-300."""
    sequence, before = torch.arange(1_000_000), torch.get_rng_state()
    first, again, other = (excerpts(sequence, 3, 50, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
