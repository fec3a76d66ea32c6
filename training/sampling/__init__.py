"""Drawing sample images: prompts as people write them, samplers, guidance."""
