"""The page of `arm-hf app`: `page` is the page itself, `work` what happens behind it, `guard` what keeps it safe."""

from importlib.util import find_spec


def require_gradio() -> None:
    """Raise ImportError with what to install if gradio is not here."""
    if find_spec("gradio") is None:
        raise ImportError("the page needs gradio; install it with: pip install 'arm_hf[app]'")
