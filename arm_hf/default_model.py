"""The model that ships inside the package."""

from pathlib import Path

DEFAULT_MODEL = "arm-clip-mini"

_ASSETS = Path(__file__).parent / "assets"


def resolve_model(name_or_path: str) -> str:
    """Returns what `from_pretrained` and `pipeline` accept for a model name.

    ```python
    >>> from arm_hf import resolve_model
    >>> resolve_model("openai/clip-vit-base-patch16")
    'openai/clip-vit-base-patch16'

    ```

    Args:
        name_or_path: "arm-clip-mini" becomes the path of the embedded folder; a local path or a hub id is returned
            unchanged. A folder called "arm-clip-mini" in the current directory does not shadow the embedded one: write
            "./arm-clip-mini" for it.

    Raises:
        FileNotFoundError: The embedded folder or its config is missing from this installation.
    """
    if name_or_path != DEFAULT_MODEL:
        return name_or_path
    folder = _ASSETS / DEFAULT_MODEL
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The embedded model {DEFAULT_MODEL!r} is not in this installation: {folder} has no config.json. "
            "Reinstall arm_hf, or name another model: a local folder or a hub id such as "
            '"openai/clip-vit-base-patch16".'
        )
    return str(folder)
