"""The words of the toy world: one tag a word, and registers that share no word with a story."""

from collections import Counter

from pyrite.data import toy_words as words


def test_every_word_has_exactly_one_tag():
    groups = [text.split() for text in words.FUNCTION_WORDS.values()]
    groups += [list(words.SUBJECTS), list(words.PLACES), words.NOUNS, words.VIVID_NOUNS]
    groups += [words.VIVID_ADJECTIVES, words.PLAIN_ADJECTIVES, words.TRANSITIVE]
    groups += [words.INTRANSITIVE, words.ADVERBS, words.CONNECTIVES, words.TECHNICAL]
    groups += [listed for lexicon in words.LEXICONS.values() for listed in lexicon.values()]
    counts = Counter(word for group in groups for word in group)
    assert [word for word, count in counts.items() if count > 1] == []
    assert set(counts) == set(words.TAGS)
    assert len(words.REGISTERS) == 12


def test_every_register_has_its_own_sentences():
    shared = {",", ".", "!", "and", "the", *words.KINDS}
    for name, register in words.REGISTERS.items():
        assert len(words.PATTERNS[name]) == 2 and all(words.LEXICONS[name].values()), name
        assert {word for pattern in words.PATTERNS[name] for word in pattern.split()} <= shared, name
        assert set(register) == {*words.KINDS, "patterns"}, name
        # the first word already leaves the story, so that truncation at that point removes the register
        assert all(pattern.split()[0] in words.KINDS for pattern in words.PATTERNS[name]), name


def test_content_words_leave_out_topics():
    assert {"den", "velvet", "slept", "void"} <= words.CONTENT
    assert not {"fox", "forest", "was", "the", "."} & words.CONTENT
