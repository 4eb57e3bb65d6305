"""How much of anything that people or strangers bring is read: the one place of these numbers.

Each is far above what exists and far below what fills a machine. A reader that meets more raises an error of ditkit's
that names the file or the host; it never reads on. Leaves out: what a host allows its clients (``placement/http``
takes the numbers that its owner gives), how numbers are checked (each reader)."""

TEXT = 32 << 20  # bytes of JSON, TOML or plain text: the largest in use, a tokenizer of 256,000 words, has 17 MB
DEPTH = 64  # tables and lists within each other; a config of a nested model has 6
DIGITS = 400  # of a number that is written out: no float has more, no integer that is used has 20
WORDS = 1 << 20  # characters of one prompt, and of one value of a setting
VALUE = 200  # characters of a value that an error repeats
MESSAGE = 2000  # characters of an error's sentence: what a file claims may be long

PICTURE = 1 << 27  # pixels of a picture: a phone makes 108 million, and 8 bytes of each are held for a moment
PICTURE_THRICE = 48 << 20  # of a webp or avif, whose decoders hold it several times
PICTURE_WHOLE = 89_478_485  # pixels of a picture that is read as it is (Pillow's own limit); a larger one is halved
PICTURE_FILE = 1 << 28  # bytes of a PNG whose texts and profile have to be left out
FRAME = 1 << 25  # pixels of a frame of a video: 7680 x 4320
FRAMES = 1 << 16  # of a video: half an hour at 30 a second; their times are held, not they
COUNTED = 1 << 20  # bytes of a moving picture whose frames are counted only to say how many they are
CLIP = 3 << 28  # bytes of frames that any file may unpack to: 129 of 1920 x 1080
CLIP_MOST = 1 << 31  # bytes of frames that a larger file may unpack to, up to CLIP_RATIO times its own: 86 of 4K
CLIP_RATIO = 512  # video that shows something is some 10 to 200 times smaller than its frames
