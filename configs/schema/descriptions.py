"""One line for each key of the envelope, as editors show it. Keys of algorithms say what they expect by themselves."""

from __future__ import annotations

from collections.abc import Mapping

_ENVELOPE = {
    "ALGORITHM": "the method; python main.py ls lists them",
    "TASK": "what kind of model: llm",
    "JOB_SERVICE": "Kompress or Adapt; a folder of the job's path",
    "JOB_ID": "the job's name; the result goes to USER_FOLDER/jobs/JOB_SERVICE/JOB_ID",
    "USER_FOLDER": "where jobs, logs, models and data sets are kept",
    "CACHE_PATH": "where tokens and downloads are kept; USER_FOLDER/.cache by default",
    "LOGGING_PATH": "where log.log goes; USER_FOLDER/logs/JOB_SERVICE/JOB_ID by default",
    "MODEL_PATH": "the output folder, in place of the job folder",
    "MODEL": "a hub id, a local folder (with /, ./ or ../), or another job's output: job://JOB_ID",
    "CUSTOM_MODEL_PATH": "your own weights: a model folder, or a state dict for MODEL's architecture",
    "DATASET_NAME": "a hub data set, a folder below USER_FOLDER/datasets, or a corpus such as wikitext2",
    "DATASET_SUBNAME": "the configuration of the data set",
    "DATA_PATH": "local text: a save_to_disk folder, json, jsonl, csv, parquet, txt, or a .pt list of token tensors",
    "TEXT_COLUMN": "the column with the text, or several for FORMAT_STRING",
    "SPLIT": "the split of the data set",
    "FORMAT_STRING": 'how several columns make a text, such as "Question: {question}\\nAnswer: {answer}"',
    "CUDA_ID": "the devices to use, one process each",
    "STAGES": "run only these stages",
    "EXPORT": "formats to write; the first stands in the job folder, the others in exports/FORMAT",
    "CORPORA": "local files for texts by name, for example {wikitext2: {train: a.txt, test: b.txt}}",
    "EVALUATION": "what is measured at the end",
    "TRACKING": "figures in wandb, beside metrics.jsonl",
    "PUSH_TO_HUB": "org/name: where a result that has passed its certificate is uploaded to",
    "NUM_PROCESSES": "how many processes, if not as many as devices",
    "TRUST_REMOTE_CODE": "true lets a model folder run its own code",
}
_EVALUATION = {
    "perplexity": "the texts to score on: wikitext2, ptb, ptb_new, c4, c4_new, pajama, or names under CORPORA",
    "sequence_length": "tokens of a window; figures of one length only can be compared",
    "tasks": "tasks of lm-eval, each alone or with its number of examples, such as gsm8k:5; also gptq_wikitext",
    "task_folder": "a folder with tasks of your own, as lm-eval's YAML files",
    "limit": "so many samples of each task; null: all",
    "batch_size": "sequences that a task's model is given at once",
    "dtype": "in which models compute; float16 halves the memory that tasks need on a GPU",
    "add_bos_token": "whether texts of tasks begin with BOS; null: as the tokenizer does of itself",
    "apply_chat_template": "true puts the questions of tasks into the tokenizer's chat template",
    "max_tokens": "so many tokens of each text; null: all",
    "kl_divergence": "also the KL divergence to the uncompressed model, and how often both have the same first choice",
}

_TRACKING = {
    "wandb": "true or false; null leaves it to the algorithm's own wandb keys",
    "project": "the project; WANDB_PROJECT, or else bitpress, by default",
    "entity": "the user or team; WANDB_ENTITY, or else your own, by default",
    "name": "the run's name; WANDB_NAME, or else JOB_ID, by default",
}

# Name of the class, key -> what it means.
DESCRIPTIONS: Mapping[tuple[str, str], str] = {
    **{("Recipe", key): meaning for key, meaning in _ENVELOPE.items()},
    **{("EvaluationConfig", key): meaning for key, meaning in _EVALUATION.items()},
    **{("TrackingConfig", key): meaning for key, meaning in _TRACKING.items()},
}
