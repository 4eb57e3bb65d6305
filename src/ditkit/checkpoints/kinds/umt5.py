"""The UMT5 text encoder, in Wan's own layout and in that of transformers, and the tokenizer that goes with it.

Sources: Wan2.1 ``wan/modules/t5.py``; transformers ``modeling_umt5.py``, ``UMT5Config``."""

from typing import Any

from ditkit.checkpoints.kinds.configs import EPSILON, ConfigFormat, ConfigKeys, Key, same
from ditkit.checkpoints.kinds.kind import Kind, Layout, Port
from ditkit.checkpoints.kinds.sizes import Fields, SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import KeyTable

UMT5_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""transformers' second name for the token embedding; a file may have either name or both."""
DECODER = ("decoder.", "lm_head.", "dec.", "output.")
"""The other half of a whole UMT5, in transformers' names and in those of GGUF; Wan uses the encoder alone."""
BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def umt5_keys(num_layers: int) -> KeyTable:
    """The UMT5 encoder: native <-> transformers ``UMT5EncoderModel``."""
    pairs = [("token_embedding.weight", "shared.weight"), ("norm.weight", "encoder.final_layer_norm.weight")]
    for n in range(num_layers):
        native, attention, feed = f"blocks.{n}", f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
        pairs += [
            (f"{native}.norm1.weight", f"{attention}.layer_norm.weight"),
            *((f"{native}.attn.{x}.weight", f"{attention}.SelfAttention.{x}.weight") for x in "qkvo"),
            (f"{native}.pos_embedding.embedding.weight", BIAS.format(n)),
            (f"{native}.norm2.weight", f"{feed}.layer_norm.weight"),
            (f"{native}.ffn.gate.0.weight", f"{feed}.DenseReluDense.wi_0.weight"),
            (f"{native}.ffn.fc1.weight", f"{feed}.DenseReluDense.wi_1.weight"),
            (f"{native}.ffn.fc2.weight", f"{feed}.DenseReluDense.wo.weight"),
        ]
    return KeyTable.of(pairs, aliases=UMT5_ALIASES, ignored_other=DECODER)


def umt5_sizes(tensors: Tensors, layout: str = "transformers") -> Sizes:
    """Fields of ``UMT5Config``. The greatest distance is not told; 128 is the only one in use."""
    read, native = SizeReader(tensors, layout, umt5_keys(1)), layout == "native"
    embedding, table = "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"
    if read.name(embedding) not in tensors and not native:
        embedding = "encoder.embed_tokens.weight"
    read.axis("vocab_size", embedding, 0, 2)
    read.axis("d_model", embedding, 1, 2)
    read.axis("relative_attention_num_buckets", table, 0, 2)
    heads = read.axis("num_heads", table, 1, 2)
    read.axis("d_kv", "blocks.0.attn.q.weight", 0, 2, heads)
    read.axis("d_ff", "blocks.0.ffn.gate.0.weight", 0, 2)
    read.count("num_layers", r"blocks\.(\d+)\." if native else r"encoder\.block\.(\d+)\.", "the names of the blocks")
    return read.sizes()


def _tell(layout: str, tensors: Tensors, sizes: Sizes) -> dict[str, Any]:
    if layout == "native" or sizes.fields["num_layers"] == 1 or BIAS.format(1) in tensors:
        return {}
    found = "it is a T5 with positions in its first block only, and Wan's is a UMT5 with its own in each"
    return {"problems": (found,)}


def _read_native(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    fields["d_kv"] = keys.take("dim_attn") // fields["num_heads"]
    keys.names["d_kv"] = "dim_attn / num_heads"


def _check(keys: ConfigKeys, fields: Fields) -> None:
    """Buckets beyond a quarter of them grow with the logarithm of the distance."""
    buckets, distance = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    found = f"a greatest distance of {distance!r:.20} for {buckets} buckets of positions"
    keys.require(distance > buckets // 4 > 0, found)


NATIVE = ConfigFormat(
    {
        "vocab_size": Key("vocab_size"), "dim": Key("d_model"), "dim_ffn": Key("d_ff"), "num_heads": Key("num_heads"),
        "num_layers": Key("num_layers"), "num_buckets": Key("relative_attention_num_buckets"),
        "max_distance": Key("relative_attention_max_distance"), "eps": Key("layer_norm_epsilon", 1e-6, EPSILON),
    },
    {"shared_pos": (False,)}, _read_native, ignored=("text_len", "dropout"),
)  # fmt: skip
TRANSFORMERS = ConfigFormat(
    same(vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
         relative_attention_num_buckets=32, relative_attention_max_distance=128)
    | same(EPSILON, layer_norm_epsilon=1e-6),
    {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",), "dense_act_fn": ("gelu_new",),
     "is_gated_act": (True,)},
    written={
        "architectures": ["UMT5EncoderModel"], "dropout_rate": 0.0, "is_encoder_decoder": True,
        "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    ignored=(
        "classifier_dropout", "dtype", "initializer_factor", "is_decoder", "num_decoder_layers", "output_past",
        "scalable_attention", "scale_decoder_outputs", "tokenizer_class", "torch_dtype", "transformers_version",
        "use_cache",
    ),
)  # fmt: skip
UMT5 = Kind(
    "umt5", "UMT5", "a UMT5 text encoder", ("text_encoder",),
    {
        "native": Layout((("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),), NATIVE,
                         ("umt5_encoder",), file="models_t5_umt5-xxl-enc-bf16", pickle=True),
        "transformers": Layout((("encoder.final_layer_norm.weight", BIAS.format(0)),), TRANSFORMERS,
                               model_types=("umt5",), file="model", library="transformers"),
    },
    umt5_sizes, lambda fields: umt5_keys(fields["num_layers"]), own="other", aliases=UMT5_ALIASES,
    config_class="ditkit.models.umt5:UMT5Config", module="ditkit.models.umt5:build_umt5",
    load="ditkit.assembly.loaders:load_umt5",
    get="Take models_t5_umt5-xxl-enc-bf16.pth of a native Wan repository or text_encoder/ of a -Diffusers one",
    tell=_tell, check=_check,
    unsaid={"layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128},
    ports=lambda config: {"width of the text": Port(config.d_model, "d_model")},
)  # fmt: skip
TOKENIZER = Kind(
    "tokenizer", "", "a tokenizer (tokenizer.json)", ("tokenizer",), load="ditkit.assembly.loaders:load_tokenizer",
    get="Take the folder google/umt5-xxl of a native Wan repository or tokenizer/ of a -Diffusers one",
)  # fmt: skip
