"""How much of anything that people or strangers bring is read: the one place of these numbers.

Each is far above what exists and far below what fills a machine. A reader that meets more raises an error of ditkit's
that names the file or the host; it never reads on. Leaves out: what a host allows its clients (``placement/http``
takes the numbers that its owner gives), how numbers are checked (each reader)."""

TEXT = 32 << 20  # bytes of JSON, TOML or plain text: the largest in use, a tokenizer of 256,000 words, has 17 MB
DEPTH = 64  # tables and lists within each other; a config of a nested model has 6
DIGITS = 400  # of a number that is written out: no float has more, no integer that is used has 20
WORDS = 1 << 20  # characters of one prompt, and of one value of a setting
MESSAGE = 2000  # characters of an error's sentence: what a file claims may be long
