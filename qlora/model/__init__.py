"""The model: NF4 loading, LoRA adapters, attention, loss, optimizer."""
