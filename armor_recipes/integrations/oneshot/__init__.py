"""What a model needs to go through llm-compressor's `oneshot` with ARMOR layers. llm-compressor itself is imported by
`armor_recipes.integrations.llmcompressor` alone.

| module | holds |
|---|---|
| `cores` | a linear layer whose weight is the core S, with A and B as hooks around it |
| `order` | which of llm-compressor's modifiers may stand before and after ours, with what was measured |
| `saving` | `save_pretrained` of a model with such layers, and the guard on its `state_dict` |
"""
