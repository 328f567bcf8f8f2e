"""`lmtrain sweep`: a ranked table, and the same again at once."""

from corpora import TINY

SPACE = """
search = {trials = 3, max_seconds = 100}
[fixed]
"data.train" = ["corpus.txt"]
"data.level" = "char"
"train.max_steps" = 5
"train.batch_size" = 4
"train.seq_len" = 8
[space]
"model.hidden_size" = {low = 3, high = 9, integer = true}
"""


def test_a_ranked_table_now_and_again(lmtrain, fresh_lmtrain, tmp_path, parsed):
    (tmp_path / "corpus.txt").write_text(TINY)
    (tmp_path / "space.toml").write_text(SPACE)

    first = fresh_lmtrain("sweep", "space.toml")
    again = lmtrain("sweep", "space.toml", "--json")

    assert first.returncode == again.returncode == 0
    head, *rows = [line.split() for line in first.stdout.splitlines()]
    assert head == ["trial", "perplexity", "seconds", "model.hidden_size"]
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    assert first.stderr.count("trial-00") == 3
    assert again.stderr == ""
    result = parsed(again.stdout)
    assert result["schema"] == "lmtrain.sweep/1"
    assert [trial["name"] for trial in result["trials"]] == [row[0] for row in rows]
    assert sorted(p.name for p in (tmp_path / "runs" / "sweep-space").glob("trial-*")) == sorted(
        row[0] for row in rows
    )
