"""Settings: config files, the environment, flags, templates of prompts."""

from __future__ import annotations

from ditkit import config
from ditkit.cli.flags import RawSettings
from ditkit.prompting import templates
from ditkit.request import Request

from ..mutate import as_toml, lines_mutated, odd, put, tree_mutated
from ..watch import command

NAMED = ("file",)
HOWS = (
    *["file"] * 12,
    *["environment"] * 6,
    *["template"] * 6,
    *["sets"] * 5,
    *["typed"] * 5,
    "plan",
    "flags",
    "explain",
)
SOUND = {
    "prompt": "a red circle", "negative_prompt": "", "seed": [1, 2], "steps": 3, "guidance_scale": 4.0, "width": 32,
    "height": 32, "frames": 5, "scheduler": "unipc", "scheduler_options": {"order": 2}, "sigmas": [1.0, 0.5, 0.0],
    "device": "cpu", "devices": {"vae": "cpu"}, "dtypes": {"vae": "float32"}, "loras": ["a.safetensors:0.5"],
    "placement": {"encode_text": "process", "denoise@2": "here"}, "cache_gigabytes": 1, "retries": 1, "timeout": 3.0,
    "expander": "http://127.0.0.1:9/v1", "expected_probes": {"encode_text": "5d1c0a9be2f4"}, "plugs": [],
    "stage_settings": {"sharpness": {"amount": 3}}, "components": {}, "convention": "wan", "expand_template": "t2v-en",
    "image": "a.png", "reference_images": ["a.png"], "expand": "no", "batched": True,
}  # fmt: skip
KEYS = (*config.FIELDS, *config.OLD_NAMES, "nothing", "stage_settings.sharpness.amount", "devices.vae")
KEYS = tuple(key for key in KEYS if key not in ("cache", "debug"))  # one may lie anywhere, one shows tracebacks


def prepare(folder):
    global TEMPLATE
    TEMPLATE = next(iter(templates.packaged().values()))


def _text(rng) -> str:
    """A value as somebody types it."""
    value = odd(rng)
    text = as_toml({"a": value}).decode("utf-8", "surrogatepass") if not isinstance(value, dict) else "{ a = 1 }"
    if isinstance(value, str) and rng.random() < 0.5:
        return value
    return text.partition("=")[2].strip() if text.startswith('"a"') else text


def make(rng, folder) -> str:
    how = rng.choice(HOWS)
    if how in ("file", "plan"):
        if rng.random() < 0.7:
            some = {key: SOUND[key] for key in rng.sample(list(SOUND), 8)}
            if rng.random() < 0.3:
                some[rng.choice(KEYS)] = odd(rng)
            data = as_toml(tree_mutated(rng, some)[0])
        else:
            more = [f"{rng.choice(KEYS)} = {_text(rng)}"]
            data = lines_mutated(rng, as_toml(SOUND).decode(), more)[0]
        put(folder / "config.toml", data)
    elif how == "template":
        if rng.random() < 0.5:
            tree = {"name": "x", "version": 1, "language": "en", "pictures": ["image"], "instructions": "make {prompt}"}
            data = as_toml(tree_mutated(rng, tree)[0])
        else:
            data = lines_mutated(rng, TEMPLATE)[0]
        put(folder / "template.toml", data)
    else:
        pairs = [f"{rng.choice(KEYS)}={_text(rng)}" for _ in range(rng.choice((1, 1, 2)))]
        put(folder / "pairs", "\0\0".join(pairs).replace("\0\0", "\x01\x01"))
    return how


def _pairs(folder) -> list[str]:
    text = (folder / "pairs").read_bytes().decode("utf-8", "surrogatepass")
    return [pair.replace("\0", "").encode("utf-8", "replace").decode() for pair in text.split("\x01\x01")]


def run(folder, how):
    if how == "file":
        settled = config.settle(config.file_layer(folder / "config.toml"))
        settled.setup()
        settled.request().samples()
    elif how == "environment":
        names = (pair.partition("=") for pair in _pairs(folder))
        settled = config.settle(config.environment_layer({f"DITKIT_{k.upper()}": v for k, _, v in names}))
        settled.setup()
        settled.request().samples()
    elif how == "template":
        given = Request(prompt="a", expand_template=str(folder / "template.toml"))
        templates.chosen(templates.placed(given).expand_template, "a", ["image"])
    elif how == "plan":
        command("plan", "x", "--config", folder / "config.toml", "--model", "shapes")
    elif how in ("sets", "typed"):
        pairs = _pairs(folder)
        typed = {k: [v] for k, _, v in (pair.partition("=") for pair in pairs) if k in config.FIELDS}
        raw = RawSettings({}, pairs) if how == "sets" else RawSettings(typed)
        settled = config.settle(*raw.layers())
        settled.setup()
        settled.request().samples()
    elif how == "explain":
        command("config", "explain", "steps", *(word for pair in _pairs(folder) for word in ("--set", pair)))
    else:
        words = (pair.partition("=") for pair in _pairs(folder))
        command("plan", *(word for k, _, v in words for word in (f"--{k.replace('_', '-').partition('.')[0]}", v)))
