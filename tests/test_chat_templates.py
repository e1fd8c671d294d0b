"""Chat templates of strangers: what transformers makes of good ones, and an end to bad ones."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune import chat_templates
from edgeprune.chat_templates import Renderer, TemplateFailed, TemplateRefused
from edgeprune.errors import ConfigError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Grüße \u2028 😀 {{ x }}"},
    {"role": "assistant", "content": "One.\ntwo"},
    {"role": "user", "content": "  Bye "},
]
# each uses something that published templates use
GOOD = {
    "chatml": (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "namespace": (
        "{%- set ns = namespace(found=false, n=0) -%}{% for m in messages %}\n  {% if loop.first %}"
        "{{ bos_token }}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}{% if ns.found is false %}none{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "json": "{{ messages | tojson }} {{ dict(a=1) | tojson(indent=2) }}",
    "absent": (
        "{% if tools is not none and tools %}tools{% endif %}{% if documents %}d{% endif %}"
        "{{ '' if custom is defined else 'no' }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set a = 1 %}{{ m.content }}"
        "{% endgeneration %}{{ a }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "macro": (
        "{% macro say(m) %}[{{ m.role }}]{{ m.content }}{% endmacro %}{% for m in messages[1:] %}{{ say(m) }}"
        "{% endfor %}{{ messages[0].content.split(' ')[-1] }}{{ messages | map(attribute='role') | join }}"
    ),
}
# seconds: any number of processor hours; each within what jinja2's own sandbox allows
SLOW = {
    "loops": "{% set n = namespace(i=0) %}" + "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "recursion": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "power": "{{ 9 ** (9 ** 9) }}",
    "compiling": "{% set x = 7 ** (7 ** 11) %}",
}
LARGE = {
    "repeat": "{{ 'x' * 8000000000 }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "doubling": (
        "{% set n = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
        "{{ n.s }}"
    ),
    "padding": "{{ 'x' | center(4000000000) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "lists": "{% set l = range(99999) | list %}{% set k = l * 99999 %}{{ k | length }}",
    "kept": "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}"
    "{% endfor %}{% endset %}",
}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, to put templates into."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import builders

    return builders.tiny_model_with_tokenizer(tmp_path_factory.mktemp("model") / "chatty")


def with_template(model: Path, folder: Path, template: Any) -> Path:
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


# ---------------------------------------------------------------- good ones


@pytest.mark.parametrize("name", GOOD)
def test_a_template_gives_what_transformers_gives(chatty: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = with_template(chatty, tmp_path / "m", GOOD[name])
    known = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    with Renderer(GOOD[name], name="m", names=known.special_tokens_map, dates="now") as jinja:
        for go_on, messages in ((True, MESSAGES), (False, MESSAGES), (True, MESSAGES[1:2])):
            want = known.apply_chat_template(messages, tokenize=False, add_generation_prompt=go_on)
            assert jinja.render(messages, go_on=go_on) == want


def test_what_a_template_is_told_about_the_date() -> None:
    source = "{{ strftime_now('%Y') }}"
    with Renderer(source, name="m", dates="1 May") as jinja:
        assert jinja.render(MESSAGES, go_on=True) == "1 May"
    with Renderer(source, name="m", dates="now") as jinja:
        assert int(jinja.render(MESSAGES, go_on=True)) >= 2024
    with Renderer(source, name="m") as jinja, pytest.raises(TemplateRefused, match="strftime_now"):
        jinja.render(MESSAGES, go_on=True)


def test_texts_that_are_written_in_a_template() -> None:
    with Renderer("a{% if x == 'b\\n' %}c{% endif %}{# no #}", name="m") as jinja:
        assert jinja.literals() == ["a", "b\n", "c"]


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", TemplateRefused, "roles must alternate"),
        ("{% if %}", TemplateRefused, "Expected an expression"),
        ("{{ messages[0].__class__.__mro__ }}", TemplateRefused, "unsafe"),
        ("{% set n = namespace(_x=1) %}", TemplateRefused, "may not have the name"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", TemplateRefused, "may not have the name"),
        ("{{ messages.append(1) }}", TemplateRefused, "append"),
        ("{% for i in range(100001) %}{% endfor %}", TemplateFailed, "Range too big"),
        ("{{ 1 / 0 }}", TemplateFailed, "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TemplateFailed, "RecursionError"),
    ],
)
def test_what_a_template_raises(source: str, kind: type[Exception], says: str) -> None:
    with Renderer(source, name="m") as jinja:
        for _ in range(2):  # the process goes on
            with pytest.raises(kind, match=says) as raised:
                jinja.render(MESSAGES, go_on=True)
            assert type(raised.value) is kind
    assert jinja._process is None


# ---------------------------------------------------------------- bad ones


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "ONE_S", 1.0)


def stopped(source: str) -> str:
    """What is said of a template that is stopped; the clock is for a busy machine."""
    began = time.monotonic()
    with Renderer(source, name="m") as jinja:
        with pytest.raises(ConfigError) as raised:
            jinja.render(MESSAGES, go_on=True)
        assert time.monotonic() - began < 120
    assert raised.value.hint is not None and "another copy" in raised.value.hint
    return raised.value.message


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.usefixtures("short")
def test_a_template_without_an_end_is_stopped(name: str) -> None:
    assert stopped(SLOW[name]) == (
        "the chat template of m was stopped: rendering took more than 1 s of processor time"
    )


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_fills_the_memory_is_stopped(name: str) -> None:
    much = "more text than a conversation can be" if name == "loops" else "more than 512 MiB of memory"
    assert stopped(LARGE[name]) == f"the chat template of m was stopped: rendering took {much}"


def test_a_long_conversation_is_not_too_much() -> None:
    long = [{"role": "user", "content": "é" * 3_000_000}]
    with Renderer(GOOD["chatml"], name="m") as jinja:
        assert len(jinja.render(long, go_on=False)) == 3_000_000 + len("<|im_start|>user\n<|im_end|>\n")


def test_many_slow_conversations_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each within the time of one, all together beyond what is allowed for so many."""
    monkeypatch.setattr(chat_templates, "ONE_S", 1.0)
    source = "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}"
    done = 0
    with Renderer(source, name="m") as jinja, pytest.raises(ConfigError, match="processor time"):
        for _ in range(1000):
            jinja.render(MESSAGES, go_on=True)
            done += 1
    assert 0 < done < 100


def test_a_template_of_megabytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 1048577 characters; at most 1048576"):
        Renderer("x" * ((1 << 20) + 1), name="m")


# ---------------------------------------------------------------- where they are rendered


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("source", [SLOW["loops"], LARGE["repeat"]], ids=["slow", "large"])
def test_recovery_text_with_such_a_template_is_one_line(chatty: Path, tmp_path: Path, source: str) -> None:
    from edgeprune.recovery import text

    folder = with_template(chatty, tmp_path / "m", source)
    documents = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    with pytest.raises(ConfigError, match=f"the chat template of {folder} was stopped: rendering took"):
        text.pack(documents, lambda s: [1], lambda: text.Chat(folder), n_tokens=2, separator=None)


def test_a_conversation_that_the_template_refuses_is_one_line(chatty: Path, tmp_path: Path) -> None:
    from edgeprune.recovery import text

    folder = with_template(chatty, tmp_path / "m", "{{ raise_exception('no\\nsystem\\x1b[2J') }}")
    documents = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    with pytest.raises(ConfigError, match="does not take a conversation of the text: no"):
        text.pack(documents, lambda s: [1], lambda: text.Chat(folder), n_tokens=2, separator=None)


def test_a_bundle_with_such_a_template_is_refused(
    run_cli: Callable[..., Any], chatty: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    folder = with_template(chatty, tmp_path / "m", LARGE["repeat"])
    ran = run_cli("export", folder, "--quantization", "F16", "--out", tmp_path / "a.gguf", "--no-verify")
    assert ran.code == 0, ran.err
    ran = run_cli("bundle", tmp_path / "a.gguf", "--out", tmp_path / "bundle")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Error: the chat template of a.gguf was stopped: rendering took more than")
    assert not (tmp_path / "bundle").exists()


def test_a_tokenizer_that_cannot_be_read_is_one_line(chatty: Path, tmp_path: Path) -> None:
    from edgeprune.recovery import text

    for i, damage in enumerate(([1], {"a": 1}, [{"name": "x", "template": "y"}])):
        folder = with_template(chatty, tmp_path / f"m{i}", damage)
        with pytest.raises(ConfigError, match=r"has no tokenizer that can be read|the chat template of"):
            text.Chat(folder)


@pytest.mark.usefixtures("short")
def test_the_main_job_refuses_such_a_model_at_once(
    run_cli: Callable[..., Any], chatty: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    folder = with_template(chatty, tmp_path / "m", SLOW["loops"])
    out = tmp_path / "run"
    args = ("--target", "laptop-cpu", "--budget", "1GB", "--profile", "tiny-512", "--model", folder)
    ran = run_cli(*args, "--out", out)
    assert (ran.code, ran.out) == (2, "")
    assert "Error: the chat template of m was stopped" in ran.err
    assert not out.exists()


def test_trimming_a_vocabulary_with_such_a_template_is_refused(short: None) -> None:
    pytest.importorskip("tokenizers")
    from edgeprune import vocabulary

    with pytest.raises(ConfigError, match="the chat template of here was stopped"):
        vocabulary._template_texts(SLOW["loops"], {}, "here")
    assert vocabulary._template_texts("<b>{{ bos_token }}{{ 1 / 0 }}", {"bos_token": "<s>"}, "here") == [
        "<b>"
    ]
