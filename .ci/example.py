"Run README.md's Python blocks one after another, as they are printed, and compare what they print, but for rounding: `example.py README.md`."
import ast
import pprint
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n+((?:(?: {4}[^\n]*)?\n)*)", re.M | re.S)


def show(value) -> str: return repr(value) if not isinstance(value, (tuple, list, dict)) else pprint.pformat(value)


def run(source:str, names:dict) -> str:
    "What a notebook would show: what is printed, and the value of a last expression"
    *body, last = (tree := ast.parse(source)).body
    printed = StringIO()
    with redirect_stdout(printed):
        if not isinstance(last, ast.Expr): exec(compile(tree, "README.md", "exec"), names)
        else:
            exec(compile(ast.Module(body, []), "README.md", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "README.md", "eval"), names)
            if value is not None: print(show(value))
    return printed.getvalue()


def alike(found:str, expected:str) -> bool:
    "The same words, and numbers within one of their last digit: another processor may round the other way"
    a, b = found.split(), expected.split()
    return len(a) == len(b) and all(x == y or close(x, y) for x, y in zip(a, b))


def close(x:str, y:str) -> bool:
    try: return abs(float(x) - float(y)) < 1.01 * 10.**-len(y.partition(".")[2])
    except ValueError: return False


if __name__ == "__main__":
    blocks, names = BLOCK.findall(Path(sys.argv[1]).read_text(encoding="utf-8")), {}
    if not blocks: sys.exit("README.md shows no Python")
    for source, expected in blocks:
        try: found = run(source, names)
        except Exception as error: sys.exit(f"README.md's example stops with {type(error).__name__}: {error}\n\n{source}")
        if not alike(found, expected): sys.exit(f"README.md's example prints\n\n{found}\nbut README.md says\n\n{expected}\nof\n\n{source}")
    print(f"README.md: {len(blocks)} blocks of Python run and print what it says")
