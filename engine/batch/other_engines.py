"""Names that other engines give to settings, and what to write here instead.

A line whose setting has another engine's name would run without it, silently. Names
are compared by `letters`: maxOutputTokens is max_output_tokens. Left out are names that are as
likely a column of the user's data (documents, details, priority, grammar).

Sources: the request parameters in the documentation of vLLM, SGLang, TensorRT-LLM, Text Generation
Inference, transformers' GenerationConfig, llama.cpp, Ollama, lm-evaluation-harness, and the APIs of
Anthropic, Cohere, Google, Mistral and Amazon Bedrock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# Our name <- theirs.
_RENAMED = {
    "max_new_tokens": """
        max_length max_len max_tokens_to_sample max_tokens_to_generate max_output_tokens max_gen_len
        max_gen_toks max_generated_tokens max_out_len max_output_len max_response_tokens
        max_decode_steps n_predict num_predict request_output_len output_len num_new_tokens
    """,
    "stop": """
        stop_sequences stop_sequence stop_words stop_word stop_words_list stop_strings stop_string
        stop_str stop_strs stop_list stop_texts stop_phrases end_sequences until
    """,
    "stop_token_ids": """
        stop_tokens stop_token stop_token_id stop_ids eos_token_id eos_token_ids eos_id end_id
        end_token_id stop_token_id_list
    """,
    "n": "num_return_sequences",
    "seed": "random_seed rng_seed sampling_seed seed_value manual_seed",
    "temperature": "temp sampling_temperature",
    "top_p": "top_prob nucleus_p runtime_top_p nucleus_sampling",
    "top_k": "runtime_top_k",
    "repetition_penalty": "repeat_penalty",
    "min_tokens": "min_new_tokens min_length",
    "logit_bias": "logits_bias",
    "top_logprobs": "top_logprobs_num top_n_tokens",
    "logprobs": """
        return_logprob return_logprobs return_log_probs output_logprobs output_log_probs
        response_logprobs return_token_logprobs
    """,
    "prompt_logprobs": """
        decoder_input_details return_prompt_logprobs input_logprobs return_context_logits
        logprob_start_len return_input_logprobs
    """,
    "ignore_eos": "ignore_eos_token ban_eos_token",
}
# What OpenAI's API has and this engine does not, with the values that have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "suffix": ("",),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "functions": ([],),
}
_UNSUPPORTED_ELSEWHERE = """
    add_bos add_bos_token add_special_tokens adapter_id adapter_name
    allowed_token_ids apply_chat_template bad_words bad_words_ids bad_words_list banned_strings
    banned_tokens beam_search beam_width begin_suppress_tokens cache_salt chat_template
    clean_up_tokenization_spaces custom_logit_processor
    detokenize diversity_penalty dry_allowed_length dry_base dry_multiplier dry_penalty_last_n
    dry_sequence_breakers dynatemp_exponent dynatemp_range early_stopping ebnf
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id
    function_call guidance_scale guided_choice guided_decoding guided_decoding_backend
    guided_grammar guided_json guided_json_object guided_regex guided_whitespace_pattern image_data
    include_stop_str_in_output input_embeds inputs_embeds json_mode json_schema keep_alive
    kv_transfer_params logits_processor logits_processors lora_adapter lora_id lora_name
    lora_path lora_request mirostat mirostat_eta mirostat_mode
    mirostat_tau mm_processor_kwargs multi_modal_data negative_prompt no_repeat_ngram_size
    no_stop_trim num_beam_groups num_beams output_kind penalty_alpha
    prompt_embeds regex_pattern remove_invalid_values renormalize_logits
    repeat_last_n response_mime_type response_schema return_full_text
    return_hidden_states return_tokens_as_token_ids skip_special_tokens smoothing_factor
    spaces_between_special_tokens structured_output structured_outputs suppress_tokens tfs tfs_z
    thinking_budget thinking_config token_healing token_ids_logprob top_a
    top_n_sigma truncate_prompt_tokens truncation typical_p watermark xtc_probability
    xtc_threshold
"""
# Of these, values other than null, 0, false and empty ones that change nothing.
_NO_EFFECT = {
    "add_special_tokens": True,
    "detokenize": True,
    "num_beams": 1,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "tfs_z": 1,
    "typical_p": 1,
}
# Values of renamed settings that ask for nothing.
_OFF_BY_OTHER_NAME = {
    "numreturnsequences": (0, 1),
    "repeatpenalty": (1,),
    "minnewtokens": (0,),
    "minlength": (0,),
    "logitsbias": ({}, []),
    "toplogprobsnum": (0,),
    "topntokens": (0,),
}
# Of these, false changes something.
_FALSE_HAS_EFFECT = frozenset(
    """
    add_special_tokens detokenize skip_special_tokens
    spaces_between_special_tokens
    """.split()
)
_SPECIAL = {
    "enable_thinking": "write it in chat_template_kwargs",
    "do_sample": "write temperature: 0 for the likeliest token, or above 0 to sample",
    "greedy": "write temperature: 0",
    "use_greedy": "write temperature: 0",
    "decoding_method": "write temperature: 0 for the likeliest token, or above 0 to sample",
    "system": 'write messages whose first has the role "system"',
    "system_prompt": 'write messages whose first has the role "system"',
    "system_message": 'write messages whose first has the role "system"',
    "system_instruction": 'write messages whose first has the role "system"',
}
# Objects that hold settings in other engines' requests.
_CONTAINERS = """
    sampling_params sampling_parameters sampling_param sampling_config sampling_settings
    generation_config generation_params generation_parameters generation_kwargs generation_args
    generation_settings gen_kwargs gen_config gen_params gen_args generate_kwargs generate_args
    generate_params decoding_params decode_params decoding_config request_params inference_params
    inference_parameters inference_config text_generation_config model_kwargs extra_body parameters
"""
# The same where the object has a setting in it, else the user's data.
_PERHAPS_CONTAINERS = "options params config settings kwargs args sampling generation decoding"
# What other engines call the prompt.
_PROMPTS = {
    "prompt": """
        inputs input text input_text text_input prompts question query instruction content
    """,
    "prompt_token_ids": "input_ids token_ids prompt_ids input_token_ids prompt_tokens tokens",
    "messages": "message conversation conversations chat contents dialog dialogue",
}


def letters(key: str) -> str:
    """Return a name as names are compared: in lower case, letters and digits alone."""
    return re.sub("[^a-z0-9]", "", key.lower())


def _each(names: str) -> Iterator[tuple[str, str]]:
    return ((letters(name), name) for name in names.split())


_OURS_OF = {theirs: ours for ours, names in _RENAMED.items() for theirs, _ in _each(names)}
_NAME_OF_UNSUPPORTED = {
    **{letters(name): name for name in UNSUPPORTED},
    **dict(_each(_UNSUPPORTED_ELSEWHERE)),
}
_ADVICE_OF = {letters(name): advice for name, advice in _SPECIAL.items()}
_IS_CONTAINER = {theirs for theirs, _ in _each(_CONTAINERS)}
_MAY_BE_CONTAINER = {theirs for theirs, _ in _each(_PERHAPS_CONTAINERS)}
_PROMPT_OF = {theirs: ours for ours, names in _PROMPTS.items() for theirs, _ in _each(names)}
# Every name here, by its letters: what a misspelt name is compared with.
KNOWN = {
    name: name
    for names in (_OURS_OF, _ADVICE_OF, _IS_CONTAINER)
    for name in names
    if len(name) > 8  # shorter ones are too near to words of any kind
} | _NAME_OF_UNSUPPORTED


def is_setting(name: str) -> bool:
    """Return whether another engine has a setting of this name, given by its `letters`."""
    return name in _OURS_OF or name in _NAME_OF_UNSUPPORTED or name in _ADVICE_OF


def advice(name: str, value: Any, settings_in: list[str]) -> str | None:
    """Return what to write instead of another engine's setting.

    Args:
        name: its `letters`.
        value: not None.
        settings_in: names of the settings in `value`, where it is an object.

    Returns:
        None where the name is not another engine's, or the value asks for nothing.
    """
    if name in _OURS_OF:
        if value in _OFF_BY_OTHER_NAME.get(name, ()):
            return None
        is_data = (name == "until" and not isinstance(value, str | list)) or (
            name == "temp" and not (isinstance(value, int | float) and 0 <= value <= 2)
        )
        return None if is_data else f"write {_OURS_OF[name]}"
    if name in _ADVICE_OF:
        is_data = name.startswith("system") and not isinstance(value, str | dict | list)
        return None if is_data or value == "" else _ADVICE_OF[name]
    is_container = name in _IS_CONTAINER and (name != "parameters" or isinstance(value, dict))
    if is_container or (name in _MAY_BE_CONTAINER and settings_in):
        what = ", ".join(settings_in) or "max_new_tokens, temperature, ..."
        return f"write its settings in the line itself, next to the prompt: {what}"
    if name in _NAME_OF_UNSUPPORTED and not asks_nothing(_NAME_OF_UNSUPPORTED[name], value):
        return "this engine does not have it: leave it out"
    return None


def asks_nothing(name: str, value: Any) -> bool:
    """Return whether the value of an unsupported setting has no effect."""
    if value is None:
        return True
    if name in UNSUPPORTED:
        return value in UNSUPPORTED[name]
    if value is False:
        return name not in _FALSE_HAS_EFFECT
    return value in (0, "", [], {}) or value == _NO_EFFECT.get(name)


def prompt_name(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the first key that other engines give to a prompt, and our name for it."""
    for key in keys:
        if (name := letters(key)) in _PROMPT_OF:
            return key, _PROMPT_OF[name]
    return None
