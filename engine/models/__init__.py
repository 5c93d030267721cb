"""Model families: `registry.build_model` turns a Hugging Face configuration into a `CausalLM`."""
