"""From a Hugging Face checkpoint to a `MoEConfig` and the weights of one layer."""
