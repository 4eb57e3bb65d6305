"""Configs of components without weights, and the index: what is read of them, what has no effect here, what is unknown.

Our own code does what these components do, so only what it needs is read: the scheduler's shift, how pictures are
prepared. The vocabulary decides what a tokenizer does. Keys that nobody knows are noted, as in ``kinds/configs.py``.
Sources of the names: diffusers ``schedulers/``, transformers ``CLIPImageProcessor`` and ``PreTrainedTokenizerFast``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.configs import ConfigKeys, is_number

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


def flow_shift(folder: Path, rules: Collection[str], notes: list[str]) -> float | None:
    """The shift in a scheduler's folder, which is the default of the diffusers convention. Raises LoadError."""
    keys = _keys(folder / "scheduler_config.json", SCHEDULER, rules, notes)
    keys.only("prediction_type", "flow_prediction")
    shift, other = keys.any("flow_shift", None), keys.any("shift", None)
    shift = other if shift is None else shift
    if shift is not None and not (is_number(shift) and shift > 0):
        raise keys.error(f"its shift is {shift!r}, not a finite number above 0", "Correct it, or set it to null")
    keys.done("scheduler_config.json")
    return None if shift is None else float(shift)


def processor_config(folder: Path, rules: Collection[str], notes: list[str]) -> Mapping[str, Any]:
    """How the folder of an image processor prepares pictures; ``models/encoders.py`` holds it against its own way."""
    keys = _keys(folder / "preprocessor_config.json", PROCESSOR, rules, notes)
    keys.done("preprocessor_config.json")
    return keys.config


def check_tokenizer(folder: Path, rules: Collection[str], notes: list[str]) -> None:
    """``tokenizer_config.json`` beside the vocabulary, where there is one. Raises LoadError."""
    file = folder / "tokenizer_config.json"
    if file.is_file():
        keys = _keys(file, TOKENIZER, rules, notes)
        keys.only("do_lower_case", None, False)
        end = keys.any("eos_token", None)
        if (end.get("content") if isinstance(end, dict) else end) not in (None, "</s>"):
            raise keys.error(f"its eos_token is {end!r}, and the texts of Wan end with '</s>'")
        keys.done(file.name)


def _keys(file: Path, known: str, rules: Collection[str], notes: list[str]) -> ConfigKeys:
    keys = ConfigKeys(read_json(file), f"reading {file}", rules, notes)
    keys.ignore(known.split())
    return keys
