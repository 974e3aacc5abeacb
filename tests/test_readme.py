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
    """(script, arguments) of each train.py and evaluate.py in the blocks of code, indented or between fences.

    What a person or a shell would fill in, like FOLDER or $seed, is filled in with 1.
    """
    fenced, found = False, []
    for line in text.replace("\\\n", " ").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if fenced or line.startswith("    "):
            called = r"\b(?:python|torchrun)[^#;&|]* (train|evaluate)\.py([^#;&|>]*)"
            for script, rest in re.findall(called, line):
                rest = re.sub(r"\$\w+|(?<!\S)[A-Z_]+(?!\S)", "1", rest.replace("...", ""))
                found.append((script, shlex.split(rest)))
    return found


def wrong_commands(text, monkeypatch):
    """The commands that the parser of their script does not take."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # a run to be resumed
    monkeypatch.setattr(stego, "read_tensors", lambda path: {"config": {}})
    wrong = []
    for script, arguments in commands(text):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        try:
            MODULES[script].parse_args()
        except SystemExit as stop:
            wrong += [f"{script}.py {' '.join(arguments)}"] * (stop.code != 0)  # --help
    return wrong


def wrong_names(text):
    """Names in backticks such as `stego.unit` that no module has."""
    names = re.findall(rf"`(?:[^`\n]*[^`\n\w./])?({'|'.join(MODULES)})\.([a-zA-Z_]\w*)", text)
    return [f"{module}.{name}" for module, name in names
            if name != "py" and not hasattr(MODULES[module], name)]


def test_its_commands_are_understood_and_its_names_are_there(monkeypatch):
    assert len(commands(README)) >= 5 and "`stego." in README
    assert not wrong_commands(README, monkeypatch) + wrong_names(README)
