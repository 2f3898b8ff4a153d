"""The stages that train `arm-clip-mini`, the small CLIP inside the package; see `training/pretrain_mini.py`."""
