"""`lmtrain corpora`: what can be fetched."""

import pytest

CORPORA = ["tiny-shakespeare", "ptb", "wikitext-2", "wikitext-103", "text8", "enwik8"]
DATA_SETS = ["snips", "wnut17", "sst2", "multi30k", "jsb", "nottingham", "splice"]
NAMES = [*CORPORA, *DATA_SETS]


def test_every_corpus_is_listed_with_size_licence_and_hash(lmtrain, parsed):
    outcome = lmtrain("corpora", "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    listing = parsed(outcome.stdout)
    assert listing["schema"] == "lmtrain.corpora/1"
    assert [entry["name"] for entry in listing["corpora"]] == NAMES
    for entry in listing["corpora"]:
        assert entry["about"]
        assert entry["licence"]
        assert entry["bytes"] > 90_000
        assert not entry["is_here"]
        assert all(len(digest) == 64 for digest in entry["sha256"].values())
        assert bool(entry["level"]) == (entry["name"] in CORPORA)


def test_the_list_reads_as_text(fresh_lmtrain):
    outcome = fresh_lmtrain("corpora")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    for name in NAMES:
        assert f"{name} (" in outcome.stdout
    assert outcome.stdout.count("licence: ") == len(NAMES)
    assert outcome.stdout.count("SHA-256 ") >= len(NAMES)
    assert "prepare: python scripts/prepare_data.py snips-slots " in outcome.stdout


@pytest.mark.parametrize("name", ["ptbb", "../ptb", ""])
def test_an_unknown_corpus_is_refused_with_those_there_are(lmtrain, assert_refused, name):
    outcome = lmtrain("corpora", "fetch", name)

    assert_refused(outcome, 2, f"no corpus {name!r}", *NAMES)


def test_a_corpus_that_was_not_fetched_says_how_to_fetch_it(lmtrain, assert_refused, tmp_path):
    outcome = lmtrain("tokenize", "ptb", LMTRAIN_CACHE=str(tmp_path / "cache"))

    assert_refused(outcome, 3, "ptb is not on this machine", "try: lmtrain corpora fetch ptb")
