"""From a base model and adapters to an OpenAI-compatible endpoint, with the engine, vLLM, in processes of its own.

Neither torch nor vllm is imported here: everything that can be checked is checked before the engine is started.
"""
