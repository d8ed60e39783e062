"""What to say of a key that a configuration does not have: where the right one stands."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Tag

_ALMOST, _SIMILAR = 0.85, 0.65
"""`difflib` ratios: a slip of the keyboard, and a name that somebody could have meant."""


def _aliases(**keys_of: str) -> dict[str, tuple[str, ...]]:
    """Every name in a value's text, by itself, with the keys that it stands for."""
    found: dict[str, tuple[str, ...]] = {}
    for key, names in keys_of.items():
        for name in names.split():
            found[name] = (*found.get(name, ()), key.replace("__", "."))
    return found


ALIASES = _aliases(
    optimizer__learning_rate="lr lr_peak peak_lr max_lr base_lr initial_lr lr_scheduler_type",
    optimizer__final_share="min_lr lr_min min_lr_ratio lr_scheduler_type",
    optimizer__warmup_steps="warmup warmup_ratio num_warmup_steps lr_warmup_steps warmup_iters",
    optimizer__weight_decay="wd decay",
    optimizer__beta1="betas adam_beta1 adam_betas",
    optimizer__beta2="betas adam_beta2 adam_betas",
    optimizer__eps="adam_epsilon adam_eps",
    optimizer__clip_norm="max_grad_norm grad_clip clip_grad gradient_clipping gradient_clip_val",
    training__batch_size="batch_size global_batch_size train_batch_size gradient_accumulation_steps"
    " grad_accum_steps",
    grpo__prompts_per_step="batch_size global_batch_size train_batch_size rollout_batch_size"
    " gradient_accumulation_steps",
    training__microbatch_size="batch_size per_device_train_batch_size per_device_batch_size"
    " ppo_micro_batch_size micro_batch_size_per_gpu",
    training__tokens="num_tokens max_tokens total_tokens train_tokens num_train_epochs num_epochs",
    training__epochs="num_train_epochs num_epochs total_epochs",
    training__max_steps="steps num_steps train_steps total_steps max_iters num_train_steps"
    " num_train_epochs num_epochs total_epochs",
    data__sequence_length="seq_len seq_length sequence_len max_seq_length max_seq_len max_length"
    " block_size context_length cutoff_len",
    training__sequence_length="seq_len seq_length sequence_len max_seq_length max_seq_len"
    " max_length max_model_len max_prompt_length context_length",
    sampling__max_tokens="max_new_tokens max_completion_length max_response_length max_gen_len"
    " response_length",
    sampling__rows="max_num_seqs vllm_max_num_seqs",
    grpo__group_size="num_generations num_samples n_samples rollout_n samples_per_prompt n k",
    sampling__k="num_generations num_samples n_samples samples_per_prompt num_return_sequences n",
    grpo__kl_weight="beta kl kl_beta kl_coef kl_coeff kl_loss_coef init_kl_coef kl_penalty",
    grpo__clip_epsilon="epsilon cliprange clip_range clip_ratio eps_clip",
    grpo__clip_epsilon_high="epsilon_high clip_ratio_high",
    grpo__inner_epochs="num_iterations ppo_epochs mu",
    grpo__objective="loss_type algorithm",
    grpo__reference="ref_model reference_model",
    grpo__reference_every="ref_model_sync_steps sync_ref_model",
    grpo__truncated="mask_truncated_completions",
    rewards="reward reward_funcs reward_functions reward_fn reward_model reward_weights",
    lora__rank="lora peft use_peft use_lora lora_r lora_rank r adapter adapters",
    lora__alpha="lora_alpha",
    lora__target_modules="lora_target_modules",
    run_dir="output_dir out_dir save_dir checkpoint_dir logging_dir run_name output",
    output="output_dir out_dir save_dir run_dir",
    init="model_name_or_path model_name model_path model_id pretrained base_model checkpoint"
    " resume_from_checkpoint init_from",
    checkpoint="model_name_or_path model_name model_path model_id pretrained base_model model init",
    teacher__checkpoint="teacher_model teacher_model_name_or_path",
    tokenizer="tokenizer_name tokenizer_path tokenizer_name_or_path",
    data__tokenizer="tokenizer_name tokenizer_path tokenizer_name_or_path",
    data__sources="dataset datasets dataset_name dataset_path data_path data_dir train_file path"
    " paths",
    data__paths="dataset datasets dataset_name dataset_path data_path data_dir train_file path",
    prompts__path="dataset datasets dataset_name dataset_path data_path prompt_data train_file"
    " paths",
    checkpoint__every_steps="save_steps save_interval save_every save_freq checkpoint_every",
    checkpoint__keep="save_total_limit keep_last max_to_keep",
    evaluation__every_steps="eval_steps eval_interval eval_every eval_freq",
    training__compute_dtype="dtype bf16 fp16 precision mixed_precision torch_dtype param_dtype",
    training__remat="gradient_checkpointing activation_checkpointing use_remat recompute",
    mesh__tensor="tp tensor_parallel tensor_parallel_size tensor_model_parallel_size",
    mesh__expert="ep expert_parallel expert_parallel_size expert_model_parallel_size",
    mesh__context="cp context_parallel context_parallel_size sequence_parallel",
    mesh__data="dp data_parallel data_parallel_size",
    mesh__fsdp="fsdp_size zero_stage",
)  # fmt: skip
"""What other trainers call a setting, and the keys that have it here, in whatever section."""


def explain_unknown(
    where: str,
    kind: type[BaseModel],
    section: type[BaseModel],
    tasks: Mapping[str, type[BaseModel]],
) -> str:
    """Say that there is no key `where`, and which one was meant or what there is.

    Args:
        where: the key's full name.
        kind: the whole configuration.
        section: the part of it that the key stands in.
        tasks: other configurations, by their tasks, that may have it.
    """
    name = where.rpartition(".")[2]
    found = f"unknown key {where!r}"
    if meant := _called(name, kind):
        return f"{found}; here that is {' or '.join(map(repr, meant))}"
    if near := _nearest(name, section, _ALMOST):
        return f"{found}; the nearest valid key is {near!r}"
    if meant := _named(name, kind):
        return f"{found}; here that is {' or '.join(map(repr, meant))}"
    if near := _nearest(name, section, _SIMILAR):
        return f"{found}; the nearest valid key is {near!r}"
    listed = f"expected one of {', '.join(section.model_fields)}"
    having: dict[str, list[str]] = {}
    for task, other in tasks.items():
        for key in (_called(name, other) or _named(name, other))[:1]:
            having.setdefault(key, []).append(task)
    for key, them in having.items():
        return f"{found}; {key!r} is of task {' or '.join(them)}; {listed}"
    return f"{found}; {listed}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _nearest(name: str, section: type[BaseModel], cutoff: float) -> str | None:
    near = difflib.get_close_matches(name, list(section.model_fields), n=1, cutoff=cutoff)
    return near[0] if near else None


def _called(name: str, kind: type[BaseModel]) -> list[str]:
    """The settings, sections apart, that other trainers call by this name."""
    keys = _all_keys(kind)
    return [key for key in ALIASES.get(_plain(name), ()) if keys.get(key) is False]


def _named(name: str, kind: type[BaseModel]) -> list[str]:
    """The keys that have this name, in whatever section."""
    return [key for key in _all_keys(kind) if key.rpartition(".")[2] == name]


def _all_keys(kind: type[BaseModel], under: str = "") -> dict[str, bool]:
    """Every key with those inside it, but for what is inside lists; whether it is a section."""
    found: dict[str, bool] = {}
    for name, field in kind.model_fields.items():
        inner = {} if get_origin(field.annotation) is list else sections(field.annotation)
        found[f"{under}{name}"] = bool(inner)
        for section in inner.values():
            found |= _all_keys(section, f"{under}{name}.")
    return found


def walk(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The keys that lead to `loc`, and the section that the last one stands in, or should."""
    keys: list[str] = []
    inside: dict[str, type[BaseModel]] = {"": kind}
    for part in loc:
        if part in inside:  # no key: it says which of several kinds of section was meant
            kind, inside = inside[str(part)], {}
            continue
        keys.append(str(part))
        if not isinstance(part, int):
            kind = inside.get("", kind)
            field = kind.model_fields.get(part)
            inside = sections(field.annotation) if field else {}
    return keys, kind


def sections(annotation: Any, tag: str = "") -> dict[str, type[BaseModel]]:
    """Every section inside an annotation such as `YarnConfig | None`, by its tag in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {tag: annotation}
    for mark in getattr(annotation, "__metadata__", ()):
        tag = mark.tag if isinstance(mark, Tag) else tag
    return {t: s for arg in get_args(annotation) for t, s in sections(arg, tag).items()}
