"""What the README says of the code: lengths of files, names of functions, options."""
import re
import subprocess
import sys

from conftest import ROOT

import crf
import data
import evaluate
import stego
import train

README = (ROOT / "README.md").read_text("utf-8")
MODULES = {"crf": crf, "data": data, "evaluate": evaluate, "stego": stego, "train": train}


def test_files_are_as_long_as_it_says():
    lengths = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert lengths == {f"{name}.py": str(len((ROOT / f"{name}.py").read_text("utf-8").splitlines())) for name in MODULES}


def test_names_that_it_gives_exist():
    names = set(re.findall(rf"`({'|'.join(MODULES)})\.(\w+)", README)) - {(name, "py") for name in MODULES}
    assert len(names) > 15 and not [f"{module}.{name}" for module, name in names if not hasattr(MODULES[module], name)]


def test_options_that_it_gives_exist():
    elsewhere = {"--nproc_per_node", "--teacher", "--photo", "--quick", "--rows"}  # of torchrun and other scripts
    told = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README))
    known = set()
    for script in ("train.py", "evaluate.py"):
        printed = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]+", printed))
    assert len(told) > 30 and not told - known - elsewhere
