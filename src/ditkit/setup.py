"""Setup: how to make it. Nothing in here changes what is asked for, only with what and where it is computed."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import field_validator

from ditkit import addresses
from ditkit.errors import SetupError, needed
from ditkit.registry import PlugSpec
from ditkit.request import Float, Settings, default, one_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
COMPONENTS = ("text_encoder", "image_encoder", "transformer", "transformer_2", "vae", "preview_decoder",
              "prompt_expander")  # fmt: skip
BACKENDS = ("torch", "mlx", "mlx-8bit", "mlx-4bit")
PARTS = (*(name for name in COMPONENTS if name != "prompt_expander"), "tokenizer")
Component = Annotated[str, one_of(COMPONENTS, "component")]
Part = Annotated[str, one_of(PARTS, "part")]
Dtype = Annotated[str, one_of(DTYPES, "dtype")]
Backend = Annotated[str, one_of(BACKENDS, "backend")]


class Setup(Settings):
    """Model, devices, dtypes, kernels. ``devices`` and ``dtypes`` override single components by name."""

    # fmt: off
    model: str = default("shapes", "ditkit", "a model's name, folder, file or manifest, or hf:OWNER/NAME@REVISION")
    components: dict[Part, str] = default(
        {}, "none", "files or folders that take the place of the model's, such as {vae = 'taew2_1.safetensors'}")
    variant: str | None = default(None, "none", "which set of weights of a Diffusers folder, such as fp16")
    allow: list[str] = default(
        [], "none", "a list of named exceptions from strict loading, such as image_claim (see the guide on models)")
    strict_config: bool = default(
        False, "ditkit", "true to refuse configs with keys that are not known, instead of noting them")
    offline: bool = default(False, "ditkit", "true to use no network: what is not here is an error")
    loras: list[str] = default([], "none", "a list of LoRA files, each FILE, FILE:STRENGTH or EXPERT=FILE:STRENGTH")
    lora_mode: Literal["side", "fused"] = default(
        "side", "ditkit", "side to keep LoRAs beside the weights, fused to add them while loading")
    lora_allow: list[str] = default([], "none", "named rules for LoRA keys without a target, such as image_branch")
    device: str = default("auto", "ditkit", "auto, cpu, cuda, cuda:N or mps")
    devices: dict[Component, str] = default({}, "none", "devices of single components, such as {vae = 'cpu'}")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = default(
        "auto", "ditkit: bfloat16 on a GPU, float32 on a CPU", "auto, float32, bfloat16, float16 or float64")
    dtypes: dict[Component, Dtype] = default({}, "none", "dtypes of single components, such as {vae = 'float32'}")
    dtype_policy: Literal["wan", "diffusers", "float32"] = default(
        "wan", "Wan2.1 model.py", "wan, diffusers or float32: which tensors of the transformer stay wide")
    attention: str = default("sdpa", "PyTorch", "the name of an attention kernel, such as sdpa or dense")
    plugs: list[str] = default(
        [], "none", "a list of plugs and stages, each NAME, FILE.py, FILE.py:NAME or module:NAME, with :OPTION=VALUE")
    threads: int | None = default(None, "PyTorch's own choice", "a number of CPU threads, 1 or more", ge=1)
    vae_frames_per_chunk: int = default(1, "Wan2.1 vae.py", "latent frames that are decoded at once, 1 or more", ge=1)
    cache_text_kv: bool = default(True, "ditkit", "true to keep each block's text keys and values during a run")
    backends: dict[Component, Backend] = default(
        {}, "none", "what computes single components, such as {text_encoder = 'mlx'}: torch, mlx, mlx-8bit or mlx-4bit")
    placement: dict[str, str] = default(
        {}, "none", "where stages run, such as {encode_text = 'http://mac.local:8700', denoise = 'process:cuda:1'}")
    expected_probes: dict[str, str] = default(
        {}, "none", "probe hashes that hosts have to show, by stage, as `ditkit doctor --placement` prints them")
    retries: int = default(2, "ditkit", "how often a stage is sent again to a host that was lost, 0 or more", ge=0)
    timeout: Float = default(60.0, "ditkit", "seconds without a sign of life after which a host counts as lost", gt=0)
    plain_http: bool = default(
        False, "ditkit", "true to send a token or key over http to another machine; anybody on the way can read it")
    cache: str | None = default(None, "none", "a folder for results of stages, or `default` for that of the user")
    cache_gigabytes: Float = default(20.0, "ditkit", "how large the cache may grow, in 10^9 bytes", gt=0)
    expander: str | None = default(
        None, "none", "what expands prompts: the URL of an OpenAI-compatible server, or transformers:FOLDER")
    expander_model: str | None = default(None, "the server's first one", "the name of the server's model")
    debug: bool = default(False, "ditkit", "true to check every field's dtype and shape on the way")
    # fmt: on

    @field_validator("expander")
    @classmethod
    def _expander(cls, value: str | None) -> str | None:
        if value is None:
            return value
        kind, _, rest = value.partition(":")
        if kind == "transformers" and rest:
            return value
        if kind.lower() not in ("http", "https") or not rest.strip("/"):
            raise ValueError("it is neither the URL of a server nor transformers:FOLDER")
        if addresses.parse(value).query:
            raise ValueError("it holds more than an address, such as http://127.0.0.1:8000/v1")
        return value

    @field_validator("plugs")
    @classmethod
    def _plugs(cls, value: list[str]) -> list[str]:
        try:
            return [str(PlugSpec.parse(text)) for text in value]
        except SetupError as e:
            raise ValueError(e.found) from None

    @field_validator("backends")
    @classmethod
    def _backends(cls, value: dict[str, str]) -> dict[str, str]:
        for name, backend in value.items():
            if backend != "torch" and name != "text_encoder":
                raise ValueError(f"{name} is computed by torch only; {backend} is for the text_encoder")
        return value

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return cls.parse(values, "setup", SetupError)

    def device_of(self, component: str) -> str:
        """The device of ``component``, with ``auto`` resolved to what this machine has for its backend."""
        asked, mlx = self.devices.get(component, self.device), self.backend_of(component) != "torch"
        available = _mlx_devices() if mlx else _torch_devices()
        if asked == "auto":
            return "cuda:0" if "cuda:0" in available else available[-1]
        if asked not in available:
            who = "MLX computes it on" if mlx else "this machine has"
            raise SetupError(f"device={asked!r} for {component}", f"{who} {', '.join(available)}", "Choose one of them")
        return "cuda:0" if asked == "cuda" else asked

    def backend_of(self, component: str) -> str:
        return self.backends.get(component, "torch")

    def dtype_of(self, component: str) -> str:
        """The dtype of ``component``. ``auto``: bfloat16 on a GPU and float32 on a CPU; VAE and image encoder are
        always float32, as in the official code (the VAE) and in diffusers' guides (both)."""
        asked = self.dtypes.get(component, self.dtype)
        if asked != "auto":
            return asked
        wide = component in ("vae", "image_encoder", "preview_decoder") or self.device_of(component) == "cpu"
        return "float32" if wide else "bfloat16"


def _torch_devices() -> list[str]:
    import torch

    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [*available, "mps"] if torch.backends.mps.is_available() else available


def _mlx_devices() -> list[str]:
    """What the installed MLX computes on: ``mps`` is its GPU on Apple silicon. Raises MissingDependency."""
    mx = needed("mlx.core", "computing the text_encoder with MLX", "mlx")
    if mx.metal.is_available():
        return ["cpu", "mps"]
    return ["cpu", "cuda", "cuda:0"] if mx.default_device().type == mx.gpu else ["cpu"]
