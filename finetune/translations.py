"""The settings of other tools, and what to write here instead: for messages and for docs/migration.md.

Keys of Hugging Face's TrainingArguments, PEFT and TRL, of axolotl, LLaMA-Factory, unsloth's notebooks and earlier
versions of mistral-finetune. A key is found by its dotted path or by its last part, in lower case.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model.args import ALL_LINEARS

# What to write: our keys and their values; why to leave the key out; or None if the value cannot be translated.
Advice = dict[str, Any] | str | None
Settings = Mapping[str, Any]  # all values of a configuration by the last parts of their keys


@dataclasses.dataclass(frozen=True)
class Translation:
    """What is written here instead of some keys."""

    names: tuple[str, ...]
    ours: tuple[str, ...]  # keys; empty: there is no such setting
    remark: str  # what the values mean here, or why there is no such setting
    advise: Callable[[Any, Settings], Advice]


def _to(ours: str, names: str, remark: str = "", change: Callable[[Any], Any] = lambda value: value) -> Translation:
    """Translate to one key, whose value `change` returns."""
    return Translation(tuple(names.split()), (ours,), remark, lambda value, settings: {ours: change(value)})


def _absent(names: str, reason: str) -> Translation:
    return Translation(tuple(names.split()), (), reason, lambda value, settings: reason)


def _special(ours: str, names: str, remark: str, advise: Callable[[Any, Settings], Advice]) -> Translation:
    return Translation(tuple(names.split()), tuple(ours.split()), remark, advise)


def _switch(on: Advice, off: Advice) -> Callable[[Any, Settings], Advice]:
    """Return advice for a key that is true or false."""
    return lambda value, settings: on if value is True else off if value in (False, None) else None


def _choice(advice: Mapping[Any, Advice]) -> Callable[[Any, Settings], Advice]:
    """Return advice by value; strings are in lower case."""

    def advise(value: Any, _settings: Settings) -> Advice:
        key = value.lower() if isinstance(value, str) else value
        return advice.get(key) if isinstance(key, str | int | bool | None) else None

    return advise


_DEFAULT = "this is the default"

# ---- Length of the run


def _epochs(value: Any, settings: Settings) -> Advice:
    return "`max_steps` sets the length of the run" if _is_positive(settings.get("max_steps")) else {"epochs": value}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _times_per_epoch(ours: str) -> Callable[[Any, Settings], Advice]:
    def advise(value: Any, settings: Settings) -> Advice:
        if value == 1:
            return {ours: "epoch"}
        [epochs, *_] = [settings[name] for name in ("epochs", "num_epochs", "num_train_epochs") if name in settings]
        return {ours: round(1 / (value * epochs), 6)} if value * epochs > 1 else None

    return advise


def _warm_up_steps(value: Any, settings: Settings) -> Advice:
    if value == 0 and "warmup_ratio" in settings:
        return "`warmup_ratio` sets the warm-up"
    if 0 <= value < 1:
        return {"optim.pct_start": value}
    steps = settings["max_steps"]
    return {"optim.pct_start": min(round(value / steps, 6), 1)} if steps > 0 else None


def _resume(value: Any, settings: Settings) -> Advice:
    if value in (False, None):
        return "nothing is resumed by default"
    return {"resume": "auto" if value is True else value} if isinstance(value, bool | str) else None


_LENGTH = (
    _special(
        "epochs",
        "num_train_epochs num_epochs n_epochs max_epochs train_epochs",
        "unless `max_steps` is positive",
        _epochs,
    ),
    _special(
        "max_steps",
        "max_steps",
        "`-1` is left out",
        lambda value, settings: (
            "a run without `max_steps` is as long as `epochs`" if value == -1 else {"max_steps": value}
        ),
    ),
    _to(
        "max_steps", "max_train_steps train_steps num_train_steps num_training_steps total_steps max_iters train_iters"
    ),
    _to(
        "batch_size",
        "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu micro_batch_size "
        "train_batch_size",
        "sequences of `seq_len` tokens, each packed with several samples",
    ),
    _absent("auto_find_batch_size", "`batch_size` is fixed; `python -m utils.plan` says what fits"),
    _to(
        "num_microbatches",
        "gradient_accumulation_steps gradient_accumulation grad_accumulation_steps accumulate_grad_batches",
    ),
    _to(
        "seq_len",
        "max_seq_length max_seq_len max_length cutoff_len sequence_len model_max_length block_size max_sequence_length",
    ),
    _to("seed", "random_state random_seed"),
    _absent("data_seed", "`seed` sets the order of the data, too"),
    _special(
        "resume",
        "resume_from_checkpoint auto_resume_from_checkpoints resume",
        "`auto`, or a checkpoint's folder",
        _resume,
    ),
    _absent("overwrite_output_dir", "a run is never overwritten: choose another `run_dir`, or set `resume: auto`"),
    _absent("do_train do_predict ignore_data_skip", "training always trains"),
)

# ---- Model and adapter


def _targets(value: Any, settings: Settings) -> Advice:
    if value is None or settings.get("lora_target_linear") is True:
        return "`lora.targets` are all linear layers by default"
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list):
        return None
    return {"lora.targets": ALL_LINEARS if value in (["all"], [ALL_LINEARS]) else value}


_FULL: Advice = {"lora.enable": False, "save_adapters": False}
_ADAPTER: Advice = "an adapter is trained by default"
_UNQUANTIZED: Advice = "`base_dtype` is the only setting for quantization, and there is none by default"
_DOUBLE = "bnb_4bit_use_double_quant use_bnb_nested_quant use_double_quant use_nested_quant double_quantization"


def _four_bits(value: Any, settings: Settings) -> Advice:
    if value in (False, None):
        return _UNQUANTIZED
    doubled = any(settings.get(name) is True for name in _DOUBLE.split())
    return {"base_dtype": "nf4-dq" if doubled else "nf4"} if value in (True, 4, "4") else None


def _adapter(value: Any, settings: Settings) -> Advice:
    if value == "qlora":
        return _four_bits(True, settings)
    if value in (True, "lora", "LORA"):
        return _ADAPTER
    return _FULL if value in (False, None, "", "full", "none") else None


_MODEL = (
    _to(
        "model_id_or_path",
        "model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path "
        "base_model_name_or_path initial_model_path",
        "a folder: nothing is downloaded while training",
    ),
    _absent(
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer_config use_fast_tokenizer "
        "tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common model_type trust_remote_code "
        "trust_remote_code_ds is_mistral_derived_model template chat_template chat_template_jinja special_tokens "
        "tokens add_tokens resize_vocab pad_token eos_token bos_token unk_token padding_side add_special_tokens "
        "add_eos_token add_bos_token",
        "the model's folder sets its architecture, tokenizer and chat layout",
    ),
    _absent(
        "model_revision revision cache_dir token hf_token hf_hub_token use_auth_token hub_strategy push_to_hub "
        "push_to_hub_model_id hub_model_id hub_token hub_private_repo hub_always_push",
        "training neither downloads nor uploads: `utils.fetch_model` and `utils.export --push` do",
    ),
    _to("lora.from_adapter", "adapter_name_or_path lora_model_dir peft_model_id lora_path"),
    _to("lora.rank", "r lora_r lora_rank lora_dim"),
    _to("lora.alpha", "lora_alpha"),
    _to("lora.dropout", "lora_dropout"),
    _special(
        "lora.targets",
        "target_modules lora_target_modules lora_target lora_targets",
        "Hugging Face's names are accepted",
        _targets,
    ),
    _special(
        "lora.targets",
        "lora_target_linear",
        "",
        _switch({"lora.targets": ALL_LINEARS}, "`lora.targets` are all linear layers by default"),
    ),
    _special(
        "lora.enable save_adapters base_dtype",
        "finetuning_type adapter peft_type use_peft use_lora lora",
        "an adapter is the default",
        _adapter,
    ),
    _special("lora.enable save_adapters", "full_finetuning full_finetune", "", _switch(_FULL, _ADAPTER)),
    _special("base_dtype", "qlora use_qlora", "", _four_bits),
    _special("save_adapters", "ckpt_only_lora save_only_adapter", "", _switch(_DEFAULT, {"save_adapters": False})),
    _absent("lora_bias bias", "adapters have no biases"),
    _special(
        "lora.scaling",
        "use_rslora",
        "alpha / sqrt(rank), instead of `lora.alpha`",
        _switch(None, "`lora.alpha` is divided by the rank by default"),
    ),
    _absent(
        "use_dora peft_use_dora use_pissa pissa_init loftq_config loftq_bits init_lora_weights "
        "peft_init_lora_weights loraplus_lr_ratio loraplus_lr_embedding lora_plus layers_to_transform "
        "peft_layers_to_transform rank_pattern alpha_pattern modules_to_save lora_modules_to_save additional_target "
        "unfrozen_parameters lora_on_cpu relora_steps freeze_trainable_layers",
        "LoRA has no variants here",
    ),
    _absent(
        "task_type lora_task_type inference_mode fan_in_fan_out lora_fan_in_fan_out peft lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel create_new_adapter",
        "adapters of a Mistral model need no such setting",
    ),
    _special(
        "base_dtype",
        f"load_in_4bit use_4bit quantization_bit {_DOUBLE}",
        "`nf4`, or `nf4-dq` with double quantization",
        lambda value, settings: {"base_dtype": "fp8"} if value in (8, "8") else _four_bits(value, settings),
    ),
    _special(
        "base_dtype",
        "load_in_8bit use_8bit",
        "",
        _switch({"base_dtype": "fp8"}, _UNQUANTIZED),
    ),
    _absent(
        "bnb_4bit_quant_type quantization_method quantization_type bnb_config_kwargs",
        "4 bits are always NF4",
    ),
)

# ---- Optimizer

_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32", "no"), "fp32"),
    **dict.fromkeys(("auto", "none", "full"), "auto"),
}
_BY_DEFAULT = "`param_dtype: auto` chooses what the device computes fast"


def _dtype(value: Any, settings: Settings) -> Advice:
    dtype = _DTYPES.get(value.lower()) if isinstance(value, str) else None
    return _BY_DEFAULT if value is None else {"param_dtype": dtype} if dtype else None


def _flag_of(dtype: str) -> Callable[[Any, Settings], Advice]:
    return _choice(
        {True: {"param_dtype": dtype}, "auto": {"param_dtype": "auto"}, False: _BY_DEFAULT, None: _BY_DEFAULT}
    )


_SCHEDULES = {
    "cosine_with_min_lr": "cosine",
    "onecyclelr": "onecycle",
    "one_cycle": "onecycle",
}


def _respelled(ours: str, names: Mapping[str, str]) -> Callable[[Any, Settings], Advice]:
    """Return advice for a key of ours that another tool's value was given to."""

    def advise(value: Any, _settings: Settings) -> Advice:
        return {ours: names.get(value.lower(), value)}

    return advise


_OPTIM = (
    _to("optim.lr", "learning_rate"),
    _to("optim.weight_decay", "weight_decay"),
    _to("optim.name", "optim optimizer optim_name optimizer_name", change=str.lower),
    _to(
        "optim.schedule",
        "lr_scheduler_type lr_scheduler scheduler_type lr_schedule",
        "with a warm-up of `optim.pct_start`",
        lambda value: _SCHEDULES.get(value.lower(), value.lower()),
    ),
    _special("optim.schedule", "optim.schedule", "", _respelled("optim.schedule", _SCHEDULES)),
    _to("optim.pct_start", "warmup_ratio lr_warmup_ratio"),
    _special(
        "optim.pct_start",
        "warmup_steps num_warmup_steps lr_warmup_steps",
        "a fraction of the steps: the warm-up's divided by `max_steps`",
        _warm_up_steps,
    ),
    _absent(
        "adam_beta1 adam_beta2 adam_epsilon adam_epsilon2 adam_beta3 optim_args optim_target_modules",
        "the optimizer's betas and epsilon are those of mistral-finetune",
    ),
    _absent(
        "lr_scheduler_kwargs lr_scheduler_args min_lr min_lr_rate cosine_min_lr_ratio cosine_constant_lr_ratio "
        "lr_groups embedding_lr loraplus_lr",
        "`optim.div_factor` and `optim.final_div_factor` set the first and the last learning rate",
    ),
    _special(
        "max_norm",
        "max_grad_norm gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
        "",
        lambda value, settings: {"max_norm": value if value else 1e9} if isinstance(value, int | float | str) else None,
    ),
    _special("param_dtype", "bf16 bfloat16", "", _flag_of("bf16")),
    _special("param_dtype", "fp16 float16", "", _flag_of("fp16")),
    _special("param_dtype", "float32 fp32", "", _flag_of("fp32")),
    _special(
        "param_dtype",
        "dtype torch_dtype precision mixed_precision bnb_4bit_compute_dtype",
        "",
        _dtype,
    ),
    _special("param_dtype", "param_dtype", "", _respelled("param_dtype", _DTYPES)),
    _absent(
        "pure_bf16 bf16_full_eval fp16_full_eval fp16_opt_level fp16_backend half_precision_backend upcast_layernorm "
        "upcast_lmhead_output loss_scale",
        "`param_dtype` is the precision of training and evaluation; trained weights are always fp32",
    ),
    _absent(
        "loss_watchdog_threshold loss_watchdog_patience",
        "`guards.spike_factor` and `guards.stop_on_spike` watch the loss, relative to its median",
    ),
    _absent("strict debug", "unknown keys are always refused, and each command has its own options"),
    _absent("neftune_noise_alpha label_smoothing_factor label_smoothing", "the loss is the plain cross-entropy"),
)

# ---- Saving, evaluation, logs


def _frequency(value: Any) -> Any:
    """Return a whole number of steps as an integer: elsewhere 1.0 is one step, here it is refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _strategy(ours: str, never: Advice) -> Callable[[Any, Settings], Advice]:
    steps = f"a number of steps, or a share of the run, is written as `{ours}`"
    return _choice({"epoch": {ours: "epoch"}, "steps": steps, "no": never, False: never, "best": {"keep_best": True}})


_NO_EVALUATION: Advice = "nothing is evaluated by default"


def _metric(value: Any) -> str:
    return {"loss": "eval_loss", "eval_loss": "eval_loss"}[value]


_SAVING = (
    _to(
        "run_dir",
        "output_dir out_dir output_path save_dir checkpoint_dir run_id",
        "must not exist, unless `resume: auto`",
    ),
    _to(
        "ckpt_freq",
        "save_steps checkpointing_steps save_interval save_every save_freq",
        "steps, or a share of the run",
        _frequency,
    ),
    _special("ckpt_freq", "saves_per_epoch", "", _times_per_epoch("ckpt_freq")),
    _special("ckpt_freq no_ckpt", "save_strategy", "", _strategy("ckpt_freq", {"no_ckpt": True})),
    _to("num_ckpt_keep", "save_total_limit"),
    _special(
        "keep_best",
        "load_best_model_at_end",
        "checkpoints/best is the best one",
        _switch({"keep_best": True}, "it is not by default"),
    ),
    _to("early_stopping.metric", "metric_for_best_model", change=_metric),
    _to("early_stopping.patience", "early_stopping_patience"),
    _absent("greater_is_better early_stopping_threshold", "each `early_stopping.metric` has its direction"),
    _absent(
        "save_only_model save_safetensors save_on_each_node save_first_step save_method save_merged save_full_model",
        "checkpoints are safetensors with the state to resume; `save_adapters` chooses the adapter or the merged model",
    ),
    _to(
        "eval_freq",
        "eval_steps eval_interval eval_every",
        "steps, or a share of the run; with `no_eval: false`",
        _frequency,
    ),
    _special("eval_freq", "evals_per_epoch", "", _times_per_epoch("eval_freq")),
    _special(
        "eval_freq no_eval",
        "eval_strategy evaluation_strategy",
        "",
        _strategy("eval_freq", _NO_EVALUATION),
    ),
    _special("no_eval", "do_eval", "", _switch({"no_eval": False}, _NO_EVALUATION)),
    _to("eval_batch_size", "per_device_eval_batch_size per_gpu_eval_batch_size", "a multiple of `batch_size`"),
    _absent(
        "eval_accumulation_steps eval_delay eval_on_start "
        "batch_eval_metrics include_inputs_for_metrics prediction_loss_only compute_accuracy eval_packing",
        "evaluation uses the batches and the packing of training",
    ),
    _to("eval_generation.max_tokens", "generation_max_length generation_max_new_tokens"),
    _absent(
        "predict_with_generate generation_num_beams do_sample temperature top_p top_k eval_table_size "
        "eval_max_new_tokens",
        "`eval_generation` answers questions greedily during training",
    ),
    _to(
        "log_freq",
        "logging_steps log_every_n_steps log_interval logging_interval",
        "steps, or a share of the run",
        _frequency,
    ),
    _special("log_freq", "logging_strategy", "", _strategy("log_freq", None)),
    _absent(
        "logging_dir logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node "
        "disable_tqdm plot_loss include_num_input_tokens_seen include_tokens_per_second use_tensorboard use_mlflow "
        "skip_memory_metrics",
        "metrics, TensorBoard events and loss.png are always written to `run_dir`",
    ),
    _special(
        "wandb.project mlflow.tracking_uri",
        "report_to log_with",
        "TensorBoard events are always written",
        lambda value, settings: (
            "TensorBoard events are always written, and other trackers are off by default"
            if value in (None, "none", [], ["none"], "tensorboard", ["tensorboard"])
            else None
        ),
    ),
    _to("wandb.project", "wandb_project project project_name"),
    _to("wandb.run_name", "run_name wandb_name wandb_run_name wandb_run_id wandb.name"),
    _special(
        "wandb.offline",
        "wandb_mode wandb.mode",
        "",
        _choice(
            {
                "offline": {"wandb.offline": True},
                "online": _DEFAULT,
                "disabled": "leave `wandb.project` empty",
            }
        ),
    ),
    _absent("wandb_api_key wandb_key api_key", "the key belongs to `wandb.key`, or in the variable WANDB_API_KEY"),
    _absent("wandb_entity wandb_watch wandb_log_model wandb.entity", "wandb reads its variables, such as WANDB_ENTITY"),
    _to("mlflow.tracking_uri", "mlflow_tracking_uri"),
    _to("mlflow.experiment_name", "mlflow_experiment_name"),
)

# ---- Memory and speed

_ATTENTION = {
    **dict.fromkeys(("flash_attention_2", "flash_attention_3", "flash_attention", "fa2", "flash", "auto"), "auto"),
    **dict.fromkeys(("sdpa", "eager", "disabled"), "sdpa"),
    "xformers": "xformers",
}
_ATTENTION_DEFAULT = "`attention: auto` chooses the first engine that runs here"

_SPEED = (
    _special(
        "checkpoint",
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
        "`true`, `selective`, `false`, or `auto`",
        _choice(
            {True: {"checkpoint": True}, "unsloth": {"checkpoint": True}, "true": {"checkpoint": True}}
            | {False: {"checkpoint": False}, None: {"checkpoint": False}, "offload": {"checkpoint": True}}
        ),
    ),
    _special(
        "checkpoint",
        "disable_gradient_checkpointing",
        "",
        _switch({"checkpoint": False}, {"checkpoint": True}),
    ),
    _absent("gradient_checkpointing_kwargs use_reentrant use_reentrant_gc", "`checkpoint` has no options"),
    _special(
        "attention",
        "flash_attention flash_attn use_flash_attention use_flash_attention_2 attn_implementation flash_attn_fuse_mlp",
        "",
        lambda value, settings: (
            _ATTENTION_DEFAULT if value in (None, True, False) else {"attention": _ATTENTION[value]}
        ),
    ),
    _special("attention", "attention", "", _respelled("attention", _ATTENTION)),
    _special("attention", "xformers_attention", "", _switch({"attention": "xformers"}, _ATTENTION_DEFAULT)),
    _special("attention", "sdp_attention eager_attention", "", _switch({"attention": "sdpa"}, _ATTENTION_DEFAULT)),
    _absent(
        "s2_attention shift_attn use_unsloth use_unsloth_gc rope_scaling sliding_window", "attention is the model's"
    ),
    _to("compile", "torch_compile"),
    _absent("torch_compile_backend torch_compile_mode", "`compile` has no options"),
    _absent(
        "use_liger_kernel enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
        "liger_fused_linear_cross_entropy cut_cross_entropy plugins unsloth_lora_mlp unsloth_cross_entropy_loss "
        "fast_inference",
        "kernels have no settings",
    ),
    _absent(
        "deepspeed fsdp fsdp_config fsdp_version fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap "
        "parallelism_config accelerator_config tensor_parallel_size context_parallel_size pipeline_parallel_size "
        "ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers local_rank "
        "num_processes num_machines",
        "torchrun starts the processes and FSDP shards the model: see `sharding` and `cpu_offload`",
    ),
    _absent(
        "use_cpu no_cuda use_mps_device device device_map max_memory low_cpu_mem_usage gpu_memory_utilization "
        "use_cache gpu_memory_limit max_lora_rank torch_empty_cache_steps use_ipex tpu_num_cores jit_mode_eval",
        "the GPU is used where there is one",
    ),
    _absent(
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last "
        "dataloader_persistent_workers preprocessing_num_workers dataset_num_proc dataset_processes num_proc "
        "num_workers",
        "data is read in the background, in one process per GPU",
    ),
)

# ---- Data


def _sources(value: Any) -> str:
    """Return the jsonl files that a key for data names, as a data source is written here.

    Raises:
        ValueError: it names anything else, such as a dataset of a hub.
    """
    entries = value if isinstance(value, list) else value.split(",")
    paths = [entry["path"] if isinstance(entry, dict) else entry.strip() for entry in entries]
    if not paths or not all(path.endswith("jsonl") for path in paths):
        raise ValueError
    return ",".join(paths)


def _training_data(value: Any, settings: Settings) -> Advice:
    entries = value if isinstance(value, list) else value.split(",")
    texts = [entry for entry in entries if isinstance(entry, dict) and entry.get("type") in ("completion", "pretrain")]
    parts = {"data.data": texts, "data.instruct_data": [entry for entry in entries if entry not in texts]}
    return {key: _sources(part) for key, part in parts.items() if part}


_DATA = (
    _special(
        "data.instruct_data data.data",
        "datasets dataset dataset_name dataset_path dataset_id dataset_dir data_path data_file data_files train_file "
        "train_data train_path train_dataset dataset_mixer training_data data",
        "jsonl files; `python -m utils.reformat_data` converts chat layouts, `python -m utils.import_data` columns",
        _training_data,
    ),
    _special(
        "data.eval_instruct_data no_eval",
        "eval_dataset eval_file eval_data eval_path validation_file validation_data test_file test_datasets val_file",
        "jsonl files",
        lambda value, settings: {"data.eval_instruct_data": _sources(value), "no_eval": False},
    ),
    _to("data.data", "pretraining_dataset", "jsonl files of texts", _sources),
    _absent(
        "val_set_size val_size test_size eval_split validation_split validation_split_percentage dataset_test_split",
        "split the data before, with `python -m utils.import_data --split 0.9,0.1`, and name `data.eval_instruct_data`",
    ),
    _special(
        "data.packing",
        "packing sample_packing neat_packing packing_strategy bfd_packing",
        "sequences are always packed, and samples in one do not see each other; `best_fit` keeps samples whole",
        lambda value, settings: {"data.packing": "best_fit"},
    ),
    _absent(
        "pad_to_sequence_len pad_to_multiple_of padding group_by_length length_column_name eval_sample_packing "
        "sample_packing_group_size sample_packing_bin_size multipack_real_batches remove_unused_columns padding_free "
        "excess_length_strategy curriculum_sampling",
        "sequences are packed, without padding to lengths",
    ),
    _special(
        "data.shuffle data.instruct.shuffle",
        "shuffle_merged_datasets shuffle_before_merging_datasets disable_shuffling dataset_shuffle",
        "on by default for conversations",
        lambda value, settings: "`data.shuffle` and `data.instruct.shuffle` set the order",
    ),
    _absent(
        "dataset_train_split dataset_split dataset_config dataset_config_name dataset_text_field dataset_kwargs "
        "dataset_prepared_path dataset_keep_in_memory dataset_batch_size max_samples max_train_samples "
        "max_eval_samples streaming overwrite_cache preprocessing_batch_size shards field_messages field_human "
        "field_model roles roles_to_train formatting_func dataset_exact_deduplication mix_strategy interleave_probs "
        "text_column prompt_column response_column train_split tokenized_path",
        "every row of the files is used: prepare them with `python -m utils.import_data` or `utils.reformat_data`",
    ),
    _absent(
        "train_on_inputs train_on_prompt train_on_eos mask_history completion_only_loss assistant_only_loss "
        "train_on_responses_only response_template instruction_template response_part instruction_part loss_type",
        "the assistant's messages are trained; a message's `weight` changes that",
    ),
    _absent("default_system_message default_system default_system_prompt system_prompt", "it belongs in the rows"),
    _absent(
        "stage rl task pref_beta pref_loss dpo_beta beta kto_chosen_weight reward_model ref_model trl use_ref_model",
        "training is supervised, without preferences or rewards",
    ),
)


TRANSLATIONS: dict[str, tuple[Translation, ...]] = {
    "Length of the run": _LENGTH,
    "Model and adapter": _MODEL,
    "Optimizer and precision": _OPTIM,
    "Saving, evaluation and logs": _SAVING,
    "Memory and speed": _SPEED,
    "Data": _DATA,
}


@functools.cache
def _by_name() -> dict[str, Translation]:
    return {name: entry for group in TRANSLATIONS.values() for entry in group for name in entry.names}


def find_translation(path: Sequence[str], exact: bool) -> Translation | None:
    """Return what is written here for another tool's key.

    Args:
        path: the parts of the key.
        exact: find it by its whole path only, not by the last part.
    """
    parts = [part.lower().replace("-", "_") for part in path]
    found = _by_name().get(".".join(parts))
    return found if found or exact else _by_name().get(parts[-1])
