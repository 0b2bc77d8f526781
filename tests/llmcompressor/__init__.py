"""Equal results: our modifiers against llm-compressor's own, in an environment that has it (`make test-llmcompressor`)."""
