"""No line of the package runs what a file, a name or a stranger brings: every source file is read for such calls."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("arm_hf", "modeling", "training", "hub_cards")

# Modules whose readers run code, or that unpack archives without care for the paths inside.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile", "telnetlib"}
CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "__import__": "imports by a name that may come from outside",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
    "yaml.load": "makes objects; use yaml.safe_load",
    "yaml.load_all": "makes objects; use yaml.safe_load_all",
    "yaml.unsafe_load": "makes objects; use yaml.safe_load",
    "yaml.full_load": "makes objects; use yaml.safe_load",
    "shutil.unpack_archive": "writes to the paths that an archive names",
    "tempfile.mktemp": "names a file that somebody else may make first",
    "urllib.request.urlopen": "fetches without a limit; use arm_hf.modeling.downloads",
    "urllib.request.urlretrieve": "fetches without a limit; use arm_hf.modeling.downloads",
    "requests.get": "fetches without a limit; use arm_hf.modeling.downloads",
    "httpx.get": "fetches without a limit; use arm_hf.modeling.downloads",
}
METHODS = {
    "extractall": "writes to the paths that an archive names",
    "extract": "writes to the paths that an archive names",
}


def dangers(source: str) -> Iterator[str]:
    """Yield what is wrong with a piece of source, each with its line."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in MODULES:
                yield f"{node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            for reason in _wrong_call(node):
                yield f"{node.lineno}: {ast.unparse(node.func)} {reason}"


def _wrong_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    settings = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
    if name in CALLS:
        yield CALLS[name]
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield METHODS[node.func.attr]
    if name == "torch.load" and settings.get("weights_only") is not True:
        yield "reads pickles; pass weights_only=True"
    if settings.get("allow_pickle") is True:
        yield "reads pickles"
    if settings.get("shell") is True:
        yield "starts a shell"
    if settings.get("verify") is False:
        yield "trusts any server"
    if settings.get("trust_remote_code") is True:
        yield "runs a stranger's code"
    # Without the keyword transformers asks at the terminal, and a wrong key runs the code.
    if re.fullmatch(r"(transformers\.)?Auto[A-Z]\w*\.from_pretrained", name) and "trust_remote_code" not in given:
        yield "asks whether to run a stranger's code; pass trust_remote_code"


def test_the_package_has_none(root: Path) -> None:
    files = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path.relative_to(root)}:{what}" for path in files for what in dangers(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(text)",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "zipfile.ZipFile(path).extractall(folder)",
        "httpx.get(address)",
        "AutoModel.from_pretrained(name)",
        "pipeline(task, trust_remote_code=True)",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "subprocess.run(['ls'])",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
    ],
)
def test_what_is_safe_passes(source: str) -> None:
    assert not list(dangers(source))
