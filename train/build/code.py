"""Source code into documents: Python by its syntax tree, other languages by their top-level definitions and comments.

A definition without documentation is a symbol too: its code can be asked for, what it does cannot.

    >>> read_python(file, 'def add(a, b):\\n    "Sum of two."\\n    return a + b\\n').symbols[0].signature
    'def add(a, b)'
"""

import ast
import inspect
import re
import warnings
from pathlib import Path

from loraport.train.build.documents import Document, Symbol
from loraport.train.build.sources import File, Unreadable

LANGUAGES = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp", ".cs": "csharp", ".go": "go", ".java": "java",
    ".js": "javascript", ".jsx": "jsx", ".kt": "kotlin", ".lua": "lua", ".mjs": "javascript",
    ".php": "php", ".rb": "ruby",
    ".rs": "rust", ".scala": "scala", ".sh": "bash", ".swift": "swift",
    ".ts": "typescript", ".tsx": "tsx", ".zig": "zig",
}  # fmt: skip
# Words that may stand before a definition, the words that begin one, and its name.
DEFINITION = re.compile(
    r"^(?:(?:export|default|pub(?:\([^)]*\))?|public|private|protected|internal|static|async|abstract|final|unsafe|extern|"
    r"inline|open|sealed|override|data|const(?=\s+fn)|declare)\s+)*"
    r"(?:function\*?|func|fn|fun|def|class|interface|struct|enum|trait|type|module|object|protocol|union|const(?=\s+\w+\s*=\s*"
    r"(?:struct|enum|union|\(|async)))\s+(?:\([^)]*\)\s*)?(?:self\.)?([A-Za-z_]\w*)"
)
C_FUNCTION = re.compile(
    r"^(?!(?:if|for|while|switch|return|else|do|case|typedef)\b)[A-Za-z_][\w\s*&:<>,]*?[\s*&]([A-Za-z_]\w*)\s*\([^;]*$"
)
METHOD = re.compile(
    r"^\s+(?:(?:"
    r"public|protected|static|async|abstract|final|override|pub|fn|fun|func|def)\s+)+[\w<>\[\], ?]*?([A-Za-z_]\w*)\s*\("
)
LINE_COMMENT = re.compile(r"^\s*(?:///?!?|//!|#(?!!|\[|include|define|if|endif|pragma|else)|--+)\s?(.*)$")


def read_python(file: File, text: str) -> Document:
    """A module: its docstring, functions, classes and their methods; private and nested ones are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"not Python that can be parsed ({type(error).__name__})") from error
    module = module_name(file)
    lines = text.split("\n")
    doc = ast.get_docstring(tree) or ""
    found = [Symbol(module, "module", "", doc, "", "python", 1, len(doc.split("\n")))] if doc else []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(function(node, module, lines, "function"))
        elif isinstance(node, ast.ClassDef):
            found += class_symbols(node, module, lines)
    found = [symbol for symbol in found if is_public(symbol.name.removeprefix(module))]
    if not found:
        raise Unreadable("no public definitions and no docstring")
    return Document(file.name, module, symbols=tuple(found))


def is_public(name: str) -> bool:
    """Whether no part of a dotted name begins with an underscore, and it is no test."""
    parts = [part for part in name.split(".") if part]
    return not any(part.startswith(("_", "test_", "Test")) for part in parts)


def module_name(file: File) -> str:
    """`package.module`, from the outermost folder that is a package; else the file's own name."""
    path = file.path.absolute()
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").exists() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or Path(file.name).stem


def class_symbols(node: ast.ClassDef, module: str, lines: list[str]) -> list[Symbol]:
    """A class and its methods."""
    name = f"{module}.{node.name}"
    bases = ", ".join(map(ast.unparse, node.bases))
    signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
    doc = ast.get_docstring(node) or ""
    made = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    inner = f"{doc}\n\n{ast.get_docstring(made) or ''}".strip() if made else doc
    if made:
        signature = f"{node.name}({arguments(made)})"
    found = [Symbol(name, "class", signature, inner, code_of(node, lines), "python", node.lineno, node.end_lineno or 0)]
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(function(member, name, lines, "method"))
    return found


def function(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str, lines: list[str], kind: str) -> Symbol:
    """A function or method."""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{prefix} {node.name}({ast.unparse(node.args)}){returns}"
    doc = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    is_method = kind == "method"
    return Symbol(
        f"{owner}.{node.name}", "method" if is_method else "function", signature, doc, code_of(node, lines), "python",
        node.lineno, node.end_lineno or 0,
    )  # fmt: skip


def arguments(node: ast.FunctionDef) -> str:
    """The arguments of __init__ as a caller sees them: without self."""
    text = ast.unparse(node.args)
    return re.sub(r"^self(?:, )?(?:/, )?", "", text)


def code_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The source of a definition with its decorators, dedented."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    code = lines[first - 1 : node.end_lineno]
    indent = len(code[0]) - len(code[0].lstrip()) if code else 0
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in code)


def read_source(file: File, text: str) -> Document:
    """A file in another language: definitions that begin a line, with the comment that stands before each."""
    language = LANGUAGES.get(file.path.suffix.lower(), "")
    lines = text.split("\n")
    if max(map(len, lines)) > 2000:
        raise Unreadable("made by a tool (lines of thousands of characters)")
    stem = Path(file.name).name
    found = [symbol for at in range(len(lines)) if (symbol := definition_at(lines, at, language, stem))]
    header, last = comment_from(lines, 1 if lines[0].startswith("#!") else 0)
    if len(header.split()) > 8 and not re.search(r"copyright|license|spdx", header, re.I):
        found.insert(0, Symbol(stem, "module", "", header, "", language, 1, last))
    if not found:
        raise Unreadable("no definitions that can be told")
    return Document(file.name, stem, symbols=tuple(found))


def definition_at(lines: list[str], at: int, language: str, owner: str) -> Symbol | None:
    """The definition that begins on line `at`, if one does."""
    line = lines[at]
    match = DEFINITION.match(line) or (C_FUNCTION.match(line) if language in ("c", "cpp", "bash") else None)
    if not match and language in ("java", "csharp", "typescript", "kotlin", "php"):
        match = METHOD.match(line)
    if not match or match.group(1).startswith("_"):
        return None
    doc, end = comment_before(lines, at), end_of(lines, at)
    code = "\n".join(lines[at : end + 1])
    signature = re.split(r"\s*(?:\{|=>|\bwhere\b)", line.strip())[0].rstrip(" :=")
    name = f"{match.group(1)}"
    return Symbol(f"{name} ({owner})", "definition", signature, doc, code, language, at + 1, end + 1)


def end_of(lines: list[str], at: int) -> int:
    """The last line of a definition: where the indent is back and its bracket closes."""
    indent = len(lines[at]) - len(lines[at].lstrip())
    for index in range(at + 1, min(len(lines), at + 400)):
        line = lines[index]
        if line.strip() == "{":
            continue
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return index if re.match(r"\s*(?:[})\]]|end\b)", line) else max(at, index - 1)
    return min(len(lines) - 1, at + 399)


def comment_before(lines: list[str], at: int) -> str:
    """The comment right above a definition, attributes and decorators between the two aside."""
    end = at - 1
    while end >= 0 and re.match(r"\s*(?:@|#\[|\[\w)", lines[end]):
        end -= 1
    first = end
    if end >= 0 and lines[end].rstrip().endswith("*/"):
        while first > 0 and "/*" not in lines[first]:
            first -= 1
        return comment_from(lines, first)[0]
    while first >= 0 and LINE_COMMENT.match(lines[first]):
        first -= 1
    return comment_from(lines, first + 1)[0] if first < end else ""


def comment_from(lines: list[str], at: int) -> tuple[str, int]:
    """The comment that begins on line `at`, without its marks, and its last line from 1; empty where there is none."""
    found: list[str] = []
    if at < len(lines) and lines[at].lstrip().startswith("/*"):
        for index in range(at, len(lines)):
            found.append(re.sub(r"^\s*/?\*+!?/?\s?|\s*\*+/\s*$", "", lines[index]))
            if "*/" in lines[index]:
                break
    else:
        while at + len(found) < len(lines) and (match := LINE_COMMENT.match(lines[at + len(found)])):
            found.append(match.group(1))
    return inspect.cleandoc("\n".join(found)).strip(), at + len(found)
