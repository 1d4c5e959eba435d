"""Names of sd-scripts' options that mean nothing here, each with the reason: different from a misspelt name."""

from __future__ import annotations


def _all(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_NOT_YET = "not offered yet"
_HUB = "uploads to and resuming from the hub are not offered; upload the finished file yourself"
_DDPM = "it has no meaning for flow-matching models; Stable Diffusion 1, 2 and XL read it"
_ATTENTION = "use --attn_mode; torch's scaled_dot_product_attention is the default"
_CONSOLE = "messages go to the terminal; every run writes a JSONL log"
_POSITION = "--resume restores the exact position from the state"
_FUSED = "use --fused_backward_pass, which takes every optimizer that updates each weight by itself"
_SD_ONLY = "only Stable Diffusion 1, 2 and XL read it"

NOT_OFFERED: dict[str, str] = {
    **_all("use_8bit_adam", "old spelling of --optimizer_type AdamW8bit; use that"),
    **_all("use_lion_optimizer", "old spelling of --optimizer_type Lion; use that"),
    **_all("v2 v_parameterization clip_skip max_token_length weighted_captions no_half_vae", _SD_ONLY),
    **_all("tokenizer_cache_dir", "give the tokenizer's folder with --tokenizer"),
    **_all("dataset_class", "the dataset cannot be replaced by a class; describe it in --dataset_config"),
    **_all("conditioning_data_dir", "set conditioning_data_dir in a subset of --dataset_config"),
    **_all("cache_info", "what was read of a file is always remembered and checked against the file"),
    **_all("skip_cache_check", "cache entries are always checked; it costs next to nothing"),
    **_all("debug_dataset", "the table of the dataset is always printed; --dump_batch_at_step shows a batch"),
    **_all("persistent_data_loader_workers", "the loading threads live as long as the run; remove the option"),
    **_all("initial_epoch initial_step skip_until_initial_step", _POSITION),
    **_all("output_config", "--print_config shows the effective values, and every run writes them beside its output"),
    **_all("console_log_level console_log_file console_log_simple", _CONSOLE),
    **_all("huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token", _HUB),
    **_all("huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload", _HUB),
    **_all("wandb_api_key", "set the environment variable WANDB_API_KEY; an option would end up in logs"),
    **_all("log_config", "the effective configuration is always written beside the output"),
    **_all("fused_optimizer_groups blockwise_fused_optimizers", _FUSED),
    **_all("noise_offset noise_offset_random_strength adaptive_noise_scale zero_terminal_snr min_snr_gamma", _DDPM),
    **_all("multires_noise_iterations multires_noise_discount scale_v_pred_loss_like_noise_pred", _DDPM),
    **_all("v_pred_like_loss debiased_estimation_loss", _DDPM),
    **_all("training_shift", "use --timestep_sampling sigma with --discrete_flow_shift"),
    **_all("mem_eff_attn xformers sdpa use_flash_attn use_sage_attn", _ATTENTION),
    **_all("vae_chunk_size", _NOT_YET),
    **_all("offload_inactive_dit", "of two experts the one that is not needed is always on the host"),
    **_all("lowram", "every weight goes straight from the memory map of its file to its place"),
    **_all("split_mode", "use --blocks_to_swap, which works in LoRA training and in a full fine-tune"),
    **_all("ddp_gradient_as_bucket_view ddp_static_graph", "no DistributedDataParallel is used"),
    **_all("deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path", "DeepSpeed is not used"),
    **_all("offload_param_device offload_param_nvme_path zero3_init_flag", "DeepSpeed is not used"),
    **_all("zero3_save_16bit_model fp16_master_weights_and_gradients", "DeepSpeed is not used"),
    **_all("disable_mmap_load_safetensors", "files are always read through a memory map"),
    **_all("pos_emb_random_crop_rate enable_scaled_pos_embed", "positions are as the model has them"),
    **_all("save_clip save_t5xxl t5xxl_device t5xxl_dtype", "it does nothing in sd-scripts either; remove it"),
    **_all("apply_t5_attn_mask", "Chroma's text always has its mask; for Flux and SD3 it is an option"),
    **_all("sample_sampler", "flow models are sampled with Euler steps"),
}
