"""What the README says of the code: its commands are understood, and the names in backticks are there."""
import re
import shlex
import sys
from pathlib import Path

from conftest import ROOT

import crf
import data
import evaluate
import stego
import train

README = (ROOT / "README.md").read_text("utf-8")
MODULES = {"crf": crf, "data": data, "evaluate": evaluate, "stego": stego, "train": train}


def commands(text):
    """(script, arguments) of each train.py and evaluate.py in the blocks of code, which are indented.

    What a person or a shell would fill in, like FOLDER or $seed, is filled in with 1.
    """
    called, found = r"\b(?:python|torchrun)[^#;&|]* (train|evaluate)\.py([^#;&|>]*)", []
    for line in text.splitlines():
        for script, rest in re.findall(called, line) if line.startswith("    ") else ():
            rest = re.sub(r"\$\w+|(?<!\S)[A-Z_]+(?!\S)", "1", rest.replace("...", ""))
            found.append((script, shlex.split(rest)))
    return found


def test_its_commands_are_understood(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # a run to be resumed
    monkeypatch.setattr(stego, "read_tensors", lambda path: {"config": {}})
    assert len(commands(README)) >= 5
    for script, arguments in commands(README):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        MODULES[script].parse_args()  # or SystemExit


def test_the_names_in_it_are_there():
    names = re.findall(rf"`(?:[^`\n]*[^`\n\w./])?({'|'.join(MODULES)})\.([a-zA-Z_]\w*)", README)
    assert len(names) > 10
    assert not [f"{module}.{name}" for module, name in names
                if name != "py" and not hasattr(MODULES[module], name)]
