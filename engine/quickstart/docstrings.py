"""Extract the quickstart's task: given a function's source, write its one-line docstring.

    python -m engine.quickstart.docstrings --backbone engine/quickstart/backbone --output engine/quickstart

Every documented function of the standard library (tests left out) whose docstring starts with a plain sentence of 3
to 24 words becomes one record `{"prompt": source without its docstring, "completion": the sentence}`. Train and
held-out records are split by module exactly as the backbone's pretraining text is, so the backbone has not seen a
held-out function either; a held-out sentence that also occurs in training is dropped. Records are at most MAX_TOKENS
long.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from engine.quickstart.corpus import is_heldout, standard_library

MAX_TOKENS = 256
MAX_TRAIN_RECORDS, MAX_HELDOUT_RECORDS = 4000, 300
PROMPT_END = "\n# One-line docstring:\n"
SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,.'()_\-/]+\.")


def documented_functions(source: str) -> Iterator[tuple[str, str]]:
    """(source without its docstring, first line of the docstring) of every documented function in `source`."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        first = node.body[0]
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        yield textwrap.dedent("\n".join(kept)).strip("\n"), docstring.split("\n\n")[0].replace("\n", " ").strip()


def records(heldout: bool) -> list[dict[str, str]]:
    """Unique records of one side of the split, in the order of the files."""
    found: dict[str, str] = {}
    for file in standard_library():
        if file.is_test or is_heldout(file.module) != heldout:
            continue
        try:
            functions = list(documented_functions(file.text))
        except SyntaxError:
            continue
        for code, sentence in functions:
            if SENTENCE.fullmatch(sentence) and 3 <= len(sentence.split()) <= 24:
                found.setdefault(code, sentence)
    return [{"prompt": code + PROMPT_END, "completion": sentence} for code, sentence in found.items()]


def write_task(backbone: Path, output: Path, seed: int = 0) -> None:
    """Write `docstrings_train.jsonl` and `docstrings_heldout.jsonl` into `output`."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    train, heldout = records(heldout=False), records(heldout=True)
    known = {record["completion"] for record in train}
    heldout = [record for record in heldout if record["completion"] not in known]
    for name, part, limit in (("train", train, MAX_TRAIN_RECORDS), ("heldout", heldout, MAX_HELDOUT_RECORDS)):
        short = [r for r in part if len(tokenizer(r["prompt"] + r["completion"]).input_ids) < MAX_TOKENS]
        random.Random(seed).shuffle(short)
        path = output / f"docstrings_{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in short[:limit]))
        print(f"{path}: {len(short[:limit])} of {len(part)} records, {path.stat().st_size:,} bytes")


def main() -> None:
    """Parse the command line and write the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="folder of the tokenizer that measures length")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_task(args.backbone, args.output)


if __name__ == "__main__":
    main()
