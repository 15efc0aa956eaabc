"""Which keys of a config.json are read, which change nothing here, and which settings are refused by name."""

from typing import Any

from taskgraph.models.documents import words
from taskgraph.models.families import ModelFamily
from taskgraph.models.keys import ConfigKeys
from taskgraph.models.stretch import neutral, number_is

_READ = words(
    "architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size rms_norm_eps max_position_embeddings tie_word_embeddings rope_theta "
    "rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers layer_types "
    "query_pre_attn_scalar attention_multiplier"
)
_HARMLESS = words(
    # what the model is called, and how it was saved or trained
    "auto_map transformers_version torch_dtype dtype tokenizer_class finetuning_task task_specific_params id2label "
    "label2id problem_type initializer_range initializer_factor init_std attention_dropout hidden_dropout "
    "attn_pdrop resid_pdrop embd_pdrop dropout classifier_dropout router_aux_loss_coef aux_loss_alpha seq_aux "
    "router_jitter_noise output_router_logits router_z_loss_coef gradient_checkpointing pretraining_tp ep_size "
    "num_nextn_predict_layers transformers.js_config is_llama_config license language datasets base_model "
    "tf_legacy_loss torchscript use_bfloat16 pruned_heads max_sequence_length model_max_length seq_length "
    # how it is called, which the caller decides
    "use_cache return_dict return_dict_in_generate output_attentions output_hidden_states output_scores "
    "attn_implementation use_flash_attention_2 flash_attention use_flash_attn chunk_size_feed_forward "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    # tokens, which the tokenizer reads, and how to sample
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix do_sample temperature top_k top_p "
    "typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams "
    "num_beam_groups diversity_penalty num_return_sequences early_stopping max_length min_length max_new_tokens "
    "bad_words_ids"
)
_UNCHANGED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "activation_function": ("silu",),
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "no_bias": (True,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "rope_ratio": (1, 1.0),
    "use_mrope": (False,),
    "mrope_section": (),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "scale_emb": (1, 1.0),
    "scale_depth": (1, 1.0),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "alibi": (False,),
    "use_parallel_residual": (False,),
    "parallel_residual": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "attention_sink_size": (0,),
    "attention_chunk_size": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "n_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "moe_intermediate_size": (),
    "qkv_bias": (),
    "quantization_config": (),
    "quantization": (),
    "compression_config": (),
}
"""Settings that are honoured with these values only (and when they are null): with others they change arithmetic."""


def check_keys(keys: ConfigKeys, family: ModelFamily) -> None:
    """ConfigError for a key that is neither read for this family nor known to be harmless, and for a setting that
    changes arithmetic in a way that the graphs do not have."""
    read = _READ | family.reads
    for key, value in keys.keys.items():
        if value is None or key in read or key in _HARMLESS or key.startswith(("_", "unsloth")):
            continue
        if key == "qkv_bias":
            keys.need(value is family.qkv_bias, key, f"the family {family.name} has none other")
        elif key in _UNCHANGED:
            allowed = " or ".join(map(repr, _UNCHANGED[key])) or "null"
            keys.need(neutral(value, *_UNCHANGED[key]), key, f"only {allowed} is supported")
        else:
            raise keys.wrong(
                key,
                "this version does not know the key, which may change the arithmetic: remove it if it does not, "
                "or use a supported model",
            )
    for key, value in family.only:
        keys.need(keys.keys.get(key, value) == value, key, f"this version knows {value}")
    _check_window(keys, family)


def _check_window(keys: ConfigKeys, family: ModelFamily) -> None:
    """Attention within a window is not supported; a window as wide as the context is none."""
    kinds = keys.keys.get("layer_types")
    good = kinds is None or (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds))
    keys.need(good, "layer_types", "it must be a list of names")
    window, layers = keys.keys.get("sliding_window"), keys.count("num_hidden_layers")
    wide = not window or keys.count("sliding_window") >= keys.count("max_position_embeddings", 2048)
    for kind in kinds or ():
        known = kind == "full_attention" or (kind == "sliding_attention" and bool(window) and wide)
        keys.need(known, "layer_types", "only full attention is supported")
    if family.window_switch:
        slides = keys.flag("use_sliding_window") and kinds is None and layers > _full_layers(keys)
    else:
        slides = kinds is None
    if slides and not wide:
        raise keys.wrong("sliding_window", "attention within a window is not supported")


def _full_layers(keys: ConfigKeys) -> int:
    """How many layers come before the first that slides, by the rule of Qwen's configs."""
    value = keys.keys.get("max_window_layers")
    return 0 if value == 0 else keys.count("max_window_layers", 28)


def check_scale(keys: ConfigKeys, head_dim: int) -> None:
    """ConfigError for scores that are scaled by anything but the usual 1 / sqrt(head_dim)."""
    good = number_is(keys.keys.get("query_pre_attn_scalar"), head_dim)
    keys.need(good, "query_pre_attn_scalar", f"scores are scaled by the head size, {head_dim}, only")
    good = number_is(keys.keys.get("attention_multiplier"), head_dim**-0.5)
    keys.need(good, "attention_multiplier", f"scores are multiplied by 1 / sqrt({head_dim}) only")
