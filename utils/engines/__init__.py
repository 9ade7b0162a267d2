"""Engines that answer prompts with a trained model: this project, transformers, vLLM, or a server."""
