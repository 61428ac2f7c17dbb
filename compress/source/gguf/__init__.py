"""Reading models from GGUF files, llama.cpp's format: header, config, rotary scaling, tokenizer, weights."""

from compress.source.gguf.config import config_of
from compress.source.gguf.header import GgufHeader, GgufTensor, read_header
from compress.source.gguf.tokenizer import check_tokenizer, split_as_trained
from compress.source.gguf.weights import GgufReader

__all__ = ["GgufHeader", "GgufReader", "GgufTensor", "check_tokenizer", "config_of", "read_header", "split_as_trained"]
