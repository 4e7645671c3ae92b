"""Renders our Helm chart with a strict subset of Go templates. An unsupported construct is an error.

Replaces `helm template`, because helm cannot be installed from a package index. Supports actions with pipelines,
`define`, `include`, `if`/`else`, `with`, comments, trimming, and the functions below.
"""

import json
import pathlib
import re

import jsonschema
import yaml

ACTION = re.compile(r"\{\{(-?)\s*(/\*.*?\*/|.*?)\s*(-?)\}\}", re.S)
WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[()|]|[^\s()|"]+)')


class Unknown(Exception):
    """The chart uses an unsupported construct."""


def to_yaml(value):
    return yaml.safe_dump(value, default_flow_style=False, sort_keys=True).rstrip("\n")


def nindent(width, text):
    return "\n" + "\n".join(" " * int(width) + line if line else "" for line in text.rstrip("\n").split("\n"))


FUNCTIONS = {
    "toYaml": to_yaml,
    "nindent": nindent,
    "quote": lambda value: json.dumps(str(value)),
    "default": lambda other, value: value if value else other,
    "not": lambda value: not value,
    "dict": lambda *pairs: dict(zip(pairs[::2], pairs[1::2])),
}


def shown(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


class Chart:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.about = yaml.safe_load((self.folder / "Chart.yaml").read_text())
        self.values = yaml.safe_load((self.folder / "values.yaml").read_text())
        self.schema = json.loads((self.folder / "values.schema.json").read_text())
        self.defined = {}
        for path in sorted((self.folder / "templates").glob("*.tpl")):
            self.run(parse(path.read_text()), {}, path.name)

    def render(self, values=None, release="cache"):
        """Returns the rendered text by template name. `values` override the chart's values, merged by key."""
        merged = overlay(self.values, values or {})
        jsonschema.validate(merged, self.schema)
        about = {"AppVersion": str(self.about["appVersion"]), "Name": self.about["name"]}
        top = {
            "Values": merged,
            "Chart": about,
            "Release": {"Name": release, "Namespace": "default", "Service": "Helm"},
        }
        paths = [path for path in sorted((self.folder / "templates").iterdir()) if path.suffix != ".tpl"]
        return {path.name: self.run(parse(path.read_text()), top, path.name) for path in paths}

    def include(self, name, dot):
        if name not in self.defined:
            raise Unknown(f"no template is called {name}")
        return self.run(self.defined[name], dot, name)

    def run(self, nodes, dot, where):
        out = ""
        for kind, *rest in nodes:
            if kind == "text":
                out += rest[0]
            elif kind == "value":
                out += shown(self.pipeline(rest[0], dot, where))
            elif kind == "define":
                self.defined[json.loads(rest[0])] = rest[1]
            else:
                value = self.pipeline(rest[0], dot, where)
                inner = value if kind == "with" and value else dot
                out += self.run(rest[1] if value else rest[2], inner, where)
        return out

    def pipeline(self, text, dot, where):
        words = [word for word in WORD.findall(text)]
        value, rest = self.piped(words, dot, where)
        if rest:
            raise Unknown(f"{where}: {text}")
        return value

    def piped(self, words, dot, where):
        value, words = self.command(words, [], dot, where)
        while words and words[0] == "|":
            value, words = self.command(words[1:], [value], dot, where)
        return value, words

    def command(self, words, last, dot, where):
        name, words = words[0], words[1:]
        arguments = []
        if name != "(" and (name in FUNCTIONS or name == "include"):
            while words and words[0] not in ("|", ")"):
                value, words = self.operand(words, dot, where)
                arguments.append(value)
            call = self.include if name == "include" else FUNCTIONS[name]
            return call(*arguments, *last), words
        return self.operand([name, *words], dot, where)

    def operand(self, words, dot, where):
        word, words = words[0], words[1:]
        if word == "(":
            value, words = self.piped(words, dot, where)
            return value, words[1:]
        if word.startswith('"'):
            return json.loads(word), words
        if re.fullmatch(r"\d+", word):
            return int(word), words
        if not word.startswith("."):
            raise Unknown(f"{where}: {word}")
        value = dot
        for part in filter(None, word.split(".")):
            if not isinstance(value, dict) or part not in value:
                raise Unknown(f"{where}: there is no {word}")
            value = value[part]
        return value, words


def overlay(below, above):
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: overlay(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}
    return above


def parse(text):
    """Returns the nodes: ("text", t), ("value", p), ("if"|"with", p, then, else), ("define", name, body)."""
    pieces, at = [], 0
    for match in ACTION.finditer(text):
        pieces.append(["text", text[at : match.start()]])
        pieces.append(["action", match])
        at = match.end()
    pieces.append(["text", text[at:]])
    for number, piece in enumerate(pieces):
        if piece[0] == "action":
            if piece[1].group(1):
                pieces[number - 1][1] = pieces[number - 1][1].rstrip()
            if piece[1].group(3):
                pieces[number + 1][1] = pieces[number + 1][1].lstrip()
    pieces = [(kind, value if kind == "text" else value.group(2)) for kind, value in pieces]
    nodes, rest = block(pieces)
    if rest:
        raise Unknown("unexpected end")
    return nodes


def block(pieces):
    nodes = []
    while pieces:
        (kind, value), pieces = pieces[0], pieces[1:]
        if kind == "text":
            nodes.append(("text", value))
            continue
        word, _, argument = value.partition(" ")
        if word in ("end", "else"):
            return nodes, [(kind, value), *pieces]
        if word in ("if", "with", "define"):
            then, pieces = block(pieces)
            other = []
            if pieces and pieces[0][1] == "else":
                other, pieces = block(pieces[1:])
            if not pieces or pieces[0][1] != "end":
                raise Unknown(f"{value} has no end")
            pieces = pieces[1:]
            nodes.append(("define", argument, then) if word == "define" else (word, argument, then, other))
        elif not value.startswith("/*"):
            nodes.append(("value", value))
    return nodes, []
