"""A random Llama with a byte-level tokenizer that lacks some bytes, as SmolLM2's does."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenary.core.spelling import CHAR_OF
from tokenary.models.lm import LM
from tokenary.models.tiny import tiny_lm

MISSING = (0x04, 0x13, 0xC0, 0xF5, 0xFF)
SMALL = {"lanes": 2, "least": 8, "window": 24, "drop": 8, "warm_up": 5}


def toy_lm(seed=0, missing=MISSING):
    pieces = ["<|start|>", *(CHAR_OF[byte] for byte in range(256) if byte not in missing)]
    merges = [("t", "h"), ("th", "e"), (CHAR_OF[32], "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d")]
    pieces += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|start|>")
    net = tiny_lm(seed, vocab=270, hidden=32)
    return LM(f"toy-{seed}", net.model, fast, net.fingerprint, net.source)
