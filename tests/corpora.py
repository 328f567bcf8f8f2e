"""Small texts that tests share."""

TINY = "the cat sat on the mat\nthe dog sat on the log\na cat and a dog sat\n" * 60
SENTENCES = "The apple and pear salad is fresh.\nThe pear and apple salad isn't.\n" * 80
UNICODE = "é 你好 🙂 नमस्ते\r\nnaïve café\n"
LABELLED = "animal\tthe cat\ncolour\tred\nanimal\ta dog\ncolour\tthe blue one\n"
