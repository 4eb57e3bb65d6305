"""How much of anything that people or strangers bring is read: the one place of these numbers.

Each is far above what exists and far below what fills a machine. A reader that meets more raises an error of ditkit's
that names the file or the host; it never reads on. Leaves out: what a host allows its clients (``placement/http``
takes the numbers that its owner gives), how numbers are checked (each reader)."""

TEXT = 32 << 20  # bytes of JSON, TOML or plain text: the largest in use, a tokenizer of 256,000 words, has 17 MB
DEPTH = 64  # tables and lists within each other; a config of a nested model has 6
VALUES = 1 << 22  # in one JSON text, which take up to 250 bytes each; a tokenizer of 256,000 words has 2 million
DIGITS = 400  # of a number that is written out: no float has more, no integer that is used has 20
WORDS = 1 << 20  # characters of one prompt, and of one value of a setting
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

# --- what goes over a network

HEAD = 64 << 10  # bytes of the head of a request or an answer; ours have under one thousand, with a job some more
PATIENCE = 20.0  # seconds in which the head of a request has to be complete
SLOWEST = 10_000  # bytes a second that a body has to come with, after PATIENCE; a telephone's line has ten times that
STALLED = 60.0  # seconds after which a client that takes nothing of its answer counts as gone
CONNECTIONS = 100  # that a host keeps for those it does not know; the oldest of them goes when one more comes
BACKLOG = 64  # connections that wait to be taken
ANSWER = 4 << 20  # bytes of an answer that is no stream: a model of a thousand files needs a twentieth of it
WORDS_OF_EVENT = 1 << 30  # bytes of a message that is no State: an event may hold frames
STATE_OF_HOST = 1 << 34  # bytes of a State in a message: a hundred clips of 480p
WAITING = 1 << 28  # bytes of messages that wait to be looked at, and
MESSAGES_WAITING = 256  # how many
MESSAGES = 1_000_000  # of one job; a run of a thousand steps with a chatty plug sends a tenth of it
AT_WORK = 21_600.0  # seconds in which a host has to tell more than that it is at work
COME_AGAIN = 300.0  # seconds that a host may ask a client to wait
RESTART = 60.0  # seconds that a client waits for a host that it has known to be there again

# --- what weights and their settings claim

NAME = 200  # characters of one name in a list of names
AXES = 16  # of one tensor; torch's own operations take no more than 64, and no weight here has more than 5
NUMBER = 2**63  # an axis, a place or a size is below it
HEADER = 16 << 20  # bytes before the data of a file of weights; 1,100 tensors take 0.2 MB
VOCABULARY = 32 << 20  # bytes before the data of a GGUF file; the largest in use, with 256,000 words, have 12 MB
PICKLE = 2 << 20  # bytes that say what a checkpoint of torch holds; 1,100 tensors and their optimizer take 0.5 MB
ENTRIES = 1 << 16  # tensors or fields of one file, dictionaries of one checkpoint
PATTERNS = 256  # of a LoRA's settings that are more than a name
SHARDS = 1 << 12  # files of one set of weights; the largest in use has some hundreds
