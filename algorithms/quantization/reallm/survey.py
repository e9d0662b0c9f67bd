"""To be written."""

from algorithms.quantization.reallm.config import ReallmConfig

KIND = "reallm-survey"


def shaping(config: ReallmConfig):
    return {}


def look(context, config):
    return None
