"""`lmtrain tokenize`: ids of a text, coverage of a corpus."""

import gzip

import pytest

from corpora import TINY, UNICODE


def test_a_run_shows_the_ids_of_a_text(word_model, lmtrain, parsed):
    outcome = lmtrain("tokenize", word_model.run, "the zebra sat", "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    shown = parsed(outcome.stdout)
    assert shown["schema"] == "lmtrain.tokenize/1"
    assert shown["tokens"] == ["the", "<UNK>", "sat"]
    assert shown["ids"][1] == 0
    assert shown["oov"] == 1


def test_ids_stand_beside_their_tokens(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("tokenize", word_model.run, "the cat")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert rows[0] == ["token", "id"]
    assert [row[0] for row in rows[1:3]] == ["the", "cat"]
    assert outcome.stdout.endswith("2 tokens, 0 out of vocabulary\n")


def test_a_corpus_is_counted(lmtrain, parsed, tmp_path):
    (tmp_path / "corpus.txt").write_text(TINY)

    outcome = lmtrain("tokenize", "corpus.txt", "--vocab-size", "5", "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    counted = parsed(outcome.stdout)
    kept = {"the", "sat", "cat"}
    unknown = sum(word not in kept for word in TINY.split())
    assert counted["schema"] == "lmtrain.tokenize/1"
    assert counted["tokens"] == len(TINY.split()) + TINY.count("\n")
    assert counted["characters"] == len(TINY)
    assert counted["vocab_size"] == 5
    assert counted["oov"] == unknown
    assert counted["oov_rate"] == pytest.approx(unknown / counted["tokens"])
    assert counted["coverage"] == pytest.approx(1 - unknown / counted["tokens"])


def test_the_text_form_names_coverage_and_the_first_words(lmtrain, tmp_path):
    (tmp_path / "corpus.txt").write_text(TINY)

    outcome = lmtrain("tokenize", "corpus.txt")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert "100.00 %" in outcome.stdout
    assert "start of the vocabulary: <UNK> <EOS> the sat cat" in outcome.stdout


@pytest.mark.parametrize("level", ["char", "byte"])
def test_every_script_becomes_tokens(lmtrain, parsed, tmp_path, level):
    (tmp_path / "corpus.txt").write_bytes(UNICODE.encode())

    outcome = lmtrain("tokenize", "corpus.txt", "--level", level, "--json")

    assert outcome.returncode == 0
    counted = parsed(outcome.stdout)
    text = UNICODE.replace("\r\n", "\n")
    assert counted["tokens"] == len(text if level == "char" else text.encode())
    assert counted["vocab_size"] == (1 + len(set(text)) if level == "char" else 256)
    assert counted["oov"] == 0


def test_globs_gzip_and_standard_input_are_the_same_text(lmtrain, parsed, tmp_path):
    (tmp_path / "one.txt").write_text(TINY[:100])
    (tmp_path / "two.txt").write_text(TINY[100:])
    (tmp_path / "both.gz").write_bytes(gzip.compress((TINY[:100] + "\n" + TINY[100:]).encode()))

    glob = lmtrain("tokenize", "*.txt", "--json")
    zipped = lmtrain("tokenize", "both.gz", "--json")
    piped = lmtrain("tokenize", "-", "--json", stdin=TINY[:100] + "\n" + TINY[100:])

    counts = [parsed(outcome.stdout) for outcome in (glob, zipped, piped)]
    assert [each.pop("corpus") for each in counts] == ["*.txt", "both.gz", "-"]
    assert counts[0] == counts[1] == counts[2]


def test_standard_input_leaves_no_file_behind(fresh_lmtrain, tmp_path):
    outcome = fresh_lmtrain("tokenize", "-", stdin=TINY, TMPDIR=str(tmp_path))

    assert outcome.returncode == 0
    assert not list(tmp_path.iterdir())


def test_torch_is_not_waited_for(fresh_lmtrain, tmp_path):
    (tmp_path / "corpus.txt").write_text(TINY)

    outcome = fresh_lmtrain("tokenize", "corpus.txt", python=("-X", "importtime"))

    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "lmtrain.data.tokenizer" in imported
    assert "torch" not in imported


def test_a_run_asks_which_text_and_keeps_its_tokenizer(word_model, lmtrain, assert_refused):
    outcome = lmtrain("tokenize", word_model.run)
    changed = lmtrain("tokenize", word_model.run, "text", "--level", "char")

    assert_refused(outcome, 4, "is a run, and no text is given", "try: lmtrain tokenize")
    assert_refused(changed, 2, "is a run", "data.level")
