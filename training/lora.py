"""LoRA on the attention projections of CLIP's image tower, trained beside ARM (Hu et al., ICLR 2022; peft)."""

from __future__ import annotations

import warnings
from typing import Any

from arm_hf.modeling.modeling_arm import ARMModel

from .options import TrainingOptions

ADAPTER_FOLDER = "adapter"


def add_lora(model: ARMModel, options: TrainingOptions) -> Any:
    """Put trainable low-rank matrices into the model's CLIP, in place.

    Args:
        model: Its CLIP is changed.
        options: Rank, targets and blocks.

    Returns:
        The `PeftModel` around it, which saves the adapter. ARM stays trainable and is saved by the model itself.

    Raises:
        ImportError: peft is missing.
        ValueError: A block does not exist.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install peft") from error
    depth = model.clip.config.vision_config.num_hidden_layers
    blocks = options.lora_blocks or list(range(1, depth + 1))
    wrong = [block for block in blocks if not 1 <= block <= depth]
    if wrong:
        raise ValueError(f"lora_blocks must be from 1 to {depth}, the blocks of this CLIP; got {wrong}")
    numbers, names = "|".join(str(block - 1) for block in blocks), "|".join(options.lora_targets)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=rf"clip\.vision_model\.encoder\.layers\.(?:{numbers})\.self_attn\.(?:{names})",
    )
    with warnings.catch_warnings():
        # peft 0.21 reads a property of transformers' models that is called otherwise from version 5 on.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, config)
    model.arm.requires_grad_(True)
    model.config.adapter = ADAPTER_FOLDER
    return adapted
