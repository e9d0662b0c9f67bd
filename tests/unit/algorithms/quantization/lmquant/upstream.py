"""The keys of LMQuant's and nyuntam's own files with the values of ``llm.yaml``, and nyuntam's example recipe."""

SEARCH = {
    **{"strategy": "GridSearch", "degree": 2, "element_batch_size": -1, "sample_batch_size": -1, "element_size": -1},
    **{"sample_size": -1, "pre_reshape": True, "outputs_device": "cpu"},
}
LINEARS = {"skip_proj_qkv": False, "skip_proj_out": False, "skip_proj_1st": False, "skip_proj_2nd": False}
RANGE = {
    **SEARCH,
    **{"objective": "OutputsError", "granularity": "ChannelGroup", "ratio": 1.0, "max_shrink": 0.2, "max_expand": 1.0},
    **{"num_grids": 80, "element_batch_size": 64, "element_size": 512},
}
SMOOTH = {
    **SEARCH,
    **{"objective": "OutputsError", "granularity": "Layer", "ranges": [["AbsMax", "AbsMax"]], "alpha": -3, "beta": -3},
    "num_grids": 20,
}
KEPT = {"skip_head": True, "skip_embed": True, "skip_router": True}
GPTQ = {
    **{"damp_percentage": 0.01, "block_size": 128, "num_inv_tries": 250, "hessian_block_size": 512, "include_proj_qkv": True},
    **{"include_proj_out": True, "include_proj_1st": True, "include_proj_2nd": True},
}
TENSOR = {"static": False, "dtype": None, "group_shapes": [[1, -1]], "group_scale_dtypes": [None]}
QUANT = {
    **{"post_rotary": True, "develop_dtype": "torch.float32"},
    "wgts": {
        **TENSOR,
        **{"static": True, "compute_dtype": None, "compute_group_level": -1, "saturate_compute_dtype": False},
        **{"enable_calib_kernel": False, "calib_kernel": {"enable_gptq": False, "gptq": GPTQ}, "enable_calib_range": True},
        "calib_range": {
            **RANGE, **LINEARS, "strategy": "Manual", "granularity": "Group", "allow_kernel_calib": False, "skip_router": False,
        },
        **KEPT,
        **LINEARS,
    },
    "ipts": {
        **TENSOR, **KEPT, **LINEARS, "enable_calib_range": False, "calib_range": {**RANGE, **LINEARS, "skip_router": False},
    },
    "opts": {
        **TENSOR,
        "enable_calib_range": False,
        "calib_range": {
            **RANGE, "allow_kernel_calib": False, "skip_attn_q": False, "skip_attn_k": False, "skip_attn_v": False,
        },
        **{"skip_attn_q": False, "skip_attn_k": False, "skip_attn_v": False},
    },
    **{"enable_rotation": False, "enable_reorder": False, "enable_smooth": False},
    "rotation": {"random": False, "transform_proj_out": False, "transform_proj_2nd": False},
    "reorder": {
        **SEARCH,
        **{"allow_kernel_calib": False, "channel_metric": "InputsAbsMax", "channel_index": "Transpose", "dynamic": False},
        **{"skip_residual": True, "skip_proj_out": False, "skip_proj_2nd": False},
    },
    "smooth": {
        **{"enable_xw": False, "enable_yx": False},
        "xw": {**SMOOTH, **LINEARS, "allow_kernel_calib": False},
        "yx": SMOOTH,
    },
    **{"enable_select_wgts": False, "enable_select_ipts": False, "enable_select_opts": False},
}  # fmt: skip
LLM = {
    **{"seed": 12345, "save_model": False},
    "model": {"name": "llama2-7b", "root": "/dataset/models", "local_root": "/dataset/models"},
    "eval": {
        **{"num_gpus": 8, "batch_size": 8, "output_root": "runs", "output_dirname": "default", "attach_timestamp": True},
        **{"tasks": ["wikitext"], "max_seq_length": -4096, "evaluator": "gptq"},
    },
    "calib": {
        **{"data": "pileval", "dataset_path": "mit-han-lab/pile-val-backup", "local_dataset_path": "/dataset/pile"},
        **{"num_samples": 128, "seq_length": 1024, "min_seq_length": 0, "max_seq_length": 0, "cache_root": "runs"},
    },
    "quant": QUANT,
}
# Keys of the other files of either, and those that nyuntam sets itself.
FURTHER = {
    "quant": {
        **{"bias_correction": True, "lm_head": False},
        "ipts": {"compute_dtype": None, "share_size": 1, "share_part": "m"},
        "opts": {"compute_dtype": None, "share_size": 1, "share_part": "m"},
        "smooth": {"yx": {"skip_attn_qk": False}},
    },
    "model": {"local_path": "/models/llama"},
    "eval": {"cache_root": "runs"},
    **{"keep_scales": False, "loads_with_qserve": False, "dtype": "float32", "quant_type": "default"},
}

# nyuntam's qoq/gchn.yaml where it differs from llm.yaml.
NYUNTAM_GCHN = {
    "bias_correction": True,
    **{"enable_rotation": True, "enable_smooth": True},
    "smooth": {
        **{"enable_xw": True, "enable_yx": True},
        "xw": {"alpha": 0.05, "beta": 0.95, "strategy": "Manual", "skip_proj_qkv": True, "skip_proj_1st": True},
        "yx": {"alpha": 0.5, "beta": " -2", "skip_attn_qk": False},
    },
    "wgts": {
        **{"dtype": "sint4", "group_scale_dtypes": ["torch.float16"], "enable_calib_kernel": True, "static": False},
        **{"calib_kernel": {"enable_gptq": True}, "calib_range": {"strategy": "GridSearch"}},
    },
    "ipts": {"dtype": "sint8", "group_scale_dtypes": ["torch.float16"]},
    "opts": {"dtype": "sint8", "group_scale_dtypes": ["torch.float16"]},
}

EXAMPLE = """\
MODEL: "meta-llama/Meta-Llama-3.1-8B-Instruct"
DATASET_NAME: "mit-han-lab/pile-val-backup"
DATASET_SUBNAME: ""
TEXT_COLUMN: "text"
SPLIT: "validation"
DATA_PATH:
FORMAT_STRING:

llm:
  LMQuant:
    save_model: True
    keep_scales: True
    loads_with_qserve: True
    dtype: float32

    quant_type: "gchn"
    quant.develop_dtype: torch.float32
    quant.smooth.xw.alpha: 0.05
    quant.smooth.xw.beta: 0.95
    quant.smooth.yx.strategy: GridSearch
    quant.smooth.yx.beta: " -2"

    quant.wgts.calib_range.outputs_device: cpu
    quant.reorder.outputs_device: cpu
    quant.smooth.xw.outputs_device: cpu
    quant.smooth.yx.outputs_device: cpu

    eval.tasks:
      - arc_challenge:25
    eval.max_seq_length: 4096
    eval.evaluator: "lm_eval"

CUDA_ID: "0,1,2,3"
ALGORITHM: "LMQuant"
JOB_SERVICE: "Kompress"
USER_FOLDER: "user_data"
JOB_ID: "lmquant_quantization"
CACHE_PATH: "user_data/.cache"
JOB_PATH: "user_data/jobs/lmquant_quantization"
LOGGING_PATH: "user_data/logs/lmquant_quantization"
ALGO_TYPE: "llm"
TASK: "llm"
"""
