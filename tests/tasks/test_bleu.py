import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.tasks.bleu import Bleu, statistics

# So few words that sentences share several in a row.
sentence = st.lists(st.sampled_from(["a", "b", "c", ".", "isn't"]), max_size=9).map(" ".join)
pairs = st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6)


def corpus_bleu(examples):
    translations, references = map(list, zip(*examples, strict=True))
    return sacrebleu.corpus_bleu(translations, [references], tokenize="none", force=True).score


@settings(max_examples=100, deadline=None)
@given(pairs, st.integers(0, 6))
def test_sums_of_parts_have_the_bleu_of_the_whole(examples, cut):
    parts = [Bleu(1.0, 2, statistics(part)) for part in (examples[:cut], examples[cut:])]

    whole = parts[0].summed([part.sums for part in parts])

    assert whole.bleu == pytest.approx(corpus_bleu(examples))
    assert whole.loss == 0.5


def test_bleu_of_a_published_sentence():
    examples = [("the cat the cat on the mat", "the cat is on the mat")]
    found = Bleu(1.0, 2, statistics(examples))

    # Counted by hand: 5 of 7 words, 3 of 6 pairs, 1 of 5 triples, none of 4.
    assert found.sums[2:10] == [5, 3, 1, 0, 7, 6, 5, 4]
    assert found.statistics[-2:] == (7, 6)
    assert found.values()["length_ratio"] == 7 / 6


def test_the_table_names_how_it_was_counted():
    table = dict(Bleu(1.0, 2, statistics([("a b c d", "a b c d")])).table())

    assert table["BLEU"] == "100.00"
    assert "tok:none" in table["sacrebleu"]
    assert sacrebleu.__version__ in table["sacrebleu"]
