"""A bundle: what it holds, that its samples run, and that `verify` notices every change."""

from __future__ import annotations

import ast
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.bundle import chat, manifest
from edgeprune.bundle import write as writer
from edgeprune.errors import ConfigError
from edgeprune.report import build as report_build

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
CACHE = Path(os.environ.get("EDGEPRUNE_INTEROP_CACHE", HOME / "edgeprune" / "interop"))

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + "
    "(first if loop.first else '') + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "no system": NO_SYSTEM}


# ---------------------------------------------------------------- a small bundle, made by hand


@pytest.fixture
def small(tmp_path: Path) -> Path:
    root = tmp_path / "small"
    (root / "onnx").mkdir(parents=True)
    (root / "a.bin").write_bytes(bytes(range(64)))
    (root / "onnx" / "b.bin").write_bytes(b"bbbb")
    (root / "empty").write_bytes(b"")
    manifest.write(root, {"parent": {"id": "x", "license": None}, "figure": 0.25})
    return root


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who knows its form: with a digest that is right again."""
    plain = json.loads((root / manifest.FILE_NAME).read_text())
    change(plain)
    plain["digest"] = manifest._digest(plain)
    (root / manifest.FILE_NAME).write_text(manifest._render(plain))


def problems(root: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        manifest.verify(root)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_an_untouched_bundle_passes(small: Path) -> None:
    found = manifest.verify(small)
    assert (found.files, found.bytes) == (3, 68)
    assert found.manifest["schema"] == 1 and found.manifest["figure"] == 0.25
    assert [row["path"] for row in found.manifest["files"]] == ["a.bin", "empty", "onnx/b.bin"]
    assert found.manifest["files"][2]["sha256"] == (
        "81cc5b17018674b401b42f35ba07bb79e211239c23bffe658da1577e3e646877"
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_names_the_file(small: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["a.bin", "onnx/b.bin", "manifest.json"]))
    path = small / name
    before = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(before[:at] + bytes([before[at] ^ (1 << bit)]) + before[at + 1 :])
    try:
        found = problems(small)
        assert found[0].startswith(f"{name}: ")
    finally:
        path.write_bytes(before)


def test_missing_extra_and_longer_files_are_all_named(small: Path) -> None:
    (small / "empty").unlink()
    (small / "onnx" / "b.bin").write_bytes(b"bbbbb")
    (small / "onnx" / "more").write_bytes(b"")
    assert problems(small) == (
        "empty: is missing",
        "onnx/b.bin: has 5 bytes, listed are 4",
        "onnx/more: is not listed",
    )


def test_links_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(bytes(range(64)))
    (small / "a.bin").unlink()
    (small / "a.bin").symlink_to(tmp_path / "same")
    os.rename(small / "onnx", tmp_path / "elsewhere")
    (small / "onnx").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert problems(small) == ("a.bin: is a link", "onnx/b.bin: is a link", "onnx: is not listed")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../outside", "leaves the bundle"),
        ("onnx/../../outside", "leaves the bundle"),
        ("/etc/hostname", "is an absolute path"),
        ("C:/x", "is an absolute path"),
        ("..\\outside", "has a character"),
        ("a.bin\x00", "has a character"),
        ("./a.bin", "not in its shortest form"),
        ("onnx//b.bin", "not in its shortest form"),
        ("a.bin", "is listed twice"),
        ("manifest.json", "lists itself"),
        ("", "is no file name"),
        (7, "is no file name"),
    ],
)
def test_names_that_leave_the_bundle(small: Path, tmp_path: Path, name: Any, said: str) -> None:
    (tmp_path / "outside").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    row = {"path": name, "bytes": 0, "sha256": empty}
    rewrite(small, lambda plain: plain["files"].append(row))
    (found,) = problems(small)
    assert found.startswith("manifest.json: ") and said in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "does not describe a bundle"),
        ('{"kind": "bundle", "schema": 2}', "schema 2, this edgeprune reads 1"),
        ('{"kind": "bundle", "schema": 1}', "'files' is not a list"),
        ('{"kind": "bundle", "schema": 1, "files": [3], "digest": ""}', "is no file"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_manifest_that_is_none(small: Path, text: str, said: str) -> None:
    (small / manifest.FILE_NAME).write_text(text)
    assert any(said in problem for problem in problems(small))


def test_a_known_figure_cannot_be_edited(small: Path) -> None:
    path = small / manifest.FILE_NAME
    path.write_text(path.read_text().replace("0.25", "0.20"))
    assert problems(small) == ("manifest.json: changed since it was written",)


def test_verify_on_the_command_line(run_cli: Callable[..., Any], small: Path, tmp_path: Path) -> None:
    ran = run_cli("verify", small)
    assert (ran.code, ran.out, ran.err) == (0, "3 files, 68 B: all as listed in manifest.json\n", "")
    assert json.loads(run_cli("verify", small, "--format", "json").out)["files"] == 3
    (small / "a.bin").write_bytes(bytes(64))
    ran = run_cli("verify", small)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[0] == "Error: a.bin: its sha256 is not the listed one"
    assert run_cli("verify", tmp_path / "no").code == 2
    ran = run_cli("verify", tmp_path)
    assert ran.code == 2 and "has no manifest.json" in ran.err


def test_verify_needs_no_heavy_library(run_python: Callable[..., Any], small: Path) -> None:
    code = (
        "import sys; from edgeprune.cli.main import run; assert run(['verify', sys.argv[1]]) == 0; "
        "print(sorted({'torch', 'numpy', 'transformers', 'gguf', 'jinja2'} & set(sys.modules)))"
    )
    ran = run_python(code, str(small))
    assert ran.out.splitlines()[-1] == "[]", ran.err


# ---------------------------------------------------------------- chat templates


class Jinja:
    """A chat template as transformers renders it."""

    def __init__(self, source: str) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            source
        )

    def __call__(self, messages: list[dict[str, str]]) -> str:
        text = self.template.render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        return text.removeprefix("<s>")


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Render what the Modelfiles use of Go's template language."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    tokens: list[tuple[str, str]] = [("text" if i % 2 == 0 else "do", part) for i, part in enumerate(parts)]
    variables: dict[str, bool] = {}

    def truth(text: str, dot: dict[str, str] | None) -> bool:
        if text.startswith("not "):
            return not variables[text[4:]]
        match = re.fullmatch(r'eq \.Role "(\w+)"', text)
        assert match and dot is not None
        return dot["role"] == match[1]

    def block(i: int, dot: dict[str, str] | None, live: bool) -> tuple[str, int]:
        out = ""
        while i < len(tokens):
            kind, text = tokens[i]
            if kind == "text":
                out += text if live else ""
            elif text == "end" or text.startswith("else if "):
                return out, i
            elif text == "range .Messages":
                after = i
                for message in messages:
                    piece, after = block(i + 1, message, live)
                    out += piece
                i = after
            elif text.startswith("if "):
                done, condition = False, text[3:]
                while True:
                    take = live and not done and truth(condition, dot)
                    piece, i = block(i + 1, dot, take)
                    out += piece
                    done = done or take
                    if tokens[i][1] == "end":
                        break
                    condition = tokens[i][1].removeprefix("else if ")
            elif text == ".Content":
                assert dot is not None
                out += dot["content"] if live else ""
            else:
                match = re.fullmatch(r"(\$\w+) :?= (true|false)", text)
                assert match, text
                if live:
                    variables[match[1]] = match[2] == "true"
            i += 1
        return out, i

    return block(0, None, True)[0]


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_gives_the_same_prompt(name: str, with_system: bool) -> None:
    pieces = chat.read(TEMPLATES[name], eos="</s>")
    assert pieces is not None
    template = pieces.go_template()
    assert template is not None
    messages = [
        {"role": "user", "content": "Hi {there}"},
        {"role": "assistant", "content": "Yes?\n"},
        {"role": "user", "content": "Bye"},
    ]
    if name == "llama3":
        messages[1]["content"] = "Yes?"  # the template trims
    given = messages
    if with_system:
        if name == "no system":
            assert pieces.system is None
            return
        messages = given = [{"role": "system", "content": "Be brief."}, *messages]
    elif pieces.default_system is not None:
        # Ollama puts SYSTEM in front of a conversation that has none
        given = [{"role": "system", "content": pieces.default_system}, *messages]
    assert go(template, given) == Jinja(TEMPLATES[name])(messages)
    assert pieces.default_system == ("Be nice." if name == "chatml" else None)


def test_what_ends_an_answer() -> None:
    stops = {}
    for name, source in TEMPLATES.items():
        pieces = chat.read(source, eos="</s>")
        assert pieces is not None
        stops[name] = pieces.stop
    assert stops == {
        "chatml": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "no system": "</s>",
    }


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",  # counts
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{{ messages | length }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{% for m in messages %}{{ nothing.at.all }}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "",
    ],
)
def test_other_templates_are_not_translated(source: str) -> None:
    assert chat.read(source) is None


def test_a_first_token_that_the_template_spells_out_stays() -> None:
    """SmolLM2's first token is <|im_start|>, which also opens every turn."""
    pieces = chat.read(CHATML, eos="<|im_end|>")
    assert pieces is not None and pieces.system == ("<|im_start|>system\n", "<|im_end|>\n")


def test_a_piece_that_go_would_read_is_not_translated() -> None:
    pieces = chat.read(CHATML.replace("<|im_end|>", '"""'))
    assert pieces is not None and pieces.go_template() is None


# ---------------------------------------------------------------- Modelfiles

# docs.ollama.com/modelfile; num_batch is an option of its API that Modelfiles take as well
PARAMETERS: dict[str, type] = {
    **dict.fromkeys(("num_ctx", "num_batch", "num_predict", "repeat_last_n", "seed", "top_k"), int),
    **dict.fromkeys(("temperature", "repeat_penalty", "top_p", "min_p"), float),
    "stop": str,
}
WORDS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"}
ONCE = ("FROM", "TEMPLATE", "SYSTEM", "REQUIRES")
ROLES = ("system", "user", "assistant")


def quoted(text: str) -> str | None:
    """What a value says, or None when its quotes are still open. One or three quotes, and no escapes."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, argument) by the documented grammar: `# comment` and `INSTRUCTION arguments`, any case,
    values that reach over lines in one or three quotes; characters that cannot be printed are lost.
    """
    out, lines = [], text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.lstrip(" \t").startswith("#"):
            continue
        match = re.fullmatch(r"[ \t]*([A-Za-z]+)[ \t]+(.*)", line)
        assert match and match[1].upper() in WORDS, f"no instruction: {line!r}"
        word, rest, name = match[1].upper(), match[2], ""
        if word in ("PARAMETER", "MESSAGE"):
            name, _, rest = rest.partition(" ")
            known = PARAMETERS if word == "PARAMETER" else ROLES
            assert name in known, f"{word}: unknown {name!r}"
        while (value := quoted(rest.strip())) is None:
            assert lines, f"{word}: quotes are not closed"
            rest += "\n" + lines.pop(0)
        assert value, f"{word} has no argument"
        assert all(c.isprintable() or c in "\n\t" for c in value), f"{word}: a character would be lost"
        if word == "PARAMETER":
            PARAMETERS[name](value)
        out.append((word, f"{name} {value}" if name else value))
    words = [word for word, _ in out]
    assert "FROM" in words, "no FROM"
    assert all(words.count(word) <= 1 for word in ONCE), "an instruction that counts once is there twice"
    return out


def test_the_parser_reads_every_instruction() -> None:
    found = parse_modelfile(
        "# a comment\n\nfrom ./a b.gguf\nPARAMETER num_ctx 4096\nParameter temperature 0.5\n"
        'PARAMETER stop "AI assistant: "\nPARAMETER stop \\n\nADAPTER ./lora.gguf\nREQUIRES 0.14.0\n'
        'TEMPLATE """{{ if .System }}\n# no comment\n"quoted" {{ end }}\n"""\nSYSTEM "two\nlines"\n'
        'MESSAGE user Is Toronto in Canada?\nMESSAGE assistant "yes"\nLICENSE """\nMIT\n"""\nLICENSE more\n'
    )
    assert found == [
        ("FROM", "./a b.gguf"),
        ("PARAMETER", "num_ctx 4096"),
        ("PARAMETER", "temperature 0.5"),
        ("PARAMETER", "stop AI assistant: "),
        ("PARAMETER", "stop \\n"),
        ("ADAPTER", "./lora.gguf"),
        ("REQUIRES", "0.14.0"),
        ("TEMPLATE", '{{ if .System }}\n# no comment\n"quoted" {{ end }}\n'),
        ("SYSTEM", "two\nlines"),
        ("MESSAGE", "user Is Toronto in Canada?"),
        ("MESSAGE", "assistant yes"),
        ("LICENSE", "\nMIT\n"),
        ("LICENSE", "more"),
    ]


@pytest.mark.parametrize(
    ("template", "eos", "said"),
    [
        (CHATML, "back\\slash", {"<|im_end|>", "back\\slash"}),  # quotes of a Modelfile know no escapes
        (CHATML, 'a"b', {"<|im_end|>"}),
        (CHATML, "zero\u200bwidth", {"<|im_end|>"}),
        (CHATML.replace("<|im_end|>", "<|fin\u200b|>"), "</s>", set()),  # no template, so no stops of it
    ],
)
def test_what_a_modelfile_cannot_say_is_left_out(template: str, eos: str, said: set[str]) -> None:
    from edgeprune.bundle import write
    from edgeprune.records import LaunchFlags

    facts = {"parent": {"id": "x", "license": "a\u0000b"}}
    about = write._About(template=template, eos=eos, max_context=None)
    flags = LaunchFlags(context_tokens=128, ubatch=32, kv_type="f16", mmap=False)
    text = write._modelfile(facts, about, {"model": "a.gguf", "flags": flags, "chat": True, "title": "x"})
    found = parse_modelfile(text)
    stops = {v.removeprefix("stop ") for w, v in found if w == "PARAMETER" and v.startswith("stop ")}
    assert stops == said
    words = {word for word, _ in found}
    assert "LICENSE" not in words and ("TEMPLATE" in words) == bool(said)


@pytest.mark.parametrize(
    "text",
    [
        "FROM ./a\nFROM ./b\n",
        "PARAMETER num_ctx 5\n",
        "FROM ./a\nPARAMETER num_ctx many\n",
        "FROM ./a\nPARAMETER heat 1\n",
        'FROM ./a\nTEMPLATE """open\n',
        "FROM ./a\nRUN x\n",
        "FROM ./a\nFROM\n",
        'FROM ./a\nSYSTEM "open\n',
        'FROM ./a\nSYSTEM """a""" b\n',
        'FROM ./a\nTEMPLATE """a\u200bb"""\n',
        "FROM ./a\nMESSAGE robot hello\n",
        "FROM ./a\nMESSAGE user\n",
        "FROM ./a\nPARAMETER stop\n",
        'FROM ./a\nPARAMETER top_p "much"\n',
        "FROM ./a\nSYSTEM a\nSYSTEM b\n",
    ],
)
def test_the_parser_refuses(text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        parse_modelfile(text)


# ---------------------------------------------------------------- bundles of real files


def made_report(artifact: Path, sha256: str, *, license_name: str | None) -> dict[str, Any]:
    """A finished run's report about a real file; figures are made up."""
    import dataclasses

    from candidates import budget, candidate, dims, limit

    from edgeprune import graph
    from edgeprune.config.profiles import load_profile
    from edgeprune.config.targets import load_target
    from edgeprune.records import LaunchFlags, Selection
    from edgeprune.report import build

    flags = LaunchFlags(context_tokens=128, ubatch=32, kv_type="q8_0", mmap=False)
    taken = candidate("uniform-9.4@Q8_0", ratio=0.094, file=artifact.stat().st_size)
    assert taken.artifact is not None and taken.measured is not None
    taken = dataclasses.replace(
        taken,
        artifact=dataclasses.replace(
            taken.artifact, path=f"artifacts/{artifact.name}", sha256=sha256, quantization="Q8_0"
        ),
        measured=dataclasses.replace(taken.measured, flags=flags),
        meets={"memory": True},
    )
    other = dataclasses.replace(candidate("dense@Q8_0", memory=None), artifact=None)
    target, _ = load_target("raspberry-pi-5-8gb")
    return build.build(
        command=("edgeprune", "--target", "raspberry-pi-5-8gb", "--model", "a b"),
        seed=3,
        target=target,
        profile=load_profile("chat-2k"),
        budget=budget(200e6, kl=limit(0.5, "nats per token")),
        name="org/tiny-model",
        graph=graph.graph_of(graph.find_family("llama"), dims()),
        license_name=license_name,
        parent_key="parent-key",
        candidates=[taken, other],
        chosen=Selection(
            selected=taken.id,
            ties=(),
            headline="Prune: it is the best that fits.",
            nearest=None,
            missed=(),
            reasons={},
            key="s",
        ),
        context={"dense_perplexity": 12.5},
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `hf`, its file `tiny.gguf` and the finished run `run`."""
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    from builders import tiny_model_with_tokenizer

    from edgeprune import rundir
    from edgeprune.cli.main import run

    base = tmp_path_factory.mktemp("tiny")
    hf = tiny_model_with_tokenizer(base / "hf", hidden=128)  # q8_0 caches want heads of 32
    config = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    out = base / "tiny.gguf"
    assert run(["export", str(hf), "--quantization", "Q8_0", "--no-verify", "--out", str(out)]) == 0
    (base / "run" / "artifacts").mkdir(parents=True)
    shutil.copy(out, base / "run" / "artifacts" / "cut.gguf")
    report = made_report(out, rundir.sha256_file(out), license_name="apache-2.0")
    report["candidates"][0]["artifact"]["path"] = "artifacts/cut.gguf"
    (base / "run" / "report.json").write_text(json.dumps(report_build.sealed(report)))
    return base


@pytest.fixture(scope="module")
def bundle(tiny: Path) -> Path:
    """The bundle of the run in `tiny`."""
    from edgeprune.cli.main import run

    out = tiny / "bundle"
    assert run(["bundle", str(tiny / "run"), "--tokenizer", str(tiny / "hf"), "--out", str(out)]) == 0
    return out


def fails(args: list[str | Path], run_cli: Callable[..., Any]) -> str:
    ran = run_cli(*args)
    assert ran.code == 2, ran.err
    return str(ran.err.splitlines()[0])


def start(command: list[str | Path], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **env},
    )


def test_what_a_bundle_of_a_run_holds(bundle: Path, tiny: Path) -> None:
    model = "org-tiny-model-uniform-9.4-Q8-0.gguf"
    assert set(manifest.found_files(bundle)) == {
        *("README.md", "manifest.json", "Modelfile", "llama-server.sh", "sample.py", "sample.mjs"),
        *("tokenizer.json", "tokenizer_config.json", model),
    }
    assert (bundle / model).read_bytes() == (tiny / "tiny.gguf").read_bytes()
    assert (bundle / "tokenizer.json").read_bytes() == (tiny / "hf" / "tokenizer.json").read_bytes()
    plain = manifest.verify(bundle).manifest
    assert plain["parent"]["id"] == "org/tiny-model" and plain["parent"]["license"] == "apache-2.0"
    assert plain["candidate"] == "uniform-9.4@Q8_0" and plain["seeds"]["run"] == 3
    assert plain["model"]["path"] == model and plain["model"]["bytes"] == (bundle / model).stat().st_size
    assert plain["predicted"]["decode_tps"] == 48.0 and plain["measured"]["decode_tps"] == 50.0
    assert plain["budget"]["memory"] == {"value": 2e8, "unit": "bytes", "from": "command line"}
    assert plain["recipe"]["metric"] == "llm-bip" and plain["recipe"]["quantizations"]
    assert "edgeprune" in plain["made_with"] and plain["quality"]["kl"] == 0.1
    assert plain["flags"]["context_tokens"] == 128


def test_the_same_bundle_twice_is_the_same(bundle: Path, tiny: Path, run_cli: Callable[..., Any]) -> None:
    was = (bundle / "manifest.json").read_bytes()
    again = tiny / "again"
    assert run_cli("bundle", tiny / "run", "--tokenizer", tiny / "hf", "--out", again).code == 0
    assert (
        run_cli("bundle", tiny / "run", "--tokenizer", tiny / "hf", "--out", again).code == 0
    )  # replaces it
    assert (again / "manifest.json").read_bytes() == was
    assert not list(tiny.glob(".*.part"))


def test_the_model_card(bundle: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = (bundle / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "apache-2.0",
        "base_model": "org/tiny-model",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "library_name": "gguf",
        "tags": ["edgeprune", "gguf", "pruned"],
    }
    rows = {line.split(" | ")[0].strip("| "): line for line in body.splitlines() if line.count(" | ") == 2}
    assert rows["figure"] == "| figure | predicted | measured |"
    assert rows["decode"] == "| decode | 38 to 58 tokens/s | 50.0 ± 0.5 tokens/s |"
    assert rows["peak memory, context full"] == "| peak memory, context full | 149 MB | 150 MB |"
    assert rows["first token"] == "| first token | - | not measured |"
    assert rows["perplexity"] == "| perplexity | - | 20.00 ± 1.00 (dense parent 12.50) |"
    assert "\n## Limits\n\n- " in body
    assert "edgeprune --target raspberry-pi-5-8gb --model 'a b'" in body
    line = (bundle / "llama-server.sh").read_text().splitlines()[-1]
    assert line == (
        "exec llama-server -m org-tiny-model-uniform-9.4-Q8-0.gguf -c 128 -ub 32 -b 64 -ctk q8_0 -ctv q8_0 "
        '-fa on -lm none -np 1 --cache-ram 0 --ctx-checkpoints 0 "$@"'
    )
    assert line.removeprefix("exec ").removesuffix(' "$@"') in body
    assert start(["sh", "-n", bundle / "llama-server.sh"]).returncode == 0
    assert os.access(bundle / "llama-server.sh", os.X_OK)
    for name in ("sample.py", "sample.mjs"):
        assert (bundle / name).read_text() in body


def test_the_modelfile(bundle: Path) -> None:
    found = parse_modelfile((bundle / "Modelfile").read_text())
    model = next(bundle.glob("*.gguf")).name
    assert found[0] == ("FROM", f"./{model}")
    template = dict(found)["TEMPLATE"]
    messages = [{"role": "system", "content": dict(found)["SYSTEM"]}, {"role": "user", "content": "Hi"}]
    assert go(template, messages) == Jinja(CHATML)([{"role": "user", "content": "Hi"}])
    assert [value for word, value in found if word == "PARAMETER"] == [
        *("num_ctx 128", "num_batch 32", "stop <|im_end|>", "stop </s>")
    ]
    assert dict(found)["LICENSE"] == "apache-2.0"


def test_the_python_sample_runs(bundle: Path) -> None:
    sample = (bundle / "sample.py").read_text()
    assert len(ast.parse(sample).body) <= 10 and len(sample.splitlines()) <= 14
    done = start([sys.executable, bundle / "sample.py", "the quick brown fox"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    manifest.verify(bundle)  # running it leaves nothing behind


class _Server(http.server.BaseHTTPRequestHandler):
    """The two addresses of llama-server that the sample asks, answered by the bundle's own model."""

    llm: Any = None

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        more = {"max_tokens": min(asked["max_tokens"], 8), "temperature": 0.0}
        if self.path == "/v1/chat/completions":
            answer = self.llm.create_chat_completion(asked["messages"], **more)
        elif self.path == "/v1/completions":
            answer = self.llm.create_completion(asked["prompt"], **more)
        else:
            self.send_error(404)
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(bundle: Path) -> Iterator[str]:
    from llama_cpp import Llama

    _Server.llm = Llama(str(next(bundle.glob("*.gguf"))), n_ctx=128, n_threads=1, verbose=False)
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()
    _Server.llm = None


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_the_javascript_sample_for_a_server(bundle: Path, server: str) -> None:
    assert len((bundle / "sample.mjs").read_text().splitlines()) <= 10
    asked = [{"role": "user", "content": "the quick brown fox"}]
    expected = _Server.llm.create_chat_completion(asked, max_tokens=8, temperature=0.0)
    done = start(["node", bundle / "sample.mjs", "the quick brown fox"], SERVER=server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == expected["choices"][0]["message"]["content"].rstrip("\n")
    done = start(["node", bundle / "sample.mjs"], SERVER=server + "/nowhere")
    assert done.returncode == 1 and "404" in done.stderr


def test_a_file_of_its_own(tiny: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """No run, no template: nothing is said that is not known, and the samples complete text."""
    from builders import tiny_model_with_tokenizer

    hf = tiny_model_with_tokenizer(tmp_path / "plain")
    own = tmp_path / "my own.gguf"
    assert run_cli("export", hf, "--quantization", "F16", "--no-verify", "--out", own).code == 0
    ran = run_cli("bundle", own, "--license", 'Odd "1.0"', "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    plain = manifest.verify(tmp_path / "out").manifest
    assert (
        plain["measured"] is None and plain["predicted"] is None and plain["model"]["quantization"] == "F16"
    )
    assert plain["model"]["path"] == "my-own.gguf" and plain["parent"] == {
        "id": "my own",
        "license": 'Odd "1.0"',
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "other"\nlicense_name: "Odd \\"1.0\\""\n' in card and "base_model" not in card
    assert "| decode | - | not measured |" in card and "Quality was not measured." in card
    parsed = parse_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert dict(parsed)["TEMPLATE"] == "{{ .Prompt }}"
    # the tokenizer comes from the file
    from edgeprune import tokenizer

    text = "the quick brown fox, 123 ünï 😀"
    assert tokenizer.encode(tmp_path / "out", text) == tokenizer.encode(hf, text)
    done = start([sys.executable, tmp_path / "out" / "sample.py", "the quick"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick") and len(done.stdout.strip()) > len("the quick")


def test_what_cannot_be_bundled(tiny: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    args: list[str | Path] = ["bundle", tiny / "run", "--out", out]
    assert "no candidate 'dense@Q4_0' (did you mean 'dense@Q8_0'?)" in fails(
        [*args, "--candidate", "dense@Q4_0"], run_cli
    )
    assert "was planned and not made" in fails([*args, "--candidate", "dense@Q8_0"], run_cli)
    assert "does not exist" in fails(["bundle", tmp_path / "no", "--out", out], run_cli)
    assert "neither a finished run" in fails(["bundle", tiny / "hf", "--out", out], run_cli)
    assert "is no GGUF file" in fails(["bundle", tiny / "hf" / "config.json", "--out", out], run_cli)
    assert "has no tokenizer.json" in fails([*args, "--tokenizer", tmp_path], run_cli)
    assert "is no bundle" in fails(["bundle", tiny / "run", "--out", tiny / "hf"], run_cli)
    run = Path(shutil.copytree(tiny / "run", tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    file = run / "artifacts" / "cut.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert "its sha256 is another" in fails(["bundle", run, "--out", out], run_cli)
    file.unlink()
    assert "is not there" in fails(["bundle", run, "--out", out], run_cli)
    report["candidates"][0]["artifact"]["path"] = "../../etc/x.gguf"
    (run / "report.json").write_text(json.dumps(report_build.sealed(report)))
    assert "leaves the run folder" in fails(["bundle", run, "--out", out], run_cli)
    report["selected"] = None
    (run / "report.json").write_text(json.dumps(report_build.sealed(report)))
    assert "selected nothing" in fails(["bundle", run, "--out", out], run_cli)
    assert not out.exists() and not list(tmp_path.glob(".*.part"))


def test_a_link_is_not_a_second_copy_and_refresh_forgets(tiny: Path, tmp_path: Path) -> None:
    from edgeprune.pipeline import bundling

    run = Path(shutil.copytree(tiny / "run", tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    bundling.refresh(run, report, tiny / "hf")
    manifest.verify(run / "bundle")
    (model,) = (run / "bundle").glob("*.gguf")
    assert model.samefile(run / "artifacts" / "cut.gguf")
    bundling.refresh(run, {**report, "selected": None}, tiny / "hf")
    assert not (run / "bundle").exists()
    (run / "bundle").mkdir()
    (run / "bundle" / "mine").write_text("x")
    bundling.refresh(run, {**report, "selected": None}, tiny / "hf")
    assert (run / "bundle" / "mine").exists()


@pytest.fixture(scope="module")
def onnx_bundle(tiny: Path) -> Path:
    """The bundle of an ONNX folder whose layers differ in width."""
    pytest.importorskip("onnx", reason="the extra 'onnx' is not installed")
    from builders import tiny_tokenizer, uneven_llama

    from edgeprune import checkpoint, graph
    from edgeprune.cli.main import run
    from edgeprune.exporters import onnx

    hf = uneven_llama(tiny / "uneven", [(4, 2, 128), (2, 1, 64)], vocab=300, tied=True)
    tiny_tokenizer(hf, 300)
    source = checkpoint.SafetensorsSource(hf)
    onnx.export(
        tiny / "onnx",
        family=graph.find_family("llama"),
        dims=graph.build(source.config).dims,
        config=source.config,
        read_tensor=lambda name: checkpoint.to_float32(source.tensor(name)),
        quantization="int8",
        tokenizer_folder=hf,
    )
    assert run(["bundle", str(tiny / "onnx"), "--license", "mit", "--out", str(tiny / "onnx-bundle")]) == 0
    return tiny / "onnx-bundle"


def test_the_bundle_of_an_onnx_folder(onnx_bundle: Path) -> None:
    plain = manifest.verify(onnx_bundle).manifest
    assert plain["model"] == {"format": "onnx", "quantization": "int8", "path": "."}
    names = {row["path"] for row in plain["files"]}
    assert {
        "onnx/model_int8.onnx",
        "genai_config.json",
        "config.json",
        "tokenizer.json",
        "README.md",
    } <= names
    assert not names & {"Modelfile", "llama-server.sh"}
    pytest.importorskip("onnxruntime_genai", reason="the extra 'onnx' is not installed")
    done = start([sys.executable, onnx_bundle / "sample.py", "the quick"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick") and len(done.stdout.strip()) > len("the quick")


def test_the_javascript_sample_for_onnx(onnx_bundle: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    modules = CACHE / "js" / "node_modules"
    if not (modules / "@huggingface" / "transformers").is_dir():
        pytest.skip(f"scripts/interop/transformers-js has not set it up in {CACHE}")
    shutil.copytree(onnx_bundle, tmp_path / "model")
    (tmp_path / "node_modules").symlink_to(modules)
    done = start(["node", tmp_path / "model" / "sample.mjs", "the quick"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick") and len(done.stdout.strip()) > len("the quick")


@pytest.mark.parametrize("form", ["gguf", "onnx"])
def test_one_flipped_byte_in_any_file_of_a_real_bundle(
    form: str, tmp_path: Path, request: pytest.FixtureRequest, run_cli: Callable[..., Any]
) -> None:
    """First, middle and last byte of every file, the manifest included; the command names that file alone."""
    root = Path(
        shutil.copytree(
            request.getfixturevalue("bundle" if form == "gguf" else "onnx_bundle"), tmp_path / form
        )
    )
    names = list(manifest.found_files(root))
    assert len(names) >= 9
    for name in names:
        path = root / name
        before = path.read_bytes()
        for at in {0, len(before) // 2, len(before) - 1}:
            path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            assert problems(root)[0].startswith(f"{name}: ")
        ran = run_cli("verify", root)
        assert ran.code == 2 and ran.err.startswith(f"Error: {name}: "), ran.err
        path.write_bytes(before)
    assert run_cli("verify", root).code == 0


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"a": 1}x', "\ufffe"])
def test_damaged_settings_beside_an_onnx_model_say_nothing(tmp_path: Path, text: str) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    about = writer._read_folder(tmp_path)
    assert (about.template, about.eos, about.max_context) == (None, "", None)
