"""One component opened: a file or a folder in any layout, of which only headers and configs are read; or the settings
of one without weights.

Our own code does what schedulers, image processors and tokenizers do, so only what it needs is read of their configs:
the shift, how pictures are prepared. Keys that nobody knows are noted, as in ``kinds/configs.py``. Leaves out: which
parts a model has (find.py), and building modules.
Sources of the names: diffusers ``schedulers/``, transformers ``CLIPImageProcessor`` and ``PreTrainedTokenizerFast``."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.files.text import read_json, readable, some
from ditkit.checkpoints.kinds.configs import ConfigKeys, Rules, check_quantization, is_number
from ditkit.checkpoints.kinds.detect import Detected, networks, recognise
from ditkit.checkpoints.kinds.kind import KINDS, Kind, kind_of_config, kinds_of, side_of
from ditkit.checkpoints.model.part import Part, component_names
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError, check_known
from ditkit.reading import file_at

OF_ANOTHER = "its tensors are those of"


def open_part(
    path: str | Path, component: str | None = None, variant: str | None = None, *, entry: str | None = None,
    allow: Rules = (),
) -> Part:  # fmt: skip
    """The component in ``path``, a file of weights or a folder with one set of them (or with a tokenizer).

    ``component``: what it must be; None takes what is found. ``variant`` and ``entry`` as for ``open_source``. A
    ``config.json`` beside the weights is used when it is theirs; in a folder of their own another one is an error.
    Raises LoadError."""
    path = Path(os.path.expanduser(path))
    with readable(f"opening {path}"):
        return opened(path, component, variant, entry, allow)


def opened(
    path: Path, component: str | None, variant: str | None = None, entry: str | None = None, rules: Rules = ()
) -> Part:
    """``open_part`` within a look at a whole model."""
    if component == "tokenizer":
        return open_tokenizer(path, rules)
    found, _ = opened_all(path, component, variant, entry, rules)
    if len(found) > 1:
        asked = f"opening {path}" + (f" as {component}" if component else "")
        prefixes = [part.detected.prefix for part in found if part.detected]
        told, do = some(prefixes), f"Name one of them by its prefix, such as {path.name}#{prefixes[0][:-1]}"
        raise LoadError(asked, f"it holds {len(found)} networks of that kind, whose names begin with {told}", do)
    return found[0]


def opened_all(
    path: Path, component: str | None, variant: str | None = None, entry: str | None = None, rules: Rules = ()
) -> tuple[list[Part], dict[str, str]]:
    """Every network in ``path`` that may be ``component``, nearly always one; and of those that stand beside it under
    another prefix and cannot be opened, why. Raises LoadError where there is none."""
    if component is not None:
        asked = f"opening {path} as {component!r}"
        check_known(component, component_names(), asked, "there is no such component", LoadError)
    from ditkit.checkpoints.files.opening import open_source  # not before a file is opened

    source = open_source(path, variant, entry)
    found = networks(source)
    if len(found) == 1:
        return [_opened(path, found[0], component, rules)], {}
    parts, faults = list[Part](), dict[str, LoadError]()
    for one in found:
        try:
            parts.append(_opened(path, one, component, rules))
        except LoadError as error:
            faults[f"{path.name}#{one.prefix[:-1]}"] = error
    if not parts:  # one that is of the kind and damaged tells more than one of another kind
        raise min(faults.values(), key=lambda error: error.found.startswith(OF_ANOTHER))
    return parts, {name: error.found for name, error in faults.items()}


def _opened(path: Path, source: TensorSource, component: str | None, rules: Rules) -> Part:
    file = (path if os.path.isdir(path) else source.path.parent) / "config.json"
    said = read_json(file) if file_at(file, f"opening {source.path} with its config") else None
    asked = f"opening {source.path}" + (f" as {component}" if component else "")
    detected, view = recognise(source)
    if detected.kind not in KINDS or not KINDS[detected.kind].components:
        found = detected.problems[0] if detected.problems else f"it is a {detected.kind}"
        raise LoadError(asked, found, "Give a model's part")
    row = KINDS[detected.kind]
    if component is not None and component not in row.components:
        names = " or ".join(kind.name for kind in kinds_of(component))
        raise LoadError(asked, f"{OF_ANOTHER} {row.name}", f"Give {names}")
    if detected.problems:
        raise LoadError(asked, detected.problems[0], "Use a model of a supported kind")
    belongs, notes = kind_of_config(said or {}), list[str]()
    if said is None or (not os.path.isdir(path) and (belongs is None or belongs[0] != row.name)):
        config = row.read_config(detected.layout, None, view.tensors)
    else:
        try:
            config = _config(row, detected, view, said, rules, notes)
        except LoadError as error:
            raise LoadError(f"{error.asked} ({file})", error.found, error.do) from None
    if (unsaid := sorted(row.unsaid.keys() - config.keys())) and belongs is None:
        notes.insert(0, f"no config says {' and '.join(unsaid)}; the official ones are taken")
    named, side = view, side_of(detected.layout)
    if row.keys is not None and (side, row.own) != ("native", "native"):  # what the table does not know keeps its name
        named = Mapped(view, row.keys(config), row.own, of=side)
    return Part(
        component or row.components[0], row.name, source.path, MappingProxyType(config), named, detected.layout,
        detected.quantization, detected, (*view.notes, *notes),
    )  # fmt: skip


def _config(
    row: Kind, found: Detected, view: TensorSource, said: Mapping[str, Any], rules: Rules, notes: list[str]
) -> dict[str, Any]:
    """The fields from a config that has to be that of these weights."""
    layout, tensors, belongs = found.layout, view.tensors, kind_of_config(said)
    if belongs is None or belongs[0] != row.name:
        name = said.get("_class_name", said.get("model_type"))
        asked = f"reading the config of {row.name} weights in the {layout} layout"
        wrong = f"it is of {name!r}" if name else "it says no class"
        raise LoadError(asked, wrong, "Use the config.json of these weights")
    if said.get("quantization_config") is not None and found.quantization:
        check_quantization(said["quantization_config"], found.quantization, f"reading the config of {row.noun}")
        said = {key: value for key, value in said.items() if key != "quantization_config"}
    if belongs[1] != layout and row.keys:  # native weights, the other's config
        layout = belongs[1]
        tensors = Mapped(view, row.keys(row.sizes(tensors, found.layout).guess), side_of(layout)).tensors
    return row.read_config(layout, said, tensors, rules, notes)


def open_tokenizer(folder: Path, rules: Rules) -> Part:
    """Raises LoadError when there is no ``tokenizer.json``."""
    folder = folder.parent if folder.name == "tokenizer.json" else folder
    asked = f"opening the tokenizer in {folder}"
    if not file_at(folder / "tokenizer.json", asked):
        only = "it has only spiece.model and no tokenizer.json"
        found = only if os.path.isfile(folder / "spiece.model") else "there is no tokenizer.json"
        raise LoadError(asked, found, KINDS["tokenizer"].get)
    notes: list[str] = []
    if file_at(file := folder / "tokenizer_config.json", asked):  # the vocabulary decides what a tokenizer does
        keys = _keys(file, TOKENIZER, rules, notes)
        keys.only("do_lower_case", None, False)
        end = keys.any("eos_token", None)
        if (end.get("content") if isinstance(end, dict) else end) not in (None, "</s>"):
            raise keys.error(f"its eos_token is {end!r}, and the texts of Wan end with '</s>'")
        keys.done(file.name)
    return Part("tokenizer", "tokenizer", folder, MappingProxyType({}), None, "tokenizers", notes=tuple(notes))


SCHEDULER = """
    algorithm_type base_image_seq_len base_shift beta_end beta_schedule beta_start disable_corrector
    dynamic_thresholding_ratio euler_at_final final_sigmas_type invert_sigmas lambda_min_clipped lower_order_final
    max_image_seq_len max_shift num_train_timesteps predict_x0 rescale_betas_zero_snr sample_max_value scale_factors
    shift_terminal sigma_max sigma_min solver_order solver_p solver_type steps_offset stochastic_sampling
    thresholding time_shift_type timestep_spacing trained_betas upscale_mode use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas variance_type
"""  # the request says how sigmas and steps are made; only the shift is taken from here
PROCESSOR = """
    crop_size data_format default_to_square device disable_grouping do_center_crop do_convert_rgb do_normalize
    do_pad do_rescale do_resize feature_extractor_type image_mean image_processor_type image_std input_data_format
    pad_size processor_class resample rescale_factor return_tensors size size_divisor
"""
TOKENIZER = """
    added_tokens_decoder additional_special_tokens add_bos_token add_eos_token add_prefix_space backend bos_token
    clean_up_tokenization_spaces cls_token extra_ids extra_special_tokens from_slow is_local legacy local_files_only
    mask_token max_length model_input_names model_max_length model_specific_special_tokens name_or_path
    pad_to_multiple_of pad_token pad_token_type_id padding_side processor_class sep_token sp_model_kwargs
    spaces_between_special_tokens special_tokens_map_file split_special_tokens stride tokenizer_class tokenizer_file
    truncation_side truncation_strategy unk_token
"""


def flow_shift(folder: Path, rules: Rules, notes: list[str]) -> float | None:
    """The shift in a scheduler's folder, which is the default of the diffusers convention. Raises LoadError."""
    keys = _keys(folder / "scheduler_config.json", SCHEDULER, rules, notes)
    keys.only("prediction_type", "flow_prediction")
    shift, other = keys.any("flow_shift", None), keys.any("shift", None)
    shift = other if shift is None else shift
    if shift is not None and not (is_number(shift) and shift > 0):
        raise keys.error(f"its shift is {shift!r}, not a finite number above 0", "Correct it, or set it to null")
    keys.done("scheduler_config.json")
    return None if shift is None else float(shift)


def processor_config(folder: Path, rules: Rules, notes: list[str]) -> Mapping[str, Any]:
    """How the folder of an image processor prepares pictures; ``models/encoders.py`` holds it against its own way."""
    keys = _keys(folder / "preprocessor_config.json", PROCESSOR, rules, notes)
    keys.done("preprocessor_config.json")
    return keys.config


def _keys(file: Path, known: str, rules: Rules, notes: list[str]) -> ConfigKeys:
    keys = ConfigKeys(read_json(file), f"reading {file}", rules, notes)
    keys.ignore(known.split())
    return keys
