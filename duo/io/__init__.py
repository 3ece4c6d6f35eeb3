"""Reading and writing: checkpoints as safetensors."""
