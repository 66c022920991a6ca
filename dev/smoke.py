"""Try an installed pvrt with nothing beside it: `python dev/smoke.py`, in its environment.

Tunes a toy model and measures, inspects and serves it with the commands themselves; ends with the
first that fails. The kernels in C must be there. Nothing is imported from this repository.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PVRT = Path(sysconfig.get_path("scripts")) / "pvrt"


def write_model(folder: Path) -> None:
    """A random Llama of two blocks, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)


def pvrt(*arguments: str) -> str:
    """Run a command and show it; its standard output. Ends here if the command fails."""
    started = time.monotonic()
    done = subprocess.run([PVRT, *arguments], stdout=subprocess.PIPE, text=True)
    print(f"$ pvrt {' '.join(arguments)}\n{done.stdout}", flush=True)
    if done.returncode:
        sys.exit(f"pvrt {arguments[0]} ended with {done.returncode}")
    print(f"({time.monotonic() - started:.1f} s)\n", flush=True)
    return done.stdout


def main() -> None:
    """All commands in the order of a new user."""
    with tempfile.TemporaryDirectory() as place:
        dense, out = Path(place) / "dense", Path(place) / "out"
        write_model(dense)
        found = {finding["name"]: finding for finding in json.loads(pvrt("doctor", "--json"))}
        if found["cpu kernels"]["level"] != "ok":
            sys.exit(f"no kernels in C: {found['cpu kernels']['text']}")
        tokens = ("--samples", "8", "--length", "64")
        pvrt("tune", str(dense), "-o", str(out), "--effort", "quick", *tokens, "--no-report")
        pvrt("inspect", str(out), "--verify")
        pvrt("bench", str(out))
        pvrt("serve", str(out), "--engine", "local", "--port", "0", "--check")


if __name__ == "__main__":
    main()
