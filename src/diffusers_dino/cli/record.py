"""The record and the card of a model, from the flags of the script that trained it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..data.sharding import recorded_sources
from ..hub.cards import write_model_card
from ..hub.privacy import listed_names, without_folders
from ..hub.record import TrainingRecord

__all__ = ["describe_history", "told_settings", "write_record_and_card"]

# An allow-list: folders, trackers and what concerns only the machine are not told.
_VIEWS = ("resolution", "remove_borders", "augment", "sharpness", "shear", "translation", "random_flip", "cache_views")
_SCALE = ("min_scale", "max_scale", "shuffle_window_shards")
_VAE = ("in_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "crop_size")
_VAE_LOSS = ("freeze_encoder", "mid_block_add_attention", "l1_weight", "mse_weight", "gradient_weight", "kl_weight")
_ADVERSARY = ("adversarial_weight", "adversarial_learning_rate", "latent_noise")
_PERCEPTION = ("perceptual_size", "perceptual_weight", "token_weight", "token_guidance")
_ENCODER = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "teacher_size")
_TOKENS = ("num_register_tokens", "pixel_mean", "pixel_std", "image_size", "num_statistics_images", "slot_offset")
_CONDITION = ("tokens", "projection_dim", "normalize_tokens", "condition_dropout", "fuse_encoders", "encoder_dropout")
_PRIOR = ("width", "num_layers", "num_heads", "num_components", "text_length", "label_dropout", "times")
_CHOICE = ("validation_share", "validation_steps", "patience")
_UNET = ("qk_init_scale", "rank", "lora_alpha", "use_ema", "ema_decay")
_NOISE = ("prediction_type", "flow_times", "flow_shift", "rescale_betas_zero_snr", "snr_gamma", "noise_offset")
_DISTILLATION = ("teacher_steps", "phases", "min_guidance", "max_guidance", "guidance_width")
_STUDENT = ("target_decay", "huber_c")
_UPDATES = ("seed", "train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "mixed_precision")
_RATE = ("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps")
_ADAM = ("use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
_VIEWS_OF_DINO = ("min_global_crop", "max_global_crop", "local_crops", "local_crop_size", "min_local_crop")
_HEAD_OF_DINO = ("max_local_crop", "exposure", "num_prototypes", "head_hidden_size", "head_bottleneck_size")
_DINO = ("teacher_temperature", "student_temperature", "teacher_momentum", "koleo_weight")
_METRIC = ("metric", "metric_features", "metric_steps", "metric_num_images")
_RECIPE = _VIEWS + _SCALE + _VIEWS_OF_DINO + _HEAD_OF_DINO + _VAE + _VAE_LOSS + _ADVERSARY
_RECIPE += _PERCEPTION + _ENCODER
_RECIPE += _TOKENS + _CONDITION + _PRIOR + _CHOICE + _UNET + _NOISE + _DINO + _DISTILLATION + _STUDENT
_RECIPE += _UPDATES + _RATE + _ADAM + _METRIC


def told_settings(args: Any) -> dict[str, Any]:
    """The flags of a run that a card may tell, by name, paths without their folders; those of None are not set."""
    return {name: without_folders(getattr(args, name)) for name in _RECIPE if hasattr(args, name)}


def describe_history(history: Iterable[dict[str, Any]]) -> str:
    """In words, which settings were changed after how many updates."""
    return "; ".join(
        f"after {entry['updates']} updates: "
        + ", ".join(
            f"{name.replace('_', ' ')} {without_folders(old)} to {without_folders(new)}"
            for name, (old, new) in entry["changes"].items()
        )
        for entry in history
    )


def write_record_and_card(
    args: Any,
    model: str,
    num_images: int,
    updates: int,
    base_models: Iterable[str | None] = (),
    history: Iterable[dict[str, Any]] = (),
) -> None:
    """Write `training_record.json` and `README.md` into `args.output_dir`, which holds the finished model.

    `args` are the flags of the run, of which those in the list above are told, and `history` what was changed of them
    on the way. `model` is the Hub id of the model, or a name, `updates` those of its weights, and `base_models` what
    it was made from; None is skipped. The data sets of those whose folders have a record are its data sets, too.
    """
    base_models = list(filter(None, base_models))
    facts = {"training images": num_images, "updates": updates}
    facts |= {name.replace("_", " "): value for name, value in told_settings(args).items() if value is not None}
    if changes := describe_history(history):
        facts["changed on resuming"] = changes
    sources = recorded_sources(args.train_data_dir) if args.train_data_dir else []
    datasets = listed_names(args.dataset_name)
    for base in map(TrainingRecord.load, base_models):
        sources += [source for source in base.sources if source not in sources]
        datasets += [name for name in base.datasets if name not in datasets]
    record = TrainingRecord(facts, listed_names(base_models), datasets, sources)
    record.save(args.output_dir)
    write_model_card(args.output_dir, model, record)
