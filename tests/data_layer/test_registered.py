import json

import pytest

from raytune_rl.data.load import load_examples

QUESTION = "Using LaTeX to perform OCR on the image."


@pytest.fixture
def ocr(tmp_path, monkeypatch):
    """A local copy of the document's data set, in a folder of its name."""
    folder = tmp_path / "AI-ModelScope" / "LaTeX_OCR"
    folder.mkdir(parents=True)
    rows = [{"image": f"/x/{n}.png", "text": f"x^{n}"} for n in range(3)]
    (folder / "human_handwrite.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return folder


def test_rows_without_a_question_are_asked_the_one_of_their_data_set(ocr):
    loaded = load_examples(
        ["AI-ModelScope/LaTeX_OCR:human_handwrite"], task="sft", strict=True, shuffle=False
    )
    first = loaded.examples[0]
    assert [(m.role, m.content) for m in first.messages] == [
        ("user", f"<image>{QUESTION}"),
        ("assistant", "x^0"),
    ]
    assert first.images == ("/x/0.png",)
    assert any(f"every row is asked '{QUESTION}'" in notice for notice in loaded.report.notices)
    absolute = load_examples([f"{ocr}:human_handwrite#2"], task="sft", strict=True)
    assert len(absolute.examples) == 2


def test_a_row_that_asks_by_itself_or_a_column_of_the_user_goes_first(ocr):
    (ocr / "own.jsonl").write_text(json.dumps({"image": "a.png", "query": "What?", "text": "x"}) + "\n")
    (own,) = load_examples([f"{ocr}:own"], task="sft", strict=True).examples
    assert own.messages[0].content == "<image>What?"
    (ocr / "mapped.jsonl").write_text(json.dumps({"image": "a.png", "task": "Read.", "text": "x"}) + "\n")
    mapped = load_examples([f"{ocr}:mapped"], task="sft", columns={"task": "query"}, strict=True)
    assert mapped.examples[0].messages[0].content == "<image>Read."
    assert not any("is asked" in notice for notice in mapped.report.notices)
