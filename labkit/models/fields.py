"""The fields of the published config files that our configs do not have, and how a field is read.

A field of theirs is either one that our config has, or one that must have the only value our modules implement (FIXED), or one
that must be off (OFF), or one that changes nothing in the numbers (IGNORED). Anything else is an error that names the field, so
that no checkpoint is ever run by the wrong network.
"""

from typing import Any

from labkit.errors import CheckpointError

# What our modules do, in diffusers' words; a field that is absent has the same value by default.
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "center_input_sample": False, "class_embeddings_concat": False, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "resnet_out_scale_factor": 1.0, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}  # fmt: skip
UNET_OFF = {
    "class_embed_type", "cross_attention_norm", "dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type", "mid_block_only_cross_attention",
    "num_class_embeds", "only_cross_attention", "resnet_skip_time_act", "reverse_transformer_layers_per_block", "time_cond_proj_dim",
    "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act",
}  # fmt: skip
UNET_IGNORED = {"dropout", "addition_embed_type_num_heads"}  # of training, of a part that is not there
VAE_FIXED = {"act_fn": "silu", "mid_block_add_attention": True, "use_post_quant_conv": True, "use_quant_conv": True}
VAE_OFF = {"latents_mean", "latents_std", "shift_factor"}
TEXT_FIXED = {"layer_norm_eps": 1e-5}
TEXT_OFF = {"use_attention_mask", "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "pruned_heads"}
TEXT_OFF |= {"tie_encoder_decoder", "quantization_config"}
TEXT_IGNORED = {  # of training, of what transformers returns, of tasks that are not ours
    "architectures", "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_factor", "initializer_range", "label2id", "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "problem_type", "projection_dim", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip
SCHEDULERS = {  # they differ in how they sample, not in the noise that was added in training
    f"{kind}Scheduler" for kind in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse",
        "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
        "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep",
    )
}  # fmt: skip
SCHEDULE_OFF = {"trained_betas", "thresholding", "use_flow_sigmas", "use_dynamic_shifting", "shift_terminal"}
SCHEDULE_IGNORED = {  # of the sampler, which is ours to choose
    "algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final", "noise_sampler_seed",
    "original_inference_steps", "predict_x0", "predictor_order", "sample_max_value", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order",
    "solver_p", "solver_type", "tau_func", "time_shift_type", "timestep_scaling", "timestep_type", "use_beta_sigmas", "use_exponential_sigmas",
    "use_karras_sigmas", "use_lu_lambdas", "variance_type",
}  # fmt: skip


def check_fields(raw: dict, kind: str, used: set[str], fixed: dict[str, Any], off: set[str], ignored: set[str]) -> None:
    """Raise unless every field is known, those with one possible value have it, and what we do not have is off."""
    if raw.get("_class_name", kind) != kind:
        raise CheckpointError(f"it describes a {raw['_class_name']}; labkit has a {kind}.")
    for field, value in raw.items():
        if field in fixed and value != fixed[field]:
            raise CheckpointError(f"{field} is {str(value)[:60]!r}; labkit's {kind} has {fixed[field]!r} only.")
        if field in off and value not in (None, False, {}, []):
            raise CheckpointError(f"{field} is {str(value)[:60]!r}; labkit's {kind} does not have that.")
    known = used | set(fixed) | off | ignored
    if unknown := [field for field in raw if not field.startswith("_") and field not in known]:
        names = ", ".join(f"{field} ({str(raw[field])[:40]!r})" for field in unknown[:5])
        raise CheckpointError(f"{names}: unknown to labkit's {kind}, and it may change the numbers, so it is not skipped.")


def integer(raw: dict, field: str, default: int, high: int = 10**6, low: int = 1) -> int:
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(f"{field} is {str(value)[:60]!r}; an integer from {low} to {high} is expected.")
    return value


def number(raw: dict, field: str, default: float) -> float:
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{field} is {str(value)[:60]!r}; a number is expected.")
    return float(value)


def truth(raw: dict, field: str, default: bool | None) -> bool | None:
    value = default if raw.get(field) is None else raw[field]
    if raw.get(field) is not None and not isinstance(value, bool):
        raise CheckpointError(f"{field} is {str(value)[:60]!r}; true or false is expected.")
    return value


def integers(raw: dict, field: str, default, n: int, high: int = 65536) -> tuple[int, ...]:
    """A field that is one integer for all resolutions or a list with one for each."""
    value = default if raw.get(field) is None else raw[field]
    values = [value] * n if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    if len(values) != n or n > 8:
        raise CheckpointError(f"{field} is {str(value)[:60]}; {min(n, 8)} integers are expected, one for each resolution (eight at most).")
    return tuple(integer({field: v}, field, 0, high) for v in values)
