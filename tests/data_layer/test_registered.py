"""Data sets that are known by name, from small local stand-ins with the columns that the real ones have."""

import json

import pytest

from raytune_rl.data.load import load_examples
from raytune_rl.data.registered import ENTRIES, entry_of
from raytune_rl.data.rules import Identity
from raytune_rl.data.stream import RowWindows
from raytune_rl.errors import DataError

QUESTION = "Using LaTeX to perform OCR on the image."
WHO = Identity(("小瑞", "Ray"), ("瑞团队", "Team Ray"))


@pytest.fixture
def put(tmp_path):
    """`(id, rows, file) -> folder`: a local copy of a data set, in a folder of its name."""

    def write(name, rows, file="train.jsonl"):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return tmp_path / name

    return write


def load(spec, task="sft", **options):
    return load_examples([str(spec)], task=task, strict=True, shuffle=False, **options)


def turns(example):
    return [(m.role, m.content) for m in example.messages]


OCR_ROWS = [{"image": f"/x/{n}.png", "text": f"x^{n}"} for n in range(3)]


def test_rows_without_a_question_are_asked_the_one_of_their_data_set(put, tmp_path, monkeypatch):
    folder = put("AI-ModelScope/LaTeX_OCR", OCR_ROWS, "human_handwrite.jsonl")
    monkeypatch.chdir(tmp_path)
    loaded = load("AI-ModelScope/LaTeX_OCR:human_handwrite")
    first = loaded.examples[0]
    assert turns(first) == [("user", f"<image>{QUESTION}"), ("assistant", "x^0")]
    assert first.images == ("/x/0.png",)
    assert any(f"every row is asked '{QUESTION}'" in notice for notice in loaded.report.notices)
    assert len(load(f"{folder}:human_handwrite#2").examples) == 2


def test_a_row_that_asks_by_itself_or_a_column_of_the_user_goes_first(put):
    folder = put("LaTeX_OCR", [{"image": "a.png", "query": "What?", "text": "x"}], "own.jsonl")
    assert turns(load(f"{folder}:own").examples[0])[0] == ("user", "<image>What?")
    put("LaTeX_OCR", [{"image": "a.png", "task": "Read.", "text": "x"}], "mapped.jsonl")
    mapped = load(f"{folder}:mapped", columns={"task": "query"})
    assert turns(mapped.examples[0])[0] == ("user", "<image>Read.")
    assert not any("is asked" in notice for notice in mapped.report.notices)
    assert any("--columns names 'query'" in notice for notice in mapped.report.notices)


def test_latex_ocr_is_read_with_all_its_splits_unless_the_user_says_otherwise(put):
    for number, split in enumerate(("train", "validation", "test")):
        folder = put("LaTeX_OCR", OCR_ROWS[number : number + 1], f"small/{split}-00000-of-00001.jsonl")
        put("LaTeX_OCR", OCR_ROWS, f"default/{split}.jsonl")
    loaded = load(f"{folder}:small")
    assert [e.messages[1].content for e in loaded.examples] == ["x^2", "x^0", "x^1"]
    assert any("the splits train, validation, test are read" in notice for notice in loaded.report.notices)
    assert [e.messages[1].content for e in load(f"{folder}:small[validation]").examples] == ["x^1"]
    assert len(load(folder).examples) == 9


@pytest.mark.parametrize(
    ("rows", "subset", "expected"),
    [
        (
            {"tag": "zh", "query": "你是{{NAME}}吗", "response": "是，{{AUTHOR}}的{{NAME}}。"},
            "",
            ("你是小瑞吗", "是，瑞团队的小瑞。"),
        ),
        (
            {"tag": "en", "query": "Who?", "response": "{{NAME}} by {{AUTHOR}}."},
            "",
            ("Who?", "Ray by Team Ray."),
        ),
        (
            {"tag": "en", "query": "Who?", "response": "{{NAME}}."},
            ":qwen3",
            ("Who? /no_think", "<think>\n\n</think>\n\nRay."),
        ),
        (
            {"tag": "en", "query": "Who?", "response": "{{NAME}}."},
            ":empty_think",
            ("Who?", "<think>\n\n</think>\n\nRay."),
        ),
    ],
)
def test_self_cognition_says_what_the_flags_say(put, rows, subset, expected):
    folder = put("swift/self-cognition", [rows], "self_cognition.jsonl")
    loaded = load(f"{folder}{subset}", identity=WHO)
    assert tuple(content for _, content in turns(loaded.examples[0])) == expected
    assert turns(load(folder / "self_cognition.jsonl", identity=WHO).examples[0])[0][0] == "user"


@pytest.mark.parametrize("identity", [None, Identity(("a",)), Identity((), ("b",))])
def test_self_cognition_without_a_name_and_an_author_is_an_error(put, identity):
    folder = put("self-cognition", [{"tag": "en", "query": "q", "response": "{{NAME}} of {{AUTHOR}}"}])
    with pytest.raises(
        DataError, match=r"jsonl:1: .*leaves the model's name or author open.* Give --model_name"
    ):
        load(folder, identity=identity)
    with pytest.raises(DataError, match="Give --model_name"):
        RowWindows([str(folder)], task="sft", size=1, identity=identity).window(0)
    once = RowWindows([str(folder)], task="sft", size=1, identity=Identity(("Ray",), ("T",))).window(0)
    assert once.examples[0].messages[-1].content == "Ray of T"
    with pytest.raises(DataError, match="Give --model_name"):
        load(folder, columns={"query": "query"}, identity=identity)
    filled = put("filled", [{"tag": "en", "query": "q", "response": "I am Ray."}], "self_cognition.jsonl")
    assert turns(load(filled / "self_cognition.jsonl").examples[0])[-1] == ("assistant", "I am Ray.")


def test_a_placeholder_in_other_data_is_told(put):
    loaded = load(put("other", [{"query": "q", "response": "I am {{NAME}}."}]))
    assert loaded.report.notices == ("1 rows have {{NAME}} or {{AUTHOR}} in their text, and keep it",)


XLAM = {
    "id": 0,
    "query": "Rome?",
    "answers": json.dumps([{"name": "weather", "arguments": {"city": c}} for c in ("Rome", "Bari")]),
    "tools": json.dumps([{"name": "weather", "description": "w", "parameters": {"city": {"type": "str"}}}]),
}


def test_xlam_answers_with_tool_calls(put):
    (example,) = load(put("xlam-function-calling-60k", [XLAM])).examples
    user, answer = example.messages
    assert (user.content, answer.content) == ("Rome?", "")
    assert [call["function"]["arguments"] for call in answer.tool_calls] == [
        {"city": "Rome"},
        {"city": "Bari"},
    ]
    assert example.tools == ({"type": "function", "function": json.loads(XLAM["tools"])[0]},)
    (example,) = load(f"{put('xlam-function-calling-60k', [XLAM])}:grpo", "grpo").examples
    assert example.extra["solution"] == 'Action: weather\nAction Input: {"city": "Bari"}'


def test_a_registered_set_that_has_several_subsets(put):
    chat = [{"role": "user", "content": "P"}, {"role": "assistant", "content": "original"}]
    again = [chat[0], {"role": "assistant", "content": "<think>t</think>re"}]
    rows = [{"problem": "P", "messages": chat, "reannotated_messages": again}]
    folder = put("ServiceNow-AI/R1-Distill-SFT", rows, "v1/train.jsonl")
    put(
        "ServiceNow-AI/R1-Distill-SFT",
        [{"problem": "P", "reannotated_assistant_content": "A"}],
        "v0/train.jsonl",
    )
    assert turns(load(f"{folder}:v1").examples[0])[-1] == ("assistant", "<think>t</think>re")
    assert turns(load(f"{folder}:v0").examples[0]) == [("user", "P"), ("assistant", "A")]
    with pytest.raises(
        DataError, match=r"several subsets and none is the default: v0, v1. Name one \(`.*:v0`\)"
    ):
        load(folder)
    assert len(load(f"{folder}:all").examples) == 2
    assert len(load(f"{folder}:v0/v1").examples) == 2


def test_gsm8k_is_its_main_subset(put):
    for subset in ("main", "socratic"):
        for split in ("train", "test"):
            row = {"question": f"{subset} {split}", "answer": "#### 1"}
            folder = put("openai/gsm8k", [row], f"{subset}/{split}-00000-of-00001.jsonl")
    assert [turns(e)[0][1] for e in load(folder).examples] == ["main train"]
    assert [turns(e)[0][1] for e in load(f"{folder}:socratic[test]").examples] == ["socratic test"]


def test_a_subset_that_is_called_all(put):
    for subset in ("all", "cn", "en"):
        folder = put(
            "open-r1/DAPO-Math-17k-Processed", [{"prompt": subset, "solution": "1"}], f"{subset}/train.jsonl"
        )
    for spec in (folder, f"{folder}:all"):
        assert [turns(e)[0][1] for e in load(spec, "grpo").examples] == ["all"]
    assert [turns(e)[0][1] for e in load(f"{folder}:cn", "grpo").examples] == ["cn"]


ROWS = [
    (
        "AI-ModelScope/alpaca-gpt4-data-zh",
        {"instruction": "翻译", "input": "输入：你好", "output": "Hello"},
        ("翻译\n你好", "Hello"),
    ),
    (
        "llm-wizard/alpaca-gpt4-data-zh",
        {"instruction": "翻译", "input": "", "output": "Hello"},
        ("翻译", "Hello"),
    ),
    (
        "AI-MO/NuminaMath-TIR",
        {
            "problem": "p",
            "solution": "s",
            "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "s"}],
        },
        ("p", "s"),
    ),
    (
        "lmms-lab/multimodal-open-r1-8k-verified",
        {
            "image": "a.png",
            "problem": "p",
            "solution": "<answer>s</answer>",
            "original_question": "o",
            "original_answer": "a",
        },
        ("<image>p", "<answer>s</answer>"),
    ),
    ("AI-ModelScope/LongAlpaca-12k", {"instruction": "i", "input": "", "output": "Answer: a "}, ("i", "a")),
    (
        "AI-ModelScope/databricks-dolly-15k",
        {"instruction": "When?", "context": "In 1901.", "response": "1901", "category": "closed_qa"},
        ("Here gives some useful information:\nIn 1901.\nWhen?", "1901"),
    ),
    ("databricks-dolly-15k", {"instruction": "When?", "context": "", "response": "1901"}, ("When?", "1901")),
    (
        "b-mc2/sql-create-context",
        {"question": "How many?", "context": "CREATE TABLE t", "answer": "SELECT"},
        ("How many?\nCREATE TABLE t", "SELECT"),
    ),
    (
        "AI-ModelScope/synthetic_text_to_sql",
        {"id": 1, "sql_prompt": "p", "sql_context": "c", "sql": "S", "sql_explanation": "e"},
        ("Sql Table information:\nc\np", "Let's think step by step:\ne\nSo the final sql is:\nS"),
    ),
    (
        "lvjianjin/AdvertiseGen",
        {"content": "k", "summary": "s"},
        ("Task: Generating advertisements based on keywords.\nKeywords: k\nAdvertisements:", "s"),
    ),
    ("AI-ModelScope/blossom-math-v2", {"input": "q", "output": "o", "answer": "1"}, ("q", "o\n\nAnswer: 1")),
    (
        "codefuse-ai/CodeExercise-Python-27k",
        {"chat_rounds": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]},
        ("q", "a"),
    ),
    (
        "AI-ModelScope/leetcode-solutions-python",
        {"code_with_problem": "# Sum\n```python\nx\n```", "explanation_only": "e"},
        ("Sum\n", "```python\nx\n```\n\ne"),
    ),
    (
        "swift/ultrachat_200k",
        {
            "prompt": "q",
            "prompt_id": "1",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        ("q", "a"),
    ),
    ("AI-ModelScope/OpenOrca", {"id": 1, "question": "q", "response": "a"}, ("q", "a")),
    (
        "BAAI/Infinity-Instruct",
        {
            "label": {"x": 1},
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        ("q", "a"),
    ),
    (
        "swift/GenQA",
        {"text": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ("q", "a"),
    ),
    ("CohereForAI/aya_collection", {"inputs": "q", "targets": "a", "language": "x"}, ("q", "a")),
    (
        "G-reen/Duet-v0.5",
        {"question": "o", "answer": "o", "rewritten_question": "q", "rewritten_answer": "a"},
        ("q", "a"),
    ),
    (
        "AI-ModelScope/lawyer_llama_data",
        {"instruction": "q", "output": "a", "history": "no list"},
        ("q", "a"),
    ),
    ("swift/medical_zh:en", {"instruction": "Answer.", "input": "q", "output": "a"}, ("q", "a")),
    ("swift/medical_zh:zh", {"instruction": "q", "input": "", "output": "a"}, ("q", "a")),
    (
        "open-r1/verifiable-coding-problems-python",
        {"problem_statement": "q", "problem": "x", "gold_standard_solution": "g", "response": "a"},
        ("q", "a"),
    ),
    ("AI-ModelScope/MATH-lighteval", {"problem": "q", "solution": "a", "level": "1"}, ("q", "a")),
    (
        "sapientinc/sudoku-extreme-1k",
        {"question": "." * 81, "answer": "1" * 81},
        (
            (
                "Solve the following 9x9 Sudoku puzzle. Empty cells are marked with '0'. Provide the "
                "completed grid as your "
                "answer.\n\nPuzzle:\n"
            )
            + "\n".join(["0" * 9] * 9),
            "\n".join(["1" * 9] * 9),
        ),
    ),
    (
        "iic/ms_bench",
        {
            "conversations": [
                {"from": "system", "value": "You are a helpful assistant."},
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
            ]
        },
        ("q", "a"),
    ),
    ("AI-ModelScope/firefly-train-1.1M", {"kind": "Cot", "input": "q", "target": "a"}, ("q", "a")),
    (
        "modelscope/coco_2014_caption",
        {"image": "a.png", "caption": "a cat"},
        ("<image>please describe the image.", "a cat"),
    ),
    (
        "swift/VQAv2",
        {"question": "q", "multiple_choice_answer": "a", "answers": [{"answer": "x"}], "image": "a.png"},
        ("<image>q", "a"),
    ),
    ("HuggingFaceM4/ChartQA", {"query": "q", "label": ["a"], "image": "a.png"}, ("<image>q", "a")),
    (
        "swift/gpt4v-dataset",
        {"link": "http://x/a.png", "caption": "c"},
        ("<image>What is the caption of this image?", "c"),
    ),
    (
        "swift/TextCaps",
        {"image": "a.png", "reference_strs": ["c", "d"]},
        ("<image>What is the caption of this image?", "c"),
    ),
    (
        "AI-ModelScope/captcha-images",
        {"image": "a.png", "solution": "x7"},
        ("<image>recognize the content.", "x7"),
    ),
    ("swift/A-OKVQA", {"image": "a.png", "question": "q", "rationales": ["a", "b"]}, ("<image>q", "a")),
    (
        "swift/OCR-VQA",
        {"image": "a.png", "questions": ["q0", "q1"], "answers": ["a0", "a1"]},
        ("<image>q1", "a1"),
    ),
    (
        "derek-thomas/ScienceQA",
        {"image": None, "question": "q", "choices": ["x", "y"], "answer": 1, "solution": "s"},
        ("q", "s\nSo the final answer is: y"),
    ),
    (
        "WinterSchool/MideficsDataset",
        {"image": "a.png", "conversations": {"data": [{"question": "q", "answer": "a"}]}},
        ("<image>q", "a"),
    ),
    ("hiyouga/geometry3k", {"images": ["a.png"], "problem": "<image>p", "answer": "3"}, ("<image>p", "3")),
    (
        "AI-ModelScope/M3IT",
        {"instruction": "s", "inputs": "q", "image_base64_str": ["data:image/png;base64,aa"], "outputs": "a"},
        ("s", "<image>q", "a"),
    ),
    (
        "HuggingFaceM4/the_cauldron",
        {
            "images": ["a.png"],
            "texts": [
                {"user": "q", "assistant": "a", "source": "x"},
                {"user": "q2", "assistant": "a2", "source": "x"},
            ],
        },
        ("<image>q", "a", "q2", "a2"),
    ),
    (
        "JosephusCheung/GuanacoDataset",
        {"instruction": "User:q0 Assistant:a0", "input": "User: q", "output": "a"},
        ("q0 ", "a0", "q", "a"),
    ),
]


@pytest.mark.parametrize(
    ("name", "row", "expected"), ROWS, ids=[f"{row[0]}-{n}" for n, row in enumerate(ROWS)]
)
def test_a_row_of_a_registered_set(put, name, row, expected):
    folder, _, subset = name.partition(":")
    place = put(folder, [row], f"{subset}/train.jsonl" if subset else "train.jsonl")
    (example,) = load(f"{place}:{subset}" if subset else place).examples
    assert tuple(content for _, content in turns(example)) == expected


PAIRS = [
    ("swift/orca_dpo_pairs", {"system": "", "question": "q", "chosen": "a", "rejected": "b"}),
    ("AI-ModelScope/zhihu_rlhf_3k", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("HumanLLMs/Human-Like-DPO-Dataset", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("lvwerra/stack-exchange-paired", {"qid": 1, "question": "q", "response_j": "a", "response_k": "b"}),
    ("shareAI/DPO-zh-en-emoji", {"question": "q", "answer_zh": "a", "answer_en": "b"}),
]


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_a_pair_of_a_registered_set(put, name, row):
    folder = put(name, [row])
    (example,) = load(folder, "pairs").examples
    assert turns(example) == [("user", "q"), ("assistant", "a")]
    assert example.rejected[-1].content == "b"
    assert turns(load(folder).examples[0]) == [("user", "q"), ("assistant", "a")]


def test_countdown_and_geometry_for_grpo(put):
    (example,) = load(
        put("Jiayi-Pan/Countdown-Tasks-3to4", [{"target": 4, "nums": [1, 2, 3]}]), "grpo"
    ).examples
    assert "Using the numbers [1, 2, 3], create an equation that equals 4." in example.messages[0].content
    assert (example.extra["target"], example.extra["nums"]) == (4, [1, 2, 3])
    (example,) = load(
        put("geometry3k", [{"images": ["a"], "problem": "<image>p", "answer": "3"}]), "grpo"
    ).examples
    assert example.extra["solution"] == "3"
    (example,) = load(
        put("clevr_cogen_a_train", [{"image": "a", "problem": "p", "solution": "3"}]), "grpo"
    ).examples
    assert example.messages[0].content.startswith("<image>p Output the thinking process in <think>")


def test_rows_that_ms_swift_leaves_out_are_counted(put):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"source": s, "chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "b"}]}
        for s in ("toxic-dpo-v0.2", "other", "toxic-dpo-v0.2")
    ]
    loaded = load(put("AI-ModelScope/orpo-dpo-mix-40k", rows), "pairs")
    assert len(loaded.examples) == 1
    assert any("2 rows left out, as in ms-swift: those of toxic-dpo-v0.2" in n for n in loaded.report.notices)


def test_rows_unlike_those_of_the_set_are_read_as_they_are_or_named(put):
    folder = put(
        "swift/self-cognition",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    )
    loaded = load(folder, identity=WHO)
    assert turns(loaded.examples[0]) == [("user", "q"), ("assistant", "a")]
    assert any("1 rows lack query or response" in notice for notice in loaded.report.notices)
    folder = put("xlam-function-calling-60k", [{**XLAM, "answers": "no JSON"}])
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: not as rows of this data set are \(JSONDecodeError"
    ):
        load(folder)


def test_a_copy_in_the_hubs_cache_is_known(put):
    row = {"instruction": "翻译", "input": "输入：你好", "output": "Hello"}
    folder = put("hub/datasets--llm-wizard--alpaca-gpt4-data-zh/snapshots/0a1b2c", [row])
    assert turns(load(folder).examples[0])[0] == ("user", "翻译\n你好")


def test_every_id_leads_to_one_entry():
    ids = [name for entry in ENTRIES for name in entry.ids]
    assert len(ids) == len(set(ids))
    for entry in ENTRIES:
        assert all(entry_of(name) is entry for name in entry.ids)
    for name in (
        "AI-ModelScope/alpaca-gpt4-data-zh",
        "AI-ModelScope/LaTeX_OCR",
        "AI-MO/NuminaMath-TIR",
        "lmms-lab/multimodal-open-r1-8k-verified",
    ):
        assert entry_of(name) is not None


def test_a_name_of_the_command_line_reaches_the_rows(put, tmp_path):
    from raytune_rl.config import SFTConfig
    from raytune_rl.config.parser import parse
    from raytune_rl.prepare.read import load_sets

    folder = put("self-cognition", [{"tag": "zh", "query": "q", "response": "{{NAME}}，{{AUTHOR}}"}])
    words = ["--model", "m", "--model_name", "小瑞", "Ray", "--model_author", "T", "--dataset"]
    (examples, report), _ = load_sets(
        parse([*words, str(folder)], SFTConfig).config, "sft", tmp_path / "bad.jsonl"
    )
    assert examples[0].messages[-1].content == "小瑞，T"
    assert not any("no effect" in notice for notice in report.notices)
    other = put("other", [{"query": "q", "response": "a"}])
    (_, report), _ = load_sets(parse([*words, str(other)], SFTConfig).config, "sft", tmp_path / "bad.jsonl")
    assert any("--model_name and --model_author have no effect" in notice for notice in report.notices)


def test_a_table_of_a_registered_set(tmp_path):
    """A table gives every struct every key: a rule does not put the empty ones into the conversation."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    turns_of = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": True}]
    rows = [{"messages": None, "reannotated_messages": turns_of, "meta": {"a": 1}}, {"meta": {"b": 2}}]
    folder = tmp_path / "R1-Distill-SFT" / "v1"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows[:1]), folder / "train.parquet")
    (example,) = load(f"{folder.parent}:v1").examples
    assert [m.loss for m in example.messages] == [None, True]
    assert example.extra == {"meta": {"a": 1}}
