"""What vLLM could not serve, refused before hours are spent on it.

The rank is bounded by the run configuration, the targets by shapes.check_targets; DoRA, biases and saved modules are no
options at all. What is left is the architecture: vLLM loads adapters onto models whose class is a `SupportsLoRA`.
"""

from collections.abc import Iterable

from loraport.clients.errors import BaseModelError

# Language models in vLLM 0.32.0 (vllm/model_executor/models/registry.py) whose class is no SupportsLoRA; the test
# compares the list with the installed sources. An architecture that vLLM has no class for goes through its wrapper of
# transformers' models, which takes adapters, if it goes at all: nothing is refused for that.
WITHOUT_LORA = frozenset(
    {
        "BloomForCausalLM",
        "FalconForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "OrionForCausalLM",
        "Phi3VForCausalLM",
        "StableLmForCausalLM",
    }
)


def check_servable(architectures: Iterable[str], model: str) -> None:
    """BaseModelError for a base on which vLLM takes no adapters; `architectures` as its config.json names them."""
    refused = sorted(WITHOUT_LORA & set(architectures))
    if refused:
        raise BaseModelError(
            f"vLLM takes no LoRA adapters on {model}: its {refused[0]} has no support for them.",
            "train a Llama, Mistral, Qwen, Gemma, Phi or another model that vLLM's list of supported models marks",
        )
