"""The commands of `arm-hf`, one module each; `arm_hf.cli` puts them together."""
