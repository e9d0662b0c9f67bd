"""What the blocks of ``llm.AQLM`` have in common: ranges, and why some keys change nothing or take one value only."""

from __future__ import annotations

from configs.strict import Inert
from configs.values import Nullable, Real

CODE_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")
TOLERANCE = Nullable(Real(least=0.0, below=1.0))  # a loss cannot fall by more than all of it
SHARE = Real(above=0.0, most=1.0)

ROW_SCALES = "0: one float16 scale a row; clients of the AQLM format read no other"
HALF_CODEBOOKS = "16: clients of the AQLM format read float16 codebooks"
ONE_GROUP = "1: it takes effect below 16 bits a codebook value, which no client reads"
ONE_SETTING = "false: the AQLM format has one num_codebooks for the whole model"
USE_CUDA_ID = "null: the devices of a job are CUDA_ID at the top of the recipe"
NO_PICKLE = "false: pickled modules are never read; models and tensors are safetensors"
NO_CODE = "null: code from a recipe is never run"

TRUST = Inert(False, "only TRUST_REMOTE_CODE at the top of the recipe counts")
FAST_TOKENIZER = Inert(True, "the fast tokenizer is always used")
SET_BY_JOB = Inert(None, "the job sets it")
