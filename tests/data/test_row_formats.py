"""Rows of every layout -> one canonical conversation; every complaint names the field and what was expected."""

import json
from typing import Any

import pytest

from minimind.data import conversation, preference, prompt, text

TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
BARE_CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
QUESTION = {"role": "user", "content": "1 + 2?"}
ANSWER = {"role": "assistant", "content": "3"}
TOOL_TURNS = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            QUESTION,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {**BARE_CALL, "arguments": '{"a": 1, "b": 2}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [WRAPPED],
    },
    "openai with parts and a developer": {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
            {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "assistant", "content": "It is 3.", "tool_calls": []},
        ],
        "tools": [TOOL],
    },
    "upstream minimind": {
        "conversations": [
            {"role": "system", "content": "Be brief.", "tools": json.dumps([WRAPPED])},
            {**QUESTION, "reasoning_content": "", "tools": "", "tool_calls": ""},
            {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": json.dumps([BARE_CALL])},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3.", "reasoning_content": ""},
        ]
    },
    "upstream minimind with objects": {
        "conversations": [{**TOOL_TURNS[0], "tools": [TOOL]}, *TOOL_TURNS[1:]],
    },
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": json.dumps(BARE_CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
        "tools": json.dumps([TOOL]),
    },
    "typed parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "value": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "value": "1 + 2?"}]},
            {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(BARE_CALL)}]},
            {"role": "tool", "content": [{"type": "text", "value": "3"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "It is 3."}]},
        ],
        "tools": json.dumps([WRAPPED]),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_conversation(layout: str) -> None:
    found, problems = conversation.read(LAYOUTS[layout])
    assert problems == []
    assert found.messages == TOOL_TURNS
    assert found.tools == [WRAPPED]


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"instruction": "1 + 2?", "input": "", "output": "3"}, ["1 + 2?", "3"]),
        ({"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Hm."}, ["Hm.", "Add\n1 and 2", "3"]),
        ({"instruction": "And?", "output": "4", "history": [["1 + 2?", "3"]]}, ["1 + 2?", "3", "And?", "4"]),
        ({"instruction": "1 + 2?", "response": "3"}, ["1 + 2?", "3"]),
        ({"prompt": "1 + 2?", "response": "3"}, ["1 + 2?", "3"]),
        ({"prompt": "1 + 2?", "completion": "3"}, ["1 + 2?", "3"]),
        ({"name": "n", "messages": [{"message": "Hi?"}, {"message": "Hi!", "attrs": []}]}, ["Hi?", "Hi!"]),
        # what follows the last answer teaches nothing
        ({"messages": [QUESTION, ANSWER, {"role": "user", "content": "Thanks"}]}, ["1 + 2?", "3"]),
        ({"messages": [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": ""}]}, ["1 + 2?", "3"]),
        # nothing at all to learn: no problem, but no messages either (the report counts it)
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, []),
    ],
)
def test_other_layouts(row: dict[str, Any], contents: list[str]) -> None:
    found, problems = conversation.read(row)
    assert problems == []
    assert [message["content"] for message in found.messages] == contents
    assert [m["role"] for m in found.messages if m["role"] != "system"] == ["user", "assistant"] * (len(contents) // 2)


def test_reasoning_and_words_before_a_call() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "gpt", "value": "Let me see.", "reasoning_content": "A sum."},
            {"from": "function_call", "value": json.dumps([BARE_CALL, BARE_CALL])},
        ]
    }
    found, problems = conversation.read(row)
    assert problems == []
    expected = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "A sum.",
        "tool_calls": [CALL, CALL],
    }
    assert found.messages[1:] == [expected]


def test_labels_of_kto_rows() -> None:
    assert [
        conversation.read({"messages": [QUESTION, ANSWER], "label": value})[0].disliked for value in (True, False)
    ] == [
        False,
        True,
    ]


def _with(**last: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", **last}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "row: has no conversation (its fields are nothing)"),
    ({"text": "a", "meta": 1}, "row: has no conversation (its fields are text, meta), expected messages"),
    ({"messages": "hello"}, "messages: is a string, expected a list of messages"),
    ({"messages": []}, "messages: is empty, expected at least one message"),
    ({"messages": ["hello"]}, 'messages[0]: is a string, expected an object {"role", "content"}'),
    ({"messages": [{"content": "a"}]}, 'messages[0]: has no "role"'),
    ({"messages": [{"role": "usr", "content": "a"}]}, 'messages[0].role: "usr" is unknown, expected system, user'),
    ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role: 3 is unknown"),
    ({"conversations": [{"from": "me", "value": "a"}]}, 'conversations[0].from: "me" is unknown'),
    ({"messages": [{"role": "user"}]}, "messages[0]: has no content, expected a string"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]: content is null, expected a string"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: is the number 5, expected a string"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content: is an object, expected a string"),
    (
        {"messages": [{"role": "user", "content": "a\0b"}]},
        "messages[0].content: holds the character NUL (U+0000) at place 2",
    ),
    ({"messages": [{"role": "user", "content": ["a"]}]}, 'messages[0].content[0]: expected a part {"type": "text"'),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type: 'image_url' is not possible",
    ),
    ({"messages": [QUESTION]}, "messages: has no assistant turn, expected at least one answer"),
    ({"messages": [ANSWER]}, "messages: the first turn is the assistant's, expected the user's"),
    ({"messages": [QUESTION, QUESTION, ANSWER]}, "messages: turns 1 and 2 are both the user's"),
    ({"messages": [QUESTION, ANSWER, ANSWER]}, "messages: turns 2 and 3 are both the assistant's"),
    ({"messages": [QUESTION, {"role": "system", "content": "a"}, ANSWER]}, "messages: turn 2 is a system turn"),
    ({"messages": [QUESTION, ANSWER, {"role": "tool", "content": "a"}, ANSWER]}, "messages: turn 3 is a tool's answer"),
    (
        {"messages": [QUESTION, {"role": "assistant", "content": " "}, QUESTION, ANSWER]},
        "messages: turn 2, an answer, is empty",
    ),
    (_with(content="", tool_calls="[{"), "messages[1].tool_calls: is a string that is not valid JSON"),
    (_with(content="", tool_calls=[{"arguments": {}}]), "messages[1].tool_calls[0]: expected a tool call"),
    (
        _with(content="", tool_calls=[{"name": "f", "arguments": "{1"}]),
        "messages[1].tool_calls[0].arguments: is a string that is not",
    ),
    (
        _with(content="", tool_calls=[{"name": "f", "arguments": [1]}]),
        "messages[1].tool_calls[0].arguments: is a list, expected an object",
    ),
    (_with(content="a", reasoning_content=7), "messages[1].reasoning_content: is the number 7, expected a string"),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]},
        "conversations[1].value: is a string that is not valid JSON",
    ),
    ({"messages": [QUESTION, ANSWER], "tools": "[add]"}, "tools: is a string that is not valid JSON"),
    ({"messages": [QUESTION, ANSWER], "tools": {"name": "f"}}, "tools: is an object, expected a list of tools"),
    ({"messages": [QUESTION, ANSWER], "tools": [{"name": 1}]}, 'tools[0]: expected {"type": "function"'),
    ({"messages": [TOOL_TURNS[0], QUESTION, ANSWER], "system": "b"}, "system: is given beside a system turn"),
    ({"messages": [QUESTION, ANSWER], "system": 1}, "system: is the number 1, expected a string"),
    ({"messages": [QUESTION, ANSWER], "label": "yes"}, "label: expected true or false"),
    ({"instruction": "a"}, "output: is missing"),
    ({"instruction": "a", "output": ["b"]}, "output: is a list, expected a string"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]: expected [question, answer]"),
    ({"prompt": 1, "response": "b"}, "prompt: is the number 1, expected a string"),
]


@pytest.mark.parametrize(("row", "what"), BAD, ids=[what[:40] for _, what in BAD])
def test_problems_of_conversations(row: dict[str, Any], what: str) -> None:
    problems = conversation.read(row)[1]
    assert problems
    assert problems[0].startswith(what)


def test_all_problems_of_a_row_are_told() -> None:
    row = {"messages": [{"role": "usr", "content": "a"}, {"role": "user", "content": 1}], "tools": "x"}
    assert [problem.split(":")[0] for problem in conversation.read(row)[1]] == [
        "messages[0].role",
        "messages[1].content",
        "tools",
    ]


def test_text_rows() -> None:
    assert text.read({"text": "a", "id": 3}) == ("a", [])
    assert text.read({"content": "a"})[1] == ['text: is missing (the row has content), expected {"text": "..."}']
    assert text.read({"text": None})[1] == ["text: is null, expected a string"]
    assert text.read({"text": "\0"})[1] == ["text: holds the character NUL (U+0000) at place 1, expected text"]


def test_preferences_of_every_layout() -> None:
    bad = {"role": "assistant", "content": "4"}
    rows: list[dict[str, Any]] = [
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, bad]},
        {"prompt": "1 + 2?", "chosen": "3", "rejected": "4"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [bad]},
        {"prompt": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, bad]},
        {"instruction": "1 + 2?", "chosen": "3", "rejected": "4"},
        {
            "conversations": [{"from": "human", "value": "1 + 2?"}],
            "chosen": {"from": "gpt", "value": "3"},
            "rejected": {"from": "gpt", "value": "4"},
        },
    ]
    for row in rows:
        found, problems = preference.read(row)
        assert problems == []
        assert (found.prompt, found.chosen, found.rejected) == ([QUESTION], [ANSWER], [bad])
        assert preference.unpaired(found) == []
    unpaired, problems = preference.read({"messages": [QUESTION, bad], "label": False})
    assert problems == []
    assert (unpaired.prompt, unpaired.chosen, unpaired.rejected) == ([QUESTION], None, [bad])
    assert "--loss kto" in preference.unpaired(unpaired)[0]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": "a"}, "rejected: is missing"),
        ({"chosen": "a", "rejected": "b"}, "chosen/rejected: no user turn comes before the answers"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen: is equal to rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: is empty"),
        ({"prompt": "q", "chosen": 1, "rejected": "a"}, "chosen: expected a string, a message"),
        (
            {"prompt": 1, "chosen": "a", "rejected": "b"},
            "prompt: is the number 1, expected a string or a list of messages",
        ),
        ({"chosen": [QUESTION], "rejected": [QUESTION, ANSWER]}, "chosen: does not end with an assistant turn"),
        ({"chosen": [{"role": "x", "content": "a"}], "rejected": "b", "prompt": "q"}, 'chosen[0].role: "x" is unknown'),
    ],
)
def test_problems_of_preferences(row: dict[str, Any], what: str) -> None:
    assert preference.read(row)[1][0].startswith(what)


def test_prompts_of_every_layout() -> None:
    ended = {"conversations": [QUESTION, {"role": "assistant", "content": ""}]}
    for row, answer in [
        (ended, None),
        ({"conversations": [QUESTION, ANSWER]}, "3"),
        ({"prompt": "1 + 2?", "answer": 3}, "3"),
        ({"question": "1 + 2?", "answer": "3"}, "3"),
        ({"prompt": [QUESTION], "answer": "3"}, "3"),
    ]:
        found, problems = prompt.read(row)
        assert problems == []
        assert (found.messages, found.answer, found.fields) == ([QUESTION], answer, row)
    agent, problems = prompt.read({**ended, "tools": [TOOL], "gt": ["3", 4.5]}, needs_tools=True)
    assert problems == []
    assert (agent.tools, agent.gt) == ([WRAPPED], ["3", "4.5"])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": 3}, "prompt: is the number 3, expected a string or a list of messages"),
        ({"prompt": "a", "answer": ["b"]}, "answer: is a list, expected a string or a number"),
        ({"prompt": "a", "gt": [None]}, "gt[0]: is null, expected a string or a number"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "prompt: has no turn of the user at its end"),
        ({"answer": "b"}, "row: has no conversation"),
    ],
)
def test_problems_of_prompts(row: dict[str, Any], what: str) -> None:
    assert prompt.read(row)[1][0].startswith(what)


def test_tool_prompts_need_tools_and_truth() -> None:
    problems = prompt.read({"prompt": "a"}, needs_tools=True)[1]
    assert [problem.split(":")[0] for problem in problems] == ["tools", "gt"]
