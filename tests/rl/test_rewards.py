import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimind.data.prompt import Prompt
from minimind.errors import ConfigError, DataError
from minimind.rl import rewards as named
from minimind.rl.rewards import MAX_HANGS, REWARDS, Rewards
from minimind.rl.scoring import Answer, RewardFault, UserFunction, read_answer
from minimind.world.tools import TOOLS

ASK = [{"role": "user", "content": "What is 30 + 12?"}]
SUM = Prompt(
    ASK,
    answer="42",
    gt=["42"],
    fields={"answer": "42", "grader": "number", "grader_args": {"given": [30, 12]}},
)
CALCULATOR = Prompt(ASK, tools=[TOOLS["calculator"].schema, TOOLS["clock"].schema])
THOUGHT = "<think>\n30 and 12 make 42.\n</think>\n\n<answer>42</answer>"


def said(written: str, *, is_truncated: bool = False) -> Answer:
    return read_answer(written, num_tokens=len(written), is_truncated=is_truncated)


# --- what an answer is -------------------------------------------------------------------------------------------


def test_an_answer_is_read_into_its_parts():
    answer = said(THOUGHT + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
    assert answer.reasoning == "30 and 12 make 42."
    assert answer.text == "<answer>42</answer>"
    assert answer.tool_calls == [{"name": "clock", "arguments": {}}]
    assert answer.written.startswith("<think>")
    assert answer.messages == [
        {
            "role": "assistant",
            "content": "<answer>42</answer>",
            "reasoning_content": "30 and 12 make 42.",
            "tool_calls": [{"name": "clock", "arguments": {}}],
        }
    ]


def test_earlier_turns_come_first():
    before = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "42"}]
    answer = read_answer("It is 42.", num_tokens=9, before=before)
    assert answer.messages == [*before, {"role": "assistant", "content": "It is 42."}]
    assert not answer.is_truncated


# --- the named rewards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written", "want"),
    [
        ("grade", "It is 42.", 1.0),
        ("grade", "30 + 12 = 42", 1.0),
        ("grade", "It is 41, or 42.", 0.0),
        ("grade", "", 0.0),
        ("grade", "<think>\n42", 0.0),  # cut off while thinking: no answer
        ("grade", THOUGHT, 1.0),
        ("exact_answer", " 42. ", 1.0),
        ("exact_answer", "42.0", 1.0),
        ("exact_answer", THOUGHT, 1.0),
        ("exact_answer", "It is 42", 0.0),
        ("exact_answer", "", 0.0),
        ("contains_gt", "So it is 42, I think.", 1.0),
        ("contains_gt", "So it is 42.0!", 1.0),
        ("contains_gt", "142", 0.0),
        ("contains_gt", "", 0.0),
        ("format", THOUGHT, 0.5),
        ("format", f"\n{THOUGHT}\n", 0.5),
        ("format", f"Well. {THOUGHT}", 0.0),
        ("format", f"{THOUGHT} Bye.", 0.0),
        ("format", "<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("format", "<answer>42</answer>", 0.0),
        ("format", "", 0.0),
        ("tags", THOUGHT, 1.0),
        ("tags", "<answer>42</answer>", 0.5),
        ("tags", "<answer>42</answer></answer>", 0.25),
        ("tags", "", 0.0),
        ("length", "x" * 19, -0.5),
        ("length", "x" * 20, 0.5),
        ("length", "x" * 800, 0.5),
        ("length", "x" * 801, -0.5),
        ("length", " " * 50, -0.5),
        ("repetition", "one two three four five", 0.0),
        ("repetition", "a b c a b c", -0.25),  # abc bca cab abc: one of four is a repetition
        ("repetition", "no " * 50, -0.5),
        ("repetition", "好好好好好好", -0.5),  # without spaces it is six tokens all the same
        ("repetition", "", 0.0),
    ],
)
def test_named_rewards_by_hand(name: str, written: str, want: float):
    assert REWARDS[name].function(SUM, said(written)) == want


def test_every_named_reward_survives_an_empty_completion():
    prompt = Prompt(ASK, tools=CALCULATOR.tools, answer="42", gt=["42"], fields=SUM.fields)
    for name, entry in REWARDS.items():
        assert math.isfinite(entry.function(prompt, said(""))), name


def test_contains_gt_is_a_share():
    prompt = Prompt(ASK, gt=["12:30", "sunny"])
    assert named.contains_gt(prompt, said("It is 12:30.")) == 0.5
    assert named.contains_gt(prompt, said("It is 12:30 and sunny.")) == 1.0
    assert named.contains_gt(prompt, said("<think>\nsunny\n</think>\n\nwho knows")) == 0.0


def test_grade_looks_at_tool_calls():
    wanted = {"name": "calculator", "arguments": {"expression": "30 + 12"}}
    prompt = Prompt(ASK, fields={"answer": "", "grader": "tool_call", "grader_args": {"calls": [wanted]}})
    call = f"<tool_call>\n{json.dumps(wanted)}\n</tool_call>"
    assert named.grade(prompt, said(call)) == 1.0
    assert named.grade(prompt, said(call + "\n" + call)) == 0.0
    assert named.grade(SUM, said(f"42\n{call}")) == 0.0  # a call is not an answer


@pytest.mark.parametrize(
    ("calls", "want"),
    [
        ([], 0.0),
        (['{"name": "calculator", "arguments": {"expression": "30 + 12"}}'], 1.0),
        (['{"name": "calculator", "arguments": {"expression": 42}}'], 0.0),
        (['{"name": "calculator", "arguments": {}}'], 0.0),
        (['{"name": "calculator", "arguments": {"expression": "1", "digits": 2}}'], 0.0),
        (['{"name": "weather", "arguments": {"place": "mill", "day": "Monday"}}'], 0.0),  # not offered
        (['{"name": "clock", "arguments": {"minutes": true}}'], 0.0),
        (['{"name": "clock", "arguments": {"minutes": 5}}', "{oh no"], 0.5),  # one cannot be read
    ],
)
def test_valid_calls(calls: list[str], want: float):
    written = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    assert named.valid_calls(CALCULATOR, said(written)) == want


def test_valid_calls_of_all_turns():
    before = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {"minutes": 5}}]},
        {"role": "tool", "content": "<tool_call>12:05"},  # what a tool says is no call
    ]
    answer = read_answer("<tool_call>\n{}\n</tool_call>", num_tokens=3, before=before)
    assert named.valid_calls(CALCULATOR, answer) == 0.5


# --- names and weights -------------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_and_every_part_is_kept():
    rewards = Rewards(["grade=2", "format", "length=-0.5"])
    assert rewards.names == ["grade", "format", "length"]
    scores = rewards.score([(SUM, said(THOUGHT)), (SUM, said("42"))])
    assert scores.parts == {"grade": [1.0, 1.0], "format": [0.5, 0.0], "length": [0.5, -0.5]}
    assert scores.total == [2 + 0.5 - 0.25, 2 + 0.25]
    assert scores.is_masked == [False, False]
    assert scores.faults == {"grade": 0, "format": 0, "length": 0}


def test_nothing_to_score_is_nothing():
    scores = Rewards(["grade"]).score([])
    assert (scores.total, scores.parts, scores.is_masked) == ([], {"grade": []}, [])


def test_all_that_is_wrong_with_names_is_said_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        Rewards(["grad", "format=much", "format", "format=2", f"{tmp_path}/none.py:f", "model:runs/rm", "nowhere"])
    text = str(caught.value)
    assert "'grad' is no reward; did you mean 'grade'?" in text
    assert "'format=much': the weight 'much' is no number" in text
    assert "format is named 2 times" in text
    assert f"there is no file {tmp_path}/none.py" in text
    assert "model:runs/rm: no reward model can be loaded here" in text
    assert "'nowhere' is no reward; there are grade, exact_answer" in text
    with pytest.raises(ConfigError, match="at least one"):
        Rewards([])


def test_prompts_without_what_a_reward_needs_are_refused_at_start():
    rewards = Rewards(["format", "grade"])
    rewards.check([SUM])
    with pytest.raises(DataError, match=r"reward grade needs 'grader', and 1 of 2 prompts .* number 2\)"):
        rewards.check([SUM, Prompt(ASK, answer="42")])
    with pytest.raises(DataError, match="'answer'"):
        Rewards(["exact_answer"]).check([Prompt(ASK)])
    with pytest.raises(DataError, match="'gt'"):
        Rewards(["contains_gt"]).check([Prompt(ASK)])
    with pytest.raises(DataError, match="'tools'"):
        Rewards(["valid_calls"]).check([SUM])
    with pytest.raises(DataError, match="'grader'"):
        rewards.check([Prompt(ASK, fields={"grader": "unheard of", "answer": "1"})])


# --- reward models -----------------------------------------------------------------------------------------------


def scorer_by_length(conversations) -> list[float]:
    """A reward model that likes long last messages: their length, less 3."""
    return [len(conversation[-1]["content"]) - 3.0 for conversation in conversations]


def test_a_model_sees_whole_conversations_and_its_score_is_cut():
    seen: list = []

    def scorer(conversations):
        seen.extend(conversations)
        return scorer_by_length(conversations)

    asked: list = []
    rewards = Rewards(["model:runs/rm=2"], scorer_of=lambda *what: asked.append(what) or scorer)
    scores = rewards.score([(SUM, said("1234")), (SUM, said("x" * 30)), (SUM, said(""))])
    assert asked == [("model", "runs/rm")]
    assert scores.parts == {"model": [1.0, 3.0, -3.0]}
    assert scores.total == [2.0, 6.0, -6.0]
    assert seen[0] == [*ASK, {"role": "assistant", "content": "1234"}]


def test_the_historical_mixture_of_whole_and_answer():
    """0.4 of the score of all, 0.6 of that of what stands in <answer>, where it stands."""
    rewards = Rewards(["transformers-mixed:rm"], scorer_of=lambda *_: scorer_by_length)
    scores = rewards.score([(SUM, said("<answer>42</answer>")), (SUM, said("plain"))])
    assert scores.parts["transformers-mixed"] == [pytest.approx(0.4 * 3.0 + 0.6 * -1.0), 2.0]


def test_a_model_without_a_score_masks():
    def scorer(conversations):
        return [math.nan if len(conversation[-1]["content"]) > 3 else 1.0 for conversation in conversations]

    scores = Rewards(["model:rm"], scorer_of=lambda *_: scorer).score([(SUM, said("1234")), (SUM, said("1"))])
    assert scores.is_masked == [True, False]
    assert scores.parts["model"] == pytest.approx([math.nan, 1.0], nan_ok=True)

    def broken(_):
        raise RuntimeError("out of order")

    scores = Rewards(["model:rm"], scorer_of=lambda *_: broken).score([(SUM, said("1234")), (SUM, said("1"))])
    assert scores.is_masked == [True, True]


# --- functions of the user's -------------------------------------------------------------------------------------

USER_FILE = """
import sys
import time
import neighbour

def likes(prompt, answer):
    print("this is no reply")
    return len(answer.text) + len(prompt.gt) + neighbour.BONUS

def moody(prompt, answer):
    sys.stdin.read()
    if "raise" in answer.text:
        raise ValueError("no mood")
    if "nan" in answer.text:
        return float("nan")
    if "text" in answer.text:
        return "1.0"
    if "none" in answer.text:
        return None
    if "exit" in answer.text:
        raise SystemExit(3)
    if "die" in answer.text:
        import os
        os._exit(7)
    if "hang" in answer.text:
        with open(__file__ + ".hangs", "a") as file:
            file.write("!")
        time.sleep(60)
    return 1

def wrong(one):
    return 1.0
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("BONUS = 100\n")
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_a_users_function_is_a_reward(user_file: Path, capfd: pytest.CaptureFixture[str]):
    rewards = Rewards([f"{user_file}:likes=0.5", "length"])
    scores = rewards.score([(SUM, said("four")), (SUM, said(""))])
    rewards.close()
    assert scores.parts["likes"] == [105.0, 101.0]
    assert scores.total == [52.0, 50.0]
    out, err = capfd.readouterr()
    assert out == ""
    assert "this is no reply" in err


def test_whatever_a_users_function_does_masks_and_counts(user_file: Path, caplog: pytest.LogCaptureFixture):
    rewards = Rewards([f"{user_file}:moody", "tags"], seconds=2.0)
    texts = ["good", "raise", "nan", "text", "none", "exit", "die", "hang", "good"]
    scores = rewards.score([(SUM, said(text)) for text in texts])
    rewards.close()
    assert scores.is_masked == [False, *[True] * 7, False]
    assert scores.parts["moody"] == pytest.approx([1.0, *[math.nan] * 7, 1.0], nan_ok=True)
    assert scores.total == [1.0, *[0.0] * 7, 1.0]
    assert scores.faults == {"moody": 7, "tags": 0}


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("raise", "raised", r"ValueError: no mood \(mine.py:13\)"),
        ("text", "no number", "it returned '1.0', expected a number"),
        ("none", "no number", "it returned None"),
        ("exit", "raised", "SystemExit: 3"),
        ("die", "died", "its process ended with code 7"),
        ("hang", "hung", "no reply within 0.5 s"),
    ],
)
def test_a_fault_says_what_happened(user_file: Path, text: str, kind: str, what: str):
    function = UserFunction(f"{user_file}:moody", seconds=0.5 if text == "hang" else 30.0)
    with pytest.raises(RewardFault, match=what) as caught:
        function(SUM, said(text))
    assert caught.value.kind == kind
    function.seconds = 30.0
    assert function(SUM, said("good")) == 1.0  # the next one is answered
    function.close()


def test_a_function_that_hangs_again_and_again_is_not_waited_for_each_time(user_file: Path):
    rewards = Rewards([f"{user_file}:moody"], seconds=1.0)
    scores = rewards.score([(SUM, said("hang"))] * 20)
    assert Path(f"{user_file}.hangs").read_text() == "!" * MAX_HANGS
    assert scores.is_masked == [True] * 20
    assert scores.faults == {"moody": 20}
    assert rewards.score([(SUM, said("good"))]).total == [1.0]  # the next rollout asks again
    rewards.close()


def test_a_file_that_goes_away_during_training_masks(user_file: Path):
    function = UserFunction(f"{user_file}:moody")
    user_file.unlink()
    assert function(SUM, said("good")) == 1.0
    with pytest.raises(RewardFault, match="died"):
        function(SUM, said("die"))
    with pytest.raises(RewardFault, match="there is no file"):
        function(SUM, said("good"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mine.py:like", "has no function 'like'; did you mean 'likes'?"),
        ("mine.py:zzz", "has no function 'zzz'; it has likes, moody, wrong"),
        ("mine.py:wrong", r"wrong is not a function of \(prompt, answer\)"),
        ("mine.py:time", r"time is not a function of \(prompt, answer\)"),
        ("main.py:likes", r"there is no file main.py; \. has mine.py, neighbour.py"),
        ("there/mine.py:likes", "there is no file there/mine.py; no folder there"),
        ("nowhere.module:f", "there is no module 'nowhere.module'"),
        ("broken.py:f", r"importing broken.py failed: ZeroDivisionError: division by zero \(broken.py:1\)"),
        ("needy.py:f", "importing needy.py failed: No module named 'not_installed'"),
        ("syntax.py:f", "importing syntax.py failed: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_at_start(
    user_file: Path, monkeypatch: pytest.MonkeyPatch, where: str, message: str
):
    monkeypatch.chdir(user_file.parent)
    if where.split(".", maxsplit=1)[0] in ("broken", "needy", "syntax"):
        text = {"broken": "1 / 0\n", "needy": "import not_installed\n", "syntax": "def f(:\n"}
        Path(where.split(":", maxsplit=1)[0]).write_text(text[where.split(".", maxsplit=1)[0]])
    with pytest.raises(ConfigError, match=message):
        Rewards([where])


def test_a_function_of_an_installed_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "scores.py").write_text("def one(prompt, answer):\n    return answer.num_tokens\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = Rewards(["pack.scores:one"])
    assert rewards.score([(SUM, said("four"))]).total == [4.0]
    rewards.close()


@pytest.mark.skipif(sys.platform == "win32", reason="process ids are looked up as POSIX has them")
def test_closing_ends_the_process(user_file: Path):
    function = UserFunction(f"{user_file}:moody")
    assert function._process is not None
    number = function._process.pid
    function.close()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_function_that_hangs_does_not_outlive_training(user_file: Path, repository: Path):
    """Its process holds this one's stderr, so `run` comes back only when it is gone: long before its 60 seconds end."""
    code = f"""
import os, threading, time
from minimind.data.prompt import Prompt
from minimind.rl.scoring import UserFunction, read_answer
function = UserFunction({str(user_file) + ":moody"!r})
threading.Thread(target=function, args=(Prompt([]), read_answer("hang", num_tokens=1)), daemon=True).start()
while not os.path.exists({str(user_file) + ".hangs"!r}):
    time.sleep(0.01)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE, timeout=50)
    assert done.returncode == 9
