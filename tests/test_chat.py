"""Chat templates: ids and masks equal those of transformers, the right one is taken, hostile ones are refused."""

import chat_templates as files
import numpy as np
import pytest
import tokenizers
from conversations import (  # noqa: F401
    CONVERSATIONS,
    TOOL,
    cache_fixture,
    folders_fixture,
    oracle,
    read,
    theirs_fixture,
    turns,
    write_rows,
)

from lcx.data import load_tokenizer, notices, save_tokenizer
from lcx.data.chat import turn_end_ids
from lcx.data.chat_templates import chat_templates
from lcx.errors import UserError


@pytest.mark.parametrize("name", [*files.TEMPLATES])
def test_ids_and_masks_equal_those_of_transformers(tmp_path, folders, theirs, name):
    """Every conversation on its own: what the template refuses there is refused here, in one line with its place."""
    compared = 0
    for title, row in CONVERSATIONS.items():
        source = write_rows(tmp_path / f"{title}.jsonl", [row])
        marked = name.startswith("marked")
        try:
            want = oracle(theirs[name], row, return_assistant_tokens_mask=marked)
        except Exception:
            with pytest.raises(
                UserError, match=r"jsonl line 1: the chat template of .* cannot render"
            ) as found:
                read(source, folders[name])
            assert "\n" not in str(found.value)
            continue
        if title == "parts" and "[{'type'" in theirs[name].decode(want["input_ids"]):
            with pytest.raises(UserError, match="writes it as Python prints a list"):
                read(source, folders[name])
            continue
        if title == "assistant first" and not marked:
            continue  # no prompt comes before it; see below
        ((ids, mask),) = read(source, folders[name])
        assert ids == want["input_ids"], title
        if marked:
            assert mask == want["assistant_masks"], title
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "tools"])
def test_without_blocks_the_loss_is_on_what_follows_the_generation_prompt(tmp_path, folders, theirs, name):
    for title in ("plain", "no system", "unicode", "white space", "special tokens", "ends with user"):
        row = CONVERSATIONS[title]
        ((ids, mask),) = read(write_rows(tmp_path / f"{title}.jsonl", [row]), folders[name])
        pieces = theirs[name].convert_ids_to_tokens(ids)  # a character for each byte, but for special tokens
        ends = np.cumsum([len(piece) for piece in pieces])
        want = np.zeros(len(ids), int)
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                begin, end = (
                    len(theirs[name].apply_chat_template(
                        row["messages"][:stop], add_generation_prompt=prompt, tokenize=False).encode())
                    for stop, prompt in ((i, True), (i + 1, False))
                )  # fmt: skip
                want |= (ends > begin) & (ends - list(map(len, pieces)) < end)
        assert mask == want.tolist(), title
        assert 0 < sum(mask) < len(mask)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, folders):
    """Qwen3 and its kin leave out reasoning once a question follows: where the turn ends is then not certain."""
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}]
    for row in rows:
        for message in row["messages"]:
            message["reasoning"] = "because"
    source = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(
        UserError, match=r"data.jsonl line 2: .* message 2 .*Dataset.chat_template.*chat_loss='all'"
    ):
        read(source, folders["forgetful"])
    assert all(all(mask) for _, mask in read(source, folders["forgetful"], chat_loss="all"))
    marked = files.write_tokenizer(tmp_path / "x")
    (tmp_path / "own.jinja").write_text(files.MARKED)
    found = read(source, marked, chat_template=str(tmp_path / "own.jinja"))
    assert found == read(source, folders["marked"])


def test_a_template_that_writes_the_date_is_said(tmp_path, folders, caplog):
    source = write_rows(tmp_path / "data.jsonl", [CONVERSATIONS["plain"]] * 2)
    for name, times in (("chatml", 0), ("llama3", 1)):
        notices.say_once.cache_clear()
        caplog.clear()
        read(source, folders[name])
        assert sum("may write the date" in line for line in caplog.messages) == times


def test_nothing_is_added_to_what_the_template_writes(tmp_path, folders):
    source = write_rows(tmp_path / "data.jsonl", [CONVERSATIONS["plain"]])
    ((ids, _),) = read(source, folders["chatml"], add_bos=True, add_eos=True)
    assert [(ids, _)] == read(source, folders["chatml"], add_bos=False)
    ((with_bos, _),) = read(source, folders["llama3"], add_bos=True)
    bos = load_tokenizer(str(folders["llama3"])).bos_id
    assert with_bos.count(bos) == 1 and with_bos[0] == bos


@pytest.mark.parametrize(
    ("after", "end"),
    [("<|im_end|>\\n", ["<|im_end|>"]), ("\\n", []), (" ", []), (" </s>", []), ("", [])],
)
def test_only_a_special_token_right_after_an_answer_ends_a_turn(tmp_path, after, end):
    """A space of sentencepiece, which alone is decoded to nothing, ended every answer at its next such token."""
    letters = {letter: i for i, letter in enumerate("\u2581\nAn aswer.Qutio[]:")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<|im_end|>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '@' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template.replace("@", after))
    ours = load_tokenizer(str(tmp_path))
    assert turn_end_ids(chat_templates(ours), ours) == [tokenizer.token_to_id(token) for token in end]


def test_a_template_that_rewrites_the_answer_names_no_end_of_it(folders, tmp_path):
    template = "{% for m in messages %}<|im_end|>{{ m.content | upper }}{% endfor %}"
    (tmp_path / "upper.jinja").write_text(template)
    ours = load_tokenizer(str(folders["chatml"]))
    assert turn_end_ids(chat_templates(ours, str(tmp_path / "upper.jinja")), ours) == []


def test_reasoning_goes_by_every_name(tmp_path, folders, theirs):
    for field in ("reasoning", "thinking", "reasoning_content"):
        row = {"messages": [*turns("a"), {"role": "assistant", "content": "b", field: "since"}]}
        ((ids, _),) = read(write_rows(tmp_path / f"{field}.jsonl", [row]), folders["forgetful"])
        assert ids == oracle(theirs["forgetful"], row)["input_ids"]


# ---------------------------------------------------------------------------------------------- where templates are


@pytest.mark.parametrize(
    ("config", "beside", "extra"),
    [
        ("in the config", None, {}),
        ("in the config", "beside", {}),
        (None, "beside", {}),
        (None, "beside", {"tool_use": "with tools", "rag": "more"}),
        ("in the config", None, {"tool_use": "with tools", "default": "of the folder"}),
        (
            [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "named tools"}],
            None,
            {},
        ),
        ([{"name": "other", "template": "x"}], None, {}),
        ({"default": "as an object"}, None, {}),
        (None, None, {}),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(tmp_path, config, beside, extra):
    transformers = pytest.importorskip("transformers")
    folder = files.write_tokenizer(tmp_path / "tokenizer", config)
    if beside:
        (folder / "chat_template.jinja").write_text(beside)
    for name, text in extra.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    save_tokenizer(load_tokenizer(str(folder)), tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        ours = chat_templates(load_tokenizer(str(place)))
        for tools in (None, [TOOL]):
            try:
                want = theirs.get_chat_template(tools=tools)
            except ValueError:
                with pytest.raises(UserError, match=r"chat template.*set Dataset.chat_template"):
                    ours.choose(tools)
            else:
                assert ours.choose(tools) == want
    if config is None and not beside:
        return
    assert dict(ours.special_tokens) == theirs.special_tokens_map


def test_a_template_by_path_or_name(tmp_path, folders):
    named = [{"name": "default", "template": files.CHATML}, {"name": "short", "template": files.MARKED}]
    folder = files.write_tokenizer(tmp_path / "named", named)
    source = write_rows(tmp_path / "data.jsonl", [CONVERSATIONS["plain"]])
    assert read(source, folder, chat_template="short") == read(source, folders["marked"])
    with pytest.raises(
        UserError, match=r"Dataset.chat_template='shrt' is not a file, nor one of .*default, short"
    ):
        read(source, folder, chat_template="shrt")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    ((ids, mask),) = read(source, "bytes", chat_template=str(template))
    text = "".join(f"{m['role']}:{m['content']};" for m in CONVERSATIONS["plain"]["messages"])
    assert bytes(ids).decode() == text
    assert (
        bytes(i for i, m in zip(ids, mask, strict=True) if m).decode()
        == "assistant:hello there;assistant:general;"
    )


def test_without_a_template_conversations_are_refused(tmp_path):
    source = write_rows(tmp_path / "data.jsonl", [CONVERSATIONS["plain"]])
    with pytest.raises(UserError, match=r"has no chat template .*set Dataset.chat_template to a .jinja file"):
        read(source, "bytes")


# -------------------------------------------------------------------------------------------------- hostile templates

HOSTILE = {
    "{% for i in range(10**9) %}{% endfor %}": "",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "steps",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}": "characters",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": "characters",
    "{{ 'a' * 10**11 }}": "characters",
    "{{ 9 ** (9 ** 9) }}": "",
    "{{ '%999999999d' % 1 }}": "width",
    "{{ '{:>999999999}'.format(1) }}": "width",
    "{{ 'a'.center(999999999) }}": "number",
    "{{ 'a' | center(999999999) }}": "number",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recurses without end",
    "{{ messages.__class__ }}": "__class__",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "__class__",
    "{{ '' | attr('__class__') }}": "__class__",
    "{{ messages.append(1) }}": "append",
    "{{ raise_exception }}{{ raise_exception.__globals__ }}": "__globals__",
    "{{ namespace(__class__=1) }}": "__class__",
    "{% include '/etc/passwd' %}": "",
    "{% import os %}": "",
    "{% if %}": "line 1",
    "{% for m in messages %}": "",
    "{{ messages[0].nothing.more }}": "no attribute",
    "{{ raise_exception('this model\nneeds more') }}": "this model needs more",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}": "",
    "{{ 1 / 0 }}": "zero",
    "\ud800{{ messages[0].content }}": "surrogates not allowed",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:40])
def test_hostile_and_damaged_templates_are_refused_in_one_line(tmp_path, template):
    folder = files.write_tokenizer(tmp_path / "tokenizer", template)
    source = write_rows(tmp_path / "data.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(UserError) as found:
        read(source, folder)
    message = str(found.value)
    assert HOSTILE[template] in message and "\n" not in message and len(message) < 900
    assert "data.jsonl line 1" in message and "Dataset.chat_template" in message


@pytest.mark.parametrize(
    "value", [3, ["a"], [{"name": "x"}], [{"name": ["a"], "template": 2}], {"default": 1}]
)
def test_a_damaged_setting_is_refused(tmp_path, value):
    folder = files.write_tokenizer(tmp_path / "tokenizer", value)
    source = write_rows(tmp_path / "data.jsonl", [{"messages": turns("a", "b")}])
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template is"):
        read(source, folder)


def test_text_is_read_whatever_the_template_is(tmp_path):
    """A damaged template is no reason to refuse text."""
    folder = files.write_tokenizer(tmp_path / "tokenizer", "{% if %}")
    source = write_rows(tmp_path / "data.jsonl", [{"text": "hello"}])
    assert len(read(source, folder)) == 1
    with pytest.raises(UserError, match="is damaged"):
        read(source, folder, chat=True)
