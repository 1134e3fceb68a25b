"""Train the base's byte-level BPE tokenizer and write it, with its chat template, into the model folder.

Copying is easier when a name always becomes the same tokens: punctuation marks, digits and line breaks are
tokens of their own, and only words take a leading space along.

    python -m examples.pretrain.tokenizer --corpus build/corpus --out examples/reader-9m
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.pretrain.tasks import END, TURN, TURN_END, TaskMaker

VOCABULARY = 4096
PIECES = r" ?\p{L}+|\p{N}|[^\s\p{L}\p{N}]|\n|[^\S\n]+(?!\S)|\s"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def read_corpus(folder: Path) -> tuple[list[dict], list[str]]:
    """(functions, texts) as `corpus.py` wrote them."""
    functions, texts = (
        json.loads(gzip.decompress((folder / f"{n}.json.gz").read_bytes())) for n in ("functions", "texts")
    )
    return functions, texts


def train_tokenizer(samples: list[str]) -> Tokenizer:
    """Byte-level BPE over `samples`; the three special tokens take ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    functions, texts = read_corpus(args.corpus)
    maker = TaskMaker(functions, texts, seed=1)
    tasks = ["".join(text for text, _ in maker.make()) for _ in range(15_000)]
    samples = random.Random(1).sample(texts, min(len(texts), 20_000)) + tasks
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(samples),
        eos_token=TURN_END,
        pad_token=END,
        extra_special_tokens=[TURN],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(args.out)
    config = args.out / "tokenizer_config.json"  # the class name that transformers 4 and 5 both know
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    text = "\n".join(samples[:1000])
    print(
        f"{len(fast)} tokens in the vocabulary, {len(text.encode()) / len(fast(text)['input_ids']):.2f} bytes per token"
    )


if __name__ == "__main__":
    main()
