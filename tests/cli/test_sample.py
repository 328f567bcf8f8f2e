"""`lmtrain sample`: novel text from a run."""


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


def test_a_text_begins_with_its_prompt_and_ends_with_its_sentence(word_model, lmtrain):
    outcome = lmtrain("sample", word_model.run, "--prompt", "the dog", "--max-tokens", "500")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert outcome.stdout.startswith("the dog ")
    assert outcome.stdout.count("\n") == 1
    known = {"the", "cat", "dog", "sat", "on", "mat", "log", "a", "and"}
    assert set(outcome.stdout.split()) <= known


def test_a_character_model_writes_as_many_characters_as_asked(char_model, lmtrain):
    outcome = lmtrain("sample", char_model.run, "--prompt", "the c", "--max-tokens", "60", "-n", 2)

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert outcome.stdout.startswith("the c")
    assert len(outcome.stdout) == 2 * (len("the c") + 60 + len("\n"))


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
    assert outcome.stderr == (
        "warning: the prompt has 3 characters that are not in the vocabulary and count as <UNK>: "
        "'œ' 2, 'Q' 1\n"
    )


def test_impossible_draws_are_refused(word_model, lmtrain, assert_refused):
    outcome = lmtrain("sample", word_model.run, "--top-p", "1.5")

    assert_refused(outcome, 2, "top_p 1.5 is not above 0 and at most 1")
