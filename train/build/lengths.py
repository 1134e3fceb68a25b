"""How long a text is: in the tokens of a model, or estimated from its characters when none is named.

>>> counter(None)[0]("seven characters are two tokens")
9
"""

import math
from typing import Any

from loraport.clients.errors import BaseModelError
from loraport.train.base_model import download, local_folder
from loraport.train.build.documents import Counter

CHARACTERS_A_TOKEN = 3.5  # of English documentation with code; tokenizers of 150,000 entries come to 3.5 to 4.5
TEMPLATE_TOKENS = 24  # what a chat template puts around two turns


def counter(model: str | None) -> tuple[Counter, str, frozenset[str]]:
    """A function that counts tokens, how it counts in words, and the model's special tokens.

    `model`: a folder or hub id; of a hub model only tokenizer.json is downloaded. Raises BaseModelError.
    """
    if not model:
        return estimate, f"estimated, {CHARACTERS_A_TOKEN} characters a token (--model counts exactly)", frozenset()
    tokenizer = load(model)
    special = frozenset(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), f"counted by {model}", special


def estimate(text: str) -> int:
    """Tokens that a text will have, about."""
    return math.ceil(len(text) / CHARACTERS_A_TOKEN)


def load(model: str) -> Any:
    """The tokenizer of a folder or hub id."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BaseModelError(
            "counting tokens needs the package tokenizers.", 'pip install "loraport[train]", or leave --model out'
        ) from error
    wanted = ("tokenizer.json",)
    path = (local_folder(model) or download(model, None, wanted).folder) / wanted[0]
    if not path.is_file():
        raise BaseModelError(f"{model} has no tokenizer.json.", "give another folder or hub id, or leave --model out")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BaseModelError(f"{path} cannot be read: {error}.", "copy or download it again") from error
