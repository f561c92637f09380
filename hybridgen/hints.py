"""Keywords of transformers and vLLM: what to write here instead, or why there is nothing to write."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from hybridgen.errors import shown

_NO_BEAMS = "there is no beam search; n= draws several completions of a prompt"
_GREEDY = "write temperature=0 for greedy, another temperature= to sample"
_LENGTHS = "max_new_tokens= counts generated tokens; max_context= is the longest prompt and output together"
_CHAT = 'put it into the prompt: {"messages": [...], "%s": ...}'
_GRAMMARS = "write json_schema=, regex=, grammar= or choice="
_MEMORY = "kv_memory= is the size of the KV cache, such as kv_memory='4GiB'"
_ALWAYS = "keys and values are always cached; prefix_cache= says whether requests share them"
_OUTPUTS = "a Completion always has all of it; logprobs= asks for log-probabilities"
_PADDING = "prompts of a list may have any lengths: nothing is padded"
_ONE_DEVICE = "a model runs on one device here: device="
_REPLICAS = "write hybridgen.Replicas(model, n) for n engines, each on a GPU of its own"
_QUANTISED = 'write quantization="fp8", "int8" or "int4"; a checkpoint that is quantised needs nothing'

HINTS: dict[str, str] = {
    # transformers
    "add_generation_prompt": _CHAT % "continue_final_message",
    "assistant_model": 'write drafter=, a path, hub id or live module; speculation="ngram" drafts without one',
    "prompt_lookup_num_tokens": 'write speculation="ngram"',
    "speculative_config": 'write speculation="ngram", or drafter= with a smaller model',
    "speculative_model": "write drafter=, a path, hub id or live module",
    "data_parallel_size": _REPLICAS,
    "attention_mask": 'give what the tokenizer returned as the prompt: {"input_ids": ..., "attention_mask": ...}',
    "attn_implementation": "attention is hybridgen's own in every mode",
    "cache_implementation": f"the cache is always paged; {_MEMORY}",
    "chat_template": _CHAT % "chat_template",
    "continue_final_message": _CHAT % "continue_final_message",
    "device_map": _ONE_DEVICE,
    "diversity_penalty": _NO_BEAMS,
    "do_sample": _GREEDY,
    "early_stopping": _NO_BEAMS,
    "eos_token_id": "write stop_token_ids=[...]; the model's own end ids count too, unless ignore_eos=True",
    "generation_config": "write sampling=SamplingParams(...), or its fields as keywords",
    "guidance_scale": "there is no classifier-free guidance",
    "input_ids": "give token ids as the prompts: the second argument, prompts=",
    "inputs": "the prompts are the second argument, prompts=",
    "length_penalty": _NO_BEAMS,
    "load_in_4bit": 'write quantization="int4"',
    "load_in_8bit": 'write quantization="int8"',
    "logits_processor": "write logits_processors=[...]",
    "low_cpu_mem_usage": "leave it out: weights are read one by one",
    "max_length": _LENGTHS,
    "max_time": "there is no limit by time; max_new_tokens= limits a completion",
    "min_length": "min_new_tokens= counts generated tokens",
    "num_beam_groups": _NO_BEAMS,
    "num_beams": _NO_BEAMS,
    "num_return_sequences": "write n=",
    "output_logits": _OUTPUTS,
    "output_scores": _OUTPUTS,
    "pad_token_id": _PADDING,
    "padding": _PADDING,
    "padding_side": _PADDING,
    "quantization_config": _QUANTISED,
    "return_dict_in_generate": _OUTPUTS,
    "return_full_text": "Completion.text is without the prompt",
    "stop_strings": "write stop=[...]",
    "tools": _CHAT % "tools",
    "torch_dtype": "write dtype=",
    "truncation": "write truncate_prompt=N: the last N tokens of a prompt are kept",
    "kv_cache_dtype": 'write kv_dtype="fp8", or nothing for keys and values in the dtype of the weights',
    "use_cache": _ALWAYS,
    # vLLM and OpenAI
    "best_of": "write n=, and choose by Completion.cumulative_logprob",
    "block_size": "write page_size=",
    "enable_prefix_caching": "write prefix_cache=",
    "enforce_eager": 'write mode="eager"',
    "gpu_memory_utilization": _MEMORY,
    "guided_choice": "write choice=",
    "guided_decoding": _GRAMMARS,
    "guided_grammar": "write grammar=",
    "guided_json": "write json_schema=",
    "guided_regex": "write regex=",
    "max_completion_tokens": "write max_new_tokens=",
    "max_model_len": "write max_context=",
    "max_num_batched_tokens": "write token_budget=",
    "max_num_seqs": "write max_batch=",
    "max_tokens": "write max_new_tokens=",
    "messages": "the prompts are the second argument, prompts=; a list of messages is a chat",
    "min_tokens": "write min_new_tokens=",
    "prompt": "the prompts are the second argument, prompts=",
    "prompt_token_ids": "give token ids as the prompts: the second argument, prompts=",
    "replicas": _REPLICAS,
    "response_format": _GRAMMARS,
    "sampling_params": "write sampling=SamplingParams(...), or its fields as keywords",
    "stop_sequences": "write stop=[...]",
    "structured_outputs": _GRAMMARS,
    "tensor_parallel_size": "write tensor_parallel=n (docs/scale.md)",
    "top_logprobs": "write logprobs=",
    "truncate_prompt_tokens": "write truncate_prompt=N: the last N tokens of a prompt are kept",
    "use_tqdm": "write progress=",
    # what people try
    "batch_size": "give all prompts in one call; max_batch= says how many run at once",
}
"""By keyword."""


def unknown(name: str, known: Collection[str]) -> str:
    """What to tell somebody who gave a keyword that is not known.

    Args:
        known: the keywords that are.
    """
    hint = HINTS.get(name)
    if hint is None:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
    return f"unknown keyword {shown(name)}; {hint}"
