"""InternLM2: model, configuration and tokenizer."""
