"""Files and models come from strangers: nothing that is read may run code."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from models import build

from metafocus.__main__ import main
from metafocus.cli import config_file
from metafocus.data.tokenizer import train_tokenizer
from metafocus.trainer.checkpoints import damage

ROOT = Path(__file__).parent.parent / "metafocus"
FILES = sorted(ROOT.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ALLOWED = {"evals/agentic/guard.py": {"exec", "compile"}}
"""Runs a model's program: that file is the bounded process made for it, and reads no file else."""
CODE = {"eval", "exec", "compile", "__import__"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def faults(source: str) -> list[str]:
    """What a reviewer would stop at, with its line."""
    tree = ast.parse(source)
    found = []
    for name, call in calls(tree):
        given, last = keywords(call), name.rpartition(".")[2]
        # `dumps` reads nothing.
        if name.partition(".")[0] in PICKLES and last != "dumps":
            found.append(f"{call.lineno}: {name}")
        if name in ("torch.load", "torch.jit.load") and given.get("weights_only") != "True":
            found.append(f"{call.lineno}: {name} without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"{call.lineno}: {name} of pickles")
        if name in CODE:
            found.append(f"{call.lineno}: {name}")
        if name in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"):
            found.append(f"{call.lineno}: {name}")
        if name == "yaml.load" and given.get("Loader") not in ("Loader", "yaml.SafeLoader"):
            found.append(f"{call.lineno}: {name} with {given.get('Loader')}")
        if name in ("os.system", "os.popen") or given.get("shell", "False") != "False":
            found.append(f"{call.lineno}: {name} by a shell")
        if last == "from_pretrained" and name.startswith("Auto"):
            # Left out it is a question at the terminal.
            if given.get("trust_remote_code") != "False":
                found.append(f"{call.lineno}: {name} without trust_remote_code=False")
    return found


def test_no_file_of_the_package_runs_what_it_reads():
    found = [
        f"{name}:{fault}"
        for name, path in ((path.relative_to(ROOT).as_posix(), path) for path in FILES)
        for fault in faults(path.read_text())
        if fault.partition(": ")[2] not in ALLOWED.get(name, set())
    ]
    assert found == []


def test_the_reviewer_sees_it():
    sources = (
        "import pickle\npickle.loads(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.full_load(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
    )
    assert [source for source in sources if len(faults(source)) != 1] == []


def test_no_word_of_the_package_offers_to_trust_a_stranger():
    """Neither an argument, nor an option, nor a setting with another default than False."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg):
                assert node.arg != "trust_remote_code", path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "--trust" not in node.value, path


def test_the_yaml_loader_is_the_safe_one():
    import yaml

    source = inspect.getsource(config_file._yaml)
    assert "class Loader(yaml.SafeLoader)" in source
    assert not issubclass(yaml.SafeLoader, yaml.UnsafeLoader)


class Bomb:
    """A pickle that makes a directory where it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_a_pickle_beside_a_model_is_not_run(tmp_path, capsys):
    folder, mark = tmp_path / "model", tmp_path / "gone"
    build(dtype=torch.float32).save_pretrained(folder)
    train_tokenizer(["hello"], 270).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    assert main(["compare", "--quick", "--model_name_or_path", str(folder)]) == 2
    assert "could run any code" in capsys.readouterr().err
    assert not mark.exists()


def test_code_beside_a_model_is_not_run(tmp_path, capsys):
    """`auto_map` asks for the code in the directory; nobody answers yes."""
    folder, mark = tmp_path / "model", tmp_path / "gone"
    folder.mkdir()
    train_tokenizer(["hello"], 270).save_pretrained(folder)
    (folder / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", '
        '"AutoModelForCausalLM": "strange.Model"}}'
    )
    (folder / "strange.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    assert main(["compare", "--quick", "--model_name_or_path", str(folder)]) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("metafocus: error: name_or_path=") and "cannot be loaded" in last
    assert "[y/N]" not in error
    assert not mark.exists()


def test_judging_a_checkpoint_reads_no_pickle(tmp_path):
    """Before a run is resumed its files are looked at, by sizes and headers only."""
    folder, mark = tmp_path / "checkpoint-1", tmp_path / "gone"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    assert damage(folder) == "pytorch_model.bin is missing or cut off"
    assert not mark.exists()


def test_a_configuration_makes_no_objects(tmp_path, capsys):
    mark = tmp_path / "gone"
    file = tmp_path / "run.yaml"
    file.write_text(f"data: !!python/object/apply:os.mkdir [{str(mark)!r}]\n")
    assert main(["train", str(file)]) == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    assert not mark.exists()
