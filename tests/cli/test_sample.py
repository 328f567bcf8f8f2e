"""`lmtrain sample`: novel text from a run."""

from corpora import TINY


def test_the_seed_decides_the_texts(word_model, lmtrain, parsed_lines):
    words = ("sample", word_model.run, "--num", "3", "--json")

    first = lmtrain(*words, "--seed", "5")
    again = lmtrain(*words, "--seed", "5")
    other = lmtrain(*words, "--seed", "6")

    assert [first.returncode, first.stderr] == [0, ""]
    entries = parsed_lines(first.stdout)
    assert [entry["schema"] for entry in entries] == ["lmtrain.sample/1"] * 3
    assert [entry["index"] for entry in entries] == [0, 1, 2]
    assert len({entry["text"] for entry in entries}) > 1
    assert again.stdout == first.stdout
    assert other.stdout != first.stdout


def test_a_text_begins_with_its_prompt_and_ends_with_its_sentence(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("sample", word_model.run, "--prompt", "the dog", "--max-tokens", "500")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert outcome.stdout.startswith("the dog ")
    assert outcome.stdout.count("\n") == 1
    known = {"the", "cat", "dog", "sat", "on", "mat", "log", "a", "and"}
    assert set(outcome.stdout.split()) <= known


def test_a_character_model_writes_as_many_characters_as_asked(char_model, lmtrain):
    outcome = lmtrain("sample", char_model.run, "--prompt", "the c", "--max-tokens", "60", "-n", 2)

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    texts = outcome.stdout.removesuffix("\n").split("\n---\n")
    assert [text.startswith("the c") for text in texts] == [True, True]
    assert [len(text) for text in texts] == [len("the c") + 60] * 2


def test_a_reader_that_leaves_is_no_error(char_model, start):
    process = start("sample", char_model.run, "--max-tokens", "2000")
    assert process.stdout is not None

    begin = process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    stderr = process.stderr.read()
    process.wait(timeout=60)

    assert begin.endswith("\n")
    assert not stderr
    assert process.returncode != 1


def test_a_prompt_with_a_character_the_model_does_not_know_is_continued(char_model, lmtrain):
    outcome = lmtrain("sample", char_model.run, "--prompt", "the Qœœ", "--max-tokens", "300")

    assert outcome.returncode == 0
    assert outcome.stdout.startswith("the Qœœ")
    assert set(outcome.stdout.removeprefix("the Qœœ")) <= set(TINY)
    assert outcome.stderr == "not in the vocabulary of the model: Q, œ\n"


def test_impossible_draws_are_refused(word_model, lmtrain, assert_refused):
    outcome = lmtrain("sample", word_model.run, "--top-p", "1.5")

    assert_refused(outcome, 2, "top_p 1.5 is not above 0 and at most 1")


def test_greedy_texts_are_all_alike(word_model, lmtrain):
    words = ("sample", word_model.run, "--temperature", "0", "-n", "2", "--max-tokens", "20")

    outcome, other = lmtrain(*words), lmtrain(*words, "--seed", "7")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    first, second = outcome.stdout.splitlines()
    assert first == second != ""
    assert other.stdout == outcome.stdout
    assert "<UNK>" not in outcome.stdout


def test_a_text_ends_before_a_stop_string_also_while_it_is_streamed(char_model, lmtrain):
    words = ("sample", char_model.run, "--prompt", "the ", "--max-tokens", "80")
    whole = lmtrain(*words).stdout

    stopped = lmtrain(*words, "--stop", "never there", "--stop", whole[20:23])

    assert [stopped.returncode, stopped.stderr] == [0, ""]
    assert stopped.stdout == whole[: 4 + whole[4:].index(whole[20:23])] + "\n"


def test_an_empty_stop_string_is_refused(char_model, lmtrain, assert_refused):
    outcome = lmtrain("sample", char_model.run, "--stop", "")

    assert_refused(outcome, 2, "an empty string would end every text")


def test_a_prompt_comes_from_a_file_or_standard_input(char_model, lmtrain, tmp_path):
    (tmp_path / "prompt.txt").write_text("the c\n")
    words = ("sample", char_model.run, "--max-tokens", "30")

    typed = lmtrain(*words, "--prompt", "the c")
    read = lmtrain(*words, "--prompt-file", "prompt.txt")
    piped = lmtrain(*words, "--prompt-file", "-", stdin="the c")

    assert typed.stdout == read.stdout == piped.stdout
    assert [read.returncode, read.stderr] == [0, ""]


def test_a_prompt_file_that_cannot_be_used_is_refused(
    char_model, lmtrain, assert_refused, tmp_path
):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    words = ("sample", char_model.run, "--prompt-file")

    assert_refused(lmtrain(*words, "latin.txt"), 3, "latin.txt is not UTF-8: line 1")
    assert_refused(lmtrain(*words, "empty.txt"), 3, "empty.txt is empty")
    assert_refused(lmtrain(*words, "missing.txt"), 3, "no text file missing.txt")
    assert_refused(
        lmtrain(*words, "empty.txt", "--prompt", "a"), 2, "--prompt cannot be combined with"
    )


def test_a_prompt_is_printed_as_it_was_typed_and_unknown_words_are_named(word_model, lmtrain):
    prompt = "the  Zebra saw one two three four five six,"

    outcome = lmtrain("sample", word_model.run, "--prompt", prompt)

    assert outcome.returncode == 0
    assert outcome.stdout.startswith(f"{prompt} ")
    assert (
        outcome.stderr
        == "not in the vocabulary of the model: Zebra, saw, one, two, three and 4 more\n"
    )
